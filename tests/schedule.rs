//! Properties of every schedule, and equality with upstream's plans.

use polymla::problem::BLOCK_TOKENS;
use polymla::{MlaError, Schedule, SplitPolicy, get_mla_metadata};
use proptest::prelude::*;

/// Checks one schedule against the lengths it was made for, by walking over every split.
fn check(schedule: &Schedule, lengths: &[i32], num_sm_parts: usize) -> Result<(), TestCaseError> {
    let b = lengths.len();
    let blocks: Vec<usize> = lengths.iter().map(|n| (*n as usize).div_ceil(BLOCK_TOKENS)).collect();
    let parts = schedule.tile_scheduler_metadata();
    prop_assert_eq!(parts.len(), num_sm_parts);
    prop_assert_eq!(schedule.num_splits().len(), b + 1);
    prop_assert_eq!(schedule.num_splits()[0], 0);
    let mut partial_seen = vec![false; schedule.total_partials()];
    // Where the walk over the batch stands: the next split must begin exactly here.
    let (mut request, mut block, mut index) = (0, 0, 0);
    let mut idle = false;
    for part in parts {
        let splits: Vec<_> = schedule.splits_of(part).collect();
        prop_assert!(!idle || splits.is_empty(), "a part with work comes after one without");
        idle = splits.is_empty();
        let (mut payload, mut requests) = (0, 0);
        let mut last_request = None;
        for split in &splits {
            prop_assert_eq!((split.request, split.begin_block, split.index), (request, block, index));
            prop_assert!(split.end_block > split.begin_block || (blocks[request] == 0 && split.end_block == 0));
            prop_assert!(split.end_block <= blocks[request]);
            payload += split.end_block - split.begin_block;
            // A request of length 0 has to be visited and counts one block.
            payload += usize::from(blocks[request] == 0);
            requests += usize::from(last_request != Some(request));
            last_request = Some(request);
            let alone = schedule.num_splits()[request + 1] - schedule.num_splits()[request] == 1;
            prop_assert_eq!(split.partial.is_none(), alone);
            if let Some(row) = split.partial {
                prop_assert!(schedule.partials_of(request).contains(&row));
                prop_assert_eq!(row, schedule.partials_of(request).start + index);
                prop_assert!(!std::mem::replace(&mut partial_seen[row], true), "partial row {} twice", row);
            }
            block = split.end_block;
            index += 1;
            if let SplitPolicy::BatchInvariant { split_blocks } = schedule.policy() {
                let size = split_blocks as usize;
                prop_assert_eq!(split.begin_block, split.index * size);
                prop_assert_eq!(split.end_block, (split.begin_block + size).min(blocks[request]));
            }
            if block == blocks[request] {
                prop_assert_eq!(schedule.num_splits()[request + 1] - schedule.num_splits()[request], index as i32);
                (request, block, index) = (request + 1, 0, 0);
            }
        }
        check_part(part, &splits, schedule)?;
        check_payload(schedule, &blocks, num_sm_parts, payload, requests, splits.len())?;
    }
    prop_assert_eq!((request, block), (b, 0), "blocks are left over");
    prop_assert!(partial_seen.iter().all(|seen| *seen), "a partial row belongs to no split");
    prop_assert_eq!(schedule.total_splits(), schedule.splits().count());
    Ok(())
}

/// The row of metadata says what the splits are.
fn check_part(
    part: &polymla::schedule::PartMetadata,
    splits: &[polymla::schedule::Split],
    schedule: &Schedule,
) -> Result<(), TestCaseError> {
    prop_assert_eq!(part.padding, 0);
    let (Some(first), Some(last)) = (splits.first(), splits.last()) else {
        prop_assert!(part.begin_req > part.end_req);
        return Ok(());
    };
    prop_assert_eq!(part.begin_req as usize, first.request);
    prop_assert_eq!(part.begin_block as usize, first.begin_block);
    prop_assert_eq!(part.begin_split as usize, first.index);
    prop_assert_eq!(part.end_req as usize, last.request);
    prop_assert_eq!(part.end_block as usize, last.end_block);
    // In a balanced schedule a part holds one split a request, so that these flags say whether to write partials.
    if let SplitPolicy::Balanced { .. } = schedule.policy() {
        prop_assert_eq!(part.is_first_req_split == 1, first.partial.is_some());
        prop_assert_eq!(part.is_last_req_split == 1, last.partial.is_some());
    }
    Ok(())
}

