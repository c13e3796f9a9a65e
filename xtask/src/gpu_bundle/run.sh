#!/usr/bin/env bash
# Tests and benches of this bundle on this machine's first GPU; needs a driver and nothing else.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)

usage() {
  cat <<'USAGE'
usage: ./run.sh [--out DIR] [checks] [bench] [sanitizers]

Runs the named parts, or all, and goes on after a failure. A table comes last: a line with PASS,
FAIL or SKIPPED and its seconds for each check, then what the benches measured. What each step
printed lies in DIR (`results` beside this script), the table in DIR/table.txt. Ends with 1 if
anything failed.

  checks      the conformance suite of the backend, tiny models of every family, a cut of a real
              model against the CPU's outputs, the generator, a thousand loads, faults: about
              two minutes on an H100
  bench       decode at batch 1 to 256 and up to 32,768 tokens of context with fp16 and q4 pages,
              prefill, loading from files: about eight minutes for all four shapes, and 24 GB of
              disk for the largest (1 minute and 2 GB for tinyllama-1b alone)
  sanitizers  compute-sanitizer's memcheck and racecheck, if it is on the PATH, over small models
              with recorded steps and without, and memcheck over the conformance suite: about ten
              minutes

Variables:
  SHAPES     the benches' models, shape and bits per weight
             [tinyllama-1b:4.0 llama2-7b:4.0 llama3-8b:4.0 codellama-34b:4.0]
  BENCH      what is measured of them: decode depth q4 load split [the first four]; split compares
             prompts of 2,048 to 8,192 tokens on one GPU and with the layers on all of them
  MODEL      a directory with a whole model, compared with the CPU on the bundle's text as well
  GOLDEN     the whole model's golden outputs (of SmolLM2-135M in EXL2 at 4.0 bits:
             fixtures/golden.json, where the bundle has it)
  SCRATCH    where files of models are made for a while [DIR]
  REPEAT     benches take the best of so many rounds [2]
  TIME       seconds after which a step is ended and has failed [900]
USAGE
}

results=$here/results
parts=()
while [ $# -gt 0 ]; do
  case $1 in
    --out)
      results=${2:?a folder after --out}
      shift
      ;;
    checks | bench | sanitizers) parts+=("$1") ;;
    -h | --help) usage && exit 0 ;;
    *)
      usage >&2
      exit 2
      ;;
  esac
  shift
