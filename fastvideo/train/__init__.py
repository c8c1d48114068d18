# SPDX-License-Identifier: Apache-2.0
"""Finetuning: the node's parent, its worker, the loop, and what they record."""
