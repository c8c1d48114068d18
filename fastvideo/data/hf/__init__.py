# SPDX-License-Identifier: Apache-2.0
"""Data sets of Hugging Face: found with its libraries, read and decoded by ours."""
