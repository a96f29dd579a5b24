#!/usr/bin/env bash
# Passes the tests. Needs Rust; what else a step misses it installs, and says so: Python wheels into ignored folders,
# Debian packages by apt-get (as root).
#
#   bash scripts/test.sh
#
# POLYMLA_REQUIRE=cpu,sm90 turns the absence of a listed backend from a printed skip into a failure. Each check is a
# script of its own too; here they share one build and one run of its tests.
. "$(dirname "$0")/common.sh"

logs=$(mktemp -d)
trap 'rm -rf "$logs"' EXIT

# finish PID NAME: the output of what ran beside, and its end.
finish() {
    local status=0
    wait "$1" || status=$?
    cat "$logs/$2"
    [ $status -eq 0 ] || { echo "$2 failed" >&2; exit $status; }
}

echo "== one build of every backend ($features), while tools that are missing are installed"
(use_cuda; use_hip; use_vulkan; use_browser; use_onnx) >"$logs/tools" 2>&1 &
installer=$!
cargo test --no-run --features "$features"
finish $installer tools
# What tests leave for the checks below; an earlier build's must not be taken for this one's.
rm -rf "$target/tmp/cubins" "$target/tmp/onnx"
use_cuda
use_hip
use_vulkan
use_onnx

# Compilers only, one core at a time: beside the tests, of which many wait for one thread.
JOBS=1 bash scripts/check-portable.sh >"$logs/portable" 2>&1 &
portable=$!
echo "== tests of every backend (required: $POLYMLA_REQUIRE)"
cargo test --features "$features"
echo "== the portable kernels under every compiler: registers, spills, instructions"
finish $portable portable

export POLYMLA_TESTED=1
echo "== the Hopper kernels use the tensor cores under every compiler"
bash scripts/check-cuda.sh
echo "== HIP without a device: exported kernels, embedded binaries, the linked library"
bash scripts/check-hip.sh
echo "== the WGSL kernels in a browser"
bash scripts/check-wgpu.sh
echo "== the exported ONNX graphs by onnx.checker and onnxruntime"
bash scripts/check-onnx.sh
echo "== all passed"
