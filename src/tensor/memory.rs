//! What tensors and workspaces lie in: element types, devices, and memory named by address or by a platform's object.

use std::any::Any;
use std::fmt;

use half::{bf16, f16};

/// Element types.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum DType {
    /// bfloat16.
    Bf16,
    /// IEEE binary16.
    F16,
    /// IEEE binary32.
    F32,
    /// 32-bit signed integer: block tables and lengths.
    I32,
}

impl DType {
    /// Bytes an element takes.
    pub const fn size(self) -> usize {
        match self {
            DType::Bf16 | DType::F16 => 2,
            DType::F32 | DType::I32 => 4,
        }
    }

    /// The lower-case name: `bf16`, `f16`, `f32`, `i32`.
    pub const fn name(self) -> &'static str {
        match self {
            DType::Bf16 => "bf16",
            DType::F16 => "f16",
            DType::F32 => "f32",
            DType::I32 => "i32",
        }
    }
}

impl fmt::Display for DType {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A Rust type that a tensor can hold.
pub trait Element: bytemuck::Pod + Send + Sync + 'static {
    /// Its [`DType`].
    const DTYPE: DType;
}
impl Element for bf16 {
    const DTYPE: DType = DType::Bf16;
}
impl Element for f16 {
    const DTYPE: DType = DType::F16;
}
impl Element for f32 {
    const DTYPE: DType = DType::F32;
}
impl Element for i32 {
    const DTYPE: DType = DType::I32;
}

/// Where memory lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Device {
    /// Memory of this process.
    Host,
    /// Device number `ordinal` of the platform a backend of that name drives (`cuda`, `hip`, `wgpu`, ...).
    Accelerator {
        /// The platform.
        platform: &'static str,
        /// The device's number there.
        ordinal: u32,
    },
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Host => f.write_str("host"),
            Device::Accelerator { platform, ordinal } => write!(f, "{platform}:{ordinal}"),
        }
    }
}

/// The memory under a tensor.
#[derive(Clone, Copy)]
pub(crate) enum Memory<'a> {
    /// An address: of this process on [`Device::Host`], of the device elsewhere.
    Address(u64),
    /// A buffer object of a platform without addresses (`wgpu::Buffer`), and the byte the tensor starts at.
    #[allow(dead_code, reason = "read by backends whose platform has no addresses")]
    Object(&'a (dyn Any + Send + Sync), u64),
}

impl<'a> Memory<'a> {
    /// The address; `None` on platforms without addresses.
    pub(crate) fn address(&self) -> Option<u64> {
        match self {
            Memory::Address(a) => Some(*a),
            Memory::Object(..) => None,
        }
    }

    /// The buffer object and the byte offset in it; `None` where memory has addresses.
    pub(crate) fn object(&self) -> Option<(&'a (dyn Any + Send + Sync), u64)> {
        match self {
            Memory::Object(o, offset) => Some((*o, *offset)),
            Memory::Address(_) => None,
        }
    }
}
