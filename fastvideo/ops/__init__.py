# SPDX-License-Identifier: Apache-2.0
"""Video Sparse Attention and fused norms: the Python faces of csrc."""
