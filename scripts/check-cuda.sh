#!/usr/bin/env bash
# Checks the Hopper backend without a GPU: the crate builds with it and says why it is absent; its kernels compile under
# nvcc 13.0 and NVRTC 12.3, 12.9 and 13.0 within the recorded registers and spills; their code holds HGMMA and UTMALDG.
#
# usage: scripts/check-cuda.sh [--record]      --record writes tests/cuda/resources.txt anew
#
# Compilers are Python wheels, installed by pip into the git-ignored .cache/ when they are missing (about 350 MB once).
# POLYMLA_TOOLCHAINS names another folder for them.
set -euo pipefail
cd "$(dirname "$0")/.."
tools=${POLYMLA_TOOLCHAINS:-$PWD/.cache}
if [ "${1:-}" = --record ]; then
    export POLYMLA_TEST_RECORD=1
fi

# install FOLDER MARKER WHEEL...: unless the marker file is there already
install() {
    local folder=$1 marker=$2
    shift 2
    if [ ! -e "$folder/$marker" ]; then
        echo "installing $* into $folder"
        mkdir -p "$folder"
        python3 -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
            --no-deps --upgrade --target "$folder" "$@"
    fi
    [ -e "$folder/$marker" ] || { echo "$folder/$marker is not there after installing $*" >&2; exit 1; }
}
cu13=$tools/cuda/nvidia/cu13
install "$tools/cuda" nvidia/cu13/bin/nvcc nvidia-cuda-nvcc==13.0.88 nvidia-nvvm==13.0.88 nvidia-cuda-crt==13.0.88 \
    nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-runtime==13.0.96 nvidia-cuda-cccl==13.0.85 \
    nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
install "$tools/nvrtc/12.3" nvidia/cuda_nvrtc/lib/libnvrtc.so.12 'nvidia-cuda-nvrtc-cu12==12.3.*'
install "$tools/nvrtc/12.9" nvidia/cuda_nvrtc/lib/libnvrtc.so.12 'nvidia-cuda-nvrtc-cu12==12.9.*'

cubins=$(mktemp -d)
trap 'rm -rf "$cubins"' EXIT

echo "== the backend's host side and its kernels under every compiler"
# Without a GPU the tests that need one print why they were skipped.
# NVRTC 13 finds its built-in headers by the loader's path only.
LD_LIBRARY_PATH=$cu13/lib${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH} \
POLYMLA_TEST_NVCC=$cu13/bin/nvcc \
POLYMLA_TEST_NVRTC=$tools/nvrtc/12.3/nvidia/cuda_nvrtc/lib/libnvrtc.so.12:$tools/nvrtc/12.9/nvidia/cuda_nvrtc/lib/libnvrtc.so.12:$cu13/lib/libnvrtc.so.13 \
POLYMLA_TEST_CUBINS=$cubins \
POLYMLA_NVCC=none \
    cargo test --features sm90 --test cuda -- --nocapture
POLYMLA_NVCC=none cargo test --features sm90 --lib cuda

echo "== code of the decode kernels"
count=0
for cubin in "$cubins"/*-decode*.cubin; do
    # To a file first: cuobjdump ends badly when its reader does.
    "$cu13/bin/cuobjdump" -sass "$cubin" >"$cubins/sass"
    # The gather form copies with cp.async (LDGSTS) instead of TMA.
    count=$((count + $(awk -v cubin="$(basename "$cubin" .cubin)" '
        function finish(   copy) {
            if (name == "") return
            copy = name ~ /_gather$/ ? "LDGSTS" : "UTMALDG"
            if (!seen["HGMMA"]) { print cubin, name ": no HGMMA" >"/dev/stderr"; bad = 1 }
            if (!seen[copy]) { print cubin, name ": no " copy >"/dev/stderr"; bad = 1 }
            kernels++
        }
        /Function : / { finish(); name = $NF; delete seen }
        match($0, /(HGMMA|UTMALDG|LDGSTS)/) { seen[substr($0, RSTART, RLENGTH)] = 1 }
        END { finish(); print kernels + 0; exit bad }' "$cubins/sass")))
done
[ "$count" -ge 32 ] || { echo "only $count of 8 decode kernels x 4 compilers" >&2; exit 1; }
echo "$count decode kernels hold HGMMA and UTMALDG (LDGSTS in the gather form)"
