//! The adapter and the device: what they offer, and their errors as values.

use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{ThreadId, current};

use super::{NAME, environment};
use crate::error::{MlaError, Result};

/// Names the adapter to open, by a part of its name, where a machine has several.
pub const ADAPTER_VARIABLE: &str = "POLYMLA_WGPU_ADAPTER";

/// A device and its queue, the caller's or one of our own.
pub(super) struct Context {
    pub(super) device: ::wgpu::Device,
    pub(super) queue: ::wgpu::Queue,
    pub(super) limits: ::wgpu::Limits,
    pub(super) features: ::wgpu::Features,
    pub(super) adapter: ::wgpu::AdapterInfo,
    /// Whether the device multiplies matrices.
    pub(super) matrices: bool,
    /// Whether it is known to multiply f16 ones of 16 x 16 into f32: an adapter tells, a caller's device does not.
    pub(super) known_matrices: bool,
    /// Why the device was lost, once it was. A caller's own device has the caller's callback, not ours.
    lost: Arc<Mutex<Option<String>>>,
    held: Mutex<Option<Held>>,
}

/// What one thread has recorded, to submit it at once.
struct Held {
    thread: ThreadId,
    encoder: Option<::wgpu::CommandEncoder>,
}

/// What the backend makes use of, where an adapter has it.
fn wanted() -> ::wgpu::Features {
    ::wgpu::Features::SUBGROUP
        | ::wgpu::Features::SHADER_F16
        | ::wgpu::Features::MEMORY_DECORATION_VOLATILE
        | ::wgpu::Features::PIPELINE_CACHE
        | ::wgpu::Features::TIMESTAMP_QUERY
        | ::wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS
}

pub(super) fn absent(reason: String) -> MlaError {
    MlaError::Absent { backend: NAME.into(), reason }
}

pub(super) fn platform(call: &'static str, message: String) -> MlaError {
    MlaError::Platform { backend: NAME, call, message }
}

/// The adapters of this machine, best first: a GPU of its own, one that shares memory, software.
fn adapters() -> Vec<::wgpu::Adapter> {
    // One for all devices: buffers are numbers within their instance, so that one of another instance would be taken for
    // whatever has its number here. Of the same instance, wgpu refuses buffers of other devices.
    static INSTANCE: OnceLock<::wgpu::Instance> = OnceLock::new();
    let instance = INSTANCE.get_or_init(|| {
        let mut options = ::wgpu::InstanceDescriptor::new_without_display_handle();
        options.backends = ::wgpu::Backends::PRIMARY;
        // Release builds of wgpu have no validation layers; debug builds would ask for them, and warn where there are none.
        options.flags = ::wgpu::InstanceFlags::empty();
        ::wgpu::Instance::new(options)
    });
    let mut adapters = pollster::block_on(instance.enumerate_adapters(::wgpu::Backends::PRIMARY));
    adapters.sort_by_key(|adapter| match adapter.get_info().device_type {
        ::wgpu::DeviceType::DiscreteGpu => 0,
        ::wgpu::DeviceType::IntegratedGpu => 1,
        ::wgpu::DeviceType::VirtualGpu => 2,
        ::wgpu::DeviceType::Other => 3,
        ::wgpu::DeviceType::Cpu => 4,
    });
    adapters
}

/// Picks an adapter: the best, or the one that the environment names.
fn pick() -> Result<::wgpu::Adapter> {
    let named = environment(ADAPTER_VARIABLE);
    let adapters = adapters();
    let names: Vec<String> = adapters.iter().map(|a| a.get_info().name).collect();
    let mut fitting = adapters.into_iter().filter(|a| a.get_info().name.contains(&named));
    fitting.next().ok_or_else(|| {
        absent(match names.is_empty() {
            true => "no adapter: wgpu found no Vulkan, Metal or DX12 driver".into(),
            false => format!("{ADAPTER_VARIABLE} is {named:?}; adapters are {}", names.join(", ")),
        })
    })
}

