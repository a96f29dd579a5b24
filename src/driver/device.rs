//! A device, what is asked of it once, and the guard that makes it current for a call.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::marker::PhantomData;
use std::sync::Arc;

use super::table::Driver;
use super::vendor::Arch;
use crate::device::Handle;
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
    /// Where contexts are made current: the device's primary one, never released.
    context: Option<Handle>,
}

// SAFETY: a context may be used from any thread; its handle is a plain value to the driver.
unsafe impl Send for Accelerator {}
// SAFETY: as above.
unsafe impl Sync for Accelerator {}

/// More than any version's struct of device properties has (ROCm 5: 792 bytes, ROCm 6: 1472).
const PROPERTIES_BYTES: usize = 16 * 1024;

impl Accelerator {
    /// Device `ordinal`.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(super) fn open(driver: &'static Driver, ordinal: u32) -> Result<Arc<Accelerator>> {
        let index = c_int::try_from(ordinal).unwrap_or(c_int::MAX);
        let (mut device, mut context) = (index, None);
        if driver.table.retain_context.is_some() {
            let mut handle: Handle = std::ptr::null_mut();
            // SAFETY: pointers to locals; an ordinal out of range is an error code.
            unsafe {
                driver.device_get(&raw mut device, index)?;
                driver.retain_context(&raw mut handle, device)?;
            }
            context = Some(handle);
        }
        let attributes = &driver.vendor.attributes;
        let attribute = |attribute| -> Result<u32> {
            let mut value: c_int = 0;
            // SAFETY: a pointer to a local; an ordinal out of range is an error code.
            unsafe { driver.device_attribute(&raw mut value, attribute, device)? };
            Ok(value.unsigned_abs())
        };
        let facts = Facts {
            warp_size: attribute(attributes.warp_size)?,
            multiprocessors: attribute(attributes.multiprocessors)?,
            shared_memory_per_block: attribute(attributes.shared_memory_per_block)?,
            name: name(driver, device)?,
            arch: match driver.vendor.arch {
                Arch::InProperties(prefix) => arch(driver, device, prefix)?,
                Arch::Capability(prefix, [major, minor]) => {
                    format!("{prefix}{}{}", attribute(major)?, attribute(minor)?)
                }
            },
            ordinal,
        };
        Ok(Arc::new(Accelerator { driver, facts, context }))
    }

    /// Makes this device current on this thread until the guard is dropped, then the one that was current before.
    ///
    /// # Errors
    /// [`MlaError::Platform`].
    pub(super) fn enter(&self) -> Result<Guard> {
        let driver = self.driver;
        let mut before = Before::Same;
        if let Some(mine) = self.context {
            let mut context: Handle = std::ptr::null_mut();
            // SAFETY: a pointer to a local; a context that was retained.
            unsafe {
                driver.get_context(&raw mut context)?;
                if context != mine {
                    driver.set_context(mine)?;
                    before = Before::Context(context);
                }
            }
        } else {
            let (mut device, mine) = (0, self.facts.ordinal as c_int);
            // SAFETY: a pointer to a local; an ordinal that was opened.
            unsafe {
                driver.get_device(&raw mut device)?;
                if device != mine {
                    driver.set_device(mine)?;
                    before = Before::Device(device);
                }
            }
        }
        Ok(Guard { driver, before, not_send: PhantomData })
    }
}

/// What was current before a guard.
enum Before {
    Same,
    Device(c_int),
    Context(Handle),
}

/// A device that is current on this thread. It stays on the thread that made it.
pub(super) struct Guard {
    driver: &'static Driver,
    before: Before,
    not_send: PhantomData<*const ()>,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // SAFETY: what was current when the guard was made.
        let _ = unsafe {
            match self.before {
                Before::Same => Ok(()),
                Before::Device(device) => self.driver.set_device(device),
                Before::Context(context) => self.driver.set_context(context),
            }
        };
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
fn arch(driver: &Driver, ordinal: c_int, prefix: &str) -> Result<String> {
    let mut properties = vec![0u64; PROPERTIES_BYTES / 8];
    // SAFETY: the driver writes the struct of its version, which is shorter than the buffer.
    unsafe { driver.device_properties(properties.as_mut_ptr().cast::<c_void>(), ordinal)? };
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
