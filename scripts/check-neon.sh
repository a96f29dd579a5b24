#!/usr/bin/env bash
# The NEON path of the CPU backend without an Arm machine: cross-compiled for aarch64, its unit tests, the golden files
# and the comparison with the f64 reference executed by QEMU's user mode. Installs Rust's aarch64 target and Debian's
# cross linker and QEMU where they are missing, and says so. About ten minutes on two cores; QEMU says nothing of speed.
set -euo pipefail
cd "$(dirname "$0")/.."

target=aarch64-unknown-linux-gnu
need=()
command -v aarch64-linux-gnu-gcc >/dev/null || need+=(gcc-aarch64-linux-gnu libc6-dev-arm64-cross)
command -v qemu-aarch64-static >/dev/null || need+=(qemu-user-static)
if [ ${#need[@]} -gt 0 ]; then
    echo "installing ${need[*]}"
    apt-get update -qq
    apt-get install -y -qq --no-install-recommends "${need[@]}" >/dev/null
fi
if ! rustup target list --installed | grep -qx "$target"; then
    echo "installing Rust's target $target"
    rustup target add "$target"
fi

export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_LINKER=aarch64-linux-gnu-gcc
export CARGO_TARGET_AARCH64_UNKNOWN_LINUX_GNU_RUNNER="qemu-aarch64-static -L /usr/aarch64-linux-gnu"
export POLYMLA_REQUIRE=cpu
echo "== lints for $target"
cargo clippy --quiet --lib --target "$target" -- -D warnings
echo "== unit tests, every instruction set against the f64 reference, golden files, under QEMU"
cargo test --target "$target" --lib --test cpu --test golden
