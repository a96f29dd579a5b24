//! Whether a binary is there to its end.
//!
//! Drivers take a binary by its address alone and read its length from the binary's own tables. So a file that was cut
//! short, as a copy that ran out of disk leaves it in a module folder, would have the driver read past our memory.

/// The header of a 64-bit ELF file, of a section and of a program segment.
const ELF_BYTES: usize = 64;
const SECTION_BYTES: usize = 64;
const SEGMENT_BYTES: usize = 56;
/// `SHT_NOBITS`: a section that has a size, and nothing in the file.
const NO_BITS: u64 = 8;
/// `SHT_LOOS`: from here on the types of sections are a platform's own, and so is what their sizes mean.
const OWN_TYPES: u64 = 0x6000_0000;
/// How a bundle of clang's begins: the number of its binaries follows, then where each lies.
const BUNDLE: &[u8] = b"__CLANG_OFFLOAD_BUNDLE__";

/// Whether everything that the binary's tables name lies inside it. What is no table known here counts as whole.
pub(crate) fn is_whole(binary: &[u8]) -> bool {
    match binary {
        // Class 2 is 64 bits, encoding 1 little-endian; drivers' binaries are nothing else.
        [0x7f, b'E', b'L', b'F', 2, 1, ..] => elf(binary).unwrap_or(false),
        _ if binary.starts_with(BUNDLE) => bundle(binary).unwrap_or(false),
        _ => true,
    }
}

/// A little-endian number of `bytes` bytes; `None` past the end.
fn number(binary: &[u8], at: usize, bytes: usize) -> Option<u64> {
    let field = binary.get(at..at.checked_add(bytes)?)?;
    Some(field.iter().rev().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn inside(binary: &[u8], offset: u64, bytes: u64) -> bool {
    offset.checked_add(bytes).is_some_and(|end| end <= binary.len() as u64)
}

/// The entries of a table of an ELF file, each at least `least` bytes; `None` where the table is not inside.
fn entries(binary: &[u8], table: u64, size: u64, count: u64, least: usize) -> Option<impl Iterator<Item = usize>> {
    let whole = inside(binary, table, size * count) && (count == 0 || size >= least as u64);
    whole.then(|| (0..count).map(move |i| (table + i * size) as usize))
}

fn elf(binary: &[u8]) -> Option<bool> {
    let field = |at, bytes| number(binary, at, bytes);
    if binary.len() < ELF_BYTES {
        return None;
    }
    let (segments, sections) = (field(32, 8)?, field(40, 8)?);
    for at in entries(binary, segments, field(54, 2)?, field(56, 2)?, SEGMENT_BYTES)? {
        if !inside(binary, field(at + 8, 8)?, field(at + 32, 8)?) {
            return None;
        }
    }
    for at in entries(binary, sections, field(58, 2)?, field(60, 2)?, SECTION_BYTES)? {
        let kind = field(at + 4, 4)?;
        if kind < OWN_TYPES && kind != NO_BITS && !inside(binary, field(at + 24, 8)?, field(at + 32, 8)?) {
            return None;
        }
    }
    Some(true)
}

fn bundle(binary: &[u8]) -> Option<bool> {
    let mut at = BUNDLE.len();
    for _ in 0..number(binary, at, 8)? {
        let [offset, bytes, name] = [8, 16, 24].map(|field| number(binary, at + field, 8));
        // A bundle in a bundle is none.
        let part = usize::try_from(offset?).ok().zip(usize::try_from(bytes?).ok());
        let part = part.and_then(|(offset, bytes)| binary.get(offset..offset.checked_add(bytes)?))?;
        if part.starts_with(b"\x7fELF") && !is_whole(part) {
            return None;
        }
        at = at.checked_add(24)?.checked_add(usize::try_from(name?).ok()?)?;
    }
    Some(true)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An ELF file of one segment and two sections, the second of which has nothing in the file.
    fn small_elf() -> Vec<u8> {
        let mut elf = vec![0u8; 64 + 56 + 32 + 2 * 64];
        let fields = [
            (0, 8, u64::from_le_bytes(*b"\x7fELF\x02\x01\x01\x00")),
            (32, 8, 64),
            (40, 8, 152),
            (54, 2, 56),
            (56, 2, 1),
            (58, 2, 64),
            (60, 2, 2),
            (64 + 8, 8, 120),
            (64 + 32, 8, 32),
            (152 + 4, 4, 1),
            (152 + 24, 8, 120),
            (152 + 32, 8, 32),
            (216 + 4, 4, NO_BITS),
            (216 + 24, 8, 152),
            (216 + 32, 8, 1 << 40),
        ];
        for (at, bytes, value) in fields {
            elf[at..at + bytes].copy_from_slice(&value.to_le_bytes()[..bytes]);
        }
        elf
    }

    fn bundle_of(part: &[u8]) -> Vec<u8> {
        let mut bundle = [BUNDLE, &1u64.to_le_bytes()].concat();
        let offset = bundle.len() + 24 + 3;
        for value in [offset, part.len(), 3] {
            bundle.extend_from_slice(&(value as u64).to_le_bytes());
        }
        [&bundle, &b"gfx"[..], part].concat()
    }

    #[test]
    fn binaries_cut_short_are_not_whole() {
        for binary in [small_elf(), bundle_of(&small_elf()), bundle_of(b"no ELF file")] {
            assert!(is_whole(&binary));
            for length in BUNDLE.len()..binary.len() {
                assert!(!is_whole(&binary[..length]), "cut to {length} of {}", binary.len());
            }
        }
        assert!(is_whole(b"CCOB, whose length is not known here"));
    }

    #[test]
    fn sizes_of_any_value_are_read_without_harm() {
        for binary in [small_elf(), bundle_of(&small_elf())] {
            for at in 6..binary.len() - 8 {
                let mut wrong = binary.clone();
                wrong[at..at + 8].fill(0xff);
                let _ = is_whole(&wrong);
            }
        }
        let mut long = small_elf();
        long[64 + 32] = 255;
        assert!(!is_whole(&long), "a segment beyond the end");
        let mut long = small_elf();
        long[152 + 33] = 1;
        assert!(!is_whole(&long), "a section beyond the end");
        long[152 + 7] = 0x70;
        assert!(is_whole(&long), "what a platform's own sections are, only the platform knows");
    }
}
