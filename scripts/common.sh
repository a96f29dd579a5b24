# What the check scripts share: one build and the tools. Sourced, from any folder.
#
# Every script asks cargo for the same features in the same environment, so that the crate and its dependencies are
# compiled once, whoever asks first. Tools that are missing are installed, and the script says so: Debian's packages by
# apt-get, Python wheels into git-ignored folders.

set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# Every backend that builds anywhere; `hip-sys` needs ROCm's headers and has a build of its own in check-hip.sh.
features=cli,sm90,cuda,hip,musa,maca,corex,wgpu,onnx
tools=${POLYMLA_TOOLCHAINS:-$PWD/.cache}
target=${CARGO_TARGET_DIR:-$PWD/target}
cu13=$tools/cuda/nvidia/cu13
# Incremental builds write much and are never used again; kernels are compiled by the checks, not into the crate.
export CARGO_INCREMENTAL=0 POLYMLA_NVCC=none POLYMLA_REQUIRE="${POLYMLA_REQUIRE:-cpu}"

# The tests of the shared build that a check needs: none where scripts/test.sh has run all of them, with the same tools.
tests() {
    if [ -z "${POLYMLA_TESTED:-}" ]; then
        cargo test --features "$features" "$@"
    fi
}

# parallel FUNCTION <ARGUMENTS: calls the function with every line, JOBS at once (as many as there are cores), each
# call's output in one piece; fails where one fails. The function sees exported variables only.
parallel() {
    export -f "${1?}"
    FUNCTION=$1 xargs -P "${JOBS:-$(nproc)}" -I '{}' bash -c '
        log=$(mktemp)
        bash -euo pipefail -c "$FUNCTION \"\$1\"" _ "$1" >"$log" 2>&1
        status=$?
        cat "$log"
        rm "$log"
        [ $status -eq 0 ] || { echo "$FUNCTION $1 failed"; exit 255; }' _ '{}'
}

# debian MARKER PACKAGE...: by apt-get, where the marker (a command or a file) is missing.
debian() {
    local marker=$1
    shift
    if ! command -v "$marker" >/dev/null && [ ! -e "$marker" ]; then
        echo "installing $* (Debian)"
        [ -n "${debian_index:-}" ] || apt-get update -qq
        debian_index=1
        DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
    fi
    command -v "$marker" >/dev/null || [ -e "$marker" ] || { echo "$marker is missing after installing $*" >&2; exit 1; }
}

# wheels FOLDER MARKER WHEEL...: by pip, where the folder does not hold the marker.
wheels() {
    local folder=$1 marker=$2
    shift 2
    if [ ! -e "$folder/$marker" ]; then
        echo "installing $* into $folder"
        mkdir -p "$folder"
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
            --no-deps --upgrade --target "$folder" "$@"
    fi
    [ -e "$folder/$marker" ] || { echo "$folder/$marker is missing after installing $*" >&2; exit 1; }
}

# NVIDIA's compilers (about 350 MB once): nvcc and NVRTC 13.0, NVRTC 12.3 and 12.9.
use_cuda() {
    wheels "$tools/cuda" nvidia/cu13/bin/nvcc nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
        nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 \
        nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    wheels "$tools/nvrtc/12.3" nvidia/cuda_nvrtc/lib/libnvrtc.so.12 'nvidia-cuda-nvrtc-cu12==12.3.*'
    wheels "$tools/nvrtc/12.9" nvidia/cuda_nvrtc/lib/libnvrtc.so.12 'nvidia-cuda-nvrtc-cu12==12.9.*'
    local nvrtc=nvidia/cuda_nvrtc/lib/libnvrtc.so.12
    # NVRTC 13 finds its built-in headers by the loader's path only.
    export LD_LIBRARY_PATH=$cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
    export POLYMLA_TEST_NVCC=$cu13/bin/nvcc
    export POLYMLA_TEST_NVRTC=$tools/nvrtc/12.3/$nvrtc:$tools/nvrtc/12.9/$nvrtc:$cu13/lib/libnvrtc.so.13
    export POLYMLA_TEST_CUBINS=$target/tmp/cubins
    mkdir -p "$POLYMLA_TEST_CUBINS"
}

# clang for HIP, and ROCm's library from Debian, which hiprtc is in.
use_hip() {
    debian clang-22 clang-22 lld-22 llvm-22
    debian /usr/include/hip/hip_runtime_api.h libamdhip64-dev
    export HIP_PATH="${HIP_PATH:-/usr}" POLYMLA_REQUIRE_HIP_LIBRARY=1
}

# Mesa's software Vulkan. Another driver of this machine may be better, but results should not depend on what it is.
use_vulkan() {
    local icd=/usr/share/vulkan/icd.d/lvp_icd.x86_64.json
    debian "$icd" mesa-vulkan-drivers
    debian /usr/lib/x86_64-linux-gnu/libvulkan.so.1 libvulkan1
    export VK_ICD_FILENAMES=$icd XDG_RUNTIME_DIR="${XDG_RUNTIME_DIR:-/tmp}" POLYMLA_REQUIRE="$POLYMLA_REQUIRE,wgpu"
}

# A browser for the page in examples/web: its absence is a printed skip there.
use_browser() {
    (debian chromium chromium) || true
}

# onnx.checker and onnxruntime; TVM=8 adds Apache TVM (100 MB).
use_onnx() {
    onnx_python=$PWD/.venv-onnx/bin/python
    local need=(onnx onnxruntime numpy safetensors) check="import onnx, onnxruntime, numpy, safetensors"
    if [ "${TVM:-0}" -ne 0 ]; then
        need+=(apache-tvm)
        check+=", tvm"
    fi
    if ! "$onnx_python" -c "$check" 2>/dev/null; then
        echo "installing ${need[*]} into .venv-onnx"
        [ -x "$onnx_python" ] || python3 -m venv .venv-onnx
        "$onnx_python" -m pip install --quiet --disable-pip-version-check "${need[@]}"
    fi
}
