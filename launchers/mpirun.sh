#!/usr/bin/env bash
# Trains under Open MPI's mpirun, with no DeepSpeed launcher between. All arguments go to megaptune/train.py:
#
#   RANKS=16 HOSTFILE=hosts launchers/mpirun.sh --config configs/lama_paper.yaml [--set key=value ...]
#
#   RANKS        processes in all (default: the slots that mpirun finds)
#   HOSTFILE     lines "host slots=8" (default: this host, or what the batch system says)
#   MPIRUN_ARGS  more arguments, such as "--mca btl_tcp_if_include eth0 --allow-run-as-root"
#   EXPORT       names of variables that all ranks get
#
# Rank 0's address and port are found through mpi4py; set MASTER_ADDR and MASTER_PORT to choose them.
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ]; then sed -n '2,11s/^# \{0,1\}//p' "$0"; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)
fail() { echo "error: $1" >&2; exit 3; }

command -v mpirun >/dev/null || fail "mpirun is not installed on this host"
options=()
if [ -n "${RANKS:-}" ]; then options+=(-np "$RANKS"); fi
if [ -n "${HOSTFILE:-}" ]; then
    [ -f "$HOSTFILE" ] || fail "no hostfile at $HOSTFILE"
    options+=(--hostfile "$HOSTFILE")
fi
for name in PYTHONPATH MASTER_ADDR MASTER_PORT ${EXPORT:-}; do
    if [ -n "${!name+set}" ]; then options+=(-x "$name"); fi
done
read -ra more <<<"${MPIRUN_ARGS:-}"
# By its path: other hosts have their own PATH.
exec mpirun "${options[@]}" "${more[@]}" "$(command -v python3)" -u "$root/megaptune/train.py" "$@"
