#!/usr/bin/env bash
# From clips to videos as five jobs, each waiting for the one before:
#   TASKS=16 GPU='--gpus-per-node=1' TRAIN='--nodes=2 --gpus-per-node=8' \
#     slurm/pipeline.sh RECIPE [key=value ...]
# TASKS share the preprocessing; GPU are sbatch options of preprocessing and sampling, TRAIN those
# of training, ALL those of all ('--cpus-per-task=4 --account=...'). See train.sbatch for FASTVIDEO.
set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
read -ra all <<<"${ALL:-}"
read -ra gpu <<<"${GPU:-}"
read -ra train <<<"${TRAIN:-}"

submit() { # after which job, the options of sbatch and the script
  local after=$1
  shift
  sbatch --parsable ${after:+--dependency="afterok:$after" --kill-on-invalid-dep=yes} "${all[@]}" "$@"
}

job=$(submit '' "$here/preprocess.sbatch" "$@" --manifest-only)
job=$(submit "$job" --array="0-$((${TASKS:-8} - 1))" "${gpu[@]}" "$here/preprocess.sbatch" "$@")
job=$(submit "$job" "${train[@]}" "$here/train.sbatch" "$@")
job=$(submit "$job" --job-name=export --export=ALL,VERB=export "$here/generate.sbatch" "$@")
job=$(submit "$job" "${gpu[@]}" "$here/generate.sbatch" "$@")
echo "the last job is $job: squeue --me"
