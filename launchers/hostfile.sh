#!/usr/bin/env bash
# Trains on the hosts of a hostfile, which must reach each other by ssh without a password and have this checkout, its
# environment and the run directory at the same paths. All arguments go to megaptune/train.py:
#
#   HOSTFILE=hosts NODES=4 launchers/hostfile.sh --config configs/lama_paper.yaml [--set key=value ...]
#
#   HOSTFILE      lines "host slots=8" (default: /job/hostfile; inside a Slurm job: made from its nodes)
#   NODES         use the first so many hosts (default: all)
#   LAUNCHER      pdsh or openmpi (default: pdsh)
#   LAUNCHER_ARGS more arguments for pdsh or mpirun
#   MASTER_ADDR   address of the first host (default: the first that `hostname -I` gives there)
#   MASTER_PORT   port where the ranks meet (default: 29500)
#   EXPORT        names of variables that all ranks get (PYTHON*, NCCL* and UCX* always travel)
set -euo pipefail
if [ $# -eq 0 ] || [ "$1" = --help ]; then sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; fi
root=$(cd "$(dirname "$0")/.." && pwd)
launcher=${LAUNCHER:-pdsh} hostfile=${HOSTFILE:-/job/hostfile}
fail() { echo "error: $1" >&2; exit 3; }

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

if [ -z "${HOSTFILE:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    slots=${SLURM_GPUS_ON_NODE:-${SLURM_NTASKS_PER_NODE:-1}}
    scontrol show hostnames "$SLURM_JOB_NODELIST" | sed "s/\$/ slots=${slots%%(*}/" >"$scratch/slurm"
    hostfile=$scratch/slurm
fi
[ -f "$hostfile" ] || fail "no hostfile at $hostfile: DeepSpeed cannot start more than one node without one. Write a line \
'NAME slots=RANKS' for every host and name the file in HOSTFILE"
grep -E '^[^#[:space:]]+[[:space:]]+slots=[0-9]+' "$hostfile" | head -n "${NODES:-100000}" >"$scratch/hosts" || true
found=$(wc -l <"$scratch/hosts")
[ "$found" -gt 0 ] || fail "$hostfile has no line 'NAME slots=RANKS'"
[ "$found" -ge "${NODES:-1}" ] || fail "NODES=$NODES, but $hostfile names $found hosts"
case $launcher in
pdsh) program=pdsh ;;
openmpi) program=mpirun ;;
*) fail "LAUNCHER is '$launcher', expected pdsh or openmpi" ;;
esac
command -v "$program" >/dev/null || fail "LAUNCHER=$launcher needs $program on this host: it is not installed"
while read -r host _ <&3; do
    ssh -o BatchMode=yes -o ConnectTimeout=10 "$host" true </dev/null ||
        fail "host $host of $hostfile cannot be reached by ssh without a password"
done 3<"$scratch/hosts"

# DeepSpeed hands on the variables of a file that it looks for by this name.
for name in ${EXPORT:-}; do
    if [ -n "${!name+set}" ]; then echo "$name=${!name}"; fi
done >"$scratch/environment"
export DS_ENV_FILE=$scratch/environment

options=(--hostfile "$scratch/hosts" --launcher "$launcher" --master_port "${MASTER_PORT:-29500}")
if [ -n "${MASTER_ADDR:-}" ]; then options+=(--master_addr "$MASTER_ADDR"); fi
if [ "$launcher" = pdsh ]; then options+=(--num_nodes "$found" --force_multi); fi
if [ -n "${LAUNCHER_ARGS:-}" ]; then options+=(--launcher_args "$LAUNCHER_ARGS"); fi
deepspeed "${options[@]}" "$root/megaptune/train.py" "$@"
