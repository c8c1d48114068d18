# SPDX-License-Identifier: Apache-2.0
"""``python -m fastvideo`` and the ``fastvideo`` command."""

import sys

from fastvideo.cli import run


def main() -> None:
    """Run one verb and exit with its code."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