impl Context {
    /// Opens an adapter of this machine with everything it offers that the backend makes use of.
    pub(super) fn open() -> Result<Context> {
        let adapter = pick()?;
        let mut features = adapter.features() & wanted();
        let mut experimental = ::wgpu::ExperimentalFeatures::disabled();
        if adapter.features().contains(::wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX) && has_matrices(&adapter) {
            features |= ::wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX;
            // SAFETY: one experimental feature is used, cooperative matrices. What wgpu asks of its users is to accept
            // that it may have bugs; results are checked against the golden files wherever the variant is chosen.
            experimental = unsafe { ::wgpu::ExperimentalFeatures::enabled() };
        }
        Self::request(&adapter, features, adapter.limits(), experimental)
    }

    /// Opens an adapter with the features and limits that every WebGPU implementation grants, and no more.
    pub(super) fn open_web_default() -> Result<Context> {
        let limits = ::wgpu::Limits::default();
        Self::request(&pick()?, ::wgpu::Features::empty(), limits, ::wgpu::ExperimentalFeatures::disabled())
    }

    fn request(
        adapter: &::wgpu::Adapter,
        required_features: ::wgpu::Features,
        required_limits: ::wgpu::Limits,
        experimental_features: ::wgpu::ExperimentalFeatures,
    ) -> Result<Context> {
        let descriptor = ::wgpu::DeviceDescriptor {
            label: Some("polymla"),
            required_features,
            required_limits,
            experimental_features,
            ..Default::default()
        };
        let (device, queue) =
            pollster::block_on(adapter.request_device(&descriptor)).map_err(|e| absent(format!("{adapter:?}: {e}")))?;
        let mut context = Self::new(adapter.get_info(), device, queue);
        // Not asked for where they have other sizes.
        context.known_matrices = context.matrices;
        let lost = context.lost.clone();
        context.device.set_device_lost_callback(move |reason, message| {
            let mut lost = lost.lock().unwrap_or_else(PoisonError::into_inner);
            lost.get_or_insert(format!("{reason:?}: {message}"));
        });
        Ok(context)
    }

    /// Takes a device that someone else opened.
    pub(super) fn new(adapter: ::wgpu::AdapterInfo, device: ::wgpu::Device, queue: ::wgpu::Queue) -> Context {
        let (limits, features) = (device.limits(), device.features());
        let matrices = features.contains(::wgpu::Features::EXPERIMENTAL_COOPERATIVE_MATRIX);
        Context {
            device,
            queue,
            limits,
            features,
            adapter,
            matrices,
            known_matrices: false,
            lost: Arc::default(),
            held: Mutex::default(),
        }
    }

    /// Runs `work`, with what wgpu would report elsewhere, or end the process for, as an error.
    ///
    /// # Errors
    /// [`MlaError::Platform`]: out of memory, a refusal of wgpu, a lost device.
    pub(super) fn guarded<T>(&self, call: &'static str, work: impl FnOnce() -> T) -> Result<T> {
        self.check_lost(call)?;
        let scopes = [::wgpu::ErrorFilter::Internal, ::wgpu::ErrorFilter::OutOfMemory, ::wgpu::ErrorFilter::Validation]
            .map(|filter| self.device.push_error_scope(filter));
        let value = work();
        // Scopes nest: the last one pushed is the first to go. Natively the answers are there at once.
        let errors = scopes.into_iter().rev().filter_map(|scope| pollster::block_on(scope.pop()));
        let error = errors.last();
        // A lost device is told to its callback only when it is polled; other calls on it look as if they worked.
        let polled = self.device.poll(::wgpu::PollType::Poll);
        match error {
            Some(error) => Err(platform(call, error.to_string())),
            None if polled.is_err() => polled.map(|_| value).map_err(|e| platform(call, e.to_string())),
            None => self.check_lost(call).map(|()| value),
        }
    }

