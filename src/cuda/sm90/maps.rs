//! Tensor maps: how TMA finds the boxes of queries and KV cache.

use cudarc::driver::sys::{
    CUtensorMap, CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};

use super::params::TensorMap;
use crate::cuda::driver::Driver;
use crate::error::Result;
use crate::tensor::DType;

/// Columns of a box: 64 elements of 16 bits are the 128 bytes that the swizzle works on.
const BOX_COLUMNS: u32 = 64;

/// What boxes are taken from: `[outer, rows apart, rows, columns]` with a stride for each but the columns. Of the cache
/// (pages, heads, tokens of a page), of queries (requests, query positions, heads).
#[derive(Debug, Clone, Copy)]
pub(super) struct Boxes {
    pub(super) address: u64,
    pub(super) shape: [usize; 4],
    /// In elements.
    pub(super) strides: [usize; 3],
    /// Rows of a box.
    pub(super) rows: u32,
    /// Have the L2 fetch 256 bytes for any 32. Measured: 7% of the bandwidth lost where memory is the limit, 1 to 2% gained
    /// where two M tiles share their loads.
    pub(super) promote: bool,
}

impl Boxes {
    /// The map of latent columns: coordinates (column in group, row, group of columns, rows apart, outer).
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform) where the driver refuses the shape. A context must be current.
    pub(super) fn latent_map(&self, driver: &Driver, dtype: DType) -> Result<TensorMap> {
        let [outer, apart, rows, columns] = self.shape.map(|n| n as u64);
        let [outer_stride, apart_stride, row_stride] = self.byte_strides(dtype);
        encode(
            driver,
            self.address,
            dtype,
            [BOX_COLUMNS.into(), rows, columns / u64::from(BOX_COLUMNS), apart, outer],
            [row_stride, u64::from(BOX_COLUMNS) * dtype.size() as u64, apart_stride, outer_stride],
            [BOX_COLUMNS, self.rows, 1, 1, 1],
            self.promote,
        )
    }

    /// The map of rotary columns: coordinates (column, row, rows apart, outer).
    ///
    /// # Errors
    /// As [`latent_map`](Self::latent_map).
    pub(super) fn rope_map(&self, driver: &Driver, dtype: DType) -> Result<TensorMap> {
        let [outer, apart, rows, columns] = self.shape.map(|n| n as u64);
        let [outer_stride, apart_stride, row_stride] = self.byte_strides(dtype);
        encode(
            driver,
            self.address,
            dtype,
            [columns, rows, apart, outer],
            [row_stride, apart_stride, outer_stride],
            [BOX_COLUMNS, self.rows, 1, 1],
            self.promote,
        )
    }

    /// The strides in bytes. One that is never stepped by may be anything in a tensor, also what the driver refuses.
    fn byte_strides(&self, dtype: DType) -> [u64; 3] {
        let row = self.shape[3] * dtype.size();
        std::array::from_fn(|dim| if self.shape[dim] > 1 { self.strides[dim] * dtype.size() } else { row } as u64)
    }
}

/// `RANK` dimensions, innermost first; one stride less, because the innermost is 1.
fn encode<const RANK: usize, const STRIDES: usize>(
    driver: &Driver,
    address: u64,
    dtype: DType,
    sizes: [u64; RANK],
    strides: [u64; STRIDES],
    tile: [u32; RANK],
    promote: bool,
) -> Result<TensorMap> {
    const { assert!(STRIDES + 1 == RANK && RANK <= 5) };
    let data_type = match dtype {
        DType::F16 => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        _ => CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
    };
    let promotion = if promote {
        CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B
    } else {
        CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_NONE
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
            promotion,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )?;
    }
    Ok(map)
}
