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

/// Groups of [`BOX_COLUMNS`] columns of the latent part that one box holds, where a box holds a whole block: half of
/// them, so that the halves land and are freed apart.
const BOX_GROUPS: u32 = 4;

impl CachePart {
    /// The map of the latent part: coordinates (column in group, token, group of columns, head, page), boxes of up to a
    /// block of tokens of a page.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform) where the driver refuses the shape. A context must be current.
    pub(super) fn latent_map(&self, driver: &Driver, dtype: DType) -> Result<TensorMap> {
        let [pages, page_size, heads, columns] = self.shape;
        let [page, token, head] = self.byte_strides(dtype);
        let groups = (columns / BOX_COLUMNS as usize) as u64;
        // Pages smaller than a block come one box a group, or the groups of one page would lie between those of the next.
        let box_groups = if page_size < BLOCK_TOKENS { 1 } else { BOX_GROUPS };
        encode(
            driver,
            self.address,
            dtype,
            [BOX_COLUMNS.into(), page_size as u64, groups, heads as u64, pages as u64],
            [token, u64::from(BOX_COLUMNS) * dtype.size() as u64, head, page],
            [BOX_COLUMNS, box_tokens(page_size), box_groups, 1, 1],
        )
    }

    /// The map of the rotary part: coordinates (column, token, head, page), boxes likewise.
    ///
    /// # Errors
    /// As [`latent_map`](Self::latent_map).
    pub(super) fn rope_map(&self, driver: &Driver, dtype: DType) -> Result<TensorMap> {
        let [pages, page_size, heads, columns] = self.shape;
        let [page, token, head] = self.byte_strides(dtype);
        encode(
            driver,
            self.address,
            dtype,
            [columns as u64, page_size as u64, heads as u64, pages as u64],
            [token, head, page],
            [BOX_COLUMNS, box_tokens(page_size), 1, 1],
        )
    }

    /// Bytes from page to page, token to token, head to head. One that is never stepped by may be anything in a tensor,
    /// also what the driver refuses.
    fn byte_strides(&self, dtype: DType) -> [u64; 3] {
        let row = self.shape[3] * dtype.size();
        std::array::from_fn(|dim| if self.shape[dim] > 1 { self.strides[dim] * dtype.size() } else { row } as u64)
    }
}

fn box_tokens(page_size: usize) -> u32 {
    page_size.min(BLOCK_TOKENS) as u32
}

/// `RANK` dimensions, innermost first; one stride less, because the innermost is 1.
fn encode<const RANK: usize, const STRIDES: usize>(
    driver: &Driver,
    address: u64,
    dtype: DType,
    sizes: [u64; RANK],
    strides: [u64; STRIDES],
    tile: [u32; RANK],
) -> Result<TensorMap> {
    const { assert!(STRIDES + 1 == RANK && RANK <= 5) };
    let data_type = match dtype {
        DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let mut map = TensorMap(CUtensorMap { opaque: [0; 16] });
    // SAFETY: arrays of rank, rank - 1 and rank entries; the map is aligned to 64 bytes; the address is only stored.
    unsafe {
        driver.cuTensorMapEncodeTiled(
            &raw mut map.0,
            data_type,
            RANK as u32,
            address as *mut _,
            sizes.as_ptr(),
            strides.as_ptr(),
            tile.as_ptr(),
            [1u32; RANK].as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )?;
    }
    Ok(map)
}