done
[ ${#parts[@]} -gt 0 ] || parts=(checks bench sanitizers)
shapes=${SHAPES:-tinyllama-1b:4.0 llama2-7b:4.0 llama3-8b:4.0 codellama-34b:4.0}
measured=${BENCH:-decode depth q4 load}
scratch=${SCRATCH:-$results}
repeat=${REPEAT:-2}
time=${TIME:-900}
oxllama=$here/oxllama
tests=$here/oxllama-gpu-tests
fixtures=$here/fixtures
mkdir -p "$results" "$scratch" || exit 2
results=$(cd "$results" && pwd)
scratch=$(cd "$scratch" && pwd)
# Reports of an earlier run are not this one's.
rm -f "$results"/*.json "$results/table.txt"
rows=()
failed=0
# Something to run, with its time limit, so that nothing else waits for what hangs.
limited=(timeout --kill-after=10 "$time")

# row OUTCOME SECONDS NAME WORDS: a line of the table.
row() {
  rows+=("$(printf '%-7s %7.1f s  %s  %s' "$@")")
  echo "${rows[-1]}"
  [ "$1" != FAIL ] || failed=1
}

# log NAME: where a step's output goes.
log() {
  echo "$results/${1//[^A-Za-z0-9._-]/-}.log"
}

# words FILE: its last line, as much of it as a table's row holds.
words() {
  tail -n 1 "$1" | cut -c 1-110
}

# step NAME COMMAND...: runs a command, keeps what it prints, and notes how it ended.
step() {
  local name=$1 start=$SECONDS outcome=PASS log
  log=$(log "$name")
  shift
  if ! "$@" >"$log" 2>&1; then
    outcome=FAIL
    tail -n 40 "$log" | sed 's/^/    /'
  fi
  row $outcome $((SECONDS - start)) "$name" "$(words "$log")"
}

# refused WORDS COMMAND...: whether the command ends with an error that has these words, and not
# with a signal.
refused() {
  local expected=$1 status=0 output
  shift
  output=$("${limited[@]}" "$@" 2>&1 </dev/null) || status=$?
  echo "$output"
  [ $status -gt 0 ] && [ $status -lt 124 ] || { echo "ended with status $status"; return 1; }
  grep -q -- "$expected" <<<"$output" || { echo "does not say: $expected"; return 1; }
  echo "refused: $(grep -m 1 -- "$expected" <<<"$output")"
}

# tokens MODEL FILE OPTION...: what the GPU makes of the jobs: one line a job, its name and tokens.
tokens() {
  local model=$1 file=$2 answers=$results/answers.jsonl
  shift 2
  rm -f "$answers"
  "${limited[@]}" "$oxllama" generate "$model" --device cuda --raw --temperature 0 \
    --max-tokens 48 --input "$fixtures/jobs.jsonl" --output "$answers" "$@" || return 1
  sed -nE 's/^\{"custom_id":("[^"]*").*"token_ids":(\[[0-9,]*\]).*/\1 \2/p' "$answers" |
    sort >"$file"
  [ "$(wc -l <"$file")" -eq "$(wc -l <"$fixtures/jobs.jsonl")" ] ||
    { echo "some job has no answer"; return 1; }
}

# In steps of few rows a job's tokens depend on the job alone, not on its neighbours. Steps of many
# rows are multiplied otherwise, but the same file of jobs makes the same steps in every run.
generator() {
  local alone=$results/alone.txt together=$results/together.txt
  local packed=$results/packed.txt again=$results/again.txt
  tokens "$1" "$alone" --batch 1 --chunk 64 || return 1
  tokens "$1" "$together" --batch 8 --chunk 64 || return 1
  tokens "$1" "$packed" --batch 8 || return 1
  tokens "$1" "$again" --batch 8 || return 1
  diff "$alone" "$together" || { echo "neighbours change tokens"; return 1; }
  diff "$packed" "$again" || { echo "runs differ"; return 1; }
  local other
  other=$(diff "$alone" "$packed" | grep -c '^>')
  echo "$(wc -l <"$alone") jobs, the same alone, together and again; $other other in large steps"
}

# Without a visible GPU, the list says so and models run on the CPU.
no_gpu() {
  local hidden=(env CUDA_VISIBLE_DEVICES= "${limited[@]}" "$oxllama")
  "${hidden[@]}" devices || return 1
  "${hidden[@]}" devices | grep -q '^no GPU: ' || return 1
  "${hidden[@]}" generate "$fixtures/llama.gguf" --prompt the --raw --max-tokens 4 || return 1
  echo "runs on the CPU"
}

# CUDA_VISIBLE_DEVICES chooses: of one device named, there is one.
one_gpu() {
  local count
  count=$(CUDA_VISIBLE_DEVICES=0 "${limited[@]}" "$oxllama" devices | grep -c '^cuda:')
  [ "$count" -eq 1 ] || { echo "$count devices are listed"; return 1; }
  echo "one device is listed"
}

# rows_of NAME FILTERS...: the test program, whose own lines are rows of the table.
rows_of() {
  local name=$1 start=$SECONDS status=0 log line
  log=$(log "$name")
  shift
  "${limited[@]}" "$tests" "$fixtures/models" "$@" 2>&1 | tee "$log" || status=$?
  while IFS= read -r line; do
    rows+=("$line")
  done < <(grep -E '^(PASS|FAIL|SKIPPED) ' "$log" | cut -c 1-200)
  if [ $status -ne 0 ]; then
    row FAIL $((SECONDS - start)) "$name" "status $status: $(words "$log")"
  else
    row PASS $((SECONDS - start)) "$name" "$(words "$log")"
  fi
}

checks() {
  local options=() model
  [ ! -d "$fixtures/cut" ] || options+=(--cut "$fixtures/cut")
  if [ -n "${MODEL:-}" ]; then
    options+=(--model "$MODEL")
    [ ! -f "$fixtures/text.txt" ] || options+=(--text "$fixtures/text.txt")
    [ -z "${GOLDEN:-}" ] || options+=(--golden "$GOLDEN")
  fi
  rows_of "all checks of one process" "${options[@]}"
  for model in "$fixtures"/*.gguf; do
    step "generator $(basename "$model" .gguf)" generator "$model"
  done
  step "fault: no device is visible" no_gpu
  step "fault: one device of all" one_gpu
  step "fault: a GPU is asked for where none is visible" refused CUDA_VISIBLE_DEVICES \
    env CUDA_VISIBLE_DEVICES= "$oxllama" generate "$fixtures/llama.gguf" --prompt the \
    --device cuda
  step "fault: a cap that is too small" refused 'cuda:0' \
    "$oxllama" plan "$fixtures/llama.gguf" --device cuda --cap cuda:0=64KiB
  step "fault: a model that is larger than the GPU" refused 'cuda:0' \
    "$oxllama" bench --synthetic llama3-70b:8.0 --device cuda --cap cuda:0=20GiB
  step "fault: kernels that are not there" refused 'kernels cannot be loaded' \
    env OXLLAMA_KERNEL_DIR="$here/absent" "$oxllama" generate "$fixtures/llama.gguf" \
    --prompt the --device cuda
  head -c 100000 "$fixtures/llama.gguf" >"$results/short.gguf"
  step "fault: a file that ends too soon" refused short.gguf \
    "$oxllama" generate "$results/short.gguf" --prompt the --device cuda
  rm -f "$results/short.gguf"
}

# measure NAME ARGUMENTS...: a bench, whose report is kept for the table.
measure() {
  local report
  report=$results/${1//[^A-Za-z0-9._-]/-}.json
  shift
  "${limited[@]}" "$oxllama" bench --device cuda --json "$@" >"$report.part" || return 1
  mv "$report.part" "$report"
  "$tests" table "$report" && echo "in the table below"
}

# Gigabytes on disk of a shape at up to 8 bits.
gigabytes() {
  case $1 in
    tinyllama-1b:*) echo 2 ;;
    llama2-7b:*) echo 8 ;;
    llama3-8b:*) echo 10 ;;
    codellama-34b:*) echo 36 ;;
    *) echo 75 ;;
  esac
}

# from_files SHAPE NUMBER: loads the files of a model that has just been written or read.
from_files() {
  measure "load $1 $2" "$scratch/$1" --prefill 64 --batch 1 --decode 8 --repeat 1
}

load() {
  local shape=$1 folder free run
  free=$(df -Pk "$scratch" | awk 'NR == 2 { print int($4 / 1000000) }')
  if [ "$free" -lt "$(gigabytes "$shape")" ]; then
    row SKIPPED 0 "load $shape" "$scratch has $free GB free, $(gigabytes "$shape") are needed"
    return
  fi
  folder=$scratch/$shape
  rm -rf "$folder"
  step "synth $shape" "${limited[@]}" "$oxllama" synth "$shape" "$folder"
  # Written back now and not while loads are timed; the files stay in the page cache.
  sync
  for run in 1 2 3; do
    step "load $shape $run" from_files "$shape" "$run"
  done
  rm -rf "$folder"
}

# Prompts on one GPU, then with the layers on all of them.
split() {
  local policy prompts="--prefill 2048,4096,8192 --batch 1 --decode 64"
  for policy in fill balanced; do
    # shellcheck disable=SC2086 # several words
    step "split $1 $policy" measure "split $1 $policy" --synthetic "$1" --repeat "$repeat" \
      $prompts --policy $policy
  done
}

bench() {
  local shape kind
  for shape in $shapes; do
    for kind in $measured; do
      case $kind in
        decode)
          step "bench $shape" measure "bench $shape" --synthetic "$shape" --repeat "$repeat" \
            --batch 1,2,4,8,16,32,256 --prefill 512,2048
          ;;
        depth)
          step "bench $shape depth" measure "bench $shape depth" --synthetic "$shape" \
            --repeat "$repeat" --batch 1 --prefill 2048 --depth 512,2048,8192,32768
          ;;
        q4)
          step "bench $shape q4" measure "bench $shape q4" --synthetic "$shape" --cache q4 \
            --repeat "$repeat" --batch 1 --prefill 2048 --depth 512,2048,8192,32768
          ;;
        load) load "$shape" ;;
        split) split "$shape" ;;
        *) row FAIL 0 "bench $shape" "unknown kind $kind: decode, depth, q4, load or split" ;;
      esac
    done
  done
}

# sanitized TOOL OPTION...: small models under a tool, which must find nothing.
sanitized() {
  local tool=$1
  shift
  "${limited[@]}" compute-sanitizer --tool "$tool" --error-exitcode 9 "$tests" \
    "$fixtures/models" "$@"
}

sanitizers() {
  local tool option
  if ! command -v compute-sanitizer >/dev/null; then
    row SKIPPED 0 sanitizers "compute-sanitizer is not on the PATH"
    return
  fi
  local small=("model llama3" "model gemma3" "decode is the same")
  for tool in memcheck racecheck; do
    step "$tool, recorded steps" sanitized $tool "${small[@]}"
    step "$tool, launched steps" sanitized $tool --unrecorded "${small[@]}"
  done
  # These call NVIDIA's library for matrices as well, which is not ours to check for races.
  [ ! -d "$fixtures/cut" ] ||
    step "memcheck, real weights" sanitized memcheck --cut "$fixtures/cut" "a cut against"
  step "memcheck, conformance" sanitized memcheck conformance
}

# table: everything that was noted, then what was measured.
table() {
  local reports=("$results"/*.json)
  cat "$here/VERSION"
  date -u '+%F %T UTC'
  printf '%s\n' "${rows[@]}"
  if [ -e "${reports[0]}" ]; then
    echo
    "$tests" table "${reports[@]}"
  fi
}

cat "$here/VERSION"
"$oxllama" devices
for part in "${parts[@]}"; do
  $part
done
echo
table | tee "$results/table.txt"
exit $failed
