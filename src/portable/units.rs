// How the portable kernels are compiled for a vendor whose compiler is clang. Included by build.rs too.

/// The element types that a binary is made for: its name, and what it is compiled with.
pub(crate) const ELEMENTS: [(&str, &str); 2] = [("bf16", "-DPOLYMLA_ONLY_BF16"), ("f16", "-DPOLYMLA_ONLY_F16")];

/// The tile class of an AMD or Hygon architecture, in KiB; `None` where its waves are not 64 lanes wide or it is unknown.
#[allow(dead_code, reason = "for the HIP backend; build.rs includes this file too")]
pub(crate) fn hip_class(arch: &str) -> Option<u32> {
    let digits = arch.strip_prefix("gfx9")?;
    let known = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    known.then_some(if arch == "gfx950" { 163 } else { 64 })
}

/// The tile class of an NVIDIA architecture, in KiB; `None` where it is unknown.
#[allow(dead_code, reason = "for build.rs")]
pub(crate) fn cuda_class(arch: &str) -> Option<u32> {
    Some(match arch {
        "sm_75" => 64,
        "sm_80" | "sm_87" => 163,
        "sm_86" | "sm_89" | "sm_120" | "sm_121" => 99,
        "sm_90" | "sm_90a" | "sm_100" | "sm_100a" | "sm_103" | "sm_103a" => 227,
        _ => return None,
    })
}

/// What decides the code: standard, optimisation, class, elements.
pub(crate) fn options(kib: u32, element: &str) -> Vec<String> {
    vec!["-std=c++17".into(), "-O3".into(), format!("-DPOLYMLA_SMEM_KIB={kib}"), element.into()]
}

/// Lanes of a warp of every CUDA device.
#[allow(dead_code, reason = "for the CUDA backend; build.rs includes this file too")]
pub(crate) const CUDA_WARP: u32 = 32;

/// What is compiled for a device of this compute capability. Features of their own let warps of some trade registers.
#[allow(dead_code, reason = "for the CUDA backend; build.rs includes this file too")]
pub(crate) fn cuda_arch(major: u32, minor: u32) -> String {
    format!("sm_{major}{minor}{}", if matches!((major, minor), (9, 0) | (10, 0 | 3)) { "a" } else { "" })
}

/// What NVRTC is told: architecture (`sm_90a`), class, elements.
#[allow(dead_code, reason = "for the CUDA backend; build.rs includes this file too")]
pub(crate) fn nvrtc_options(arch: &str, kib: u32, element: &str) -> Vec<String> {
    vec!["-std=c++17".into(), format!("--gpu-architecture={arch}"), format!("-DPOLYMLA_SMEM_KIB={kib}"), element.into()]
}

/// What hiprtc is told beside its defaults.
#[allow(dead_code, reason = "for the HIP backend; build.rs includes this file too")]
pub(crate) fn hiprtc_options(arch: &str, kib: u32, element: &str) -> Vec<String> {
    let mut options = options(kib, element);
    options.push(format!("--offload-arch={arch}"));
    options
}

/// The lanes of a warp and the tile class of a Moore Threads architecture; `None` where it is unknown.
#[allow(dead_code, reason = "for the MUSA backend; build.rs includes this file too")]
pub(crate) fn musa_shape(arch: &str) -> Option<(u32, u32)> {
    match arch {
        "mp_21" | "mp_22" => Some((128, 28)),
        "mp_31" => Some((32, 64)),
        _ => None,
    }
}

/// What libmtrtc is told. The lanes of a warp follow from the class: only the smallest has 128.
#[allow(dead_code, reason = "for the MUSA backend; build.rs includes this file too")]
pub(crate) fn musa_options(arch: &str, kib: u32, element: &str) -> Vec<String> {
    let mut options = options(kib, element);
    options.push(format!("-DPM_WARP={}", if kib == 28 { 128 } else { 32 }));
    options.push(format!("--offload-arch={arch}"));
    options
}

/// What mcrtc is told: nothing about the architecture, which it takes from the device.
#[allow(dead_code, reason = "for the MACA backend; build.rs includes this file too")]
pub(crate) fn maca_options(_arch: &str, kib: u32, element: &str) -> Vec<String> {
    options(kib, element)
}

/// What CoreX's clang is told.
#[allow(dead_code, reason = "for the CoreX backend; build.rs includes this file too")]
pub(crate) fn corex_options(arch: &str, kib: u32, element: &str) -> Vec<String> {
    let mut options = options(kib, element);
    options.push(format!("--cuda-gpu-arch={arch}"));
    options
}

/// The name of a binary, without its extension.
pub(crate) fn binary_name(vendor: &str, arch: &str, kib: u32, element: &str) -> String {
    format!("{vendor}-{element}-{arch}-{kib}k")
}

/// What clang and hipcc are told beside [`hiprtc_options`]: the source needs no headers and no library of the platform.
#[allow(dead_code, reason = "for the command line and for build.rs")]
pub(crate) const CLANG_OPTIONS: [&str; 6] =
    ["-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib"];