/// No part exceeds the payload that the batch makes for each.
fn check_payload(
    schedule: &Schedule,
    blocks: &[usize],
    num_sm_parts: usize,
    payload: usize,
    requests: usize,
    splits: usize,
) -> Result<(), TestCaseError> {
    match schedule.policy() {
        SplitPolicy::Balanced { overhead_blocks } => {
            let overhead = overhead_blocks as usize;
            let total: usize = blocks.iter().map(|n| n.max(&1) + overhead).sum();
            let limit = total.div_ceil(num_sm_parts) + overhead;
            prop_assert!(payload + requests * overhead <= limit, "{payload} + {requests} x {overhead} > {limit}");
        }
        SplitPolicy::BatchInvariant { .. } => {
            let limit = schedule.total_splits().div_ceil(num_sm_parts);
            prop_assert!(splits <= limit, "{splits} > {limit}");
        }
    }
    Ok(())
}

fn length() -> impl Strategy<Value = i32> {
    prop_oneof![
        1 => Just(0),
        2 => 0..130i32,
        2 => (0..15_000i32).prop_map(|n| n * 64),
        2 => (0..15_000i32).prop_map(|n| n * 64 + 1),
        4 => 0..=1_000_000i32,
    ]
}

fn batch() -> impl Strategy<Value = Vec<i32>> {
    prop_oneof![
        2 => prop::collection::vec(length(), 0..=8),
        3 => prop::collection::vec(length(), 0..=300),
        1 => prop::collection::vec(length(), 0..=4096),
        1 => prop::collection::vec(0..200i32, 0..=4096),
    ]
}

