#!/usr/bin/env bash
# Proof of the portable kernels on an NVIDIA device, for machines that have one but no Rust: backend `cuda` itself, and the
# host code and kernels of other vendors over libraries that stand in for theirs (tests/shims, tier T4).
#
#   scripts/device-portable.sh build          here: the binary and the libraries into .carry/portable/
#   scripts/device-portable.sh run [STEP...]  there, in the repository's root with .carry/portable/ beside it; the steps
#                                             named, or golden tests hip musa maca bench sanitizer
#
# Results go to $OUT (else .carry/portable/out): one log a step. Every step runs, whatever became of those before, and is
# ended after its own limit of time; the last line counts them.
set -euo pipefail
cd "$(dirname "$0")/.."
carry=$PWD/.carry/portable

build() {
    local target=${CARGO_TARGET_DIR:-$PWD/target}
    mkdir -p "$carry"
    cargo build --release --features cli,sm90,cuda,hip,musa,maca
    cp "$target/release/polymla" "$carry/polymla"
    strip "$carry/polymla"
    local tests
    tests=$(cargo test --no-run --features sm90,cuda --test cuda --message-format=json |
        python3 -c 'import json,sys
for line in sys.stdin:
    m = json.loads(line)
    if m.get("executable") and m["target"]["name"] == "cuda":
        print(m["executable"])')
    cp "$tests" "$carry/cuda-tests"
    strip "$carry/cuda-tests"
    local vendor
    for vendor in hip musa maca; do
        c++ -std=c++17 -O2 -shared -fPIC -fvisibility=hidden -Wall -Wextra -Werror \
            -DSHIM_VENDOR_HEADER="\"$vendor.h\"" -o "$carry/lib$vendor.so" tests/shims/forward.cpp -ldl
    done
    # Moore Threads' newer devices have warps of 32.
    c++ -std=c++17 -O2 -shared -fPIC -fvisibility=hidden -DSHIM_VENDOR_HEADER='"musa.h"' -DSHIM_WARP=32 \
        -o "$carry/libmusa32.so" tests/shims/forward.cpp -ldl
    ls -l "$carry"
}

# Golden files and random problems, on the device.
step_golden() { timeout 120 "$carry/polymla" conformance --backend cuda --random 300; }

# What both CUDA backends must pass: golden, random, repeats, batch invariance, graphs, bad input.
step_tests() {
    POLYMLA_REQUIRE=cuda POLYMLA_TEST_RANDOM=${POLYMLA_TEST_RANDOM:-300} timeout 120 "$carry/cuda-tests" portable::
}

# HIP's host code and kernels over NVRTC and libcuda.
step_hip() {
    POLYMLA_HIP_LIB=$carry/libhip.so POLYMLA_HIPRTC_LIB=$carry/libhip.so \
        timeout 240 "$carry/polymla" conformance --backend hip --random 100
}

step_musa() {
    local lib
    for lib in libmusa.so libmusa32.so; do
        POLYMLA_MUSA_LIB=$carry/$lib POLYMLA_MTRTC_LIB=$carry/$lib \
            timeout 240 "$carry/polymla" conformance --backend musa --random 100
    done
}

step_maca() {
    POLYMLA_MACA_LIB=$carry/libmaca.so POLYMLA_MCRTC_LIB=$carry/libmaca.so \
        timeout 240 "$carry/polymla" conformance --backend maca --random 100
}

step_bench() { timeout 120 "$carry/polymla" bench --backend cuda --suite h200; }

# Three golden files, because every access is watched: one each of 16, 32 and 64 rows.
step_sanitizer() {
    local tool files=() failed=0
    for tool in dense_bf16_b6_sq2_hq16_zero_len dense_fp16_b1_sq3_hq20_peaked_rising dense_bf16_b2_sq2_hq64_causal; do
        files+=("tests/golden/$tool.safetensors")
    done
    for tool in memcheck synccheck initcheck racecheck; do
        echo "-- $tool"
        timeout "${SANITIZER_S:-100}" compute-sanitizer --tool $tool --error-exitcode 9 "$carry/polymla" conformance --backend cuda \
            "${files[@]}" >"$out/$tool.log" 2>&1 || { tail -n 40 "$out/$tool.log"; failed=1; }
        tail -n 2 "$out/$tool.log"
    done
    [ $failed -eq 0 ]
}

run() {
    out=${OUT:-$carry/out}
    mkdir -p "$out"
    local passed=0 failed=0 step start
    local steps=("$@")
    [ ${#steps[@]} -gt 0 ] || steps=(golden tests hip musa maca bench sanitizer)
    for step in "${steps[@]}"; do
        echo "== $step"
        start=$SECONDS
        # In a subshell with the shell's own checks on: `if` would switch them off.
        set +e
        (set -e && "step_$step") >"$out/$step.log" 2>&1
        local status=$?
        set -e
        tail -n "${LINES_SHOWN:-34}" "$out/$step.log"
        if [ $status -eq 0 ]; then
            passed=$((passed + 1))
            echo "-- $step passed in $((SECONDS - start)) s"
        else
            failed=$((failed + 1))
            echo "-- $step FAILED ($status) in $((SECONDS - start)) s"
        fi
    done
    echo "$passed steps passed, $failed failed"
    [ $failed -eq 0 ]
}

case ${1:-} in
    build) build ;;
    run) shift && run "$@" ;;
    *) sed -n '2,12p' "$0" && exit 2 ;;
esac
