#!/usr/bin/env bash
# Proof on a Hopper device, for machines that have one but no Rust.
#
#   scripts/device-sm90.sh build          here: binaries with embedded kernels into .carry/
#   scripts/device-sm90.sh run [STEP...]  there, in the repository's root with .carry/ beside it; the steps named, or
#                                         bench golden tests first-use
#                                         Others: sanitizer
#
# Results go to $OUT (else .carry/out): one log a step, bench.json, roofline.svg. Every step runs, whatever became of
# those before, and is ended after its own limit of time, so that a hang costs no more; the last line counts them.
# POLYMLA_NVCC names nvcc for `build` (else .cache/cuda, else PATH).
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/device-steps.sh
carry=$PWD/.carry

build() {
    local wheel=$PWD/.cache/cuda/nvidia/cu13/bin/nvcc target=${CARGO_TARGET_DIR:-$PWD/target}
    if [ -z "${POLYMLA_NVCC:-}" ] && [ -x "$wheel" ]; then
        export POLYMLA_NVCC=$wheel
    fi
    # A proof of kernels that were compiled there would be one of another compiler.
    [ -n "${POLYMLA_NVCC:-}" ] || command -v nvcc >/dev/null || { echo "no nvcc: scripts/check-cuda.sh installs one" >&2; exit 1; }
    mkdir -p "$carry"
    cargo build --release --features cli,sm90
    cp "$target/release/polymla" "$carry/polymla"
    cp "$(test_binary cuda sm90)" "$carry/cuda-tests"
    strip "$carry/polymla" "$carry/cuda-tests"
    ls -l "$carry"
}

run() {
    out=${OUT:-$carry/out}
    mkdir -p "$out"
    export POLYMLA_REQUIRE=sm90 RUST_BACKTRACE=0
    [ $# -gt 0 ] || set -- bench golden tests first-use
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader || true
    "$carry/polymla" info | sed -n '/^sm90 /p' || true
    run_steps "$@"
}

step_bench() {
    timeout 60 "$carry/polymla" bench --backend sm90 --suite h200 --svg "$out/roofline.svg"
    timeout 60 "$carry/polymla" --json bench --backend sm90 --suite h200 >"$out/bench.json"
}

step_golden() { timeout 20 "$carry/polymla" conformance --backend sm90 tests/golden; }

# One process a test, most telling first: what hangs is ended and named, and the others still run.
step_tests() {
    local failures=0 limit name
    while read -r limit name; do
        POLYMLA_TEST_RANDOM=${POLYMLA_TEST_RANDOM:-2000} timeout "$limit" "$carry/cuda-tests" --exact "$name" ||
            { echo "FAILED ($?): $name" && failures=$((failures + 1)); }
    done <<'END'
90 sm90::random_problems
40 sm90::repeated_runs_give_the_same_bits
40 sm90::batch_invariant_rows_have_the_same_bits_alone
20 sm90::a_captured_step_follows_new_lengths_and_smaller_batches
20 sm90::a_schedule_is_reused_for_a_smaller_batch
60 sm90::bad_tables_and_lengths_mark_their_request_only
25 large::caches_beyond_four_gibibytes
20 large::more_than_four_million_accumulator_rows
30 large::sixty_five_thousand_requests
60 large::every_device_of_a_machine_in_turns
60 sm90::schedules_cover_every_block_once
END
    [ $failures -eq 0 ]
}

# The time of a first start without nvcc, and of later ones: sources from the folder, so that nothing embedded is used.
step_first-use() {
    local cache one=tests/golden/dense_bf16_b2_sq1_hq6_hkv2.safetensors run from
    cache=$(mktemp -d)
    for run in "embedded" "NVRTC, empty cache" "disk cache"; do
        from=$(date +%s%N)
        if [ "$run" = embedded ]; then
            timeout 30 "$carry/polymla" conformance --backend sm90 "$one"
        else
            POLYMLA_CACHE_DIR=$cache/kernels POLYMLA_KERNEL_DIR=backends/sm90 \
                timeout 30 "$carry/polymla" conformance --backend sm90 "$one"
        fi
        echo "$run: $((($(date +%s%N) - from) / 1000000)) ms for a whole process that checks one golden file"
    done
    ls -l "$cache/kernels"
    rm -rf "$cache"
}

# All tools, whatever the others found. racecheck does not follow that one lane arrives at a barrier for its warp, so it gets sources
# in which all lanes do (tile.h).
step_sanitizer() {
    local tool failed=0 sources
    sources=$(mktemp -d)
    cp backends/sm90/* "$sources"
    sed -i '1i #define POLYMLA_ARRIVE_ALL' "$sources/tile.h"
    for tool in memcheck racecheck synccheck initcheck; do
        echo "-- $tool"
        (
            [ $tool != racecheck ] || export POLYMLA_KERNEL_DIR=$sources POLYMLA_CACHE_DIR=$sources/cache
            timeout 90 compute-sanitizer --tool "$tool" --error-exitcode 1 \
                "$carry/polymla" conformance --backend sm90 tests/golden
        ) || failed=1
    done
    rm -rf "$sources"
    [ $failed -eq 0 ]
}

case ${1:-} in
    build) build ;;
    run) shift && run "$@" ;;
    *) sed -n '2,11p' "$0" && exit 2 ;;
esac
