#!/usr/bin/env bash
# Tests and benches of this bundle on this machine's GPUs; needs a driver and nothing else.
#
#   ./run.sh [--out DIR] [conformance] [generator] [bench]
#
# Runs the named sections, or all. What each step printed lies in DIR (results beside this
# script); a table comes last, and is in DIR/table.txt. Ends with 1 if a step failed.
# SHAPES names the benches' models: shape and bits per weight, separated by blanks.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
results=$here/results
if [ "${1:-}" = --out ]; then
  results=${2:?a folder after --out}
  shift 2
fi
sections=${*:-conformance generator bench}
shapes=${SHAPES:-tinyllama-1b:4.0 llama2-7b:4.0 codellama-34b:4.0}
oxllama=$here/oxllama
mkdir -p "$results" || exit 2
rows=()
failed=0

# step NAME COMMAND...: runs a command, keeps what it prints, and notes how it ended.
step() {
  local name=$1 log=$results/${1//[ :\/]/-}.log start=$SECONDS outcome=passed
  shift
  if ! "$@" >"$log" 2>&1; then
    outcome=FAILED
    failed=1
    sed 's/^/    /' "$log" | tail -n 40
  fi
  local line
  line=$(tail -n 1 "$log" | cut -c 1-100)
  rows+=("$(printf '%-40s %-7s %5d s  %s' "$name" "$outcome" $((SECONDS - start)) "$line")")
  echo "${rows[-1]}"
}

# tokens MODEL BATCH FILE: what the GPU makes of the jobs, BATCH at a time: one line a job, its
# name and tokens.
tokens() {
  local answers=$results/answers.jsonl
  rm -f "$answers"
  "$oxllama" generate "$1" --device cuda --raw --temperature 0 --max-tokens 48 --batch "$2" \
    --input "$here/fixtures/jobs.jsonl" --output "$answers" || return 1
  sed -nE 's/^\{"custom_id":("[^"]*").*"token_ids":(\[[0-9,]*\]).*/\1 \2/p' "$answers" | sort >"$3"
  [ "$(wc -l <"$3")" -eq "$(wc -l <"$here/fixtures/jobs.jsonl")" ] ||
    { echo "some job has no answer"; return 1; }
}

# A job's tokens depend on the job alone: not on its neighbours, not on the run.
generator() {
  tokens "$1" 1 "$results/alone.txt" || return 1
  tokens "$1" 8 "$results/together.txt" || return 1
  tokens "$1" 8 "$results/again.txt" || return 1
  diff "$results/alone.txt" "$results/together.txt" || { echo "neighbours change tokens"; return 1; }
  diff "$results/together.txt" "$results/again.txt" || { echo "runs differ"; return 1; }
  echo "$(wc -l <"$results/alone.txt") jobs, the same alone, together and again"
}

cat "$here/VERSION"
"$oxllama" devices || true
for section in $sections; do
  case $section in
    conformance) step conformance "$here/oxllama-gpu-tests" "$here/fixtures/models" ;;
    generator)
      for model in "$here"/fixtures/*.gguf; do
        step "generator $(basename "$model" .gguf)" generator "$model"
      done
      ;;
    bench)
      for shape in $shapes; do
        step "bench $shape" "$oxllama" bench --synthetic "$shape" --device cuda
        sed 's/^/    /' "$results/bench-${shape//:/-}.log"
      done
      ;;
    *)
      echo "unknown section $section: conformance, generator or bench" >&2
      exit 2
      ;;
  esac
done

{
  cat "$here/VERSION"
  date -u '+%F %T UTC'
  printf '%s\n' "${rows[@]}"
} >"$results/table.txt"
echo
cat "$results/table.txt"
exit $failed
