//! Tensors over memory that the caller owns: address, element type, shape, strides, device.
//!
//! Nothing here allocates or copies. Strides are counted in elements, are never negative, and may be anything that
//! stays inside the memory given. Offsets are 64-bit.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;

use half::{bf16, f16};

use crate::error::{MlaError, Result};

mod memory;
mod view_mut;

pub(crate) use memory::Memory;
pub use memory::{DType, Device, Element};
pub use view_mut::TensorViewMut;

/// Most dimensions a tensor of the contract has.
pub const MAX_RANK: usize = 4;

/// A tensor that is read. See the [module](self) for what it may look like.
#[derive(Clone, Copy)]
pub struct TensorView<'a> {
    memory: Memory<'a>,
    bytes: u64,
    device: Device,
    dtype: DType,
    rank: usize,
    shape: [usize; MAX_RANK],
    strides: [usize; MAX_RANK],
    borrow: PhantomData<&'a [u8]>,
}

// SAFETY: a view only reads memory it borrows for 'a, as a shared slice would; device addresses are plain numbers.
unsafe impl Send for TensorView<'_> {}
// SAFETY: as above; no interior mutability.
unsafe impl Sync for TensorView<'_> {}

/// Strides of a tensor without gaps, last dimension innermost. Dimensions beyond [`MAX_RANK`] are left out: no tensor
/// can be made of them.
pub fn contiguous_strides(shape: &[usize]) -> [usize; MAX_RANK] {
    let mut strides = [1usize; MAX_RANK];
    for i in (0..shape.len().min(MAX_RANK).saturating_sub(1)).rev() {
        strides[i] = strides[i + 1].saturating_mul(shape[i + 1].max(1));
    }
    strides
}

impl<'a> TensorView<'a> {
    /// A tensor without gaps over a slice. The slice may be longer than the tensor.
    ///
    /// # Errors
    /// [`MlaError::Rank`], [`MlaError::StrideOverrun`], [`MlaError::Overflow`].
    pub fn from_slice<T: Element>(param: &'static str, data: &'a [T], shape: &[usize]) -> Result<Self> {
        Self::from_slice_strided(param, data, shape, &contiguous_strides(shape)[..shape.len().min(MAX_RANK)])
    }

    /// A tensor with strides (in elements) over a slice.
    ///
    /// # Errors
    /// [`MlaError::Rank`], [`MlaError::StrideOverrun`], [`MlaError::Overflow`].
    pub fn from_slice_strided<T: Element>(
        param: &'static str,
        data: &'a [T],
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        // SAFETY: the slice is valid for reads for 'a and its length is what is claimed.
        unsafe {
            Self::from_raw_parts(
                param,
                data.as_ptr() as u64,
                std::mem::size_of_val(data) as u64,
                T::DTYPE,
                shape,
                strides,
                Device::Host,
            )
        }
    }

    /// A tensor over memory named by its address: of this process, or of a device.
    ///
    /// # Errors
    /// [`MlaError::Rank`], [`MlaError::StrideOverrun`], [`MlaError::Overflow`], [`MlaError::Alignment`].
    ///
    /// # Safety
    /// `address` must be readable for `bytes` bytes on `device` for all of `'a`, and what enqueued work reads must
    /// stay so until that work is done. Nothing may write there meanwhile, except work ordered on the same stream.
    pub unsafe fn from_raw_parts(
        param: &'static str,
        address: u64,
        bytes: u64,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
        device: Device,
    ) -> Result<Self> {
        let align = dtype.size();
        if bytes > 0 && !address.is_multiple_of(align as u64) {
            return Err(MlaError::Alignment { param, value: address, limit: align });
        }
        Self::build(param, Memory::Address(address), bytes, dtype, shape, strides, device)
    }

    /// A tensor over a buffer object of a platform without addresses, from byte `offset` of it, `bytes` long.
    ///
    /// # Errors
    /// [`MlaError::Rank`], [`MlaError::StrideOverrun`], [`MlaError::Overflow`].
    #[allow(clippy::too_many_arguments)]
    pub fn from_object(
        param: &'static str,
        object: &'a (dyn Any + Send + Sync),
        offset: u64,
        bytes: u64,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
        device: Device,
    ) -> Result<Self> {
        Self::build(param, Memory::Object(object, offset), bytes, dtype, shape, strides, device)
    }

    fn build(
        param: &'static str,
        memory: Memory<'a>,
        bytes: u64,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
        device: Device,
    ) -> Result<Self> {
        let rank = shape.len();
        if rank == 0 || rank > MAX_RANK {
            return Err(MlaError::Rank { param, value: rank, limit: MAX_RANK });
        }
        if strides.len() != rank {
            return Err(MlaError::Rank { param, value: strides.len(), limit: rank });
        }
        let mut view = TensorView {
            memory,
            bytes,
            device,
            dtype,
            rank,
            shape: [1; MAX_RANK],
            strides: [1; MAX_RANK],
            borrow: PhantomData,
        };
        view.shape[..rank].copy_from_slice(shape);
        view.strides[..rank].copy_from_slice(strides);
        let needed = view.extent_bytes(param)?;
        if needed > bytes {
            return Err(MlaError::StrideOverrun { param, value: needed, limit: bytes });
        }
        Ok(view)
    }

