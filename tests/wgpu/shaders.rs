//! Every variant of every kernel is valid WGSL, with no more than its path's capabilities and a browser's limits.

use polymla::DType;
use polymla::wgpu::api::naga;
use polymla::wgpu::api::naga::valid::{Capabilities, ValidationFlags, Validator};
use polymla::wgpu::shaders::{Build, FILES, Kernel, Path, source};

const DTYPES: [DType; 3] = [DType::Bf16, DType::F16, DType::F32];
const BUILDS: [Build; 3] = [Build::Any, Build::Full, Build::Remains];

/// What WebGPU has without any feature: `unpack2x16float`, which naga counts as a capability.
const CORE: Capabilities = Capabilities::SHADER_FLOAT16_IN_FLOAT32;

fn capabilities(path: Path) -> Capabilities {
    let extra = match path {
        Path::Plain => Capabilities::empty(),
        Path::Subgroups => Capabilities::SUBGROUP,
        Path::NativeF16 => Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16,
        _ if path.is_emulated() => Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16,
        Path::Matrix64 => capabilities(Path::Matrix32) | Capabilities::MEMORY_DECORATION_VOLATILE,
        _ => Capabilities::SUBGROUP | Capabilities::SHADER_FLOAT16 | Capabilities::COOPERATIVE_MATRIX,
    };
    CORE | extra
}

fn module(kernel: Kernel, path: Path, dtype: DType, build: Build) -> naga::Module {
    let text = source(kernel, path, dtype, build);
    let mut options = naga::front::wgsl::Options::new();
    options.capabilities = capabilities(path);
    naga::front::wgsl::Frontend::new_with_options(options)
        .parse(&text)
        .unwrap_or_else(|e| panic!("{kernel:?} {path:?} {dtype}: {}", e.emit_to_string(&text)))
}

/// Bytes of workgroup memory.
fn workgroup_bytes(module: &naga::Module) -> u32 {
    let mut layouter = naga::proc::Layouter::default();
    layouter.update(module.to_ctx()).expect("types have sizes");
    let shared = module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup);
    shared.map(|(_, v)| layouter[v.ty].size.next_multiple_of(16)).sum()
}

#[test]
fn every_variant_is_valid_and_keeps_to_its_limits() {
    let mut seen = 0;
    for path in Path::ALL {
        for dtype in DTYPES.into_iter().filter(|dtype| path.takes(*dtype)) {
            for (kernel, build) in Kernel::ALL.into_iter().flat_map(|k| BUILDS.map(|build| (k, build))) {
                if (build == Build::Full && !path.is_matrix() && kernel != Kernel::Combine)
                    || (build == Build::Remains && path != Path::Subgroups)
                {
                    continue;
                }
                let what = format!("{kernel:?} {path:?} {dtype} {build:?}");
                let module = module(kernel, path, dtype, build);
                let validated = Validator::new(ValidationFlags::all(), capabilities(path)).validate(&module);
                let info = validated.unwrap_or_else(|e| panic!("{what}: {e:?}"));
                // What a driver would be given. naga refuses here what it has no code for.
                let options = naga::back::spv::Options {
                    lang_version: (1, 4),
                    zero_initialize_workgroup_memory: naga::back::spv::ZeroInitializeWorkgroupMemoryMode::None,
                    force_loop_bounding: false,
                    ..Default::default()
                };
                let spirv = naga::back::spv::write_vec(&module, &info, &options, None);
                let spirv = spirv.unwrap_or_else(|e| panic!("{what}: {e}"));
                if let Some(folder) = std::env::var_os("POLYMLA_SPIRV_DIR") {
                    let file = format!("{}-{}-{dtype}-{build:?}.spv", kernel.name(), path.name());
                    std::fs::write(std::path::Path::new(&folder).join(file), bytemuck::cast_slice::<u32, u8>(&spirv))
                        .expect("the folder can be written");
                }
                let entry = &module.entry_points[0];
                assert_eq!((module.entry_points.len(), entry.name.as_str()), (1, kernel.name()), "{what}");

                let storage: Vec<_> = module
                    .global_variables
                    .iter()
                    .filter_map(|(_, v)| match v.space {
                        naga::AddressSpace::Storage { access } => {
                            Some((v.binding.as_ref()?.binding, !access.contains(naga::StorageAccess::STORE)))
                        }
                        _ => None,
                    })
                    .collect();
                // WebGPU grants 8.
                assert!(storage.len() <= 8 && storage.len() == kernel.read_only().len(), "{what}: {storage:?}");
                for (binding, read_only) in storage {
                    assert_eq!(read_only, kernel.read_only()[binding as usize - 1], "{what}, binding {binding}");
                }
                assert!(
                    entry.workgroup_size.iter().product::<u32>() <= if path.is_matrix() { 512 } else { 256 },
                    "{what}"
                );
                // Matrices are no part of WebGPU; the host asks for so much before it takes their path.
                let limit = match path {
                    _ if path.is_emulated() => 24 << 10,
                    _ if path.is_matrix() => 48 << 10,
                    _ => 16 << 10,
                };
                if path.is_matrix() && kernel == Kernel::Decode {
                    for (_, v) in
                        module.global_variables.iter().filter(|(_, v)| v.space == naga::AddressSpace::WorkGroup)
                    {
                        // A driver lays them out one behind the other, and matrices need 16 bytes' alignment.
                        let size = module.types[v.ty].inner.size(module.to_ctx());
                        assert_eq!(size % 16, 0, "{what}: {:?}", v.name);
                    }
                }
                assert!(workgroup_bytes(&module) <= limit, "{what}: {} bytes", workgroup_bytes(&module));
                seen += 1;
            }
        }
    }
    assert!(seen >= 28, "{seen} variants");
}

/// A path that forgets to ask for an extension would only be found out by a device without it.
#[test]
fn paths_differ_and_need_what_they_say() {
    let plain = source(Kernel::Decode, Path::Plain, DType::F16, Build::Any);
    for path in [Path::Subgroups, Path::NativeF16, Path::Matrix16, Path::Matrix32, Path::Matrix64] {
        assert_ne!(source(Kernel::Decode, path, DType::F16, Build::Any), plain);
        let module = module(Kernel::Decode, path, DType::F16, Build::Any);
        assert!(Validator::new(ValidationFlags::all(), CORE).validate(&module).is_err(), "{path:?}");
    }
}

#[test]
fn the_template_leaves_no_line_of_its_own_and_every_file_is_used() {
    for path in Path::ALL {
        for dtype in DTYPES.into_iter().filter(|dtype| path.takes(*dtype)) {
            for kernel in Kernel::ALL {
                assert!(
                    !source(kernel, path, dtype, if path.is_matrix() { Build::Full } else { Build::Any })
                        .contains("//#"),
                    "{kernel:?} {path:?} {dtype}"
                );
            }
        }
    }
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("shaders");
    let on_disk = std::fs::read_dir(folder).expect("shaders").flatten().map(|e| e.file_name().into_string().unwrap());
    let mut on_disk: Vec<String> = on_disk.collect();
    let mut built_in: Vec<&str> = FILES.iter().map(|(name, _)| *name).collect();
    on_disk.sort();
    built_in.sort_unstable();
    assert_eq!(on_disk, built_in);
}
