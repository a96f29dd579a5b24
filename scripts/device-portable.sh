#!/usr/bin/env bash
# Proof of the portable kernels on an NVIDIA device, for machines that have one but no Rust: backend `cuda` itself, and the
# host code and kernels of other vendors over libraries that stand in for theirs (tests/shims, tier T4).
#
#   scripts/device-portable.sh build          here: the binary and the libraries into .carry/portable/
#   scripts/device-portable.sh run [STEP...]  there, in the repository's root with .carry/portable/ beside it; the steps
#                                             named, or golden tests hip musa maca corex bench sanitizer
#
# Results go to $OUT (else .carry/portable/out): one log a step. Every step runs, whatever became of those before, and is
# ended after its own limit of time; the last line counts them.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/device-steps.sh
carry=$PWD/.carry/portable

build() {
    local target=${CARGO_TARGET_DIR:-$PWD/target} wheel=$PWD/.cache/cuda/nvidia/cu13/bin
    [ ! -x "$wheel/nvcc" ] || PATH=$wheel:$PATH
    mkdir -p "$carry"
    cargo build --release --features cli,sm90,cuda,hip,musa,maca,corex
    cp "$target/release/polymla" "$carry/polymla"
    strip "$carry/polymla"
    cp "$(test_binary cuda sm90,cuda)" "$carry/cuda-tests"
    strip "$carry/cuda-tests"
    local vendor
    # Moore Threads' newer devices have warps of 32.
    for vendor in hip musa musa32 maca corex; do
        cargo build --release --locked --manifest-path tests/shims/forward/Cargo.toml --target-dir "$target/forward" \
            --features "$vendor"
        cp "$target/forward/release/libpolymla_forward.so" "$carry/lib$vendor.so"
    done
    # CoreX has no run-time compiler: its kernels come by the script that `polymla kernels` writes, nvcc standing in.
    "$carry/polymla" kernels --vendor corex --arch ivcore11 --out "$carry/corex"
    COREX_CXX=$PWD/tests/shims/corex-clang.sh bash "$carry/corex/corex-ivcore11.sh"
    ls -l "$carry"
}

# Golden files and random problems, on the device.
step_golden() { timeout 120 "$carry/polymla" conformance --backend cuda --random 300; }

# What both CUDA backends must pass: golden, random, repeats, batch invariance, graphs, bad input. One process a test: in one,
# a test's work on the legacy stream would end another's graph capture.
step_tests() {
    export POLYMLA_REQUIRE=cuda POLYMLA_TEST_RANDOM=${POLYMLA_TEST_RANDOM:-300}
    local name pids=() names=() i failed=0 logs
    logs=$(mktemp -d)   # not $out: a device brings few files back
    for name in $("$carry/cuda-tests" --list portable:: | sed -n 's/: test$//p'); do
        timeout 120 "$carry/cuda-tests" --exact "$name" >"$logs/$name" 2>&1 &
        pids+=($!) names+=("$name")
    done
    for i in "${!pids[@]}"; do
        if wait "${pids[$i]}"; then
            echo "passed: ${names[$i]}"
        else
            tail -n 20 "$logs/${names[$i]}"
            echo "FAILED: ${names[$i]}"
            failed=1
        fi
    done
    rm -r "$logs"
    [ ${#pids[@]} -gt 0 ] && [ $failed -eq 0 ]
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

# Its libcuda is CUDA's by name: the real one, whose warps are not CoreX's, must be refused.
step_corex() {
    POLYMLA_COREX_LIB=$carry/libcorex.so POLYMLA_MODULE_DIR=$carry/corex \
        timeout 240 "$carry/polymla" conformance --backend corex --random 100
    local words
    words=$(POLYMLA_COREX_LIB=libcuda.so.1 POLYMLA_MODULE_DIR=$carry/corex \
        timeout 60 "$carry/polymla" conformance --backend corex 2>&1) && { echo "libcuda was taken for CoreX's"; return 1; }
    echo "$words"
    grep -q 'warp size 32' <<<"$words"
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
    [ $# -gt 0 ] || set -- golden tests hip musa maca corex bench sanitizer
    run_steps "$@"
}

case ${1:-} in
    build) build ;;
    run) shift && run "$@" ;;
    *) sed -n '2,12p' "$0" && exit 2 ;;
esac