    /// A shape without gaps and without memory, for [`MlaBackend::view`](crate::MlaBackend::view) to lay over a buffer.
    /// Reading it reads nothing: it claims no bytes, so only its description may be used.
    pub(crate) fn description(dtype: DType, shape: &[usize]) -> Self {
        let mut view = TensorView {
            memory: Memory::Address(0),
            bytes: 0,
            device: Device::Host,
            dtype,
            rank: shape.len().min(MAX_RANK),
            shape: [1; MAX_RANK],
            strides: contiguous_strides(shape),
            borrow: PhantomData,
        };
        view.shape[..view.rank].copy_from_slice(&shape[..view.rank]);
        view
    }

    /// Bytes from the first element to the end of the last one; 0 where the tensor is empty.
    fn extent_bytes(&self, param: &'static str) -> Result<u64> {
        let overflow = || MlaError::Overflow {
            param,
            value: format!("shape {:?} x strides {:?}", self.shape(), self.strides()),
            limit: isize::MAX as u64,
        };
        if self.is_empty() {
            return Ok(0);
        }
        let mut last: u64 = 0;
        for (n, stride) in self.shape().iter().zip(self.strides()) {
            let step = (*n as u64 - 1).checked_mul(*stride as u64).ok_or_else(overflow)?;
            last = last.checked_add(step).ok_or_else(overflow)?;
        }
        let end = last.checked_add(1).and_then(|e| e.checked_mul(self.dtype.size() as u64)).ok_or_else(overflow)?;
        if end > isize::MAX as u64 { Err(overflow()) } else { Ok(end) }
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.shape[..self.rank]
    }
    /// Strides in elements, outermost first.
    pub fn strides(&self) -> &[usize] {
        &self.strides[..self.rank]
    }
    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Where the memory lives.
    pub fn device(&self) -> Device {
        self.device
    }
    /// The size of the memory under the tensor, in bytes, gaps and slack included.
    pub fn memory_bytes(&self) -> u64 {
        self.bytes
    }
    /// Whether a dimension is 0.
    pub fn is_empty(&self) -> bool {
        self.shape().contains(&0)
    }
    /// The number of elements; `usize::MAX` where there are more, as strides of 0 allow.
    pub fn len(&self) -> usize {
        // A product that is 0 in the end may overflow on the way.
        if self.is_empty() { 0 } else { self.shape().iter().fold(1, |n: usize, size| n.saturating_mul(*size)) }
    }
    /// The address of the first element; `None` on platforms without addresses.
    pub fn address(&self) -> Option<u64> {
        self.memory.address()
    }
    /// The buffer object and the byte offset of the first element; `None` where memory has addresses.
    pub fn object(&self) -> Option<(&'a (dyn Any + Send + Sync), u64)> {
        self.memory.object()
    }
    /// The typed pointer of a host tensor.
    ///
    /// # Errors
    /// [`MlaError::WrongDevice`], [`MlaError::DTypeMismatch`].
    pub fn host_ptr<T: Element>(&self, param: &'static str) -> Result<*const T> {
        if self.dtype != T::DTYPE {
            return Err(MlaError::DTypeMismatch { param, value: self.dtype, limit: T::DTYPE });
        }
        match (self.memory, self.device) {
            (Memory::Address(a), Device::Host) => Ok(a as *const T),
            _ => Err(MlaError::WrongDevice { param, value: self.device, limit: Device::Host }),
        }
    }

    /// The memory under a host tensor as bytes, gaps and slack included.
    ///
    /// # Errors
    /// [`MlaError::WrongDevice`].
    pub fn host_bytes(&self, param: &'static str) -> Result<&'a [u8]> {
        match (self.memory, self.device) {
            (Memory::Address(_), Device::Host) if self.bytes == 0 => Ok(&[]),
            // SAFETY: the constructor's contract: readable for `bytes` bytes during 'a.
            (Memory::Address(a), Device::Host) => {
                Ok(unsafe { std::slice::from_raw_parts(a as *const u8, self.bytes as usize) })
            }
            _ => Err(MlaError::WrongDevice { param, value: self.device, limit: Device::Host }),
        }
    }

    /// Element offset of an index; the index must be inside the shape.
    pub fn offset(&self, index: &[usize]) -> usize {
        debug_assert!(index.len() == self.rank && index.iter().zip(self.shape()).all(|(i, n)| i < n));
        index.iter().zip(self.strides()).map(|(i, s)| i * s).sum()
    }

    /// One element of a host tensor as `T`; `None` outside the shape, or for another device or type.
    pub fn get<T: Element>(&self, index: &[usize]) -> Option<T> {
        let inside = index.len() == self.rank && index.iter().zip(self.shape()).all(|(i, n)| i < n);
        let ptr = self.host_ptr::<T>("").ok()?;
        // SAFETY: the index is inside the shape and the constructor checked that the shape stays inside the memory.
        inside.then(|| unsafe { ptr.add(self.offset(index)).read() })
    }

    /// One element of a host tensor of any floating type, as f64. Same conditions as [`get`](Self::get).
    pub fn get_f64(&self, index: &[usize]) -> Option<f64> {
        match self.dtype {
            DType::Bf16 => self.get::<bf16>(index).map(|x| x.to_f64()),
            DType::F16 => self.get::<f16>(index).map(|x| x.to_f64()),
            DType::F32 => self.get::<f32>(index).map(f64::from),
            DType::I32 => None,
        }
    }

    /// The half-open range of addresses from the first element to the end of the last.
    pub(crate) fn address_range(&self) -> Option<std::ops::Range<u64>> {
        let start = self.address()?;
        let extent = self.extent_bytes("").ok()?;
        Some(start..start + extent)
    }
}

impl fmt::Debug for TensorView<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{:?} strides {:?} on {}", self.dtype, self.shape(), self.strides(), self.device)
    }
}
