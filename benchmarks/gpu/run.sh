#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build, tests, compute-sanitizer, benchmarks. No network, any torch, triton
# and nvcc; what is missing is said and left out. Results: $RESULTS (benchmarks/results/gpu). Goldens: $MAGIC_FAST_GOLDEN.
#   [PYTHON=python3] [RESULTS=folder] [BUDGET=seconds] benchmarks/gpu/run.sh
set -uo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-python3}
results=${RESULTS:-benchmarks/results/gpu}
mkdir -p "$results"
results=$(cd "$results" && pwd)
export PYTHONPATH="$PWD:$PWD/tests${PYTHONPATH:+:$PYTHONPATH}"
unset TRITON_INTERPRET MAGIC_FAST_CUDA_EMULATED

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then
  echo "make gpu: $python: expected a torch that sees a GPU, found none. Nothing was run." >&2
  exit 3
fi

failed=()
step() { # name, seconds allowed, command
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "== $name"
  if timeout "$limit" "$@" >"$results/$name.log" 2>&1; then
    echo "   done in $((SECONDS - started)) s"
  else
    failed+=("$name")
    echo "   FAILED after $((SECONDS - started)) s; the end of $results/$name.log:"
    tail -n 25 "$results/$name.log" | sed 's/^/   /'
  fi
}

step build 200 env MAGIC_FAST_CUDA=1 MAGIC_FAST_ISAS=baseline,avx2 "$python" setup.py build_ext --inplace --parallel 8
# the kernels are imported from the top of the tree under their installed name
[ -e magic_fast/kernels ] || ln -s ../kernels magic_fast/kernels
[ -e magic_fast/examples ] || ln -s ../examples magic_fast/examples

workers=$("$python" -c 'import xdist' 2>/dev/null && echo "-n 4")
step tests 240 "$python" -m pytest -q -p no:cacheprovider --import-mode=importlib $workers -m gpu tests/gpu
grep -hE '^(FAILED|SKIPPED|[0-9]+ (passed|failed))|passed|failed' "$results/tests.log" | tail -n 15

if sanitizer=$(command -v compute-sanitizer); then
  for tool in memcheck racecheck initcheck; do
    step "sanitizer-$tool" 60 "$sanitizer" --tool "$tool" --error-exitcode 9 "$python" benchmarks/gpu/short.py
  done
else
  echo "== compute-sanitizer: not on the PATH, left out"
fi

step benchmarks 180 "$python" benchmarks/gpu/bench.py --json "$results/gpu.json" --markdown "$results/gpu.md"
[ -f "$results/gpu.md" ] && cat "$results/gpu.md"
step registers 60 "$python" benchmarks/gpu/registers.py --markdown "$results/registers.md"

for link in magic_fast/kernels magic_fast/examples; do [ -L "$link" ] && rm "$link"; done
echo
if [ ${#failed[@]} -gt 0 ]; then
  echo "make gpu: failed: ${failed[*]} (logs in $results)"
  exit 1
fi
echo "make gpu: everything passed in $SECONDS s (results in $results)"
