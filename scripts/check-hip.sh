#!/usr/bin/env bash
# HIP without a device: the kernels through clang and hiprtc (T1), our host code against ROCm's library (T2), and the
# feature `hip-sys`, which links it. Installs Debian's packages where they are missing, and says so.
set -euo pipefail
cd "$(dirname "$0")/.."

need=()
[ -e /usr/include/hip/hip_runtime_api.h ] || need+=(libamdhip64-dev)
command -v clang-22 >/dev/null || need+=(clang-22 lld-22 llvm-22)
if [ ${#need[@]} -gt 0 ]; then
    echo "installing ${need[*]}"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
fi

export POLYMLA_REQUIRE="${POLYMLA_REQUIRE:-cpu},hip-library" HIP_PATH="${HIP_PATH:-/usr}"
echo "== T2 and hiprtc, the library loaded at run time"
cargo test --features hip --test hip
echo "== the host code over the fiber harness: results on the CPU; other vendors' sources stand alone"
cargo test --features hip,musa,maca,corex --test driver_cpu --test vendors
echo "== the command line writes kernels that clang-22 compiles with the script it gives"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
for arch in gfx906 gfx90a gfx942 gfx950; do
    cargo run --quiet --features cli,hip -- kernels --vendor hip --arch "$arch" --out "$out" >/dev/null
    HIPCC=clang-22 bash "$out/hip-$arch.sh"
done
count=$(find "$out" -name '*.co' -size +1k | wc -l)
[ "$count" -eq 8 ] || { echo "$count binaries instead of 8" >&2; exit 1; }
echo "== the build embeds binaries where POLYMLA_HIPCC names a compiler"
POLYMLA_HIPCC=clang-22 POLYMLA_HIP_ARCHS=gfx90a cargo test --features hip --lib -- driver:: portable::
echo "== hip-sys: the table from linked symbols"
cargo test --features hip-sys --lib -- driver::
cargo test --features hip-sys --test hip
