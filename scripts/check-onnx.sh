#!/usr/bin/env bash
# The exported ONNX graphs: executed by tract on golden files and random problems, then checked by onnx.checker and run
# again by onnxruntime. Installs onnx, onnxruntime, numpy and safetensors (pip) into .venv-onnx where they are missing,
# and says so. TVM=8 compiles that many with Apache TVM too (pip, 100 MB).
. "$(dirname "$0")/common.sh"

use_onnx
# Graphs of an earlier build must not be taken for this one's.
[ -n "${POLYMLA_TESTED:-}" ] || rm -rf "$target/tmp/onnx"
tests --test onnx
tests --lib -- onnx::
# The command line exports; the README's support matrix is the registry's answer.
tests --test cli
"$onnx_python" backends/onnx/check.py "$target/tmp/onnx" --tvm "${TVM:-0}"
