#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Fills a folder (default: data/tiny_real_clips) with 22 short real clips and their captions.
# Needs Python 3.11 with PyAV and NumPy. Downloads 94 MB once; a second run does nothing.
set -euo pipefail

"${PYTHON:-python3}" "$(dirname -- "$0")/download_dataset.py" "${1:-data/tiny_real_clips}"
