#!/usr/bin/env bash
# Drains the workers of one data_dir on this host and waits for their end. For those who cannot send
# SIGTERM to launch_host.sh and nothing else: a Slurm step (its signals reach every process), the
# preStop hook of a pod whose workers somebody else's mpirun started.
#
#   drain_host.sh DATA_DIR [SECONDS]     (default: 30, more than drain_timeout_s)
set -euo pipefail
end=$((SECONDS + ${2:-30}))
is() { grep -qsz "$1" "/proc/${2:-0}/cmdline"; } # a file outlives its process, whose pid is reused

supervisors=()
for lock in "$1"/run/worker-*/supervisor.lock; do
  pid=$(cat "$lock" 2>/dev/null) && is 'tandem-worker$' "$pid" && supervisors+=("$pid")
done
launch=$(cat "$1/run/launch.pid" 2>/dev/null) || launch=
if [ -n "$launch" ] && is 'launch_host.sh$' "$launch"; then
  kill -TERM "$launch"
  supervisors+=("$launch")
elif [ ${#supervisors[@]} -gt 0 ]; then
  kill -TERM "${supervisors[@]}" 2>/dev/null || true
fi
for pid in ${supervisors[@]+"${supervisors[@]}"}; do
  while kill -0 "$pid" 2>/dev/null; do
    [ $SECONDS -lt $end ] || { echo "drain_host.sh: process $pid goes on" >&2; exit 1; }
    sleep 0.2
  done
done
