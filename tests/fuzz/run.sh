#!/usr/bin/env bash
# Runs every fuzz target for SECONDS each (default 30), from its seeds and from what earlier runs found.
# The first crash, hang over 10 s or input that takes more than 1 GiB ends it with code 1 and names
# the input.
#   tests/fuzz/run.sh [SECONDS] [TARGET...]      (built with: cmake --preset fuzz && ninja -C build/fuzz fuzz_targets)
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
build=${TANDEM_FUZZ_BUILD:-$root/build/fuzz}
seconds=${1:-30}
shift || true
[ -x "$build/fuzz/fuzz_corpus" ] || { echo "not built: cmake --preset fuzz && ninja -C build/fuzz fuzz_targets" >&2; exit 2; }

corpus=$build/fuzz/corpus
rm -rf "$corpus/seeds"
"$build/fuzz/fuzz_corpus" "$corpus/seeds"
targets=("$@")
if [ ${#targets[@]} = 0 ]; then
  for program in "$build"/fuzz/fuzz_*; do
    name=${program##*/fuzz_}
    [ "$name" = corpus ] || targets+=("$name")
  done
fi
for name in "${targets[@]}"; do
  mkdir -p "$corpus/found/$name" "$corpus/seeds/$name" "$build/fuzz/crashes"
  log=$build/fuzz/$name.log
  if ! "$build/fuzz/fuzz_$name" -max_total_time="$seconds" -timeout=10 -rss_limit_mb=1024 -max_len=65536 \
      -print_final_stats=1 -artifact_prefix="$build/fuzz/crashes/$name-" \
      "$corpus/found/$name" "$corpus/seeds/$name" >"$log" 2>&1; then
    tail -n 40 "$log"
    echo "fuzz_$name failed; the input lies under $build/fuzz/crashes" >&2
    exit 1
  fi
  echo "fuzz_$name: $(sed -n 's/^stat::number_of_executed_units: *//p' "$log") inputs in $seconds s," \
    "$(find "$corpus/found/$name" -type f | wc -l) kept, nothing found"
done
