#!/usr/bin/env bash
# Trains a LoRA of the toy model that finetune_t2v.sh made, exports and samples it. Arguments are overrides.
set -euo pipefail
cd "$(dirname "$0")/../.."
job=(configs/recipes/tiny_t2v.yaml model.path=runs/tiny_t2v/export run_dir=runs/tiny_t2v_lora
  "train.method={kind: lora, rank: 8}" train.optimizer.lr=5e-3 train.steps=300)
fastvideo train "${job[@]}" "$@"
fastvideo export "${job[@]}" "$@"
fastvideo generate "${job[@]}" "$@"
