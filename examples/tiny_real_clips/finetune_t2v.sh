#!/usr/bin/env bash
# Finetunes on the shards, exports and samples. Arguments are overrides, e.g. train.steps=400.
set -euo pipefail
cd "$(dirname "$0")/../.."
fastvideo train configs/recipes/tiny_t2v.yaml "$@"
fastvideo export configs/recipes/tiny_t2v.yaml "$@"
fastvideo generate configs/recipes/tiny_t2v.yaml "$@"
