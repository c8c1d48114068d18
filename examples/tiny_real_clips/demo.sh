#!/usr/bin/env bash
# The whole job on real footage and the tiny model: what `make demo` runs. Run it again at will.
set -euo pipefail
cd "$(dirname "$0")/../.."
export OMP_NUM_THREADS=1 # two busy threads on small matrices are slower than one

job=(configs/recipes/tiny_t2v.yaml run_dir=runs/demo)
examples/tiny_real_clips/download_dataset.sh data/tiny_real_clips
fastvideo tiny "${job[@]}"
fastvideo preprocess "${job[@]}"
fastvideo generate "${job[@]}" generate.weights=base
fastvideo run "${job[@]}"
"${PYTHON:-python3}" examples/tiny_real_clips/report.py "${job[@]}"
