//! SPIR-V for kernels that multiply matrices: naga's, with what its memory model asks for.
//!
//! Cooperative matrices come with the Vulkan memory model. Under that, memory which invocations share must say so: loads
//! and stores are NonPrivatePointer, barriers make stores available and visible. naga 30 declares the model and leaves
//! both out (gfx-rs/wgpu#8805), so that nothing orders what goes through shared memory. Here they are added, word by
//! word. WGSL stays the source.

use std::collections::HashMap;

use ::wgpu::naga;

/// Words before the first instruction; the fourth is the bound of ids.
const HEADER: usize = 5;
const BOUND: usize = 3;

const OP_TYPE_INT: u32 = 21;
const OP_TYPE_POINTER: u32 = 32;
const OP_CONSTANT: u32 = 43;
const OP_FUNCTION: u32 = 54;
const OP_FUNCTION_PARAMETER: u32 = 55;
const OP_VARIABLE: u32 = 59;
const OP_LOAD: u32 = 61;
const OP_STORE: u32 = 62;
const OP_ACCESS_CHAIN: u32 = 65;
const OP_IN_BOUNDS_ACCESS_CHAIN: u32 = 66;
const OP_CONTROL_BARRIER: u32 = 224;
const OP_COOPERATIVE_MATRIX_LOAD: u32 = 4457;
const OP_COOPERATIVE_MATRIX_STORE: u32 = 4458;

const STORAGE_CLASS_WORKGROUP: u32 = 4;
const NON_PRIVATE_POINTER: u32 = 0x20;
const MAKE_AVAILABLE_AND_VISIBLE: u32 = 0x2000 | 0x4000;

/// The SPIR-V of a WGSL kernel, ordered as WGSL orders it.
///
/// # Errors
/// What naga said.
pub fn compile(text: &str) -> Result<Vec<u32>, String> {
    let mut options = naga::front::wgsl::Options::new();
    let capabilities = naga::valid::Capabilities::all();
    options.capabilities = capabilities;
    let module = naga::front::wgsl::Frontend::new_with_options(options).parse(text);
    let module = module.map_err(|e| e.emit_to_string(text))?;
    let mut validator = naga::valid::Validator::new(naga::valid::ValidationFlags::all(), capabilities);
    let info = validator.validate(&module).map_err(|e| e.emit_to_string(text))?;
    let options = naga::back::spv::Options {
        lang_version: (1, 5),
        flags: naga::back::spv::WriterFlags::empty(),
        bounds_check_policies: naga::proc::BoundsCheckPolicies {
            index: naga::proc::BoundsCheckPolicy::Restrict,
            buffer: naga::proc::BoundsCheckPolicy::Restrict,
            ..Default::default()
        },
        zero_initialize_workgroup_memory: naga::back::spv::ZeroInitializeWorkgroupMemoryMode::None,
        force_loop_bounding: false,
        ..Default::default()
    };
    let words = naga::back::spv::write_vec(&module, &info, &options, None).map_err(|e| e.to_string())?;
    order_shared_memory(&words).ok_or_else(|| "SPIR-V of an unexpected form".into())
}

/// Each instruction: its opcode and its words, the first of which has both the opcode and the length.
fn instructions(words: &[u32]) -> impl Iterator<Item = (u32, &[u32])> {
    let mut rest = words.get(HEADER..).unwrap_or_default();
    std::iter::from_fn(move || {
        let first = *rest.first()?;
        let (instruction, after) = rest.split_at_checked((first >> 16) as usize)?;
        rest = if instruction.is_empty() { &[] } else { after };
        (!instruction.is_empty()).then_some((first & 0xffff, instruction))
    })
}

/// The same module with NonPrivatePointer at every access to shared memory, and barriers that make stores available and
/// visible. None where the words are no module.
pub fn order_shared_memory(words: &[u32]) -> Option<Vec<u32>> {
    let mut bound = *words.get(BOUND)?;
    // Barriers name a constant; naga may use the same one as a number elsewhere, so that they get their own.
    let mut unsigned = None;
    let mut constants = HashMap::new();
    let mut semantics = HashMap::new();
    for (op, words) in instructions(words) {
        match (op, words) {
            (OP_TYPE_INT, [_, id, 32, 0]) => unsigned = Some(*id),
            (OP_CONSTANT, [_, ty, id, value]) if Some(*ty) == unsigned => {
                constants.insert(*id, *value);
            }
            (OP_CONTROL_BARRIER, [_, _, _, id]) => {
                if !semantics.contains_key(id) {
                    semantics.insert(*id, (bound, *constants.get(id)? | MAKE_AVAILABLE_AND_VISIBLE));
                    bound += 1;
                }
            }
            _ => {}
        }
    }

    let mut patched = words.get(..HEADER)?.to_vec();
    patched[BOUND] = bound;
    let mut shared_types = Vec::new();
    let mut shared = std::collections::HashSet::new();
    let mut written = false;
    for (op, words) in instructions(words) {
        if op == OP_FUNCTION && !written {
            written = true;
            let mut new: Vec<_> = semantics.values().collect();
            new.sort_unstable();
            for (id, value) in new {
                patched.extend([4 << 16 | OP_CONSTANT, unsigned?, *id, *value]);
            }
        }
        let mut copy = words.to_vec();
        match (op, words) {
            (OP_TYPE_POINTER, [_, id, STORAGE_CLASS_WORKGROUP, _]) => shared_types.push(*id),
            (OP_VARIABLE | OP_FUNCTION_PARAMETER | OP_ACCESS_CHAIN | OP_IN_BOUNDS_ACCESS_CHAIN, [_, ty, id, ..])
                if shared_types.contains(ty) =>
            {
                shared.insert(*id);
            }
            (OP_LOAD, [_, _, _, pointer])
            | (OP_STORE, [_, pointer, _])
            | (OP_COOPERATIVE_MATRIX_LOAD, [_, _, _, pointer, _, _])
            | (OP_COOPERATIVE_MATRIX_STORE, [_, pointer, _, _, _])
                if shared.contains(pointer) =>
            {
                copy.push(NON_PRIVATE_POINTER);
                copy[0] += 1 << 16;
            }
            (OP_CONTROL_BARRIER, [_, _, _, id]) => copy[3] = semantics.get(id)?.0,
            _ => {}
        }
        patched.extend(copy);
    }
    Some(patched)
}
