// How the portable kernels are compiled for a vendor whose compiler is clang. Included by build.rs too.

/// The element types that a binary is made for: its name, and what it is compiled with.
pub(crate) const ELEMENTS: [(&str, &str); 2] = [("bf16", "-DPOLYMLA_ONLY_BF16"), ("f16", "-DPOLYMLA_ONLY_F16")];

/// The tile class of an AMD or Hygon architecture, in KiB; `None` where its waves are not 64 lanes wide or it is unknown.
pub(crate) fn hip_class(arch: &str) -> Option<u32> {
    let digits = arch.strip_prefix("gfx9")?;
    let known = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    known.then_some(if arch == "gfx950" { 163 } else { 64 })
}

/// What decides the code: standard, optimisation, class, elements.
pub(crate) fn options(kib: u32, element: &str) -> Vec<String> {
    vec!["-std=c++17".into(), "-O3".into(), format!("-DPOLYMLA_SMEM_KIB={kib}"), element.into()]
}

/// The name of a binary, without its extension.
pub(crate) fn binary_name(vendor: &str, arch: &str, kib: u32, element: &str) -> String {
    format!("{vendor}-{element}-{arch}-{kib}k")
}

/// What clang and hipcc are told beside [`options`]: the source needs no headers and no library of the platform.
#[allow(dead_code, reason = "for the command line and for build.rs")]
pub(crate) fn clang_options(arch: &str) -> Vec<String> {
    let fixed = ["-x", "hip", "--cuda-device-only", "--no-gpu-bundle-output", "-nogpuinc", "-nogpulib"];
    fixed.iter().map(|o| (*o).to_string()).chain([format!("--offload-arch={arch}")]).collect()
}
