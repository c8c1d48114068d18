# SPDX-License-Identifier: Apache-2.0
"""Plain log lines on stderr, and progress that is a bar on a terminal and lines elsewhere."""

import logging
import sys
import time
from pathlib import Path

from tqdm import tqdm

logger = logging.getLogger("fastvideo")

NEEDLESS = {
    "transformers.utils.import_utils": "requires torchvision",
    "diffusers.quantizers.torchao.torchao_quantizer": "Unable to import `torchao` Tensor objects",
    "torch.utils._pytree": "is an Enum subclass",
    "torchao": "Failed to load",
}
"""What libraries say on import about parts that nothing here uses, by their logger."""


def setup(*, also: Path | None = None, part: str = "") -> None:
    """Send the package's messages to stderr, one line each, with the time.

    Args:
        also: A file that gets them as well.
        part: Tells the lines of one of several processes that share stderr; it shows no bars.
    """
    handlers: list[logging.Handler] = [logging.StreamHandler(sys.stderr)]
    if also is not None:
        handlers.append(logging.FileHandler(also))
    for handler in handlers:
        mark = f"[{part}] " if part else ""
        form = logging.Formatter(f"%(asctime)s %(levelname).1s {mark}%(message)s", "%H:%M:%S")
        handler.setFormatter(form)
    logger.handlers[:] = handlers
    Progress.bars = not part
    logger.setLevel(logging.INFO)
    logger.propagate = False
    for name in NEEDLESS:
        logging.getLogger(name).addFilter(_is_needed)


def _is_needed(record: logging.LogRecord) -> bool:
    return NEEDLESS[record.name] not in record.getMessage()


class Progress:
    """A bar on a terminal; elsewhere a line at most every ``every_s`` seconds and at the end."""

    bars = True
    """Whether there may be bars, as the terminal is this process's own."""

    def __init__(self, label: str, *, total: int, done: int = 0, every_s: float = 30.0) -> None:
        """Start at ``done`` of ``total``."""
        self._label, self._total, self._done = label, total, done
        self._every_s, self._last_s = every_s, time.monotonic()
        self._bar = None
        if self.bars and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=done, desc=label, dynamic_ncols=True)

    def advance(self, text: str = "") -> None:
        """Count one more; ``text`` says how it goes."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
            return
        now_s = time.monotonic()
        if now_s - self._last_s >= self._every_s or self._done == self._total:
            self._last_s = now_s
            logger.info("%s %d/%d %s", self._label, self._done, self._total, text)

    def close(self) -> None:
        """Leave the terminal's line."""
        if self._bar is not None:
            self._bar.close()
