#!/usr/bin/env bash
# polymla's CPU backend beside PyTorch's CPU way, in turns on the same shapes. Needs Rust and Python 3 with venv;
# installs PyTorch into .venv-peers (several GB: its x86-64 wheels bring CUDA along) where it is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."
venv=.venv-peers
if ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    echo "cpu.sh: no PyTorch in $venv: creating it (pip install torch numpy; a download of about 3 GB)"
    python3 -m venv "$venv"
    "$venv/bin/python" -m pip install --quiet torch numpy
fi
echo "cpu.sh: building polymla"
program=$(cargo bench --bench cpu_polymla --no-run --message-format=json |
    python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "cpu_polymla": print(message["executable"])')
exec "$venv/bin/python" benches/peers/cpu_torch.py "$program" "$@"
