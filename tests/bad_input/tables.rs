//! Wrong values: table entries, lengths, visible lengths.

use polymla::conformance::{Call, HostTensor};
use polymla::cpu::CpuBackend;
use polymla::{DType, Mask, MlaBackend, MlaError};

use crate::call::*;

fn table_with(request: usize, position: usize, value: i32) -> Call {
    let mut table = TABLE;
    table[request * COLUMNS + position] = value;
    with("block_table", HostTensor::from_i32("block_table", &[B, COLUMNS], &table).unwrap())
}

#[test]
fn used_table_entry_out_of_range() {
    for value in [PAGES as i32, 2147480000, i32::MAX] {
        let error = refused(&table_with(0, 2, value));
        assert_eq!(error, MlaError::BlockTableEntry { request: 0, position: 2, value, limit: PAGES });
    }
    assert_eq!(
        refused(&table_with(2, 3, 10)).to_string(),
        "block_table[2][3] is 10; request 2 uses it, so it must be in 0..10"
    );
}

#[test]
fn used_table_entry_negative() {
    for value in [-1, i32::MIN] {
        let error = refused(&table_with(2, 0, value));
        assert_eq!(error, MlaError::BlockTableEntry { request: 2, position: 0, value, limit: PAGES });
    }
}

#[test]
fn no_pages_at_all() {
    let mut call = with("k_cache", tensor("k_cache", DType::F32, &[0, PAGE, 1, D_K]));
    call.problem = builder().num_pages(0).build().unwrap();
    let error = refused(&call);
    assert_eq!(error, MlaError::BlockTableEntry { request: 0, position: 0, value: 7, limit: 0 });
}

fn lengths(values: [i32; B]) -> Call {
    with("cache_seqlens", HostTensor::from_i32("cache_seqlens", &[B], &values).unwrap())
}

#[test]
fn length_negative() {
    for value in [-1, i32::MIN] {
        assert_eq!(refused(&lengths([40, value, 64])), MlaError::NegativeLength { request: 1, value });
    }
}

#[test]
fn length_beyond_the_table() {
    for value in [(PAGE * COLUMNS) as i32 + 1, i32::MAX] {
        let limit = (PAGE * COLUMNS) as u64;
        let call = lengths([40, 0, value]);
        let error = MlaError::LengthBeyondTable { request: 2, value, limit };
        assert_eq!(refused(&call), error);
        // By the schedule too, which would make a workspace for it.
        let backend = CpuBackend::new().unwrap();
        let inputs = call.inputs().unwrap();
        let schedule = MlaBackend::schedule(&backend, &call.problem, &Default::default(), &inputs, ());
        assert_eq!(schedule.unwrap_err(), error);
    }
}

#[test]
fn visible_length_outside_the_sequence() {
    for (row, value) in [(3, 1), (1, -1), (5, 65), (0, i32::MAX)] {
        let mut visible = [40, 40, 0, 0, 64, 0];
        visible[row] = value;
        let mut call = with("visible_lengths", HostTensor::from_i32("visible_lengths", &[B, S_Q], &visible).unwrap());
        call.problem = builder().mask(Mask::VisibleLengths).build().unwrap();
        let (request, row) = (row / S_Q, row % S_Q);
        let error = refused(&call);
        assert_eq!(error, MlaError::VisibleLength { request, row, value, limit: LENGTHS[request] });
    }
}

#[test]
fn visible_lengths_absent_or_unexpected() {
    let mut call = good();
    call.problem = builder().mask(Mask::VisibleLengths).build().unwrap();
    assert!(matches!(refused(&call), MlaError::MissingTensor { param: "visible_lengths", .. }));
    let call = with("visible_lengths", tensor("visible_lengths", DType::I32, &[B, S_Q]));
    assert!(matches!(refused(&call), MlaError::UnexpectedTensor { param: "visible_lengths", .. }));
}
