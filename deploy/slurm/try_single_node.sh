#!/usr/bin/env bash
# Runs pool.sbatch against a real Slurm of one node: slurmctld, slurmd and munged from Debian's
# packages, in a scratch folder, on loopback, and takes everything down again.
#
#   deploy/slurm/try_single_node.sh MODEL.gguf [DATA.jsonl]
#
# Needs root (slurmd) and: apt-get install --no-install-recommends slurmctld slurmd slurm-client munge
# TANDEM_BIN: the programs (default: build/release/bin). TANDEM_TRY_KEEP=1 keeps the scratch folder.
# Exit code 0: everything below was seen; 77: something that it needs is not here.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
deploy=$root/deploy
export TANDEM_BIN=${TANDEM_BIN:-$root/build/release/bin}
model=${1:-}
data=${2:-$root/tools/quickstart/train.jsonl}
skip() { printf 'try_single_node.sh: %s\n' "$*" >&2; exit 77; }
[ -r "$model" ] && [ -r "$data" ] || { sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 2; }
[ "$(id -u)" = 0 ] || skip "slurmd needs root"
for program in munged slurmctld slurmd sbatch mpirun "$TANDEM_BIN/tandem"; do
  command -v "$program" >/dev/null || skip "no $program"
done

scratch=$(mktemp -d /tmp/tandem-slurm-XXXXXX)
node=$(hostname -s)
started=()
say() { printf '%s == %s\n' "$(date +%T)" "$*"; }
fail() {
  printf 'FAILED: %s\n' "$*" >&2
  tail -n 20 "$scratch"/*.log "$scratch"/pool-*.out >&2 || true
  exit 1
}
finish() {
  local code=$? i
  if [ -n "${SLURM_CONF:-}" ] && squeue --noheader 2>/dev/null | grep -q .; then
    scancel --user=root || true
    wait_until 60 no_jobs || true
  fi
  for ((i = ${#started[@]} - 1; i >= 0; --i)); do kill "${started[i]}" 2>/dev/null || true; done
  wait
  if [ "${TANDEM_TRY_KEEP:-}" = 1 ]; then echo "kept $scratch"; else rm -rf "$scratch"; fi
  exit "$code"
}
trap finish EXIT
trap 'exit 130' INT TERM
wait_until() { # SECONDS COMMAND...
  local end=$((SECONDS + $1))
  shift
  until "$@"; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.2
  done
}
free_port() { # the first of N free ones in a row from $1
  local port=$1 i
  while :; do
    for ((i = 0; i < $2; ++i)); do
      (exec 3<>"/dev/tcp/127.0.0.1/$((port + i))") 2>/dev/null && { port=$((port + i + 1)); continue 2; }
    done
    echo "$port"
    return
  done
}

say "a Slurm of one node, $(slurmd -V), in $scratch"
mkdir -p "$scratch"/{munge,state,spool}
chmod 700 "$scratch" "$scratch/munge"
(umask 077 && head -c 1024 /dev/urandom >"$scratch/munge/key")
slurm_port=$(free_port 16817 2)
cat >"$scratch/slurm.conf" <<CONF
ClusterName=scratch
SlurmctldHost=$node(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$scratch/munge/socket
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
SlurmctldPort=$slurm_port
SlurmdPort=$((slurm_port + 1))
StateSaveLocation=$scratch/state
SlurmdSpoolDir=$scratch/spool
SlurmctldPidFile=$scratch/slurmctld.pid
SlurmdPidFile=$scratch/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
NodeName=$node NodeAddr=127.0.0.1 CPUs=$(nproc) State=UNKNOWN
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
export SLURM_CONF=$scratch/slurm.conf
munged --force --foreground --socket="$scratch/munge/socket" --key-file="$scratch/munge/key" \
  --pid-file="$scratch/munge/pid" --seed-file="$scratch/munge/seed" \
  --log-file="$scratch/munge/log" >"$scratch/munged.log" 2>&1 &
started+=($!)
wait_until 10 test -S "$scratch/munge/socket" || fail "munged did not start"
slurmctld -D -f "$SLURM_CONF" >"$scratch/slurmctld.log" 2>&1 &
started+=($!)
slurmd -D -f "$SLURM_CONF" >"$scratch/slurmd.log" 2>&1 &
started+=($!)
idle() { [ "$(sinfo --noheader --format=%T 2>/dev/null)" = idle ]; }
wait_until 30 idle || fail "the node did not become idle"
sinfo

say "keys"
"$deploy/keys.sh" "$scratch/keys"
port=$(free_port 25555 3)
tandem() {
  env TANDEM_COORDINATOR="tcp://127.0.0.1:$port" TANDEM_KEY_FILE="$scratch/keys/admin.key" \
    TANDEM_LISTEN_BULK="tcp://127.0.0.1:$((port + 2))" "$TANDEM_BIN/tandem" "$@"
}
job=
submit() {
  job=$(env TANDEM_DEPLOY="$deploy" TANDEM_KEYS="$scratch/keys" TANDEM_SCRATCH="$scratch/node" \
    TANDEM_PORT="$port" TANDEM_SLOTS=1 TANDEM_WORKER_OPTIONS="--device cpu --threads 1" \
    sbatch --parsable --output="$scratch/pool-%j.out" "$deploy/slurm/pool.sbatch")
  say "sbatch pool.sbatch: job $job"
  wait_until 60 workers_here || fail "no worker connected"
  squeue
  tandem worker list
}
workers_here() { tandem worker list 2>/dev/null | grep -q "^$node/cpu0 "; }
no_jobs() { ! squeue --noheader | grep -q .; }
no_worker_left() { ! grep -lsz -- "$scratch/[n]ode" /proc/[0-9]*/cmdline | grep -q .; }
ended() { # HOW PATTERN
  wait_until 60 no_jobs || fail "the job goes on after $1"
  wait_until 5 no_worker_left || fail "a process of the pool outlived its job after $1"
  scontrol show job "$job" | grep -o 'JobState=[A-Z]*\|ExitCode=[0-9:]*\|RunTime=[0-9:]*' | xargs
  cat "$scratch/pool-$job.out"
  grep -q "$2" "$scratch/pool-$job.out" || fail "$1 did not drain"
  tail -qn 3 "$scratch"/node/worker/log/engine-cpu0.log
}
step_of() { tandem --json job show "$1" | sed -n 's/.*"step":\([0-9]*\).*/\1/p'; }
past_step() { [ "$(step_of "$1")" -ge "$2" ]; }
goes_on() { # two steps beyond where a pool that has just started found the long job
  local step
  step=$(step_of "$long")
  wait_until 120 past_step "$long" $((step + 2)) || fail "the long job did not go on after step $step"
  tandem job logs "$long" | grep -v ' step ' | cut -c1-100 | tail -n 6
}

