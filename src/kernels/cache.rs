//! Compiled kernels on disk, so that only the first start of a machine pays for compiling.
//!
//! A file is written under another name and renamed, so that a reader sees a whole one or none. It starts with its own
//! key and checksum: a file that was cut short, edited or renamed is taken for absent.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

/// Names the folder to keep compiled kernels in; empty keeps none.
pub const CACHE_VARIABLE: &str = "POLYMLA_CACHE_DIR";

const MAGIC: &[u8; 17] = b"polymla kernel 1\n";

/// What decides whether two compilations give the same binary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Key(u128);

impl Key {
    /// A key of these parts: sources, options, architecture, compiler version.
    pub(crate) fn new<'a>(parts: impl IntoIterator<Item = &'a [u8]>) -> Key {
        // Lengths go in too, so that bytes cannot move from one part to the next.
        Key(parts.into_iter().fold(FNV_OFFSET, |hash, part| fnv(fnv(hash, &(part.len() as u64).to_le_bytes()), part)))
    }
}

// FNV-1a of 128 bits: stable across releases of Rust, unlike the standard library's hasher. Nothing here is secret.
const FNV_OFFSET: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
const FNV_PRIME: u128 = 0x0000_0000_0100_0000_0000_0000_0000_013b;

fn fnv(hash: u128, bytes: &[u8]) -> u128 {
    bytes.iter().fold(hash, |hash, byte| (hash ^ u128::from(*byte)).wrapping_mul(FNV_PRIME))
}

/// The folder of compiled kernels.
#[derive(Debug, Clone)]
pub(crate) struct DiskCache {
    folder: PathBuf,
}

impl DiskCache {
    /// The folder that the environment names: [`CACHE_VARIABLE`], else `polymla` in the user's cache folder; `None`
    /// where there is neither. Never a folder that other users may write to, such as the system's temporary one.
    pub(crate) fn of_environment() -> Option<DiskCache> {
        Self::from_variables(|name| std::env::var_os(name))
    }

    fn from_variables(variable: impl Fn(&str) -> Option<OsString>) -> Option<DiskCache> {
        let set = |name| variable(name).filter(|v: &OsString| !v.is_empty()).map(PathBuf::from);
        let folder = match variable(CACHE_VARIABLE) {
            Some(folder) if folder.is_empty() => return None,
            Some(folder) => folder.into(),
            // A relative XDG_CACHE_HOME is to be ignored, says its specification.
            None => set("XDG_CACHE_HOME")
                .filter(|path| path.is_absolute())
                .or_else(|| set("HOME").map(|home| home.join(".cache")))
                .or_else(|| set("LOCALAPPDATA"))?
                .join("polymla"),
        };
        Some(DiskCache { folder })
    }

    fn path(&self, name: &str, key: Key) -> PathBuf {
        self.folder.join(format!("{name}-{:032x}.kernel", key.0))
    }

    /// The binary of that key, where a whole one is there.
    pub(crate) fn read(&self, name: &str, key: Key) -> Option<Vec<u8>> {
        let file = fs::read(self.path(name, key)).ok()?;
        let rest = file.strip_prefix(MAGIC)?.strip_prefix(&key.0.to_le_bytes())?;
        let (checksum, binary) = rest.split_at_checked(16)?;
        (checksum == fnv(FNV_OFFSET, binary).to_le_bytes()).then(|| binary.to_vec())
    }

    /// Keeps a binary. A cache that cannot be written costs time at the next start, nothing else; so no error.
    pub(crate) fn write(&self, name: &str, key: Key, binary: &[u8]) -> bool {
        let path = self.path(name, key);
        // Several threads may compile the same kernel, and processes of several containers have the same number.
        static WRITES: AtomicU64 = AtomicU64::new(0);
        let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
        let own = (std::process::id(), WRITES.fetch_add(1, Ordering::Relaxed), now);
        let partial = path.with_extension(format!("{}-{}-{:x}.partial", own.0, own.1, own.2));
        let written = fs::create_dir_all(&self.folder).and_then(|()| Self::write_file(&partial, key, binary));
        let kept = written.and_then(|()| fs::rename(&partial, &path)).is_ok();
        if !kept {
            let _ = fs::remove_file(&partial);
        }
        kept
    }

