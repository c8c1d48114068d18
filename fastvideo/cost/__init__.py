# SPDX-License-Identifier: Apache-2.0
"""What a training costs: parameters, FLOPs, bytes and time from configs alone, without torch."""