    fn held(&self) -> MutexGuard<'_, Option<Held>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn encoder(&self) -> ::wgpu::CommandEncoder {
        self.device.create_command_encoder(&Default::default())
    }

    /// Records commands and submits them; inside [`Context::at_once`], of the same thread, later.
    pub(super) fn enqueue(&self, record: impl FnOnce(&mut ::wgpu::CommandEncoder)) {
        if let Some(held) = self.held().as_mut().filter(|held| held.thread == current().id()) {
            record(held.encoder.get_or_insert_with(|| self.encoder()));
            return;
        }
        let mut encoder = self.encoder();
        record(&mut encoder);
        self.queue.submit([encoder.finish()]);
    }

    /// Submits what this thread holds back: before anything that must come after it.
    pub(super) fn submit_held(&self) {
        let encoder = match &mut *self.held() {
            Some(held) if held.thread == current().id() => held.encoder.take(),
            _ => None,
        };
        if let Some(encoder) = encoder {
            self.queue.submit([encoder.finish()]);
        }
    }

    /// Runs `work` and submits all that it enqueues at once: a device is idle for some microseconds between submissions.
    /// Of two threads at a time, the second submits one by one.
    pub(super) fn at_once(&self, work: impl FnOnce() -> Result<()>) -> Result<()> {
        let mut held = self.held();
        if held.is_some() {
            drop(held);
            return work();
        }
        *held = Some(Held { thread: current().id(), encoder: None });
        drop(held);
        let done = work();
        let submitted = self.guarded("submit", || self.submit_held());
        *self.held() = None;
        done.and(submitted)
    }

    /// Waits for all work.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(super) fn wait(&self, call: &'static str) -> Result<()> {
        let waited = self.guarded(call, || self.device.poll(::wgpu::PollType::wait_indefinitely()))?;
        waited.map_err(|e| platform(call, e.to_string()))?;
        self.check_lost(call)
    }

    fn check_lost(&self, call: &'static str) -> Result<()> {
        let lost = self.lost.lock().unwrap_or_else(PoisonError::into_inner);
        match &*lost {
            Some(reason) => Err(platform(call, format!("the device was lost: {reason}"))),
            None => Ok(()),
        }
    }

    /// Checks that the plainest kernels fit the device: every WebGPU implementation grants more, but a caller's device may
    /// have been opened with less.
    ///
    /// # Errors
    /// [`MlaError::Absent`], with the limit.
    pub(super) fn check_limits(&self) -> Result<()> {
        let l = &self.limits;
        for (name, value, least) in [
            ("max_storage_buffers_per_shader_stage", u64::from(l.max_storage_buffers_per_shader_stage), 7),
            ("max_compute_workgroup_storage_size", l.max_compute_workgroup_storage_size.into(), 16 << 10),
            ("max_compute_invocations_per_workgroup", l.max_compute_invocations_per_workgroup.into(), 128),
            ("max_compute_workgroup_size_x", l.max_compute_workgroup_size_x.into(), 128),
            ("max_compute_workgroups_per_dimension", l.max_compute_workgroups_per_dimension.into(), 65_535),
            ("max_storage_buffer_binding_size", l.max_storage_buffer_binding_size, 1 << 20),
            ("max_buffer_size", l.max_buffer_size, 1 << 20),
        ] {
            if value < least {
                return Err(absent(format!("{name} of the device is {value}; it must be at least {least}")));
            }
        }
        Ok(())
    }

    /// The most bytes of a buffer that a kernel can see at once. Kernels count elements in 32 bits.
    pub(super) fn binding_bytes(&self) -> u64 {
        self.limits.max_storage_buffer_binding_size.min(1 << 32).next_multiple_of(256) - 256
    }
}

/// Whether an adapter multiplies f16 matrices of 16 x 16 into f32.
fn has_matrices(adapter: &::wgpu::Adapter) -> bool {
    use ::wgpu::CooperativeScalarType::{F16, F32};
    let fits = |p: &::wgpu::CooperativeMatrixProperties| {
        (p.m_size, p.n_size, p.k_size) == (16, 16, 16) && p.ab_type == F16 && p.cr_type == F32
    };
    adapter.cooperative_matrix_properties().iter().any(fits)
}