    fn write_file(path: &Path, key: Key, binary: &[u8]) -> std::io::Result<()> {
        let mut file = fs::File::create_new(path)?;
        for part in [&MAGIC[..], &key.0.to_le_bytes(), &fnv(FNV_OFFSET, binary).to_le_bytes(), binary] {
            file.write_all(part)?;
        }
        file.sync_all()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cache(name: &str) -> DiskCache {
        let folder = std::env::temp_dir().join(format!("polymla-cache-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        DiskCache { folder }
    }

    #[test]
    fn what_was_written_is_read_and_nothing_else() {
        let cache = cache("round");
        let key = Key::new([&b"source"[..], b"sm_90a"]);
        assert_eq!(cache.read("decode", key), None);
        assert!(cache.write("decode", key, b"binary"));
        assert_eq!(cache.read("decode", key).as_deref(), Some(&b"binary"[..]));
        assert_eq!(cache.read("decode", Key::new([&b"other"[..]])), None);
        // A renamed file still holds its own key.
        let other = Key::new([&b"third"[..]]);
        fs::copy(cache.path("decode", key), cache.path("decode", other)).expect("copy");
        assert_eq!(cache.read("decode", other), None);
        let left = fs::read_dir(&cache.folder).expect("folder").count();
        assert_eq!(left, 2, "no partial file stays behind");
        fs::remove_dir_all(&cache.folder).expect("clean up");
    }

    #[test]
    fn damaged_files_count_as_absent() {
        let cache = cache("damage");
        let key = Key::new([&b"source"[..]]);
        assert!(cache.write("decode", key, &[7; 1000]));
        let path = cache.path("decode", key);
        let whole = fs::read(&path).expect("written");
        for length in [0, 10, 16, 40, 48, whole.len() - 1] {
            fs::write(&path, &whole[..length]).expect("cut short");
            assert_eq!(cache.read("decode", key), None, "cut to {length}");
        }
        for at in [0, 20, 40, 500] {
            let mut damaged = whole.clone();
            damaged[at] ^= 1;
            fs::write(&path, damaged).expect("damage");
            assert_eq!(cache.read("decode", key), None, "byte {at} changed");
        }
        fs::remove_dir_all(&cache.folder).expect("clean up");
    }

    #[test]
    fn writers_of_one_key_do_not_disturb_each_other_nor_readers() {
        let cache = cache("threads");
        let key = Key::new([&b"source"[..]]);
        let binary = vec![7; 1 << 20];
        assert!(cache.write("decode", key, &binary));
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| (0..10).for_each(|_| assert!(cache.write("decode", key, &binary), "a write was lost")));
                scope.spawn(|| {
                    (0..50).for_each(|_| assert!(cache.read("decode", key).is_some(), "a reader saw half a file"));
                });
            }
        });
        assert_eq!(fs::read_dir(&cache.folder).expect("folder").count(), 1, "no partial file stays behind");
        fs::remove_dir_all(&cache.folder).expect("clean up");
    }

    #[test]
    fn parts_of_a_key_do_not_run_together() {
        assert_ne!(Key::new([&b"ab"[..], b"c"]), Key::new([&b"a"[..], b"bc"]));
        assert_ne!(Key::new([&b"ab"[..]]), Key::new([&b"ab"[..], b""]));
    }

    #[test]
    fn folder_follows_the_environment() {
        let folder = |set: &[(&str, &str)]| {
            let find = |name: &str| set.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(v));
            DiskCache::from_variables(find).map(|c| c.folder.to_string_lossy().into_owned())
        };
        assert_eq!(folder(&[(CACHE_VARIABLE, "/k"), ("HOME", "/h")]).as_deref(), Some("/k"));
        assert_eq!(folder(&[(CACHE_VARIABLE, ""), ("HOME", "/h")]), None);
        assert_eq!(folder(&[("XDG_CACHE_HOME", "/x"), ("HOME", "/h")]).as_deref(), Some("/x/polymla"));
        assert_eq!(folder(&[("XDG_CACHE_HOME", "x"), ("HOME", "/h")]).as_deref(), Some("/h/.cache/polymla"));
        assert_eq!(folder(&[]), None);
    }

    #[test]
    fn an_unwritable_folder_is_no_error() {
        let file = std::env::temp_dir().join(format!("polymla-cache-file-{}", std::process::id()));
        fs::write(&file, b"in the way").expect("file");
        let cache = DiskCache { folder: file.join("below") };
        assert!(!cache.write("decode", Key::new([&b"s"[..]]), b"binary"));
        assert_eq!(cache.read("decode", Key::new([&b"s"[..]])), None);
        fs::remove_file(&file).expect("clean up");
    }
}
