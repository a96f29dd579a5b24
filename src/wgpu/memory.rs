//! Buffers, and where in them tensors lie.

use std::sync::mpsc;
use std::time::Duration;

use super::context::{Context, platform};
use crate::backend::BackendBuffer;
use crate::error::{MlaError, Result};
use crate::tensor::{Device, TensorView, TensorViewMut};
use crate::workspace::Workspace;

/// Memory that the backend allocated.
pub struct WgpuBuffer {
    pub(super) buffer: ::wgpu::Buffer,
    bytes: usize,
}

impl WgpuBuffer {
    /// The buffer, of at least [`bytes`](Self::bytes) bytes.
    pub fn buffer(&self) -> &::wgpu::Buffer {
        &self.buffer
    }
    /// The bytes asked for.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl BackendBuffer for WgpuBuffer {
    fn view(&self, param: &'static str, like: &TensorView<'_>, device: Device) -> Result<TensorView<'_>> {
        let bytes = self.bytes as u64;
        TensorView::from_object(param, &self.buffer, 0, bytes, like.dtype(), like.shape(), like.strides(), device)
    }

    fn view_mut(&mut self, param: &'static str, like: &TensorView<'_>, device: Device) -> Result<TensorViewMut<'_>> {
        let bytes = self.bytes as u64;
        TensorViewMut::from_object(param, &self.buffer, 0, bytes, like.dtype(), like.shape(), like.strides(), device)
    }

    fn workspace(&mut self, device: Device) -> Workspace<'_> {
        Workspace::from_object(&self.buffer, 0, self.bytes, device)
    }
}

/// What tensors and scratch memory are used as. A caller's buffers need `STORAGE`.
pub(super) const USAGE: ::wgpu::BufferUsages =
    ::wgpu::BufferUsages::STORAGE.union(::wgpu::BufferUsages::COPY_SRC).union(::wgpu::BufferUsages::COPY_DST);

/// How long a callback whose work is done may take to come. It comes at once; a driver that forgets it must not hang us.
const CALLBACK: Duration = Duration::from_secs(30);

/// Bytes copied between host and device at a time.
const PIECE: usize = 64 << 20;

/// Bytes of a copy that is worth a command, or a submission, of its own.
const LARGE: usize = 1 << 20;

impl Context {
    /// A buffer of at least `bytes` bytes, in whole words.
    pub(super) fn buffer(&self, bytes: usize, usage: ::wgpu::BufferUsages) -> Result<::wgpu::Buffer> {
        // Nothing can be bound that is empty.
        let limit = self.limits.max_buffer_size;
        let size = (bytes.max(16) as u64).checked_next_multiple_of(16).filter(|size| *size <= limit);
        let Some(size) = size else {
            return Err(platform("create_buffer", format!("{bytes} bytes; the device's buffers hold {limit}")));
        };
        let descriptor = ::wgpu::BufferDescriptor { label: Some("polymla"), size, usage, mapped_at_creation: false };
        self.guarded("create_buffer", || self.device.create_buffer(&descriptor))
    }

    pub(super) fn alloc(&self, bytes: usize) -> Result<WgpuBuffer> {
        Ok(WgpuBuffer { buffer: self.buffer(bytes, USAGE)?, bytes })
    }

    /// Copies to the start of a buffer, which has room.
    pub(super) fn write(&self, buffer: &::wgpu::Buffer, bytes: &[u8]) -> Result<()> {
        self.submit_held();
        for (i, piece) in bytes.chunks(PIECE).enumerate() {
            let offset = (i * PIECE) as u64;
            let whole = piece.len() / 4 * 4;
            let mut last = [0u8; 4];
            last[..piece.len() - whole].copy_from_slice(&piece[whole..]);
            self.guarded("write_buffer", || {
                self.queue.write_buffer(buffer, offset, &piece[..whole]);
                if whole < piece.len() {
                    self.queue.write_buffer(buffer, offset + whole as u64, &last);
                }
            })?;
            if piece.len() >= LARGE {
                // Copies wait in staging memory until something is submitted; those of a model's many tensors should not.
                self.queue.submit([]);
            }
        }
        Ok(())
    }

    /// Repeats `tile` over the first `bytes` bytes of a buffer.
    pub(super) fn fill(&self, buffer: &WgpuBuffer, tile: &[u8]) -> Result<()> {
        let bytes = buffer.bytes;
        if tile.len() >= bytes || tile.is_empty() || !tile.len().is_multiple_of(4) {
            let whole: Vec<u8> = tile.iter().copied().cycle().take(if tile.is_empty() { 0 } else { bytes }).collect();
            return self.write(&buffer.buffer, &whole);
        }
        // A tile of 4 bytes would take a command for each word.
        let tile = tile.repeat(LARGE.div_ceil(tile.len()));
        let source = self.buffer(tile.len(), USAGE)?;
        self.write(&source, &tile)?;
        self.guarded("copy_buffer_to_buffer", || {
            self.enqueue(|encoder| {
                for at in (0..bytes).step_by(tile.len()) {
                    let n = tile.len().min(bytes - at).next_multiple_of(4) as u64;
                    encoder.copy_buffer_to_buffer(&source, 0, &buffer.buffer, at as u64, n);
                }
            });
        })
    }

