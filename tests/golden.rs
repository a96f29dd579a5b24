//! Every golden file on every backend, in every layout, with every schedule.

use std::path::Path;

use polymla::conformance::{LAYOUTS, check_call, golden};

mod common;

#[test]
fn golden_files() {
    let files = golden::list(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")).unwrap();
    assert!(files.len() >= 14, "{} golden files found", files.len());
    let backends = common::backends();
    let mut failures = Vec::new();
    let mut checked = 0;
    for file in &files {
        let call = golden::load(file).unwrap();
        assert!(call.expected.is_some(), "{}: no expected values", call.name);
        for backend in backends {
            if !common::takes(backend.as_ref(), &call.problem) {
                continue;
            }
            for outcome in check_call(backend.as_ref(), &call, &LAYOUTS) {
                checked += 1;
                if !outcome.passed() {
                    let (layout, policy, device) = (outcome.layout, outcome.policy, &backend.info().device_name);
                    let what = format!("{} on {} {device}", call.name, outcome.backend);
                    failures.push(format!("{what}, {layout} {policy:?}: {}", outcome.failure()));
                }
            }
        }
    }
    println!("{checked} checks of {} files on {} backends", files.len(), backends.len());
    assert!(failures.is_empty(), "{} of {checked} failed:\n{}", failures.len(), failures.join("\n"));
}
