//! Which backend a command uses.

use std::error::Error;

use polymla::{HostBackend, Problem};

/// The backend of that name, or without a name the best one that runs here and supports the problem.
pub fn backend(name: Option<&str>, problem: &Problem) -> Result<Box<dyn HostBackend>, Box<dyn Error>> {
    match name {
        Some(name) => Ok(polymla::open(name)?),
        None => polymla::select(problem).map_err(|refusals| {
            let reasons: Vec<_> = refusals.iter().map(|r| format!("{}: {}", r.name, r.reason)).collect();
            format!("no backend serves {problem}: {}", reasons.join("; ")).into()
        }),
    }
}
