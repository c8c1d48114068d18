# SPDX-License-Identifier: Apache-2.0
"""What a run is (recipe) and where it runs (cluster): strict, frozen, torch-free."""
