#!/usr/bin/env bash
# Makes the CURVE keys that tcp:// endpoints need, with nothing running yet.
#
#   deploy/keys.sh DIR [NAME:ROLE]...     (default: admin:admin workers:worker)
#
#   DIR/coordinator.key   the coordinator's own pair      -> its key_file
#   DIR/keys/NAME.key     public halves, read live        -> its keys_dir
#   DIR/NAME.key          a client's or worker's own pair -> that process's key_file
#
# Again with more names adds them; a key that is there stays. Removing DIR/keys/NAME.key revokes it
# at once, as `tandem key revoke NAME` does. Every file has mode 0600: who starts the coordinator
# must own its two, who starts the workers theirs.
set -euo pipefail
umask 077

die() { printf 'keys.sh: %s\n' "$*" >&2; exit 1; }
[ $# -ge 1 ] && [ "${1#-}" = "$1" ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
bin=${TANDEM_BIN:-$(dirname "$(command -v tandem || echo /usr/local/bin/tandem)")}
[ -x "$bin/tandem-coordinator" ] || die "no $bin/tandem-coordinator; set TANDEM_BIN"

mkdir -p "$1/keys"
dir=$(cd "$1" && pwd)
shift
[ $# -gt 0 ] || set -- admin:admin workers:worker

# A coordinator of its own, over ipc, makes the pairs; its registry is thrown away.
scratch=$(mktemp -d)
coordinator=
finish() {
  [ -z "$coordinator" ] || kill "$coordinator" 2>/dev/null || true
  wait
  rm -rf "$scratch"
}
trap finish EXIT
unset "${!TANDEM_@}"
export HOME=$scratch XDG_CONFIG_HOME=$scratch # no settings file of this user's
"$bin/tandem-coordinator" --data-dir "$scratch/data" --keys-dir "$dir/keys" --listen-clients '' \
  --listen-workers '' --listen-bulk '' --key-file '' --registry-bytes-max 16MiB \
  --blobs-bytes-max 16MiB >"$scratch/log" 2>&1 &
coordinator=$!
for ((i = 0; i < 100; ++i)); do
  [ ! -f "$scratch/data/run/coordinator.json" ] || break
  kill -0 "$coordinator" 2>/dev/null || { cat "$scratch/log" >&2; die "no coordinator started"; }
  sleep 0.1
done
ask() { "$bin/tandem" --json --data-dir "$scratch/data" --coordinator '' key "$@"; }
field() { sed -n 's/.*"'"$1"'":"\([^"]*\)".*/\1/p'; } # Z85 has neither quotes nor backslashes

# write_key FILE NAME ROLE PUBLIC SECRET [SERVER]
write_key() {
  printf 'tandem-key 1\nname %s\nrole %s\npublic %s\nsecret %s\n' "$2" "$3" "$4" "$5" >"$1.new"
  [ -z "${6:-}" ] || printf 'server %s\n' "$6" >>"$1.new"
  mv "$1.new" "$1"
}

if [ ! -f "$dir/coordinator.key" ]; then
  made=$(ask create coordinator --role admin)
  write_key "$dir/coordinator.key" coordinator admin "$(field public <<<"$made")" \
    "$(field secret <<<"$made")"
  rm "$dir/keys/coordinator.key" # it answers; nobody calls with it
fi
server=$(sed -n 's/^public //p' "$dir/coordinator.key")
for word in "$@"; do
  name=${word%%:*} role=${word#*:}
  [ "$name" != "$word" ] && [ "$name" != coordinator ] || die "not NAME:ROLE: $word"
  if [ -f "$dir/$name.key" ]; then
    printf 'kept %s\n' "$dir/$name.key"
    continue
  fi
  made=$(ask create "$name" --role "$role") || die "no key $name: $made"
  write_key "$dir/$name.key" "$name" "$role" "$(field public <<<"$made")" \
    "$(field secret <<<"$made")" "$server"
  printf 'made %s\n' "$dir/$name.key"
done
