#!/usr/bin/env bash
# Arguments of a training go to DeepSpeed's launcher on this container's devices; anything else is a command:
#
#   docker run IMAGE --config /data/run.yaml --set train.epochs=3      RANKS processes, as launchers/local.sh
#   docker run IMAGE megaptune preflight --config /data/run.yaml       also: deepspeed, torchrun, python, bash
set -euo pipefail
case ${1:-} in
-*) exec /opt/megaptune/launchers/local.sh "$@" ;;
*) exec "$@" ;; # exec: signals reach the program itself
esac
