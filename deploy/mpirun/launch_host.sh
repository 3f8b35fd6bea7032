#!/usr/bin/env bash
# The workers of this host: one mpirun, one tandem-worker per slot. What the Slurm script, the
# systemd unit and the container start, and what launch_hosts.sh starts over ssh.
#
#   deploy/mpirun/launch_host.sh SLOTS [tandem-worker OPTIONS]
#   deploy/mpirun/launch_host.sh 2 --listen-workers tcp://head:5556 --listen-bulk tcp://head:5557 \
#       --key-file /etc/tandem/workers.key
#
# SLOTS: GPUs, or on a CPU host one per socket (threads are shared out); "auto" counts GPUs, and is 1
# where there are none. SIGTERM, SIGINT or SIGHUP to this script drains: each engine writes its job's
# checkpoint and finishes its requests within drain_timeout_s. It ends when all workers have: 0 where
# that was asked, else 1. A worker or an mpirun that died is launched anew; what runs is left alone.
# TANDEM_BIN: the programs' folder.
set -euo pipefail

say() { printf 'launch_host.sh: %s\n' "$*" >&2 || true; } # the terminal may have hung up
die() { say "$@"; exit 2; }
slots=${1:-}
[ $# -gt 0 ] && shift
if [ "$slots" = auto ]; then
  slots=$({ find /proc/driver/nvidia/gpus -mindepth 1 -maxdepth 1 2>/dev/null || true; } | wc -l)
  [ "$slots" -gt 0 ] || slots=1
fi
[[ $slots =~ ^[1-9][0-9]*$ ]] || { sed -n '2,14s/^# \{0,1\}//p' "$0"; exit 2; }
bin=${TANDEM_BIN:-$(dirname "$(command -v tandem-worker || echo /usr/local/bin/tandem-worker)")}
[ -x "$bin/tandem-worker" ] || die "no $bin/tandem-worker; set TANDEM_BIN"
command -v mpirun >/dev/null || die "no mpirun on the PATH (Debian: openmpi-bin)"
limit=$(ulimit -n)
[ "$limit" = unlimited ] || [ "$limit" -ge 1024 ] ||
  die "at most $limit open files; 1024 is enough (ulimit -n, LimitNOFILE=)"

# mpirun 4.1 takes another launcher's variables for its own: inside a Slurm job it waits for ever,
# inside another mpirun it refuses.
while read -r name; do
  unset "$name"
done < <(compgen -e | grep -E '^(OMPI|ORTE|OPAL|PMIX|PMI|PMI2|PRTE|SLURM|SLURMD|SBATCH|SRUN)_' || true)
if [ "$(id -u)" = 0 ]; then # better: a user of their own
  export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi

# Where these workers keep their locks.
ask=("$bin/tandem" --json)
for ((i = 1; i <= $#; ++i)); do
  case ${!i} in
    --data-dir | --config) next=$((i + 1)); ask+=("${!i}" "${!next:-}") ;;
    --data-dir=* | --config=*) ask+=("${!i}") ;;
  esac
done
data_dir=$("${ask[@]}" config show | sed -n 's/.*"data_dir":"\([^"]*\)".*/\1/p')
[ -n "$data_dir" ] || die "no data_dir"
(umask 077 && mkdir -p "$data_dir/run")
other=$(cat "$data_dir/run/launch.pid" 2>/dev/null) || other=$$
if [ "$other" != $$ ] && grep -qsz 'launch_host.sh$' "/proc/$other/cmdline"; then
  say "process $other keeps the workers of $data_dir already"
  exit 0
fi
echo $$ >"$data_dir/run/launch.pid" # for drain_host.sh

supervisors() { # the pids of those that live
  local lock pid
  for lock in "$data_dir"/run/worker-*/supervisor.lock; do
    pid=$(cat "$lock" 2>/dev/null) && [ -n "$pid" ] || continue
    ! grep -qsz 'tandem-worker$' "/proc/$pid/cmdline" || echo "$pid"
  done
}

# mpirun's own files go where we can take them away, also when it was killed.
scratch=$(mktemp -d "${TMPDIR:-/tmp}/tandem-mpirun-XXXXXX")
trap 'rm -rf "$scratch"' EXIT

# setsid: a terminal's Ctrl-C or hang-up reaches this script only. --enable-recovery: a worker that
# dies does not end the others (its exit code says nothing then). plm isolated: this host only, no
# ssh, no Slurm. A SIGTERM that reaches mpirun all the same may only kill after the drain. Workers
# never call MPI_Init: no btl, no fabric, is chosen here.
mpiruns=()
launch() {
  setsid mpirun --enable-recovery --oversubscribe --bind-to none --mca plm isolated \
    --mca odls_base_sigkill_timeout 60 --mca orte_tmpdir_base "$scratch" \
    -np "$slots" "$bin/tandem-worker" "${options[@]}" </dev/null &
  mpiruns+=($!)
}

# To the supervisors, not to mpirun: that would kill them a moment later. (What mpirun hands on, as
# it does SIGUSR1, reaches each rank's whole process group, so not that either.)
draining=0 told=' '
drain() {
  [ "$draining" = 1 ] || say "draining"
  draining=1
  local pid
  for pid in $(supervisors); do
    case $told in *" $pid "*) continue ;; esac # a second one would not wait for its drain
    told+="$pid "
    kill -TERM "$pid" 2>/dev/null || true
  done
}

nap() { sleep "$1" & wait $! || true; } # a trapped signal ends the nap
running() { # any mpirun of ours
  local pid
  for pid in ${mpiruns[@]+"${mpiruns[@]}"}; do ! kill -0 "$pid" 2>/dev/null || return 0; done
  return 1
}

options=("$@")
trap drain TERM INT HUP
launch
nap 2
pause=2 since=$SECONDS
while :; do
  count=$(supervisors | wc -l)
  if [ "$count" = 0 ] && ! running; then break; fi
  # An mpirun that got a SIGTERM as well sits out its time-out with nobody left to start or end.
  if [ "$count" = 0 ] && [ "$draining" = 1 ]; then
    nap 0.5
    kill -KILL "${mpiruns[@]}" 2>/dev/null || true
  fi
  if [ "$draining" = 0 ] && [ "$count" -lt "$slots" ] && [ $((SECONDS - since)) -ge "$pause" ]; then
    say "$count of $slots workers; launching the others"
    launch
    pause=$((pause * 2 > 60 ? 60 : pause * 2)) since=$SECONDS
  elif [ "$count" -ge "$slots" ] && [ $((SECONDS - since)) -ge 60 ]; then
    pause=2
  fi
  if [ "$draining" = 1 ]; then drain; nap 0.2; else nap 2; fi
done
[ "$draining" = 1 ] || { say "no worker is left"; exit 1; }
