#!/usr/bin/env bash
# Everything that is to be measured on a GPU, in parts that can be called one by one:
#
#   benchmarks/gpu.sh --out DIR build test sanitize        # each of these three calls ends
#   benchmarks/gpu.sh --out DIR --data DIR kernels step    # within --seconds, 540 by default
#   benchmarks/gpu.sh --out DIR --data DIR mnist
#   benchmarks/gpu.sh --out DIR --data DIR cifar10         # again with the same DIR: it goes on
#   benchmarks/gpu.sh --out DIR rest                       # the tests that need no GPU
#
# --data holds mnist/ (the four IDX files) and cifar10/. Raw files go to --out, and with --archive
# FILE into one .tar.gz as well; every part ends with a short table, which is also in PART.txt.
# The parts of a call share its time: each may take an equal share of what is left. A part whose
# time is up stops, says what is missing and fails; what has been written stays. Where the kernels
# are not built, they are built first.
#
# --check runs each part small on the CPU, with the embedded digits: does the script still work?
# Nothing it prints is a measurement.
set -uo pipefail

usage() { sed -n '2,19p' "${BASH_SOURCE[0]}" | sed 's/^# \{0,1\}//'; }
die() { printf 'gpu.sh: %s\n' "$*" >&2; exit 2; }
say() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }
skip() { printf 'skipped: %s\n' "$*"; }

all='build, test, sanitize, rest, kernels, step, mnist, cifar10'
out='' data='' archive='' seconds=540 check=0 parts=()
while (($#)); do
  case $1 in
    --out | --data | --archive | --seconds)
      (($# > 1)) || die "$1: expected a value, got nothing"
      case $1 in
        --out) out=$2 ;; --data) data=$2 ;; --archive) archive=$2 ;; *) seconds=$2 ;;
      esac
      shift 2
      ;;
    --check) check=1; shift ;;
    -h | --help) usage; exit 0 ;;
    build | test | sanitize | rest | kernels | step | mnist | cifar10) parts+=("$1"); shift ;;
    *) die "expected $all or an option, got '$1'" ;;
  esac
