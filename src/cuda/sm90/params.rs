//! What the kernels take: `backends/sm90/params.h` in Rust, field by field.

use cudarc::driver::sys::CUtensorMap;

/// A tensor map, passed to kernels by value.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub(super) struct TensorMap(pub(super) CUtensorMap);

/// `polymla::DecodeParams`. Strides count elements; addresses are of the device.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub(super) struct DecodeParams {
    pub(super) q_nope: u64,
    pub(super) q_pe: u64,
    pub(super) q_nope_strides: [i64; 3],
    pub(super) q_pe_strides: [i64; 3],
    pub(super) ckv: u64,
    pub(super) kpe: u64,
    pub(super) ckv_strides: [i64; 3],
    pub(super) kpe_strides: [i64; 3],
    pub(super) block_table: u64,
    pub(super) block_table_stride_b: i64,
    pub(super) cache_seqlens: u64,
    pub(super) visible_lens: u64,
    pub(super) visible_lens_stride_b: i64,
    pub(super) out: u64,
    pub(super) out_strides: [i64; 4],
    pub(super) lse: u64,
    pub(super) lse_strides: [i64; 3],
    pub(super) parts: u64,
    pub(super) num_splits: u64,
    pub(super) owners: u64,
    pub(super) partial_out: u64,
    pub(super) partial_rows: u64,
    pub(super) status: u64,
    pub(super) b: i32,
    pub(super) s_q: i32,
    pub(super) h_q: i32,
    pub(super) h_kv: i32,
    pub(super) heads_per_kv: i32,
    pub(super) m_tiles: i32,
    pub(super) num_parts: i32,
    pub(super) page_size: i32,
    pub(super) num_pages: i32,
    pub(super) max_pages_per_seq: i32,
    pub(super) causal: i32,
    pub(super) fixed_split_blocks: i32,
    pub(super) flags: i32,
    pub(super) scale_log2: f32,
    pub(super) heads_magic: u32,
    pub(super) q_box_rows: i32,
}

/// `FLAG_OUT_VEC16`: out is 16-byte aligned and its innermost stride is 1 and the others are multiples of 8.
pub(super) const FLAG_OUT_VEC16: i32 = 1;

/// `polymla::ScheduleParams`.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[repr(C)]
pub(super) struct ScheduleParams {
    pub(super) cache_seqlens: u64,
    pub(super) parts: u64,
    pub(super) num_splits: u64,
    pub(super) scratch: u64,
    pub(super) b: i32,
    pub(super) num_parts: i32,
    pub(super) max_len: i32,
    pub(super) fixed_split_blocks: i32,
    pub(super) cost_segment: i32,
    pub(super) cost_split: i32,
    pub(super) cost_combine: i32,
    pub(super) min_split_blocks: i32,
}

const _: () = {
    assert!(size_of::<DecodeParams>() == 8 * 36 + 4 * 16);
    assert!(size_of::<ScheduleParams>() == 64);
    assert!(size_of::<TensorMap>() == 128 && align_of::<TensorMap>() == 64);
    assert!(size_of::<crate::schedule::PartMetadata>() == 32);
};

#[cfg(test)]
mod tests {
    use std::collections::HashMap;
    use std::mem::offset_of;

    use super::*;

    /// Byte offsets of a struct's fields in params.h, by name; the header promises that nothing is padded.
    fn offsets(name: &str) -> (HashMap<String, usize>, usize) {
        let files = super::super::built::FILES;
        let text = files.iter().find(|(file, _)| *file == "params.h").expect("params.h").1;
        let body = text.split_once(&format!("struct {name} {{")).expect("the struct").1;
        let body = body.split_once("};").expect("its end").0;
        let without_comments: String = body.lines().map(|line| line.split("//").next().unwrap_or("")).collect();
        let (mut found, mut at) = (HashMap::new(), 0);
        for declaration in without_comments.split(';').map(str::trim).filter(|d| !d.is_empty()) {
            let first_name = declaration.split(',').next().and_then(|d| d.rsplit([' ', '*']).next()).expect("a name");
            let kind = declaration[..declaration.find(first_name).expect("found above")].trim();
            let size = match kind {
                "int" | "u32" | "float" => 4,
                "i64" => 8,
                pointer if pointer.ends_with('*') => 8,
                other => panic!("{name}: a field of type {other:?}"),
            };
            let names = declaration.trim_start_matches(kind).split(',').map(str::trim);
            for field in names {
                found.insert(field.to_string(), at);
                at += size;
            }
        }
        (found, at)
    }

    macro_rules! same {
        ($type:ident: $($field:ident = $name:literal),* $(,)?) => {{
            let (header, size) = offsets(stringify!($type));
            $(assert_eq!(Some(&offset_of!($type, $field)), header.get($name), "{}", $name);)*
            assert_eq!(size, size_of::<$type>());
        }};
    }

    #[test]
    fn decode_params_lie_as_in_the_header() {
        same!(DecodeParams:
            q_nope = "q_nope", q_pe = "q_pe", q_nope_strides = "q_nope_stride_b", q_pe_strides = "q_pe_stride_b",
            ckv = "ckv", kpe = "kpe", ckv_strides = "ckv_stride_page", kpe_strides = "kpe_stride_page",
            block_table = "block_table", block_table_stride_b = "block_table_stride_b",
            cache_seqlens = "cache_seqlens", visible_lens = "visible_lens",
            visible_lens_stride_b = "visible_lens_stride_b", out = "out", out_strides = "out_stride_b",
            lse = "lse", lse_strides = "lse_stride_b", parts = "parts", num_splits = "num_splits",
            owners = "owners", partial_out = "partial_out", partial_rows = "partial_rows", status = "status", b = "b", s_q = "s_q",
            h_q = "h_q", h_kv = "h_kv", heads_per_kv = "heads_per_kv", m_tiles = "m_tiles", num_parts = "num_parts",
            page_size = "page_size", num_pages = "num_pages", max_pages_per_seq = "max_pages_per_seq",
            causal = "causal", fixed_split_blocks = "fixed_split_blocks", flags = "flags", scale_log2 = "scale_log2",
            heads_magic = "heads_magic", q_box_rows = "q_box_rows",
        );
    }

    #[test]
    fn order_within_groups_of_strides() {
        let (header, _) = offsets("DecodeParams");
        for group in [
            ["q_nope_stride_b", "q_nope_stride_s", "q_nope_stride_h"],
            ["q_pe_stride_b", "q_pe_stride_s", "q_pe_stride_h"],
            ["ckv_stride_page", "ckv_stride_token", "ckv_stride_head"],
            ["kpe_stride_page", "kpe_stride_token", "kpe_stride_head"],
            ["out_stride_b", "out_stride_s", "out_stride_h"],
            ["out_stride_s", "out_stride_h", "out_stride_d"],
            ["lse_stride_b", "lse_stride_h", "lse_stride_s"],
        ] {
            let at: Vec<usize> = group.iter().map(|name| header[*name]).collect();
            assert_eq!(at, [at[0], at[0] + 8, at[0] + 16], "{group:?}");
        }
    }

    #[test]
    fn schedule_params_lie_as_in_the_header() {
        same!(ScheduleParams:
            cache_seqlens = "cache_seqlens", parts = "parts", num_splits = "num_splits", scratch = "scratch",
            b = "b", num_parts = "num_parts", max_len = "max_len", fixed_split_blocks = "fixed_split_blocks",
            cost_segment = "cost_segment", cost_split = "cost_split", cost_combine = "cost_combine",
            min_split_blocks = "min_split_blocks",
        );
    }
}
