//! Which backends a run must not go without.

use crate::backend::{HostBackend, open, registry};
use crate::error::{MlaError, Result};

/// Names the backends whose absence is a failure, separated by commas.
const REQUIRE: &str = "POLYMLA_REQUIRE";

/// The backends that the environment variable `POLYMLA_REQUIRE` lists.
///
/// # Errors
/// [`MlaError::Environment`] for a name that this build does not contain: a typo must not pass as a skip.
pub fn required() -> Result<Vec<String>> {
    parse_required(&std::env::var_os(REQUIRE).unwrap_or_default().to_string_lossy())
}

fn parse_required(list: &str) -> Result<Vec<String>> {
    let names: Vec<String> = list.split(',').map(str::trim).filter(|n| !n.is_empty()).map(String::from).collect();
    let built: Vec<&str> = registry().iter().map(|r| r.name).collect();
    match names.iter().find(|n| !built.contains(&n.as_str())) {
        Some(unknown) => Err(MlaError::Environment { param: REQUIRE, value: unknown.clone(), limit: built.join(", ") }),
        None => Ok(names),
    }
}

/// Opens every backend of this build. One that cannot be opened is printed as a skip with its reason.
///
/// # Errors
/// The reason of a backend that `POLYMLA_REQUIRE` lists and that cannot be opened; those of [`required`].
pub fn open_all() -> Result<Vec<Box<dyn HostBackend>>> {
    let required = required()?;
    let mut opened = Vec::new();
    for registration in registry() {
        match open(registration.name) {
            Ok(backend) => opened.push(backend),
            Err(reason) if required.iter().any(|r| r == registration.name) => return Err(reason),
            Err(reason) => eprintln!("SKIP {}: {reason}", registration.name),
        }
    }
    Ok(opened)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_names_fail() {
        assert_eq!(parse_required(" cpu ,").unwrap(), ["cpu"]);
        assert_eq!(parse_required("").unwrap(), Vec::<String>::new());
        let error = parse_required("cpu,sm91").unwrap_err();
        assert!(matches!(error, MlaError::Environment { ref value, .. } if value == "sm91"), "{error}");
    }
}
