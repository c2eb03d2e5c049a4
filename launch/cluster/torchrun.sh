#!/usr/bin/env bash
# Start the ranks of this machine with torchrun, pass SIGTERM on to them, and end with their exit code.
#
#   launch/cluster/torchrun.sh launch/ppo.py --config configs/ppo.yaml [--option value ...]
#
# torchrun reads from the environment which machine this is of how many: PET_NNODES, PET_NODE_RANK, PET_NPROC_PER_NODE,
# PET_MASTER_ADDR and PET_MASTER_PORT. Without them it starts one rank. Kubeflow sets them; the other examples do here.
#
# torchrun alone ends with 1 whatever its ranks ended with, and kills them 30 seconds after SIGTERM. A scheduler has to
# know a run that saved and wants to be started again (75) from one that cannot work (2) and one that a guard stopped (3).
#   RETRY_CODE        what to end with in place of 75, and of 4 (a rank hung)
#   SHUTDOWN_SECONDS  how long a step and its checkpoint may take after SIGTERM (600)
set -u

# without a program each rank would read one from its standard input, and end well where that is empty
if [ $# = 0 ]; then
  echo "error: torchrun.sh PROGRAM [--option value ...]: no program given" >&2
  exit 2
fi

# a name that the Training Operator gives to the first machine
if [ -n "${MASTER_ADDR:-}" ]; then
  export PET_MASTER_ADDR=${PET_MASTER_ADDR:-$MASTER_ADDR} PET_MASTER_PORT=${PET_MASTER_PORT:-${MASTER_PORT:-29500}}
fi

codes=$(mktemp)
export codes
trap 'rm -f "$codes"' EXIT

# The shell around each rank keeps its exit code. It gets SIGTERM as well and has to outlive the program.
# shellcheck disable=SC2016
rank='trap : TERM INT; python -u "$@"; code=$?; [ $code = 0 ] || echo $code >> "$codes"; exit $code'
torchrun --shutdown-timeout "${SHUTDOWN_SECONDS:-600}" --no-python bash -c "$rank" rank "$@" &
launcher=$!
trap 'kill -TERM $launcher' TERM INT USR1

wait $launcher
code=$?
# a signal ends `wait` while the launcher is still there
while kill -0 $launcher 2>/dev/null; do
  wait $launcher
  code=$?
done

# the first to fail says why; the others end because of it
first=$(head -n 1 "$codes")
code=${first:-$code}
case $code in 4 | 75) code=${RETRY_CODE:-$code} ;; esac
exit "$code"