    /// Copies from byte `offset` (a multiple of 4) of a buffer to the host, after all work submitted so far.
    pub(super) fn read(&self, buffer: &::wgpu::Buffer, offset: u64, bytes: &mut [u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        let usage = ::wgpu::BufferUsages::MAP_READ | ::wgpu::BufferUsages::COPY_DST;
        let staging = self.buffer(bytes.len().min(PIECE), usage)?;
        for (i, piece) in bytes.chunks_mut(PIECE).enumerate() {
            let size = (piece.len() as u64).next_multiple_of(4);
            let (sender, receiver) = mpsc::channel();
            self.guarded("copy_buffer_to_buffer", || {
                let from = offset + (i * PIECE) as u64;
                self.enqueue(|encoder| encoder.copy_buffer_to_buffer(buffer, from, &staging, 0, size));
                self.submit_held();
                staging.map_async(::wgpu::MapMode::Read, 0..size, move |result| {
                    // The receiver is gone only where waiting failed, which is then the error.
                    let _ = sender.send(result);
                });
            })?;
            self.wait("poll")?;
            // Another thread's poll may have taken the callback, and be about to call it.
            let mapped = receiver.recv_timeout(CALLBACK).map_err(|e| platform("map_async", e.to_string()))?;
            mapped.map_err(|e| platform("map_async", e.to_string()))?;
            {
                let view =
                    staging.get_mapped_range(0..size).map_err(|e| platform("get_mapped_range", e.to_string()))?;
                piece.copy_from_slice(&view[..piece.len()]);
            }
            staging.unmap();
        }
        Ok(())
    }
}

/// A tensor as bindings see it: a buffer, the byte of its first element, its strides in elements.
#[derive(Clone, Copy)]
pub(super) struct Place<'a> {
    pub(super) buffer: &'a ::wgpu::Buffer,
    offset: u64,
    size: u64,
    shape: [u64; 4],
    strides: [u64; 4],
}

impl<'a> Place<'a> {
    /// Where a tensor lies. `None` for one without elements, which is never read.
    ///
    /// # Errors
    /// [`MlaError::Alignment`] for an offset inside an element; [`MlaError::StrideOverrun`] where the view claims more
    /// than its buffer has; [`MlaError::Unsupported`] for memory that is no wgpu buffer.
    pub(super) fn of(param: &'static str, view: &TensorView<'a>) -> Result<Option<Place<'a>>> {
        let Some((object, offset)) = view.object() else {
            return Err(super::refusal(param, "memory with an address".into(), "a wgpu::Buffer").into());
        };
        let Some(buffer) = object.downcast_ref::<::wgpu::Buffer>() else {
            return Err(super::refusal(param, "an object of another kind".into(), "a wgpu::Buffer").into());
        };
        let size = view.dtype().size() as u64;
        if !offset.is_multiple_of(size) {
            return Err(MlaError::Alignment { param, value: offset, limit: size as usize });
        }
        // Kernels read whole words, so a buffer's last bytes count only where they fill one.
        let limit = buffer.size() / 4 * 4;
        let mut place = Place { buffer, offset, size, shape: [1; 4], strides: [0; 4] };
        for (dim, (n, stride)) in view.shape().iter().zip(view.strides()).enumerate() {
            place.shape[dim] = *n as u64;
            // A stride that is never stepped by may be anything.
            place.strides[dim] = if *n > 1 { *stride as u64 } else { 0 };
        }
        if view.is_empty() {
            return Ok(None);
        }
        let end = place.span(0, place.shape[0]).checked_add(offset);
        match end {
            Some(end) if end <= limit => Ok(Some(place)),
            _ => Err(MlaError::StrideOverrun { param, value: end.unwrap_or(u64::MAX), limit }),
        }
    }

    /// Bytes from the first element to the end of the last one, of `n` steps of dimension `dim`, all of the others.
    pub(super) fn span(&self, dim: usize, n: u64) -> u64 {
        let steps = |d: usize| if d == dim { n.max(1) - 1 } else { self.shape[d] - 1 };
        let last = (0..4).fold(0u64, |sum, d| sum.saturating_add(steps(d).saturating_mul(self.strides[d])));
        last.saturating_add(1).saturating_mul(self.size)
    }

    /// The most steps of dimension 0 whose elements fit `bytes` bytes, wherever they begin; 0 where not one does.
    pub(super) fn steps_within(&self, bytes: u64) -> u64 {
        let one = self.span(0, 1);
        if one > bytes {
            return 0;
        }
        match self.strides[0] * self.size {
            0 => self.shape[0],
            step => ((bytes - one) / step + 1).min(self.shape[0]),
        }
    }

    /// The part with steps `first..first + n` of dimension 0, of at most `limit` bytes: its binding, and the element of
    /// the binding where it begins. Bindings begin at multiples of `align`.
    pub(super) fn bind(&self, first: u64, n: u64, align: u64) -> (::wgpu::BufferBinding<'a>, u32) {
        let start = self.offset + first * self.strides[0] * self.size;
        let aligned = start / align * align;
        let end = (start + self.span(0, n)).next_multiple_of(4).min(self.buffer.size() / 4 * 4);
        let size = std::num::NonZeroU64::new(end - aligned);
        let binding = ::wgpu::BufferBinding { buffer: self.buffer, offset: aligned, size };
        (binding, ((start - aligned) / self.size) as u32)
    }

    /// Strides in elements, for kernels. They fit: whatever is bound spans fewer than 2^32 elements.
    pub(super) fn strides(&self) -> [u32; 4] {
        self.strides.map(|stride| stride as u32)
    }

    /// The bytes of the buffer that the tensor spans.
    pub(super) fn range(&self) -> std::ops::Range<u64> {
        self.offset..self.offset + self.span(0, self.shape[0])
    }
}
