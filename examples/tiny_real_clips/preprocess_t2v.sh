#!/usr/bin/env bash
# Encodes the clips into shards. Arguments are overrides, e.g. shards.rows=2 --manifest-only.
set -euo pipefail
cd "$(dirname "$0")/../.."
fastvideo tiny configs/recipes/tiny_t2v.yaml
fastvideo preprocess configs/recipes/tiny_t2v.yaml "$@"
