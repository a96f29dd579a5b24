//! The schedule: made by a kernel, from lengths that stay on the device.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::device::Accelerator;
use super::memory::{DriverBuffer, HostWord};
use super::module::Function;
use super::stream::Stream;
use crate::error::Result;
use crate::portable::{DecodeParams, Plan, STATUS_OK};
use crate::problem::Problem;
use crate::schedule::{PartMetadata, ScheduleOptions};
use crate::tensor::{Device, TensorView};

/// A plan on the device, in upstream's layout, with the status word of the runs that use it.
///
/// Reused for all layers of a step. [`schedule_into`](super::DriverBackend::schedule_into) plans again in place.
pub struct DriverSchedule {
    plan: Plan,
    /// `parts` [num_parts, 8] i32, then `num_splits` [capacity + 1] i32.
    buffer: DriverBuffer,
    status: HostWord,
}

impl DriverSchedule {
    pub(super) fn new(
        device: &Arc<Accelerator>,
        problem: &Problem,
        options: &ScheduleOptions,
        default_parts: usize,
    ) -> Result<DriverSchedule> {
        let plan = Plan::new(problem, options, default_parts)?;
        let mut buffer = DriverBuffer::alloc(device, plan.bytes())?;
        // Parts without work and requests without splits, should a kernel ever look before the plan is there.
        buffer.write(&vec![0; plan.bytes()])?;
        Ok(DriverSchedule { plan, buffer, status: HostWord::new(device, STATUS_OK)? })
    }

    /// Enqueues the schedule kernel.
    pub(super) fn enqueue(
        &mut self,
        kernel: &Function,
        problem: &Problem,
        cache_seqlens: &TensorView<'_>,
        device: Device,
        stream: Stream,
    ) -> Result<()> {
        let (base, status) = (self.buffer.address(), self.status.address());
        let mut params = self.plan.again(problem, cache_seqlens, device, base, status)?;
        // SAFETY: the kernel's one parameter. It reads b lengths, which the view vouches for, and writes both arrays of
        // this schedule, which have room for at least b requests.
        unsafe { kernel.enqueue(1, &mut params, stream)? };
        let (offset, words) = self.plan.unused();
        self.buffer.fill_words(offset, words, 0, stream)
    }

    pub(super) fn plan(&self) -> &Plan {
        &self.plan
    }

    pub(super) fn fill(&self, params: &mut DecodeParams, problem: &Problem, workspace: u64) {
        self.plan.fill(params, problem, self.buffer.address(), workspace, self.status.address());
    }

    /// What device-side checks found so far, cleared.
    pub(super) fn take_verdict(&self) -> Result<()> {
        self.plan.verdict(self.status.atomic().swap(STATUS_OK, Ordering::AcqRel))
    }

    /// What device-side checks found so far, without waiting: work still enqueued may add to it.
    /// [`MlaBackend::finish`](crate::MlaBackend::finish) waits, reports it and clears it.
    ///
    /// # Errors
    /// As [`MlaBackend::finish`](crate::MlaBackend::finish).
    pub fn poll(&self) -> Result<()> {
        self.plan.verdict(self.status.atomic().load(Ordering::Acquire))
    }

    /// Parallel parts.
    pub fn num_parts(&self) -> usize {
        self.plan.num_parts()
    }
    /// Requests planned for.
    pub fn b(&self) -> usize {
        self.plan.b()
    }

    /// Waits for the device and copies the plan to the host: `tile_scheduler_metadata` and `num_splits`.
    ///
    /// # Errors
    /// [`MlaError::Platform`](crate::MlaError::Platform).
    pub fn to_host(&self) -> Result<(Vec<PartMetadata>, Vec<i32>)> {
        let mut parts = vec![PartMetadata::default(); self.num_parts()];
        let mut num_splits = vec![0i32; self.b() + 1];
        self.buffer.read(0, bytemuck::cast_slice_mut(&mut parts))?;
        self.buffer.read(self.plan.num_splits_offset(), bytemuck::cast_slice_mut(&mut num_splits))?;
        Ok((parts, num_splits))
    }
}
