# SPDX-License-Identifier: Apache-2.0
"""Finetuning: the launcher, a worker, the loop, what they record; `node` runs several workers."""
