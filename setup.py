# SPDX-License-Identifier: Apache-2.0
"""Will build the C++ and CUDA extension of csrc/; pyproject.toml holds everything else."""

from setuptools import setup

setup()