submit
say "a model, an answer, an adapter"
tandem model add small "$model"
tandem generate --model small --prompt "Name a colour." --max-tokens 8 --temperature 0
settings=(--max-length 128 --per-device-train-batch-size 1 --lora-r 4)
tandem train --model small --data "$data" --adapter tried "${settings[@]}" --max-steps 3 --follow
tandem generate --model tried --prompt "Name a colour." --max-tokens 8 --temperature 0

say "a long job, and scancel --batch --signal=TERM in the middle of it"
long=$(tandem --json train --model small --data "$data" --adapter long "${settings[@]}" \
  --num-train-epochs 50 | sed -n 's/.*"job":"\([^"]*\)".*/\1/p')
wait_until 120 past_step "$long" 3 || fail "the long job did not start"
scancel --batch --signal=TERM "$job"
ended "scancel --batch --signal=TERM" "all workers have ended"

say "the pool again: the job goes on"
submit
goes_on
say "a plain scancel, which signals every process"
scancel "$job"
ended "scancel" "the engine ended as it was asked to" # the rest is killed after KillWait

say "the pool once more: where the job stands"
submit
goes_on
tandem job cancel "$long"
scancel --batch --signal=TERM "$job"
ended "the last scancel" "all workers have ended"
say "seen: connect, generate, train, drain twice, resume twice"
