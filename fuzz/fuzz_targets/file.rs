//! Bytes that claim to be a golden file: an error or a valid call, never a panic.
#![no_main]

use libfuzzer_sys::fuzz_target;
use polymla::Device;
use polymla::conformance::{Layout, golden};

fuzz_target!(|bytes: &[u8]| {
    if let Ok(call) = golden::parse("fuzz".into(), bytes) {
        call.inputs().unwrap().validate(&call.problem, Device::Host).unwrap();
        for layout in [Layout::Fused, Layout::Split] {
            if let Ok(other) = call.with_layout(layout) {
                other.inputs().unwrap().validate(&other.problem, Device::Host).unwrap();
            }
        }
    }
});
