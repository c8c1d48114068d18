# SPDX-License-Identifier: Apache-2.0
"""LoRA files apart from training: made of two models, put into one, brought to another format."""
