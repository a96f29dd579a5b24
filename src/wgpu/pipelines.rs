//! Compiled kernels, kept by kernel, path and element type.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::CACHE_VARIABLE;
use super::context::{Context, platform};
use super::params::Params;
use super::shaders::{Build, Kernel, Path, source};
use crate::error::Result;
use crate::tensor::DType;

/// A kernel, ready to be dispatched.
pub(super) struct Pipeline {
    pub(super) pipeline: ::wgpu::ComputePipeline,
    pub(super) layout: ::wgpu::BindGroupLayout,
}

/// What a kernel is compiled for.
type Key = (Kernel, Path, DType, Build);

/// The kernels compiled so far.
#[derive(Default)]
pub(super) struct Pipelines {
    compiled: Mutex<HashMap<Key, Arc<Pipeline>>>,
}

impl Pipelines {
    /// A kernel, compiled at first use.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform), with what wgpu or the driver's compiler said.
    pub(super) fn get(&self, context: &Context, key: Key) -> Result<Arc<Pipeline>> {
        let mut compiled = self.compiled.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = compiled.get(&key) {
            return Ok(pipeline.clone());
        }
        let pipeline = Arc::new(compile(context, key)?);
        compiled.insert(key, pipeline.clone());
        Ok(pipeline)
    }
}

/// Writes what a driver keeps of a compiled kernel to the folder that the environment names.
fn write_cache(cache: &::wgpu::PipelineCache, folder: &std::path::Path, (_, path, dtype, build): Key) -> Result<()> {
    let file = folder.join(format!("{}-{dtype}-{build:?}", path.name()));
    let written = std::fs::write(&file, cache.get_data().unwrap_or_default());
    written.map_err(|e| platform("write", format!("{}: {e}", file.display())))
}

fn compile(context: &Context, (kernel, path, dtype, build): Key) -> Result<Pipeline> {
    let device = &context.device;
    let buffer = |binding: u32, ty, has_dynamic_offset, size| ::wgpu::BindGroupLayoutEntry {
        binding,
        visibility: ::wgpu::ShaderStages::COMPUTE,
        ty: ::wgpu::BindingType::Buffer { ty, has_dynamic_offset, min_binding_size: std::num::NonZeroU64::new(size) },
        count: None,
    };
    let mut entries = vec![buffer(0, ::wgpu::BufferBindingType::Uniform, true, size_of::<Params>() as u64)];
    for (i, read_only) in kernel.read_only().iter().enumerate() {
        // Matrix paths read elements of q and of the cache 16 bytes at a time.
        let element = match kernel {
            Kernel::Decode if path.is_matrix() && i < 4 => 16,
            Kernel::Combine if build == Build::Full && i == 1 => 16,
            _ => 4,
        };
        entries.push(buffer(
            i as u32 + 1,
            ::wgpu::BufferBindingType::Storage { read_only: *read_only },
            false,
            element,
        ));
    }
    let text = source(kernel, path, dtype, build);
    let label = Some(kernel.name());
    let folder = std::env::var_os(CACHE_VARIABLE).filter(|folder| !folder.is_empty() && kernel == Kernel::Decode);
    let folder = folder.filter(|_| context.features.contains(::wgpu::Features::PIPELINE_CACHE));
    let (pipeline, cache) = context.guarded("create_compute_pipeline", || {
        let cache = folder.as_ref().map(|_| {
            let descriptor = ::wgpu::PipelineCacheDescriptor { label, data: None, fallback: false };
            // SAFETY: a driver must only be given what it returned itself; this one is given nothing.
            unsafe { device.create_pipeline_cache(&descriptor) }
        });
        let layout = device.create_bind_group_layout(&::wgpu::BindGroupLayoutDescriptor { label, entries: &entries });
        let module = ::wgpu::ShaderModuleDescriptor { label, source: ::wgpu::ShaderSource::Wgsl(text.into()) };
        // Matrix kernels know shared memory's indices when they are compiled but for the invocation's number and for what is
        // taken modulo a size, and their checks cost 6 to 10%. On Vulkan that leaves storage to the driver's own checks.
        let known = kernel == Kernel::Decode && path.is_matrix() && !path.is_emulated();
        let bounds_checks = !known || context.adapter.backend != ::wgpu::Backend::Vulkan;
        let checks = ::wgpu::ShaderRuntimeChecks {
            bounds_checks,
            force_loop_bounding: false,
            ..::wgpu::ShaderRuntimeChecks::checked()
        };
        // SAFETY: bounds are checked: of storage always, since wgpu opens devices with robustBufferAccess; of shared memory but
        // where no input can move an index. Loops are not counted: each one is bounded by a size of the problem, or by a
        // length or a plan that was checked on the device before.
        let module = unsafe { device.create_shader_module_trusted(module, checks) };
        let pipeline_layout = device.create_pipeline_layout(&::wgpu::PipelineLayoutDescriptor {
            label,
            bind_group_layouts: &[Some(&layout)],
            immediate_size: 0,
        });
        // Decode writes shared memory before it reads it, and has much of it.
        let compilation_options = ::wgpu::PipelineCompilationOptions {
            zero_initialize_workgroup_memory: kernel != Kernel::Decode,
            ..Default::default()
        };
        let pipeline = device.create_compute_pipeline(&::wgpu::ComputePipelineDescriptor {
            label,
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: label,
            compilation_options,
            cache: cache.as_ref(),
        });
        (Pipeline { pipeline, layout }, cache)
    })?;
    if let (Some(cache), Some(folder)) = (cache, folder) {
        write_cache(&cache, folder.as_ref(), (kernel, path, dtype, build))?;
    }
    Ok(pipeline)
}
