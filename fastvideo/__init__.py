# SPDX-License-Identifier: Apache-2.0
"""Finetune video diffusion models on one's own clips: preprocess, train, export, generate."""

__version__ = "0.1.0"