done
((${#parts[@]})) || die "expected at least one part: $all"
[[ $out ]] || die "--out: expected a folder for the raw files, got nothing"
[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "--seconds: expected a whole number, got '$seconds'"
mkdir -p "$out" || die "--out $out: cannot be made"
out=$(cd "$out" && pwd)
[[ $archive ]] && archive=$(realpath -m "$archive")
if [[ $data ]]; then
  [[ -d $data ]] || die "--data $data: expected a folder, there is none"
  data=$(cd "$data" && pwd)
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
python=${PYTHON:-python3}

part_end=$seconds # of the part that runs, in seconds since the script began
left() { echo $((part_end - SECONDS > 5 ? part_end - SECONDS : 5)); }
# An interrupt, not the end: Python then still says and writes what it has.
within() { # $1: seconds at most; the rest: a command
  local most=$1
  shift
  timeout --signal=INT --kill-after=15 "$((most < $(left) ? most : $(left)))" "$@"
}
limited() { within "$(left)" "$@"; }
has_module() { "$python" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)" 2>/dev/null; }

need() { # every module that a part cannot do without
  local module missing=()
  for module in "$@"; do has_module "$module" || missing+=("$module"); done
  ((${#missing[@]} == 0)) || { echo "cannot run: python modules missing: ${missing[*]}"; return 1; }
}

need_data() { # $1: folder below --data
  [[ $data && -d $data/$1 ]] && return
  echo "cannot run: --data: expected a folder with $1/ in it, got '${data:-nothing}'"
  return 1
}

gpu_or_check() {
  ((check)) && return
  "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null || {
    echo "cannot run: torch finds no CUDA device (--check runs small on the CPU)"
    return 1
  }
  # Without its libraries the package would quietly measure its plain-PyTorch reference.
  kernels_load || { part_build && kernels_load; } || {
    echo "cannot run: the CUDA kernels do not load"
    return 1
  }
}

kernels_load() {
  "$python" -c 'import sys; from fastbandit._native import status
sys.exit(not (status()["cuda"]["loaded"] and status()["cpu"]["loaded"]))' 2>/dev/null
}

# --- parts ---------------------------------------------------------------------------------

part_build() {
  need torch numpy setuptools pybind11 ninja || return
  local begun=$SECONDS status=0
  if ((check)); then
    skip "compiling; --check looks at what is built"
  else
    FASTBANDIT_CUDA=1 limited "$python" setup.py build_ext --inplace >"$out/build.log" 2>&1 || status=1
    grep -i 'fastbandit' "$out/build.log" | head -3
    ((status)) && { tail -20 "$out/build.log"; return 1; }
  fi
  "$python" -m fastbandit.info --json >"$out/info.json" || return
  printf 'build time  %d s\n' $((SECONDS - begun))
  "$python" -m fastbandit.info | head -24
  if command -v nvidia-smi >/dev/null; then
    nvidia-smi --query-gpu=name,driver_version,clocks.max.sm,clocks.max.mem,memory.total \
      --format=csv | tee "$out/gpu.csv"
  else
    skip "nvidia-smi is not on this machine, so no driver version"
  fi
  ((check)) && return
  "$python" - "$out/info.json" <<'PY'
import json, sys
libraries = json.load(open(sys.argv[1]))["libraries"]
cuda = libraries.get("cuda") or {}
if not cuda.get("loaded"):
    sys.exit(f"build: expected the CUDA library to load, got {cuda}")
PY
}

run_suite() { # $1: name of the log; the rest: arguments of pytest
  local log=$out/$1.log status=0
  shift
  local -a suite=(-q -p no:cacheprovider --maxfail=60 --tb=short)
  # One after another the tests take longer than a part has.
  if ! ((check)) && has_module xdist; then suite+=(-n 6); fi
  OMP_NUM_THREADS=2 limited "$python" -m pytest "${suite[@]}" "$@" >"$log" 2>&1 || status=1
  printf '%-12s %s\n' suite "$(tail -1 "$log")"
  grep -E '^(FAILED|ERROR)' "$log" | head -40
  return $status
}

part_test() { # what runs on the GPU
  need torch pytest hypothesis tyro pydantic rich safetensors yaml || return
  gpu_or_check || return
  if ((check)); then
    run_suite test tests/test_ops_philox.py -k 'not cuda'
  else
    run_suite test -m cuda tests
  fi
}

part_rest() { # what needs no GPU, and where a device left open means the CPU
  need torch pytest hypothesis tyro pydantic rich safetensors yaml || return
  if ((check)); then
    run_suite rest tests/test_ops_philox.py -k 'not cuda'
  else
    CUDA_VISIBLE_DEVICES='' run_suite rest -m 'not cuda' tests
  fi
}

part_sanitize() {
  need torch pytest hypothesis || return
  gpu_or_check || return
  local tool line status=0 share=$(($(left) / 4))
  if ((check)); then
    skip "compute-sanitizer: there are no kernels to check on a CPU"
    return
  fi
  if ! command -v compute-sanitizer >/dev/null; then
    skip "compute-sanitizer is not on this machine: no memcheck, racecheck, initcheck, synccheck"
    return
  fi
  for tool in memcheck racecheck synccheck initcheck; do
    # torch asks the driver for what it may not have; that is no error of a kernel.
    local -a flags=(--tool "$tool" --error-exitcode 9 --target-processes all)
    [[ $tool == memcheck ]] && flags+=(--report-api-errors no)
    # Our kernels alone, but for initcheck: that has to see what torch's kernels write.
    [[ $tool == initcheck ]] || flags+=(--kernel-regex kns=fastbandit)
    # Torch's cache of memory would hide an access beyond a tensor's end.
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 within $share \
      compute-sanitizer "${flags[@]}" "$python" -m pytest -q -p no:cacheprovider \
      -k "cuda and ($sanitized) and not compile and not gradcheck" \
      tests/test_ops_*.py >"$out/$tool.log" 2>&1
    case $? in
      0) line='clean' ;;
      9)
        if [[ $tool == initcheck ]] && ! grep -q 'fastbandit::' "$out/$tool.log"; then
          line="reports none of our kernels: see $tool.log"
        else
          line="found errors: see $tool.log"
          status=1
        fi
        ;;
      124 | 137) line='its time was up: not checked whole'; status=1 ;;
      *) line="could not run or a test failed: $(tail -1 "$out/$tool.log")"; status=1 ;;
    esac
    printf '%-12s %s; %s\n' "$tool" "$line" "$(grep -E 'ERROR SUMMARY|RACECHECK SUMMARY' "$out/$tool.log" | tail -1)"
  done
  return $status
}
# Each kernel on odd sizes, views and layouts; a sanitizer makes them a hundred times as slow.
sanitized='values or views or layout or leading or gradients_in_other or step_is_update or table_by_hand'

benchmark() { # $1: name of the files; $2: its share of the time, in percent; $3: more for -k; files
  local name=$1 most=$(($(left) * $2 / 100)) chosen=$3
  shift 3
  if ((check)); then
    # Without the compilers, whose minutes say nothing about this script.
    FASTBANDIT_BENCH_SMOKE=1 limited "$python" -m pytest -q -p no:cacheprovider \
      -k 'cpu and not compile' "$@" \
      --benchmark-json "$out/$name.json" >"$out/$name.log" 2>&1
  else
    # It stops by itself between two entries, and then still writes those that it has.
    FASTBANDIT_BENCH_SECONDS=$most within $((most + 60)) "$python" -m pytest -q \
      -p no:cacheprovider -k "cuda$chosen" "$@" --benchmark-max-time=0.2 \
      --benchmark-json "$out/$name.json" >"$out/$name.log" 2>&1
  fi || {
    printf '%s: %s\n' "$name" "$(tail -1 "$out/$name.log")"
    return 1
  }
}

tables() { # names of the files
  local name files=()
  for name in "$@"; do [[ -s $out/$name.json ]] && files+=("$out/$name.json"); done
  ((${#files[@]})) && "$python" benchmarks/tables.py kernels "${files[@]}"
}

part_kernels() {
  need torch pytest pytest_benchmark || return
  gpu_or_check || return
  local status=0
  local -a small=()
  ((check)) && small=(--check)
  # First what the library can do: it decides what is worth a kernel.
  within $(($(left) / 4)) "$python" benchmarks/gpu_ceilings.py "${small[@]}" \
    --seconds $(($(left) / 5)) --out "$out/ceilings.json" 2>&1 | tee "$out/ceilings.log"
  ((PIPESTATUS[0] == 0)) || status=1
  benchmark bench_pgd 25 '' benchmarks/bench_pgd.py || status=1
  # In --check one file shows that the way through works; CI runs them all.
  if ! ((check)); then
    benchmark bench_bandit 15 '' benchmarks/bench_bandit.py || status=1
    benchmark bench_gabor 25 ' and not compile' benchmarks/bench_gabor.py || status=1
    benchmark bench_depthwise 60 ' and (float32 or stride_2) and not compile' benchmarks/bench_depthwise.py ||
      status=1
    benchmark bench_depthwise_bfloat16 90 ' and bfloat16 and not compile' \
      benchmarks/bench_depthwise.py || status=1
  fi
  tables bench_pgd bench_bandit bench_gabor bench_depthwise bench_depthwise_bfloat16
  return $status
}

part_step() {
  need torch pytest pytest_benchmark tyro || return
  gpu_or_check || return
  local status=0
  if ((check)); then
    profile_steps --preset smoke --space general7-light --init-channels 2 --train-limit 64 ||
      status=1
  elif need_data mnist; then
    profile_steps --preset mnist --data "$data/mnist" || status=1
  else
    status=1
  fi
  benchmark bench_search_step 60 ' and not compile' benchmarks/bench_search_step.py || status=1
  # One round: the network it attacks is launch-bound.
  FASTBANDIT_BENCH_ROUNDS=1 benchmark bench_evaluate 50 '' benchmarks/bench_evaluate.py || status=1
  # Last: the compiler takes minutes for a supernet.
  if ! ((check)); then
    benchmark bench_search_step_compiled 100 ' and (compile or fastbandit)' \
      benchmarks/bench_search_step.py || status=1
  fi
  tables bench_search_step bench_search_step_compiled bench_evaluate
  return $status
}

profile_steps() { # arguments of the search whose steps are looked at
  local status=0
  within $(($(left) / 3)) "$python" benchmarks/profile_step.py --out "$out/profile.json" -- "$@" \
    2>&1 | tee "$out/profile.log" | tail -14
  ((PIPESTATUS[0] == 0)) || status=1
  if ! command -v ncu >/dev/null; then
    skip "Nsight Compute (ncu) is not on this machine: torch's profiler alone"
    return $status
  fi
  if ((check)); then
    skip "Nsight Compute: there are no kernels to look at on a CPU"
    return $status
  fi
  # The three kernels of ours that took longest: what bounds each of them.
  local kernels
  kernels=$("$python" - "$out/profile.json" <<'PY'
import json, re, sys
names = []
for row in json.load(open(sys.argv[1]))["rows"]:
    found = re.search(r"(\w+_kernel)\b", row["name"])
    if "fastbandit" in row["name"] and found and found.group(1) not in names:
        names.append(found.group(1))
print("|".join(names[:3]))
PY
  )
  if [[ ! $kernels ]]; then
    skip "Nsight Compute: the profile names no kernel of ours"
    return $status
  fi
  within $(($(left) / 3)) ncu --clock-control none --kernel-name "regex:$kernels" \
    --launch-count 12 --section SpeedOfLight --section MemoryWorkloadAnalysis \
    --section Occupancy --csv \
    "$python" -m fastbandit.search "$@" --graphs no --dry-run >"$out/ncu.csv" 2>"$out/ncu.log" ||
    { status=1; printf 'ncu: %s\n' "$(tail -1 "$out/ncu.log")"; }
  return $status
}

stopped() { # $1: exit status, $2: log
  case $1 in
    124 | 137) printf 'time is up after %d s; the same command goes on: %s\n' "$SECONDS" "$(tail -1 "$2")" ;;
    *) printf 'failed with status %d: %s\n' "$1" "$(tail -1 "$2")" ;;
  esac
}

# A search, the retraining of what it found and its evaluation, each in a folder of its own, where
# it goes on if it was stopped. $1: name of the pipeline; then arguments for each, as arrays.
pipeline() {
  local name=$1 work=$out/$1 status=0 step
  local -n for_search=$2 for_retrain=$3 for_evaluate=$4
  for step in retrain evaluate; do
    has_module "fastbandit.$step" || { echo "cannot run: this checkout has no fastbandit.$step"; return 1; }
  done
  mkdir -p "$work"
  if [[ ! -f $work/search/summary.json ]]; then
    limited "$python" -m fastbandit.search "${for_search[@]}" --out "$work/search" \
      >>"$out/$name-search.log" 2>&1 || { stopped $? "$out/$name-search.log"; status=1; }
  fi
  if ((status == 0)) && [[ ! -f $work/retrain/summary.json ]]; then
    limited "$python" -m fastbandit.retrain "$work/search" "${for_retrain[@]}" \
      --out "$work/retrain" >>"$out/$name-retrain.log" 2>&1 ||
      { stopped $? "$out/$name-retrain.log"; status=1; }
  fi
  if ((status == 0)) && [[ ! -f $work/retrain/evaluation/evaluation.json ]]; then
    limited "$python" -m fastbandit.evaluate "$work/retrain" "${for_evaluate[@]}" \
      --out "$work/retrain/evaluation" >>"$out/$name-evaluate.log" 2>&1 ||
      { stopped $? "$out/$name-evaluate.log"; status=1; }
  fi
  local -a there=()
  for step in search retrain; do [[ -f $work/$step/config.yaml ]] && there+=("$work/$step"); done
  ((${#there[@]})) && "$python" -m fastbandit.report "${there[@]}" --out "$out/$name.html" | tail -1
  # What a reader needs, without the checkpoints that only the run itself does.
  tar -czf "$out/$name.tar.gz" -C "$out" --exclude=checkpoints --exclude='*.lock' "$name"
  "$python" benchmarks/tables.py pipeline "$work"
  return $status
}

# The names are handed to pipeline, which shellcheck does not see.
# shellcheck disable=SC2034
part_mnist() {
  need torch tyro pydantic rich safetensors yaml || return
  gpu_or_check || return
  local -a search retrain evaluate
  if ((check)); then
    search=(--preset smoke --space general7-light --init-channels 2 --train-limit 64 --test-limit 32)
    retrain=(--preset smoke --epochs 1 --train-limit 64 --test-limit 32)
    evaluate=(--preset quick --limit 40 --attacks 'fgsm,pgd-7' --attack-all)
  else
    need_data mnist || return
    search=(--preset mnist --data "$data/mnist")
    retrain=(--preset mnist --data "$data/mnist")
    evaluate=(--preset mnist --data "$data/mnist" --attacks 'fgsm,pgd-40,pgd-100' --attack-all)
  fi
  pipeline mnist search retrain evaluate
}

# shellcheck disable=SC2034
part_cifar10() {
  need torch tyro pydantic rich safetensors yaml || return
  gpu_or_check || return
  local -a search retrain evaluate
  if ((check)); then
    search=(--preset smoke --space general7-light --init-channels 2 --train-limit 64 --test-limit 32)
    retrain=(--preset smoke --epochs 1 --train-limit 64 --test-limit 32)
    evaluate=(--preset quick --limit 40 --attacks 'pgd-7' --attack-all)
  else
    need PIL || return
    need_data cifar10 || return
    search=(--preset cifar10 --data "$data/cifar10")
    retrain=(--preset cifar10 --data "$data/cifar10")
    evaluate=(--preset cifar10 --data "$data/cifar10" --limit 1000
      --attacks 'pgd-20,apgd-ce,apgd-t,square')
    if has_module pyautoattack; then
      evaluate+=(--cross-check autoattack)
    else
      skip "pyautoattack is not installed: no cross-check with the reference AutoAttack"
    fi
  fi
  pipeline cifar10 search retrain evaluate || return
  ((check)) && return
  echo "trained on the JPEG copy, evaluated on the first 1,000 original test images"
}

# --- all ------------------------------------------------------------------------------------

failed=()
pack() { [[ $archive ]] && tar -czf "$archive" -C "$out" --exclude=checkpoints . 2>/dev/null; }
trap 'pack' EXIT
for index in "${!parts[@]}"; do
  part=${parts[$index]}
  remaining=$((${#parts[@]} - index))
  part_end=$((SECONDS + (seconds - SECONDS) / remaining))
  say "$part"
  "part_$part" 2>&1 | tee "$out/$part.txt"
  ((PIPESTATUS[0] == 0)) || failed+=("$part")
done
say "done"
((check)) && echo "--check: nothing above is a measurement"
if ((${#failed[@]})); then
  echo "failed: ${failed[*]}"
  exit 1
fi
echo "raw files: $out"
