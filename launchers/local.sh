#!/usr/bin/env bash
# Trains on this machine with DeepSpeed's launcher. All arguments go to megaptune/train.py:
#
#   launchers/local.sh --config configs/quickstart.yaml [--set key=value ...]
#
#   RANKS        processes to start (default: the number of NVIDIA GPUs; without one, 1)
#   MASTER_PORT  port where the ranks meet (default: a free one)
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ]; then sed -n '2,7s/^# \{0,1\}//p' "$0"; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks=${RANKS:-$((gpus > 0 ? gpus : 1))}
port=${MASTER_PORT:-$(python3 -c 'import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])')}
exec deepspeed --num_gpus "$ranks" --master_port "$port" "$root/megaptune/train.py" "$@"
