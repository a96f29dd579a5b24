#!/usr/bin/env bash
# HIP without a device: the kernels through clang and hiprtc (T1), our host code against ROCm's library (T2) and over
# the fiber harness (T3), and the feature `hip-sys`, which links it. Installs Debian's packages where they are missing.
. "$(dirname "$0")/common.sh"

use_hip
tests --test hip --test driver_cpu --test forward --test vendors

echo "== the command line writes kernels that clang-22 compiles with the script it gives"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
cargo test --quiet --no-run --features "$features" --test cli
for arch in gfx906 gfx90a gfx942 gfx950; do
    "$target/debug/polymla" kernels --vendor hip --arch "$arch" --out "$out" >/dev/null
done
compile() { HIPCC=clang-22 bash "$1"; }
ls "$out"/hip-gfx*.sh | parallel compile
count=$(find "$out" -name '*.co' -size +1k | wc -l)
[ "$count" -eq 8 ] || { echo "$count binaries instead of 8" >&2; exit 1; }

echo "== hip-sys: the table from linked symbols; the build embeds binaries where POLYMLA_HIPCC names a compiler"
export POLYMLA_HIPCC=clang-22 POLYMLA_HIP_ARCHS=gfx90a
cargo test --features "$features,hip-sys" --lib -- driver:: portable::
cargo test --features "$features,hip-sys" --test hip
