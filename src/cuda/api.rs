//! What [`crate::device`] asks of a platform, by the CUDA driver.

use std::ffi::{CStr, c_void};
use std::time::Duration;

use cudarc::driver::sys::{
    CU_MEMHOSTALLOC_DEVICEMAP, CU_MEMHOSTALLOC_PORTABLE, CUevent, CUfunction_attribute, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchAttributeValue_union__bindgen_ty_1, CUlaunchConfig, CUstream,
    CUstreamCaptureMode,
};

use super::context::Context;
use crate::device::{Api, Handle, Launch, Stream};
use crate::error::Result;
use crate::tensor::Device;

fn raw(stream: Stream) -> CUstream {
    stream.raw().cast()
}

// SAFETY (of every block below): the context is alive and current while the guard is; pointers handed out are to locals;
// addresses and handles are the caller's promise.
impl Api for Context {
    fn device(&self) -> Device {
        Context::device(self)
    }
    fn max_blocks(&self, _threads: u32) -> u64 {
        i32::MAX as u64
    }

    unsafe fn alloc(&self, bytes: usize) -> Result<u64> {
        let _current = self.enter()?;
        let mut address = 0;
        // SAFETY: as said above.
        unsafe { self.driver().cuMemAlloc_v2(&raw mut address, bytes)? };
        Ok(address)
    }
    unsafe fn free(&self, address: u64) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuMemFree_v2(address) }
    }
    unsafe fn host_alloc(&self, bytes: usize) -> Result<(*mut c_void, u64)> {
        let _current = self.enter()?;
        let (mut pointer, mut address) = (std::ptr::null_mut(), 0);
        let flags = CU_MEMHOSTALLOC_PORTABLE | CU_MEMHOSTALLOC_DEVICEMAP;
        // SAFETY: as said above. What was allocated is freed where its address cannot be had.
        unsafe {
            self.driver().cuMemHostAlloc(&raw mut pointer, bytes, flags)?;
            if let Err(e) = self.driver().cuMemHostGetDevicePointer_v2(&raw mut address, pointer, 0) {
                let _ = self.driver().cuMemFreeHost(pointer);
                return Err(e);
            }
        }
        Ok((pointer, address))
    }
    unsafe fn host_free(&self, pointer: *mut c_void) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above; the driver waits for work that uses it.
        unsafe { self.driver().cuMemFreeHost(pointer) }
    }
    unsafe fn copy_to_device(&self, to: u64, from: *const c_void, bytes: usize) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above. The copy of pageable memory may return before the last bytes are in place; waiting makes
        // it safe for streams that do not order themselves after it.
        unsafe {
            self.driver().cuMemcpyHtoD_v2(to, from, bytes)?;
            self.driver().cuStreamSynchronize(std::ptr::null_mut())
        }
    }
    unsafe fn copy_to_host(&self, to: *mut c_void, from: u64, bytes: usize) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe {
            self.driver().cuCtxSynchronize()?;
            self.driver().cuMemcpyDtoH_v2(to, from, bytes)
        }
    }
    unsafe fn copy_on_device(&self, to: u64, from: u64, bytes: usize, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuMemcpyDtoDAsync_v2(to, from, bytes, raw(stream)) }
    }
    unsafe fn fill_bytes(&self, address: u64, value: u8, count: usize, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuMemsetD8Async(address, value, count, raw(stream)) }
    }
    unsafe fn fill_words(&self, address: u64, value: i32, count: usize, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuMemsetD32Async(address, value as u32, count, raw(stream)) }
    }

    unsafe fn stream_create(&self) -> Result<Handle> {
        let _current = self.enter()?;
        let mut stream: CUstream = std::ptr::null_mut();
        // SAFETY: as said above. Flag 0: work of the legacy stream is waited for.
        unsafe { self.driver().cuStreamCreate(&raw mut stream, 0)? };
        Ok(stream.cast())
    }
    unsafe fn stream_destroy(&self, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuStreamDestroy_v2(raw(stream)) }
    }
    unsafe fn stream_synchronize(&self, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuStreamSynchronize(raw(stream)) }
    }

    unsafe fn event_create(&self) -> Result<Handle> {
        let _current = self.enter()?;
        let mut event: CUevent = std::ptr::null_mut();
        // SAFETY: as said above. Flag 0: with timing.
        unsafe { self.driver().cuEventCreate(&raw mut event, 0)? };
        Ok(event.cast())
    }
    unsafe fn event_destroy(&self, event: Handle) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuEventDestroy_v2(event.cast()) }
    }
    unsafe fn event_record(&self, event: Handle, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuEventRecord(event.cast(), raw(stream)) }
    }
    unsafe fn event_elapsed(&self, start: Handle, end: Handle) -> Result<Duration> {
        let _current = self.enter()?;
        let mut milliseconds = 0f32;
        // SAFETY: as said above.
        unsafe {
            self.driver().cuEventSynchronize(end.cast())?;
            self.driver().cuEventElapsedTime(&raw mut milliseconds, start.cast(), end.cast())?;
        }
        Ok(Duration::from_secs_f64(f64::from(milliseconds.max(0.0)) / 1e3))
    }

    fn is_binary(&self, bytes: &[u8]) -> bool {
        bytes.starts_with(b"\x7fELF")
    }
    unsafe fn module_load(&self, binary: &[u8]) -> Result<Handle> {
        let _current = self.enter()?;
        let mut module = std::ptr::null_mut();
        // SAFETY: as said above.
        unsafe { self.driver().cuModuleLoadData(&raw mut module, binary.as_ptr().cast())? };
        Ok(module.cast())
    }
    unsafe fn module_unload(&self, module: Handle) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuModuleUnload(module.cast()) }
    }
    unsafe fn module_function(&self, module: Handle, name: &CStr, shared_bytes: u32) -> Result<Handle> {
        let _current = self.enter()?;
        let mut function = std::ptr::null_mut();
        // SAFETY: as said above.
        unsafe { self.driver().cuModuleGetFunction(&raw mut function, module.cast(), name.as_ptr())? };
        // Above 48 KiB a kernel has to be told.
        if shared_bytes > 48 * 1024 {
            let attribute = CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: a live function.
            unsafe { self.driver().cuFuncSetAttribute(function, attribute, shared_bytes as i32)? };
        }
        Ok(function.cast())
    }
    unsafe fn launch(
        &self,
        function: Handle,
        launch: &Launch,
        shared_bytes: u32,
        stream: Stream,
        params: &mut [*mut c_void],
    ) -> Result<()> {
        let mut programmatic = CUlaunchAttributeValue { pad: [0; 64] };
        programmatic.programmaticStreamSerializationAllowed = launch.programmatic.into();
        let mut cluster = CUlaunchAttributeValue { pad: [0; 64] };
        cluster.clusterDim = CUlaunchAttributeValue_union__bindgen_ty_1 { x: launch.cluster, y: 1, z: 1 };
        // A device that does not know an attribute must not be handed it.
        let hopper = self.facts().compute_capability >= (9, 0);
        let mut attributes: Vec<CUlaunchAttribute> = [
            (
                launch.programmatic && hopper,
                CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
                programmatic,
            ),
            (launch.cluster > 1 && hopper, CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, cluster),
        ]
        .into_iter()
        .filter(|(wanted, ..)| *wanted)
        .map(|(_, id, value)| CUlaunchAttribute { id, pad: [0; 4], value })
        .collect();
        let config = CUlaunchConfig {
            gridDimX: launch.grid[0],
            gridDimY: launch.grid[1],
            gridDimZ: launch.grid[2],
            blockDimX: launch.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared_bytes,
            hStream: raw(stream),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        let _current = self.enter()?;
        // SAFETY: the configuration and its attributes live through the call; the rest is the caller's promise.
        unsafe {
            let extra = std::ptr::null_mut();
            self.driver().cuLaunchKernelEx(&raw const config, function.cast(), params.as_mut_ptr(), extra)
        }
    }

    unsafe fn capture_begin(&self, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // Other threads may allocate meanwhile; what is captured here does not.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: as said above.
        unsafe { self.driver().cuStreamBeginCapture_v2(raw(stream), mode) }
    }
    unsafe fn capture_end(&self, stream: Stream, discard: bool) -> Result<(Handle, Handle)> {
        let _current = self.enter()?;
        let (mut graph, mut exec) = (std::ptr::null_mut(), std::ptr::null_mut());
        // SAFETY: as said above; the graph was just made, and is destroyed where it makes no executable.
        unsafe {
            self.driver().cuStreamEndCapture(raw(stream), &raw mut graph)?;
            if !discard && let Err(e) = self.driver().cuGraphInstantiateWithFlags(&raw mut exec, graph, 0) {
                let _ = self.driver().cuGraphDestroy(graph);
                return Err(e);
            }
        }
        Ok((graph.cast(), exec.cast()))
    }
    unsafe fn graph_launch(&self, exec: Handle, stream: Stream) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe { self.driver().cuGraphLaunch(exec.cast(), raw(stream)) }
    }
    unsafe fn graph_destroy(&self, graph: Handle, exec: Handle) -> Result<()> {
        let _current = self.enter()?;
        // SAFETY: as said above.
        unsafe {
            if !exec.is_null() {
                self.driver().cuGraphExecDestroy(exec.cast())?;
            }
            if graph.is_null() { Ok(()) } else { self.driver().cuGraphDestroy(graph.cast()) }
        }
    }
}
