#!/usr/bin/env bash
# Workers on several hosts: one launch per host over ssh, so that losing a host costs its own workers
# only (an mpirun that spans hosts ends everywhere with any one of them, --enable-recovery or not).
#
#   deploy/mpirun/launch_hosts.sh HOSTFILE [tandem-worker OPTIONS]
#   deploy/mpirun/launch_hosts.sh hosts --listen-workers tcp://head:5556 \
#       --listen-bulk tcp://head:5557 --key-file /etc/tandem/workers.key
#
# Needs on each host: ssh without a password, the programs in TANDEM_BIN, this folder in
# TANDEM_DEPLOY (default: its path here), the key file, a data_dir on a disk of its own.
# A launch that ends is started again after 1 s, 2 s, ... 60 s. Starting twice is harmless: slots
# that run are left alone. SIGTERM or Ctrl-C drains all hosts. TANDEM_SSH: the ssh command.
set -euo pipefail
[ $# -ge 1 ] && [ -r "$1" ] || { sed -n '2,13s/^# \{0,1\}//p' "$0"; exit 2; }
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
file=$1
shift
deploy=${TANDEM_DEPLOY:-$(dirname "$here")}
read -ra ssh <<<"${TANDEM_SSH:-ssh -o BatchMode=yes -o ServerAliveInterval=15}"

# one_host NAME SLOTS OPTIONS...: launches there until it is told to end.
one_host() {
  local host=$1 slots=$2 pause=1 began code command connection=
  shift 2
  printf -v command '%q ' env TANDEM_BIN="${TANDEM_BIN:-/usr/local/bin}" \
    "$deploy/mpirun/launch_host.sh" "$slots" "$@"
  # -tt: with a terminal, the end of ssh is a hang-up over there, which drains.
  trap '[ -z "$connection" ] || kill "$connection" 2>/dev/null; exit 0' TERM
  while :; do
    began=$SECONDS code=0
    "${ssh[@]}" -tt "$host" "$command" </dev/null & connection=$!
    wait "$connection" || code=$?
    [ $((SECONDS - began)) -lt 60 ] || pause=1
    printf 'launch_hosts.sh: %s ended (%s); again in %s s\n' "$host" "$code" "$pause" >&2
    connection=
    sleep "$pause" & wait $!
    pause=$((pause * 2 > 60 ? 60 : pause * 2))
  done
}

hosts=()
while read -r host slots rest; do
  case $host in '' | '#'*) continue ;; esac
  [[ $slots =~ ^slots=([1-9][0-9]*)$ ]] && [[ -z $rest || $rest = '#'* ]] ||
    { printf '%s: not "NAME slots=N": %s %s %s\n' "$file" "$host" "$slots" "$rest" >&2; exit 2; }
  one_host "$host" "${slots#slots=}" "$@" &
  hosts+=($!)
done <"$file"
[ ${#hosts[@]} -gt 0 ] || { printf '%s names no host\n' "$file" >&2; exit 2; }

trap 'kill -TERM "${hosts[@]}" 2>/dev/null || true' TERM INT HUP
for pid in "${hosts[@]}"; do
  while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done
done