fn policy() -> impl Strategy<Value = SplitPolicy> {
    prop_oneof![
        2 => Just(SplitPolicy::default()),
        3 => (0..=40u32).prop_map(|overhead_blocks| SplitPolicy::Balanced { overhead_blocks }),
        1 => Just(SplitPolicy::BATCH_INVARIANT),
        3 => prop_oneof![1..=40u32, 1..=20_000u32].prop_map(|split_blocks| SplitPolicy::BatchInvariant { split_blocks }),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_block_is_covered_once(lengths in batch(), parts in prop_oneof![1..=3usize, 1..=200usize, 1..=5000usize], policy in policy()) {
        check(&get_mla_metadata(&lengths, parts, policy).unwrap(), &lengths, parts)?;
    }

    #[test]
    fn invariant_splits_ignore_batchmates(lengths in batch(), parts in 1..=200usize, split_blocks in 1..=40u32) {
        let policy = SplitPolicy::BatchInvariant { split_blocks };
        let together = get_mla_metadata(&lengths, parts, policy).unwrap();
        for (r, length) in lengths.iter().enumerate().take(20) {
            let alone = get_mla_metadata(&[*length], 1, policy).unwrap();
            let cut = |s: &Schedule, r: usize| -> Vec<_> {
                s.splits().filter(|x| x.request == r).map(|x| (x.index, x.begin_block, x.end_block)).collect()
            };
            prop_assert_eq!(cut(&together, r), cut(&alone, 0));
        }
    }
}

#[test]
fn largest_batch() {
    // The corner the properties only approach: 4096 requests of 1,000,000 tokens.
    let lengths = vec![1_000_000; 4096];
    for (parts, policy) in [
        (1, SplitPolicy::default()),
        (132, SplitPolicy::default()),
        (132, SplitPolicy::BATCH_INVARIANT),
        (7, SplitPolicy::BatchInvariant { split_blocks: 1 }),
    ] {
        check(&get_mla_metadata(&lengths, parts, policy).unwrap(), &lengths, parts).unwrap();
    }
}

#[test]
fn bad_arguments() {
    let balanced = SplitPolicy::default();
    let error = get_mla_metadata(&[5, -3], 4, balanced).unwrap_err();
    assert_eq!(error, MlaError::NegativeLength { request: 1, value: -3 });
    for (parts, value) in [(0, 0), (1 << 20 | 1, 1_048_577), (usize::MAX, i64::MAX)] {
        let error = get_mla_metadata(&[5], parts, balanced).unwrap_err();
        assert_eq!(error, MlaError::Parameter { param: "num_sm_parts", value, limit: "1..=1048576" });
    }
    get_mla_metadata(&[5], 1 << 20, balanced).unwrap();
    let error = get_mla_metadata(&[5], 4, SplitPolicy::BatchInvariant { split_blocks: 0 }).unwrap_err();
    assert_eq!(error, MlaError::Parameter { param: "split_blocks", value: 0, limit: "1..=2147483647" });
    // 100 x 33,554,432 blocks of 64 do not fit 31 bits.
    let error = get_mla_metadata(&[i32::MAX; 100], 4, balanced).unwrap_err();
    let value = (100u64 * (33_554_432 + 5)).to_string();
    let limit = i32::MAX as u64;
    assert_eq!(error, MlaError::Overflow { param: "schedule blocks with overhead", value, limit });
    let error = get_mla_metadata(&[i32::MAX; 100], 4, SplitPolicy::BatchInvariant { split_blocks: 1 }).unwrap_err();
    let value = (100u64 * 33_554_432).to_string();
    assert_eq!(error, MlaError::Overflow { param: "schedule splits", value, limit });
    let huge = SplitPolicy::Balanced { overhead_blocks: u32::MAX };
    assert!(matches!(get_mla_metadata(&[1], 4, huge), Err(MlaError::Overflow { .. })));
}

#[test]
fn empty_batch() {
    for policy in [SplitPolicy::default(), SplitPolicy::BATCH_INVARIANT] {
        let schedule = get_mla_metadata(&[], 3, policy).unwrap();
        assert_eq!(schedule.num_splits(), [0]);
        assert_eq!(schedule.splits().count(), 0);
        assert_eq!((schedule.b(), schedule.total_splits(), schedule.total_partials()), (0, 0, 0));
    }
}

#[derive(serde::Deserialize)]
struct Plan {
    cache_seqlens: Vec<i32>,
    num_sm_parts: usize,
    tile_scheduler_metadata: Vec<[i32; 7]>,
    num_splits: Vec<i32>,
}

#[test]
fn upstream_plans() {
    let file = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/plans/upstream.json")).unwrap();
    let plans: Vec<Plan> = serde_json::from_str(&file).unwrap();
    assert!(plans.len() >= 60);
    for plan in plans {
        let b = plan.cache_seqlens.len();
        let ours = get_mla_metadata(&plan.cache_seqlens, plan.num_sm_parts, SplitPolicy::default()).unwrap();
        assert_eq!(ours.num_splits(), plan.num_splits, "b {b}, {} parts", plan.num_sm_parts);
        assert_eq!(ours.tile_scheduler_metadata().len(), plan.tile_scheduler_metadata.len());
        for (i, (part, theirs)) in ours.tile_scheduler_metadata().iter().zip(&plan.tile_scheduler_metadata).enumerate()
        {
            let mut ours = [
                part.begin_req,
                part.end_req,
                part.begin_block,
                part.end_block,
                part.begin_split,
                part.is_first_req_split,
                part.is_last_req_split,
            ];
            let mut theirs = *theirs;
            if part.begin_req as usize == b {
                // Idle: upstream reads the first block of request b, one past the end of its array.
                (ours[2], theirs[2]) = (0, 0);
            }
            assert_eq!(ours, theirs, "part {i} of {} for {:?}", plan.num_sm_parts, plan.cache_seqlens);
        }
    }
}
