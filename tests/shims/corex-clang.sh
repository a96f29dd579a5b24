#!/usr/bin/env bash
# Stands in for CoreX's clang++ (COREX_CXX) where tier T4 runs its kernels on an NVIDIA device: nvcc compiles the same source
# in the same dialect for sm_90. NVCC names it.
set -euo pipefail
ours=()
skip=
for word in "$@"; do
    case $word in
        -x) skip=1 ;;
        --cuda-gpu-arch=ivcore*) arch=1 ;;
        --cuda-device-only) device=1 ;;
        *) [ -n "$skip" ] || ours+=("$word"); skip= ;;
    esac
done
[ -n "${arch:-}" ] && [ -n "${device:-}" ] || { echo "no architecture of CoreX, or host code too: $*" >&2; exit 2; }
prelude=$(mktemp --suffix=.h)
trap 'rm -f "$prelude"' EXIT
echo '#define __shfl_xor(x, lanes, width) __shfl_xor_sync(0xffffffffu, x, lanes, width)' >"$prelude"
"${NVCC:-nvcc}" -cubin -gencode arch=compute_90,code=sm_90 -include "$prelude" "${ours[@]}"
