# SPDX-License-Identifier: Apache-2.0
"""A node of a training: its parent, torchrun in a child, and the processes that train."""
