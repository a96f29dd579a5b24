#!/usr/bin/env bash
# Proof and timing of the WGSL backend on a machine that has a GPU with Vulkan, but no Rust.
#
#   scripts/device-wgpu.sh build          here: binaries into .carry/wgpu
#   scripts/device-wgpu.sh run            there, in the repository's root with .carry/wgpu beside it
#
# `run` looks for Debian packages of the Vulkan loader in .carry/wgpu/*.deb and uses them where there is none.
# Results go to $OUT/wgpu.tgz (else .carry/wgpu/out): one log a step, and the pipeline caches of what was timed, in caches/NAME.
# Every step runs, whatever became of those before, and is ended after its own limit of time; the last line counts them. Folders
# .carry/wgpu/shaders-* that one puts there are timed as variants of the shaders.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/device-steps.sh
carry=$PWD/.carry/wgpu

build() {
    local target=${CARGO_TARGET_DIR:-$PWD/target}
    mkdir -p "$carry"
    cargo build --release --features cli,wgpu
    cp "$target/release/polymla" "$carry/polymla"
    cp "$(test_binary wgpu cli,wgpu)" "$carry/wgpu-tests"
    strip "$carry/polymla" "$carry/wgpu-tests"
    ls -l "$carry"
}

# Packages go to a folder of their own: unpacked over the system they might break it.
loader() {
    local root
    root=$(mktemp -d)
    if ! ldconfig -p | grep -q libvulkan.so.1 && compgen -G "$carry/*.deb" >/dev/null; then
        for deb in "$carry"/*.deb; do dpkg -x "$deb" "$root"; done
        export LD_LIBRARY_PATH=$root/usr/lib/x86_64-linux-gnu:/usr/local/nvidia/lib64:/usr/local/nvidia/lib
    fi
    local icd=/usr/local/nvidia/share/vulkan/icd.d/nvidia_icd.json
    if [ -e "$icd" ]; then export VK_DRIVER_FILES=$icd VK_ICD_FILENAMES=$icd; fi
    export XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-/tmp}
}

step() {
    local name=$1 limit=$2 status=0 start=$SECONDS
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    echo "== $name: status $status, $((SECONDS - start)) s"
    grep -E "^(wgpu|polymla|test |random| *[0-9]+ |[a-z0-9_]+ +(pass|FAIL))|panicked|checks passed|error|of allow" "$out/$name.log" |
        cut -c1-200 | tail -n "${LINES_SHOWN:-40}" || true
    if [ $status -eq 0 ]; then passed=$((passed + 1)); else failed=$((failed + 1)); fi
}

# bench NAME LIMIT DTYPE SHAPE...
bench() {
    local name=$1 limit=$2 dtype=$3 shapes=() shape
    shift 3
    for shape in "$@"; do shapes+=(--shape "$shape"); done
    mkdir -p "$out/caches/$name"
    POLYMLA_WGPU_CACHE_DIR=$out/caches/$name step "bench-$name" "$limit" "$carry/polymla" bench --backend wgpu --dtype "$dtype" "${shapes[@]}"
}

run() {
    local results=${OUT:-$carry/out}
    out=$(mktemp -d)
    mkdir -p "$results"
    passed=0 failed=0
    loader
    export POLYMLA_REQUIRE=wgpu RUST_BACKTRACE=0
    "$carry/polymla" info 2>&1 | grep -A1 '^wgpu ' || true
    step golden 40 "$carry/polymla" conformance --backend wgpu tests/golden
    step paths 40 "$carry/wgpu-tests" --exact limits::every_path_is_right
    step matrix 40 "$carry/wgpu-tests" --exact limits::matrix_paths_are_right
    step range 20 "$carry/wgpu-tests" range::
    local large=(128,1,128,4096 128,2,128,4096 128,1,16,4096 128,1,16,16384 128,1,64,4096)
    local small=(1,1,128,8192 1,1,16,8192 8,1,128,4096 32,1,64,8192)
    bench f16 40 f16 "${large[@]}" "${small[@]}"
    bench bf16 40 bf16 "${large[@]}" "${small[@]}"
    POLYMLA_WGPU_PATH=matrix32 bench f16-matrix32 20 f16 "${large[@]}"
    local n folder
    for folder in "$carry"/shaders-*; do
        [ -d "$folder" ] || continue
        n=$(basename "$folder")
        POLYMLA_SHADER_DIR=$folder bench "f16-$n" 20 f16 128,1,128,4096 128,1,16,4096 1,1,128,8192
        POLYMLA_SHADER_DIR=$folder bench "bf16-$n" 20 bf16 128,1,128,4096 128,1,16,4096 1,1,128,8192
        POLYMLA_SHADER_DIR=$folder step "golden-$n" 30 "$carry/polymla" conformance --backend wgpu tests/golden
    done
    step random 40 "$carry/polymla" conformance --backend wgpu --random 100 tests/golden/dense_bf16_b1_sq1_hq16_sk64.safetensors
    step tests 60 "$carry/wgpu-tests" --test-threads 2 device:: refused:: limits::a_
    tar -C "$out" -czf "$results/wgpu.tgz" .
    echo "$passed passed, $failed failed"
    [ "$failed" -eq 0 ]
}

case ${1:-} in
    build) build ;;
    run) run ;;
    *) sed -n '2,10p' "$0" && exit 2 ;;
esac
