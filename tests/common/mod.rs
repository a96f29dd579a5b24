//! What several test files share.

use std::sync::OnceLock;

use polymla::conformance::open_all;
use polymla::cpu::{CpuBackend, Isa};
use polymla::{HostBackend, Problem};

/// Every backend of this build, and the CPU backend once more with every instruction set this machine has. Opened once
/// in a process: devices and their compilers take their time.
pub fn backends() -> &'static [Box<dyn HostBackend>] {
    static BACKENDS: OnceLock<Vec<Box<dyn HostBackend>>> = OnceLock::new();
    BACKENDS.get_or_init(|| {
        let mut backends = open_all().unwrap();
        for isa in Isa::available() {
            backends.push(Box::new(CpuBackend::with_isa(isa).unwrap()));
        }
        backends
    })
}

/// Whether to run a problem on a backend. The CPU backend takes everything; others may refuse, aloud.
pub fn takes(backend: &dyn HostBackend, problem: &Problem) -> bool {
    match backend.supports(problem) {
        Ok(()) => true,
        Err(refusal) => {
            assert_ne!(backend.info().name, "cpu", "{refusal}");
            eprintln!("SKIP {problem}: {refusal}");
            false
        }
    }
}
