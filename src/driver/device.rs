//! A device, what is asked of it once, and the guard that makes it current for a call.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use super::table::Driver;
use crate::error::{MlaError, Result};

/// What a device is. Everything is asked, nothing assumed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Facts {
    pub(super) name: String,
    /// `gfx942`; without features such as `:sramecc+`.
    pub(super) arch: String,
    pub(super) ordinal: u32,
    pub(super) warp_size: u32,
    pub(super) multiprocessors: u32,
    pub(super) shared_memory_per_block: u32,
}

/// A device in use. Everything made on it holds an [`Arc`] of this.
pub(super) struct Accelerator {
    pub(super) driver: &'static Driver,
    pub(super) facts: Facts,
}

/// More than any version's struct of device properties has (ROCm 5: 792 bytes, ROCm 6: 1472).
const PROPERTIES_BYTES: usize = 16 * 1024;

impl Accelerator {
    /// Device `ordinal`.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(super) fn open(driver: &'static Driver, ordinal: u32) -> Result<Arc<Accelerator>> {
        let index = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        let attributes = &driver.vendor.attributes;
        let attribute = |attribute| -> Result<u32> {
            let mut value: c_int = 0;
            // SAFETY: a pointer to a local; an ordinal out of range is an error code.
            unsafe { driver.device_attribute(&raw mut value, attribute, index)? };
            Ok(value.unsigned_abs())
        };
        let facts = Facts {
            warp_size: attribute(attributes.warp_size)?,
            multiprocessors: attribute(attributes.multiprocessors)?,
            shared_memory_per_block: attribute(attributes.shared_memory_per_block)?,
            name: name(driver, index)?,
            arch: arch(driver, index)?,
            ordinal,
        };
        Ok(Arc::new(Accelerator { driver, facts }))
    }

    /// Makes this device current on this thread until the guard is dropped, then the one that was current before.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(super) fn enter(&self) -> Result<Guard> {
        let (mut before, mine) = (0, self.facts.ordinal as c_int);
        // SAFETY: a pointer to a local; an ordinal that was opened.
        unsafe {
            self.driver.get_device(&raw mut before)?;
            if before != mine {
                self.driver.set_device(mine)?;
            }
        }
        Ok(Guard { driver: self.driver, before: (before != mine).then_some(before), not_send: PhantomData })
    }
}

/// A device that is current on this thread. It stays on the thread that made it.
pub(super) struct Guard {
    driver: &'static Driver,
    before: Option<c_int>,
    not_send: PhantomData<*const ()>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        if let Some(before) = self.before {
            // SAFETY: the device that was current when the guard was made.
            let _ = unsafe { self.driver.set_device(before) };
        }
    }
}

fn name(driver: &Driver, ordinal: c_int) -> Result<String> {
    let mut name = [0 as c_char; 256];
    // SAFETY: the buffer and its length, less the last byte, which stays null.
    unsafe { driver.device_name(name.as_mut_ptr(), name.len() as c_int - 1, ordinal)? };
    // SAFETY: the last byte is null.
    Ok(unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned())
}

/// The architecture's name. It stands in the struct of properties, at a place that differs between versions; so it is
/// looked for by what it looks like.
fn arch(driver: &Driver, ordinal: c_int) -> Result<String> {
    let mut properties = vec![0u64; PROPERTIES_BYTES / 8];
    // SAFETY: the driver writes the struct of its version, which is shorter than the buffer.
    unsafe { driver.device_properties(properties.as_mut_ptr().cast::<c_void>(), ordinal)? };
    let prefix = driver.vendor.arch_prefix;
    find_arch(bytemuck::cast_slice(&properties), prefix).ok_or_else(|| MlaError::Platform {
        backend: driver.vendor.platform,
        call: driver.vendor.symbols.device_properties[0],
        message: format!("the properties of device {ordinal} hold no name that begins with {prefix}"),
    })
}

/// The first `prefix` followed by hexadecimal digits and the end of a string, or a colon (features follow it).
fn find_arch(bytes: &[u8], prefix: &str) -> Option<String> {
    bytes.windows(prefix.len()).enumerate().filter(|(_, w)| *w == prefix.as_bytes()).find_map(|(at, _)| {
        let rest = &bytes[at + prefix.len()..];
        let digits = rest.iter().take_while(|b| b.is_ascii_hexdigit()).count();
        let ends = matches!(rest.get(digits), Some(0 | b':'));
        // Three or four digits: gfx906, gfx90a, gfx1100.
        ((3..=4).contains(&digits) && ends)
            .then(|| format!("{prefix}{}", String::from_utf8_lossy(&rest[..digits]).to_ascii_lowercase()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_are_found_wherever_they_stand() {
        let found = |text: &str| {
            let mut bytes = vec![7u8; 100];
            bytes.extend_from_slice(text.as_bytes());
            bytes.resize(300, 0);
            find_arch(&bytes, "gfx")
        };
        assert_eq!(found("gfx942:sramecc+:xnack-").as_deref(), Some("gfx942"));
        assert_eq!(found("AMD Instinct MI250X\0\0gfx90a\0").as_deref(), Some("gfx90a"));
        assert_eq!(found("gfx1100").as_deref(), Some("gfx1100"));
        assert_eq!(found("gfx\0gfx906").as_deref(), Some("gfx906"));
        assert_eq!(found("gfx9"), None);
        assert_eq!(found("gfx12345"), None);
        assert_eq!(found("gfx906 something"), None);
        assert_eq!(find_arch(b"gfx906", "gfx"), None, "a name must end inside the buffer");
        assert_eq!(find_arch(b"", "gfx"), None);
    }
}
