//! Dispatches on their way to the queue.

use std::sync::{Mutex, PoisonError};

use super::context::Context;
use super::params::{PARAMS_STRIDE, Params};
use super::pipelines::Pipeline;
use super::plan::PARAMS_SLOTS;
use crate::error::Result;

/// What a kernel sees at a binding.
#[derive(Clone)]
pub(super) enum Binding<'a> {
    Whole(&'a ::wgpu::Buffer),
    Part(::wgpu::BufferBinding<'a>),
}

/// One dispatch.
pub(super) struct Dispatch<'a> {
    pub(super) pipeline: &'a Pipeline,
    pub(super) bindings: Vec<Binding<'a>>,
    pub(super) params: Params,
    pub(super) groups: [u32; 3],
}

/// The parameters of up to [`PARAMS_SLOTS`] dispatches, on the device.
pub(super) struct Uniforms {
    pub(super) buffer: ::wgpu::Buffer,
    /// What the buffer has, or will have once what is enqueued is done.
    written: Mutex<Vec<u8>>,
}

impl Uniforms {
    pub(super) fn new(context: &Context) -> Result<Uniforms> {
        let usage = ::wgpu::BufferUsages::UNIFORM | ::wgpu::BufferUsages::COPY_DST;
        let buffer = context.buffer(PARAMS_SLOTS * PARAMS_STRIDE as usize, usage)?;
        Ok(Uniforms { buffer, written: Mutex::default() })
    }
}

/// Enqueues dispatches, each after the one before. Copies their parameters to the device on the way, where they are
/// not those of the last time, as they are for all layers of a model.
pub(super) fn submit(context: &Context, uniforms: &Uniforms, dispatches: &[Dispatch<'_>]) -> Result<()> {
    // A queue orders copies between submissions, so parameters may be overwritten by the next batch.
    let mut written = uniforms.written.lock().unwrap_or_else(PoisonError::into_inner);
    for batch in dispatches.chunks(PARAMS_SLOTS) {
        let mut bytes = vec![0u8; batch.len() * PARAMS_STRIDE as usize];
        for (slot, dispatch) in bytes.chunks_exact_mut(PARAMS_STRIDE as usize).zip(batch) {
            slot[..size_of::<Params>()].copy_from_slice(bytemuck::bytes_of(&dispatch.params));
        }
        let known = written.starts_with(&bytes);
        if !known {
            written.clear();
        }
        context.guarded("submit", || {
            if !known {
                context.submit_held();
                context.queue.write_buffer(&uniforms.buffer, 0, &bytes);
            }
            context.enqueue(|encoder| {
                let mut pass = encoder.begin_compute_pass(&Default::default());
                for (i, dispatch) in batch.iter().enumerate() {
                    let group = bind_group(context, &uniforms.buffer, dispatch);
                    pass.set_pipeline(&dispatch.pipeline.pipeline);
                    pass.set_bind_group(0, &group, &[(i as u64 * PARAMS_STRIDE) as u32]);
                    let [x, y, z] = dispatch.groups;
                    pass.dispatch_workgroups(x, y, z);
                }
            });
        })?;
        if !known {
            *written = bytes;
        }
    }
    Ok(())
}

fn bind_group(context: &Context, uniforms: &::wgpu::Buffer, dispatch: &Dispatch<'_>) -> ::wgpu::BindGroup {
    let size = std::num::NonZeroU64::new(size_of::<Params>() as u64);
    let params = ::wgpu::BufferBinding { buffer: uniforms, offset: 0, size };
    let mut entries = vec![::wgpu::BindGroupEntry { binding: 0, resource: ::wgpu::BindingResource::Buffer(params) }];
    for (i, binding) in dispatch.bindings.iter().enumerate() {
        let resource = match binding {
            Binding::Whole(buffer) => buffer.as_entire_binding(),
            Binding::Part(part) => ::wgpu::BindingResource::Buffer(part.clone()),
        };
        entries.push(::wgpu::BindGroupEntry { binding: i as u32 + 1, resource });
    }
    let layout = &dispatch.pipeline.layout;
    context.device.create_bind_group(&::wgpu::BindGroupDescriptor { label: None, layout, entries: &entries })
}
