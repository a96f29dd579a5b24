//! Scratch memory of a run: sized from problem and schedule, owned by the caller, reusable.

use std::any::Any;
use std::marker::PhantomData;

use crate::error::{MlaError, Result};
use crate::tensor::{Device, Memory};

/// Alignment that host workspaces need, in bytes.
pub const WORKSPACE_ALIGN: usize = 64;

/// Scratch memory lent to one `run`. Its contents need no initialisation and mean nothing afterwards.
pub struct Workspace<'a> {
    memory: Memory<'a>,
    bytes: usize,
    device: Device,
    borrow: PhantomData<&'a mut [u8]>,
}

impl<'a> Workspace<'a> {
    /// A workspace in this process. It must start at a multiple of [`WORKSPACE_ALIGN`], as [`HostWorkspace`] does;
    /// an empty one fits problems that need none.
    pub fn from_slice(memory: &'a mut [u8]) -> Self {
        let (address, bytes) = (memory.as_mut_ptr() as u64, memory.len());
        Workspace { memory: Memory::Address(address), bytes, device: Device::Host, borrow: PhantomData }
    }

    /// A workspace named by its address on `device`.
    ///
    /// # Safety
    /// `bytes` bytes from `address` must be the caller's to write, and used by nothing else, until the work enqueued
    /// with this workspace is done.
    pub unsafe fn from_raw_parts(address: u64, bytes: usize, device: Device) -> Self {
        Workspace { memory: Memory::Address(address), bytes, device, borrow: PhantomData }
    }

    /// A workspace in a buffer object of a platform without addresses, from byte `offset`, `bytes` long.
    pub fn from_object(object: &'a (dyn Any + Send + Sync), offset: u64, bytes: usize, device: Device) -> Self {
        Workspace { memory: Memory::Object(object, offset), bytes, device, borrow: PhantomData }
    }

    /// Its size in bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
    /// Where it lives.
    pub fn device(&self) -> Device {
        self.device
    }
    /// Its address; `None` on platforms without addresses.
    pub fn address(&self) -> Option<u64> {
        self.memory.address()
    }
    /// Its buffer object and offset; `None` where memory has addresses.
    pub fn object(&self) -> Option<(&'a (dyn Any + Send + Sync), u64)> {
        self.memory.object()
    }

    /// The first `needed` bytes as host memory.
    ///
    /// # Errors
    /// [`MlaError::WorkspaceTooSmall`], [`MlaError::WrongDevice`], [`MlaError::Alignment`].
    pub fn host(&mut self, needed: usize) -> Result<&mut [u8]> {
        let address = self.checked(needed, WORKSPACE_ALIGN, Device::Host)?;
        if needed == 0 {
            return Ok(&mut []);
        }
        // SAFETY: this value holds the exclusive borrow of `bytes` bytes at `address`, and `needed` is no more.
        Ok(unsafe { std::slice::from_raw_parts_mut(address as *mut u8, needed) })
    }

    /// Its address, where it has `needed` bytes on `device` from a multiple of `align`.
    ///
    /// # Errors
    /// [`MlaError::WorkspaceTooSmall`], [`MlaError::WrongDevice`], [`MlaError::Alignment`].
    pub(crate) fn checked(&self, needed: usize, align: usize, device: Device) -> Result<u64> {
        if self.bytes < needed {
            return Err(MlaError::WorkspaceTooSmall { value: self.bytes, limit: needed });
        }
        let Some(address) = self.address().filter(|_| self.device == device) else {
            return Err(MlaError::WrongDevice { param: "workspace", value: self.device, limit: device });
        };
        if needed > 0 && !address.is_multiple_of(align as u64) {
            return Err(MlaError::Alignment { param: "workspace", value: address, limit: align });
        }
        Ok(address)
    }
}

#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; WORKSPACE_ALIGN]);

/// Host memory for workspaces, aligned, that grows and is kept from step to step.
#[derive(Default)]
pub struct HostWorkspace {
    lines: Vec<Line>,
}

impl HostWorkspace {
    /// No memory yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Lends `bytes` bytes, growing first where needed; fewer where this machine has no such memory, which `run` then
    /// reports as [`MlaError::WorkspaceTooSmall`].
    pub fn lend(&mut self, bytes: usize) -> Workspace<'_> {
        let lines = bytes.div_ceil(WORKSPACE_ALIGN);
        let missing = lines.saturating_sub(self.lines.len());
        if missing > 0 && self.lines.try_reserve_exact(missing).is_ok() {
            self.lines.resize(lines, Line([0; WORKSPACE_ALIGN]));
        }
        let (address, held) = (self.lines.as_mut_ptr() as u64, std::mem::size_of_val(&*self.lines));
        // SAFETY: the vector holds that many bytes and stays exclusively borrowed as long as the workspace.
        unsafe { Workspace::from_raw_parts(address, bytes.min(held), Device::Host) }
    }
}
