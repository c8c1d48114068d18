#!/usr/bin/env bash
# Builds, checks and times the kernels on a machine with a CUDA GPU, without network:
#   benchmarks/kernels_on_a_gpu.sh [RESULTS_FOLDER]
# PYTHON (python3) needs torch with CUDA, setuptools, pytest and pytest-timeout; nvcc must be there.
# Runs in some minutes; whatever fails is told at the end and makes the exit code 1.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

PYTHON=${PYTHON:-python3}
results=${1:-benchmarks/results}
mkdir -p "$results"
failed=()

part() { # NAME COMMAND...: its output goes to a file, the end of it here
  local name=$1 begin=$SECONDS
  shift
  if "$@" >"$results/$name.log" 2>&1; then
    echo "== $name: done in $((SECONDS - begin)) s"
  else
    echo "== $name: FAILED after $((SECONDS - begin)) s"
    failed+=("$name")
  fi
  tail -n "${LINES_SHOWN:-25}" "$results/$name.log"
}

export OMP_NUM_THREADS=1
arch=$("$PYTHON" -c 'import torch; print("%d.%d" % torch.cuda.get_device_capability())') || exit 1
case $arch in 9.0 | 10.0) arch=8.0\;${arch}a ;; esac # mma.sync beside wgmma

LINES_SHOWN=3 part kernels_build env FASTVIDEO_BUILD=cuda "TORCH_CUDA_ARCH_LIST=$arch" \
  "$PYTHON" setup.py build_ext --inplace
part kernels_check "$PYTHON" -m pytest -q --maxfail 20 --timeout 300 \
  tests/gpu/test_attention_kernels.py tests/gpu/test_norm_kernels.py
part bench_vsa "$PYTHON" benchmarks/bench_vsa.py --device cuda --json "$results/vsa_cuda.json"
part bench_norm "$PYTHON" benchmarks/bench_norm.py --device cuda --json "$results/norm_cuda.json"

# Some machines cannot run it at all: then it says so, and nothing is proved either way.
if type compute-sanitizer >/dev/null 2>&1; then
  small='ragged and dtype0 and BSHD or lists_of_any or across_heads'
  for tool in memcheck racecheck; do
    LINES_SHOWN=5 part "sanitizer_$tool" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "$PYTHON" -m pytest -q --timeout 600 tests/gpu/test_attention_kernels.py \
      tests/gpu/test_norm_kernels.py -k "$small"
  done
else
  echo '== compute-sanitizer is not installed here'
fi

((${#failed[@]} == 0)) || { echo "failed: ${failed[*]}" && exit 1; }
