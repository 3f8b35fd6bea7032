#!/usr/bin/env bash
# deployed_pool.sh BIN: keys, a coordinator on TCP, two workers by deploy/mpirun/launch_host.sh; who has
# no key, or the wrong one, stays out; a stop drains. 77: something is missing here. Loopback only.
set -euo pipefail
export TANDEM_BIN=$1
deploy=$(cd "$(dirname "${BASH_SOURCE[0]}")/../../deploy" && pwd)
command -v mpirun >/dev/null || { echo "no mpirun"; exit 77; }
unset "${!OMPI_@}"
dir=$(mktemp -d)
coordinator='' launch=''
finish() {
  [ -z "$launch" ] || { kill "$launch" 2>/dev/null && wait "$launch"; } || true
  [ -z "$coordinator" ] || kill "$coordinator" 2>/dev/null || true
  wait
  rm -rf "$dir"
}
trap finish EXIT
fail() { echo "FAILED: $*"; tail -n 20 "$dir"/*.out "$dir"/worker/log/*.log 2>/dev/null || true; exit 1; }
wait_until() { # SECONDS COMMAND...
  local end=$((SECONDS + $1 * ${TANDEM_TIME_SCALE:-1}))
  shift
  until "$@"; do [ $SECONDS -lt $end ] || return 1; sleep 0.1; done
}

# auto counts GPUs, with or without a driver, and comes as far as the programs.
TANDEM_BIN=$dir "$deploy/mpirun/launch_host.sh" auto >"$dir/auto.out" 2>&1 || true
grep -q "set TANDEM_BIN" "$dir/auto.out" || fail "auto: $(cat "$dir/auto.out")"

"$deploy/keys.sh" "$dir/keys" admin:admin workers:worker >/dev/null
"$TANDEM_BIN/tandem-coordinator" --data-dir "$dir/head" --listen-clients tcp://127.0.0.1:0 \
  --listen-workers tcp://127.0.0.1:0 --listen-bulk tcp://127.0.0.1:0 \
  --key-file "$dir/keys/coordinator.key" --keys-dir "$dir/keys/keys" >"$dir/coordinator.out" 2>&1 &
coordinator=$!
ready=$dir/head/run/coordinator.json
wait_until 20 test -f "$ready" || fail "no coordinator"
at() { sed -n 's/.*"'"$1"'": *"\(tcp:[^"]*\)".*/\1/p' "$ready" | head -n 1; }
ask() { # KEY ARGUMENTS...
  local key=$1
  shift
  env TANDEM_COORDINATOR="$(at client)" TANDEM_LISTEN_BULK="$(at bulk)" TANDEM_KEY_FILE="$key" \
    "$TANDEM_BIN/tandem" "$@"
}

"$deploy/mpirun/launch_host.sh" 2 --data-dir "$dir/worker" --device cpu --threads 1 \
  --memory-bytes-max 1GiB --listen-workers "$(at worker)" --listen-bulk "$(at bulk)" \
  --key-file "$dir/keys/workers.key" >"$dir/launch.out" 2>&1 &
launch=$!
engines() { [ "$(ask "$dir/keys/admin.key" --json worker list | grep -o '"pid":[1-9]' | wc -l)" = "$1" ]; }
wait_until 60 engines 2 || fail "not two engines"

! ask "$dir/keys/workers.key" status >"$dir/refused.out" 2>&1 || fail "a worker's key is no client's"
! ask "" status >>"$dir/refused.out" 2>&1 || fail "no key, and yet an answer"
rm "$dir/keys/keys/admin.key"
sleep 0.5 # key files are looked at every 100 ms
! ask "$dir/keys/admin.key" status >>"$dir/refused.out" 2>&1 || fail "a revoked key still works"

kill -TERM "$launch"
wait "$launch" || fail "the launch ended with $?"
launch=''
grep -q draining "$dir/worker/log/engine-cpu0.log" || fail "engine 0 did not drain"
grep -q draining "$dir/worker/log/engine-cpu1.log" || fail "engine 1 did not drain"
for pid in $(cat "$dir"/worker/run/worker-cpu?/*.lock); do
  ! grep -qsz -- "$dir/worker" "/proc/$pid/cmdline" || fail "process $pid goes on"
done
