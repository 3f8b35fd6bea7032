#!/usr/bin/env bash
# A worker's readiness: the coordinator hears the engine of every worker of this host (its lease
# holds). Says nothing else on purpose: an engine without a model is ready to load one, and a
# coordinator that is away is no reason to restart workers, which keep their work meanwhile. So:
# readiness, never liveness; dead or hung engines are restarted by their agent.
#
#   healthy.sh [SLOTS]     with TANDEM_COORDINATOR and TANDEM_KEY_FILE of a client or admin key
set -euo pipefail
slots=${1:-1}
alive=$(tandem --json worker list | jq --arg host "$(hostname)" \
  '[.workers[] | select(.host == $host and .pid > 0)] | length')
[ "$alive" -ge "$slots" ] || { echo "$alive of $slots engines answer" >&2; exit 1; }
