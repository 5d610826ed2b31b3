#!/usr/bin/env bash
# Builds the extension with AddressSanitizer and UBSan into a copy of the tree and runs the native tests there.
#   tests/native/sanitize.sh [pytest arguments]        PYTHON=.venv/bin/python by default
#   SANITIZERS=address MAGIC_FAST_ISAS=avx2 tests/native/sanitize.sh      fewer of both: compiled in a third of the time
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${PYTHON:-$PWD/.venv/bin/python}
copy=${SANITIZE_DIR:-$PWD/.asan}
mkdir -p "$copy"
cp -a --update setup.py pyproject.toml README.md LICENSE magic_fast kernels csrc tests "$copy"/
cd "$copy"
rm -f magic_fast/_native*.so
MAGIC_FAST_CUDA=0 MAGIC_FAST_SANITIZE=${SANITIZERS:-address,undefined} "$python" setup.py -q build_ext --inplace
compiler=${CXX:-g++}
# Python itself is not instrumented: the runtime has to come first, and the interpreter's own leaks are not ours.
preload="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libubsan.so)"
LD_PRELOAD="$preload" ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1 \
  PYTHONPATH="$copy" "$python" -m pytest -q -x -p no:cacheprovider \
  --deselect tests/native/test_core.py::test_no_function_is_shared_between_instruction_sets \
  -m "not slow" "${@:-tests/native}"
