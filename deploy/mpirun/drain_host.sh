#!/usr/bin/env bash
# Drains the workers of one data_dir and waits for their end: for places where their launcher cannot
# be told to (the preStop hook of a pod whose workers somebody else's mpirun started).
#
#   drain.sh DATA_DIR [SECONDS]     (default: 30, more than drain_timeout_s)
set -euo pipefail
end=$((SECONDS + ${2:-30}))
supervisors=()
for lock in "$1"/run/worker-*/supervisor.lock; do
  pid=$(cat "$lock" 2>/dev/null) || continue
  # A lock file outlives its holder, whose pid may be somebody else's by now.
  ! grep -qsz 'tandem-worker$' "/proc/${pid:-0}/cmdline" || supervisors+=("$pid")
done
[ ${#supervisors[@]} -gt 0 ] || exit 0
kill -TERM "${supervisors[@]}" 2>/dev/null || true
for pid in "${supervisors[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do
    [ $SECONDS -lt $end ] || { echo "worker $pid goes on" >&2; exit 1; }
    sleep 0.2
  done
done
