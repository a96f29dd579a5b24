#!/usr/bin/env bash
# The exported ONNX graphs: executed by tract on golden files and random problems, then checked by onnx.checker and run
# again by onnxruntime. Installs onnx, onnxruntime, numpy and safetensors (pip) into .venv-onnx where they are missing,
# and says so. TVM=8 compiles that many with Apache TVM too (pip, 100 MB).
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-onnx
need=(onnx onnxruntime numpy safetensors)
[ "${TVM:-0}" -eq 0 ] || need+=(apache-tvm)
if ! "$venv/bin/python" -c "import onnx, onnxruntime, numpy, safetensors" 2>/dev/null ||
    { [ "${TVM:-0}" -ne 0 ] && ! "$venv/bin/python" -c "import tvm" 2>/dev/null; }; then
    echo "installing ${need[*]} into $venv"
    [ -x "$venv/bin/python" ] || python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet "${need[@]}"
fi

# One build for all of it: the runtime is large. No kernel binaries are made.
export POLYMLA_NVCC=none
features=cli,sm90,cuda,hip,musa,maca,corex,wgpu,onnx
folder=${CARGO_TARGET_DIR:-target}/tmp/onnx
rm -rf "$folder"
echo "== the graphs, executed by tract"
cargo test --features "$features" --test onnx
cargo test --features "$features" --lib -- onnx::
echo "== the command line exports; the README's support matrix is the registry's answer"
cargo test --features "$features" --test cli
echo "== the same graphs, by onnx.checker and onnxruntime"
"$venv/bin/python" backends/onnx/check.py "$folder" --tvm "${TVM:-0}"
