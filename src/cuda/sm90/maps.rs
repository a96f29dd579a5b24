//! Tensor maps: how TMA finds the boxes of the KV cache.

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};

use super::params::TensorMap;
use crate::cuda::driver::Driver;
use crate::error::Result;
use crate::problem::BLOCK_TOKENS;
use crate::tensor::DType;

/// Columns of a box: 64 elements of 16 bits are the 128 bytes that the swizzle works on.
const BOX_COLUMNS: u32 = 64;

/// A part of the cache as [num_pages, page_size, h_kv, columns].
#[derive(Debug, Clone, Copy)]
pub(super) struct CachePart {
    pub(super) address: u64,
    pub(super) shape: [usize; 4],
    /// Elements from page to page, token to token, head to head.
    pub(super) strides: [usize; 3],
}

impl CachePart {
    /// The map whose coordinates are (column, token, head, page) and whose boxes hold up to a block of tokens of a page.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform) where the driver refuses the shape.
    pub(super) fn map(&self, driver: &Driver, dtype: DType) -> Result<TensorMap> {
        let [pages, page_size, heads, columns] = self.shape;
        let [page, token, head] = self.strides;
        let bytes = |elements: usize| (elements * dtype.size()) as u64;
        // A stride that is never stepped by may be anything, also what the driver refuses.
        let stride = |n: usize, elements: usize| if n > 1 { bytes(elements) } else { bytes(columns) };
        let sizes = [columns as u64, page_size as u64, heads as u64, pages as u64];
        let strides = [stride(page_size, token), stride(heads, head), stride(pages, page)];
        let tile = [BOX_COLUMNS, page_size.min(BLOCK_TOKENS) as u32, 1, 1];
        let data_type = match dtype {
            DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let mut map = TensorMap(CUtensorMap { opaque: [0; 16] });
        // SAFETY: arrays of rank, rank - 1 and rank entries; the address is only stored.
        unsafe {
            driver.cuTensorMapEncodeTiled(
                &raw mut map.0,
                data_type,
                sizes.len() as u32,
                self.address as *mut _,
                sizes.as_ptr(),
                strides.as_ptr(),
                tile.as_ptr(),
                [1u32; 4].as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )?;
        }
        Ok(map)
    }
}
