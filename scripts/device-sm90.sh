#!/usr/bin/env bash
# Proof on a Hopper device, for machines that have one but no Rust.
#
#   scripts/device-sm90.sh build          here: binaries with embedded kernels into .carry/
#   scripts/device-sm90.sh run [STEP...]  there, in the repository's root with .carry/ beside it; all steps, or those named:
#                                         info golden tests first-use sanitizer bench
#
# Results go to $OUT (else .carry/out): one log a step, bench.txt, bench.json, roofline.svg. Every step runs, whatever
# became of those before; the last line counts them. POLYMLA_NVCC names nvcc for `build` (else .cache/cuda, else PATH).
set -euo pipefail
cd "$(dirname "$0")/.."
carry=$PWD/.carry

build() {
    local wheel=$PWD/.cache/cuda/nvidia/cu13/bin/nvcc target=${CARGO_TARGET_DIR:-$PWD/target}
    if [ -z "${POLYMLA_NVCC:-}" ] && [ -x "$wheel" ]; then
        export POLYMLA_NVCC=$wheel
    fi
    mkdir -p "$carry"
    cargo build --release --features cli,sm90
    cp "$target/release/polymla" "$carry/polymla"
    # cargo prints where the test binary is; there may be older ones beside it.
    local tests
    tests=$(cargo test --no-run --features sm90 --test cuda --message-format=json |
        python3 -c 'import json,sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m["target"]["name"] == "cuda":
        print(m["executable"])')
    cp "$tests" "$carry/cuda-tests"
    strip "$carry/polymla" "$carry/cuda-tests"
    ls -l "$carry"
}

run() {
    out=${OUT:-$carry/out}
    mkdir -p "$out"
    export POLYMLA_REQUIRE=sm90
    local steps=("$@") passed=0 failed=0
    [ ${#steps[@]} -gt 0 ] || steps=(info golden tests first-use bench)
    for step in "${steps[@]}"; do
        echo "== $step"
        local start=$SECONDS
        if "step_$step" 2>&1 | tee "$out/$step.log"; then
            passed=$((passed + 1))
            echo "-- $step passed in $((SECONDS - start)) s"
        else
            failed=$((failed + 1))
            echo "-- $step FAILED in $((SECONDS - start)) s"
        fi
    done
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

step_info() {
    nvidia-smi --query-gpu=name,driver_version,clocks.sm,power.limit --format=csv,noheader &&
        "$carry/polymla" info
}

step_golden() { "$carry/polymla" conformance --backend sm90 tests/golden; }

# Random problems, determinism, batch invariance, graphs, bad input, large sizes.
step_tests() { RUST_BACKTRACE=0 POLYMLA_TEST_RANDOM=${POLYMLA_TEST_RANDOM:-1000} "$carry/cuda-tests" --test-threads=4 --skip golden_files; }

# The time of a first start without nvcc, and of later ones: sources from the folder, so that nothing embedded is used.
step_first-use() {
    local cache one=tests/golden/dense_bf16_b2_sq1_hq6_hkv2.safetensors
    cache=$(mktemp -d)
    for run in "embedded" "NVRTC, empty cache" "disk cache"; do
        local before after
        before=$(date +%s.%N)
        if [ "$run" = embedded ]; then
            "$carry/polymla" conformance --backend sm90 "$one" >"$cache/log" 2>&1 || { cat "$cache/log"; return 1; }
        else
            POLYMLA_CACHE_DIR=$cache/kernels POLYMLA_KERNEL_DIR=backends/sm90 \
                "$carry/polymla" conformance --backend sm90 "$one" >"$cache/log" 2>&1 || { cat "$cache/log"; return 1; }
        fi
        after=$(date +%s.%N)
        echo "$run: $(echo "$before $after" | awk '{ printf "%.2f", $2 - $1 }') s for a whole process that checks one golden file"
    done
    ls -l "$cache/kernels"
    rm -rf "$cache"
}

step_sanitizer() {
    local tool
    for tool in memcheck racecheck synccheck initcheck; do
        echo "-- $tool"
        compute-sanitizer --tool "$tool" --error-exitcode 1 \
            "$carry/polymla" conformance --backend sm90 tests/golden || return 1
    done
}

step_bench() {
    "$carry/polymla" bench --backend sm90 --suite h200 --svg "$out/roofline.svg" | tee "$out/bench.txt" &&
        "$carry/polymla" --json bench --backend sm90 --suite h200 >"$out/bench.json"
}

case ${1:-} in
    build) build ;;
    run) shift && run "$@" ;;
    *) sed -n '2,10p' "$0" && exit 2 ;;
esac
