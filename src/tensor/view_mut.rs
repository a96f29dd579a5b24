//! Tensors that are written.

use std::any::Any;
use std::fmt;
use std::marker::PhantomData;

use super::memory::Memory;
use super::{DType, Device, Element, MAX_RANK, TensorView, contiguous_strides};
use crate::error::{MlaError, Result};

/// A tensor that is written. [`as_view`](TensorViewMut::as_view) reads it.
pub struct TensorViewMut<'a> {
    view: TensorView<'a>,
    borrow: PhantomData<&'a mut [u8]>,
}

impl<'a> TensorViewMut<'a> {
    /// A tensor without gaps over a slice. The slice may be longer than the tensor.
    ///
    /// # Errors
    /// As [`TensorView::from_slice`].
    pub fn from_slice<T: Element>(param: &'static str, data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let strides = contiguous_strides(shape);
        Self::from_slice_strided(param, data, shape, &strides[..shape.len().min(MAX_RANK)])
    }

    /// A tensor with strides (in elements) over a slice.
    ///
    /// # Errors
    /// As [`TensorView::from_slice_strided`]. Aliasing strides are reported by `run`.
    pub fn from_slice_strided<T: Element>(
        param: &'static str,
        data: &'a mut [T],
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        let (address, bytes) = (data.as_mut_ptr() as u64, std::mem::size_of_val(data) as u64);
        // SAFETY: the exclusive borrow of the slice lasts for 'a, and the length is what is claimed.
        unsafe { Self::from_raw_parts(param, address, bytes, T::DTYPE, shape, strides, Device::Host) }
    }

    /// A tensor over memory named by its address.
    ///
    /// # Errors
    /// As [`TensorView::from_raw_parts`].
    ///
    /// # Safety
    /// As [`TensorView::from_raw_parts`], for reads and writes, and nothing else may use the memory meanwhile.
    pub unsafe fn from_raw_parts(
        param: &'static str,
        address: u64,
        bytes: u64,
        dtype: DType,
        shape: &[usize],
        strides: &[usize],
        device: Device,
    ) -> Result<Self> {
        // SAFETY: the caller's promise is stronger than what a view needs.
        let view = unsafe { TensorView::from_raw_parts(param, address, bytes, dtype, shape, strides, device)? };
        Ok(TensorViewMut { view, borrow: PhantomData })
    }

    /// A tensor over a buffer object of a platform without addresses.
    ///
    /// # Errors
    /// As [`TensorView::from_object`].
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
        let view = TensorView::from_object(param, object, offset, bytes, dtype, shape, strides, device)?;
        Ok(TensorViewMut { view, borrow: PhantomData })
    }

    /// The tensor as one that is read.
    pub fn as_view(&self) -> TensorView<'_> {
        self.view
    }
    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        self.view.shape()
    }
    /// Strides in elements, outermost first.
    pub fn strides(&self) -> &[usize] {
        self.view.strides()
    }
    /// The element type.
    pub fn dtype(&self) -> DType {
        self.view.dtype
    }

    /// A shorter exclusive borrow of the same tensor.
    pub fn reborrow(&mut self) -> TensorViewMut<'_> {
        TensorViewMut { view: self.view, borrow: PhantomData }
    }

    /// The typed pointer of a host tensor, for writing.
    ///
    /// # Errors
    /// As [`TensorView::host_ptr`].
    pub fn host_ptr_mut<T: Element>(&mut self, param: &'static str) -> Result<*mut T> {
        self.view.host_ptr::<T>(param).map(|p| p.cast_mut())
    }

    /// The memory under a host tensor as bytes, gaps and slack included.
    ///
    /// # Errors
    /// [`MlaError::WrongDevice`].
    pub fn host_bytes_mut(&mut self, param: &'static str) -> Result<&mut [u8]> {
        match (self.view.memory, self.view.device) {
            (Memory::Address(_), Device::Host) if self.view.bytes == 0 => Ok(&mut []),
            // SAFETY: this value holds the exclusive borrow of the memory, and lends it on for as long as it is
            // borrowed itself; the constructor's contract gives the length.
            (Memory::Address(a), Device::Host) => {
                Ok(unsafe { std::slice::from_raw_parts_mut(a as *mut u8, self.view.bytes as usize) })
            }
            _ => Err(MlaError::WrongDevice { param, value: self.view.device, limit: Device::Host }),
        }
    }

    /// Checks that no two elements share an address: every stride must clear all that lies below it.
    ///
    /// Sorting dimensions by stride, each stride must exceed the extent of the smaller ones. That admits every
    /// permutation and padding of a dense tensor; it refuses interleavings that are injective only by number theory.
    pub(crate) fn check_no_alias(&self, param: &'static str) -> Result<()> {
        if self.view.is_empty() {
            return Ok(());
        }
        let mut dims: Vec<usize> = (0..self.view.rank).filter(|d| self.view.shape[*d] > 1).collect();
        dims.sort_by_key(|d| self.view.strides[*d]);
        let mut extent = 1usize;
        for d in dims {
            let stride = self.view.strides[d];
            if stride < extent {
                return Err(MlaError::StrideAlias { param, dim: d, value: stride, limit: extent });
            }
            extent = extent.saturating_add((self.view.shape[d] - 1).saturating_mul(stride));
        }
        Ok(())
    }
}

impl fmt::Debug for TensorViewMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.view.fmt(f)
    }
}
