# SPDX-License-Identifier: Apache-2.0
"""Raw videos to manifest, frames and shards, and shards to samples."""
