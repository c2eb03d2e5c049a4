#!/usr/bin/env bash
# Start a program on the machines of a hostfile over ssh, with DeepSpeed's launcher, and again after every crash.
#
#   launch/cluster/hostfile.sh hosts launch/ppo.py --config configs/ppo.yaml [--option value ...]
#
# `hosts` has a line a machine, such as `10.0.0.1 slots=8`, this machine first. Needed: pdsh, ssh without a password,
# and the same paths on all machines for the repository, the environment, the data and `output_dir`.
# Variables for the ranks stand in .deepspeed_env, NAME=value lines; LAUNCHER_FLAGS holds flags for `deepspeed`.
#
# On SIGTERM `deepspeed` gives its ranks 30 seconds and ends with 1. Here the ranks alone get it: each finishes its step
# and saves, however long that takes, and this script ends with their 75.
set -u

hostfile=${1:-} program=${2:-}
hosts=
if [ -r "$hostfile" ]; then
  hosts=$(awk '!/^[[:space:]]*(#|$)/ { print $1 }' "$hostfile" | paste -sd,)
fi
# without a hostfile DeepSpeed would train on this machine alone
if [ -z "$hosts" ] || [ ! -f "$program" ]; then
  echo "error: hostfile.sh HOSTFILE PROGRAM [--option value ...]: found no hosts in '$hostfile', or no file '$program'" >&2
  exit 2
fi
shift

stopped=
# shellcheck disable=SC2329
pass_on() {
  stopped=1
  # ranks are `python -u PROGRAM`, and the launchers `python -u -m deepspeed...`
  pdsh -S -w "$hosts" pkill -TERM -f -- "-u[[:space:]]$program"
}
trap pass_on TERM INT USR1

for attempt in $(seq "${ATTEMPTS:-20}"); do
  # shellcheck disable=SC2086
  deepspeed --hostfile "$hostfile" --no_local_rank ${LAUNCHER_FLAGS:-} "$@" &
  launcher=$!
  wait $launcher
  code=$?
  # a signal ends `wait` while the launcher is still there
  while kill -0 $launcher 2>/dev/null; do
    wait $launcher
    code=$?
  done

  case $code in 0 | 2 | 3) break ;; esac
  if [ -n "$stopped" ]; then
    break
  fi
  echo "attempt $attempt ended with $code" >&2
  sleep "${PAUSE_SECONDS:-10}"
done
exit "$code"
