//! What a library that stands in for a vendor's has to know of it: a file for each vendor beside this one. Two read them:
//! `forward/`, the vendor's library over NVIDIA's (tier T4), and `mod.rs`, which writes them down for `harness.cpp` (T3).

#![allow(dead_code, reason = "each reader needs a part of it")]

/// A vendor: how its driver and its run-time compiler differ from the others', beside the names.
#[derive(Clone, Copy)]
pub struct Vendor {
    /// Whether contexts are made current, and words of codes stored through a pointer, as by CUDA's driver; or devices are, and
    /// words are returned.
    pub contexts: bool,
    /// Whether it has a run-time compiler.
    pub compiler: bool,
    /// The numbers of device attributes: lanes of a warp, bytes of shared memory a block, multiprocessors.
    pub warp_attribute: i32,
    pub shared_attribute: i32,
    pub processors_attribute: i32,
    /// How a device says what it is.
    pub arch: Arch,
    /// The flags that a host allocation must have.
    pub host_flags: u32,
    /// How the compiler's option for the architecture begins, which must be there.
    pub arch_option: &'static str,
    /// Source before ours: the vendor's builtins in CUDA's words.
    pub prelude: &'static str,
    /// What a device may be; the first unless another is asked for.
    pub devices: &'static [Device],
}

/// How a device says what it is.
#[derive(Clone, Copy)]
pub enum Arch {
    /// By a name that stands somewhere in a struct of so many bytes.
    Properties { bytes: usize, at: usize, name: &'static str },
    /// By the attributes of these numbers: the major and the minor part of the compute capability.
    Capability([i32; 2]),
}

/// What a device calls its own.
#[derive(Clone, Copy)]
pub struct Device {
    pub warp: u32,
    pub shared_kib: u32,
    pub capability: [i32; 2],
}

/// A vendor's file: its names for the functions of the driver table (src/driver/table.rs) and of the run-time compiler
/// (src/kernels/rtc.rs) by our names for them, and the rest. `symbol!(alloc)` and `symbol!(compiler log)` are the names again.
macro_rules! vendor {
    (driver { $($name:ident = $symbol:literal;)* } compiler { $($part:ident = $of_compiler:literal;)* } $vendor:expr) => {
        #[allow(unused_macros, reason = "tests read the lists")]
        macro_rules! symbol {
            $(($name) => { $symbol };)*
            $((compiler $part) => { $of_compiler };)*
        }
        #[allow(dead_code, reason = "the library exports by the macro")]
        pub const DRIVER: &[(&str, &str)] = &[$((stringify!($name), $symbol),)*];
        #[allow(dead_code, reason = "the library exports by the macro")]
        pub const COMPILER: &[(&str, &str)] = &[$((stringify!($part), $of_compiler),)*];
        pub const VENDOR: Vendor = $vendor;
    };
}
