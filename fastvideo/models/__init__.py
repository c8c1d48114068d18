# SPDX-License-Identifier: Apache-2.0
"""Model families: encoders, transformer forward and flow matching over diffusers' modules."""
