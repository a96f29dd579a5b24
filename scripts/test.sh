#!/usr/bin/env bash
# Passes the tests. Needs Rust; what else a step misses it installs, and says so: Python wheels into ignored folders,
# Debian packages by apt-get.
#
#   bash scripts/test.sh
#
# POLYMLA_REQUIRE=cpu,sm90 turns the absence of a listed backend from a printed skip into a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

export POLYMLA_REQUIRE="${POLYMLA_REQUIRE:-cpu}"
echo "== tests: the command line, CPU, sm90, cuda, hip, musa, maca and corex (required backends: $POLYMLA_REQUIRE)"
cargo test --features cli,sm90,cuda,hip,musa,maca,corex
echo "== the Hopper kernels compile, keep to their registers, and use the tensor cores (no GPU needed)"
bash scripts/check-cuda.sh
echo "== HIP without a device: compilers, ROCm's library, the host code over a CPU (installs Debian packages)"
bash scripts/check-hip.sh
echo "== the WGSL backend on software Vulkan and in a browser (installs Debian packages)"
bash scripts/check-wgpu.sh
echo "== the portable kernels under every compiler: registers, spills, instructions (installs compilers)"
bash scripts/check-portable.sh
echo "== the ONNX graphs by tract, onnx.checker and onnxruntime (installs Python wheels)"
bash scripts/check-onnx.sh
