# SPDX-License-Identifier: Apache-2.0
"""Verbs as jobs: of Slurm, through submitit or plain sbatch, or of this machine; free of torch."""
