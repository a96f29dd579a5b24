//! Every golden file on every backend, in every layout, with every schedule.

use std::path::Path;

use polymla::conformance::{LAYOUTS, POLICIES, check, golden, open_all};

#[test]
fn golden_files() {
    let files = golden::list(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")).unwrap();
    assert!(files.len() >= 14, "{} golden files found", files.len());
    let backends = open_all().unwrap();
    let mut failures = Vec::new();
    let mut checked = 0;
    for file in &files {
        let call = golden::load(file).unwrap();
        assert!(call.expected.is_some(), "{}: no expected values", call.name);
        for backend in &backends {
            if let Err(refusal) = backend.supports(&call.problem) {
                eprintln!("SKIP {}: {refusal}", call.name);
                continue;
            }
            for layout in LAYOUTS {
                for policy in POLICIES {
                    let outcome = check(backend.as_ref(), &call, layout, policy);
                    checked += 1;
                    if !outcome.passed() {
                        failures.push(format!("{} {layout} {policy:?}: {}", call.name, outcome.failure()));
                    }
                }
            }
        }
    }
    assert!(failures.is_empty(), "{} of {checked} failed:\n{}", failures.len(), failures.join("\n"));
}
