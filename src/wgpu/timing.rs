//! What the bench needs: the device's own clock, and cold caches.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::context::{Context, platform};
use super::memory::USAGE;
use crate::error::Result;

/// Bytes written between timed runs: several times the last cache of any device.
const FLUSH_BYTES: u64 = 1 << 30;

/// A device that had nothing to do for as long (some lower their clocks after seconds) is first kept busy for [`WAKING`].
const IDLE: Duration = Duration::from_millis(100);
/// An H200 takes a quarter of a second from 400 MHz to its full clock.
const WAKING: Duration = Duration::from_millis(400);

/// Made at first use.
#[derive(Default)]
pub(super) struct Clock {
    /// When the last timed run ended.
    last: Mutex<Option<Instant>>,
    flush: Mutex<Option<::wgpu::Buffer>>,
    timestamps: Mutex<Option<Timestamps>>,
}

struct Timestamps {
    queries: ::wgpu::QuerySet,
    resolved: ::wgpu::Buffer,
}

impl Timestamps {
    fn new(context: &Context) -> Result<Timestamps> {
        let usage = ::wgpu::BufferUsages::QUERY_RESOLVE | ::wgpu::BufferUsages::COPY_SRC;
        let descriptor = ::wgpu::QuerySetDescriptor { label: None, ty: ::wgpu::QueryType::Timestamp, count: 2 };
        Ok(Timestamps {
            queries: context.guarded("create_query_set", || context.device.create_query_set(&descriptor))?,
            resolved: context.buffer(256, usage)?,
        })
    }

    /// Enqueues a timestamp, and after the second one the copy of both.
    fn stamp(&self, context: &Context, index: u32) -> Result<()> {
        context.guarded("write_timestamp", || {
            context.enqueue(|encoder| {
                encoder.write_timestamp(&self.queries, index);
                if index == 1 {
                    encoder.resolve_query_set(&self.queries, 0..2, &self.resolved, 0);
                }
            });
        })
    }
}

impl Clock {
    /// The time that the work enqueued by `work` takes: by the device's clock where it has one, else by the host's.
    pub(super) fn elapsed(
        &self,
        context: &Context,
        work: &mut dyn FnMut() -> Result<()>,
        finish: &dyn Fn() -> Result<()>,
    ) -> Result<Duration> {
        if !context.features.contains(::wgpu::Features::TIMESTAMP_QUERY_INSIDE_ENCODERS) {
            let start = Instant::now();
            work()?;
            finish()?;
            return Ok(start.elapsed());
        }
        let mut kept = self.timestamps.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.is_none() {
            *kept = Some(Timestamps::new(context)?);
        }
        let Some(timestamps) = kept.as_ref() else {
            return Err(platform("create_query_set", "no query set".into()));
        };
        self.wake(context)?;
        context.at_once(|| {
            timestamps.stamp(context, 0)?;
            work()?;
            timestamps.stamp(context, 1)
        })?;
        finish()?;
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        let mut ticks = [0u64; 2];
        context.read(&timestamps.resolved, 0, bytemuck::bytes_of_mut(&mut ticks))?;
        let ns = ticks[1].saturating_sub(ticks[0]) as f64 * f64::from(context.queue.get_timestamp_period());
        Ok(Duration::from_secs_f64(ns / 1e9))
    }

    /// Brings the device's clocks up, where it has been idle: for a few short runs it would not hurry.
    fn wake(&self, context: &Context) -> Result<()> {
        let last = *self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|last| last.elapsed() < IDLE) {
            return Ok(());
        }
        let start = Instant::now();
        while start.elapsed() < WAKING {
            self.flush_caches(context)?;
            context.wait("poll")?;
        }
        Ok(())
    }

    /// Writes more than any cache holds.
    pub(super) fn flush_caches(&self, context: &Context) -> Result<()> {
        let mut flush = self.flush.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = FLUSH_BYTES.min(context.limits.max_buffer_size);
        if flush.is_none() {
            *flush = Some(context.buffer(bytes as usize, USAGE)?);
        }
        let Some(buffer) = flush.as_ref() else { return Ok(()) };
        context.guarded("clear_buffer", || context.enqueue(|encoder| encoder.clear_buffer(buffer, 0, None)))
    }
}
