# SPDX-License-Identifier: Apache-2.0
"""Who fills shards and encodes prompts: this process, or several side by side, one per GPU.

Free of torch until there is something to encode.
"""

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastvideo import atomic, state
from fastvideo.config.recipe import Recipe
from fastvideo.config.source import ParquetSource
from fastvideo.data.first_image import PromptToEncode
from fastvideo.data.gpus import visible_gpus
from fastvideo.data.prompts import prompts_fingerprint
from fastvideo.data.side_by_side import side_by_side
from fastvideo.errors import Failed, UserError
from fastvideo.log import logger
from fastvideo.state import ShardStore

if TYPE_CHECKING:
    from fastvideo.models.family import Encoders

PROMPTS_S = 1800.0
"""How long the last task of an array waits for the one that encodes the prompts."""


@dataclass(frozen=True)
class Filling:
    """Shards to fill, and the prompts that belong to them."""

    recipe: Recipe
    store: ShardStore
    plan: dict[str, Any]
    prompts: Sequence[PromptToEncode]

    @property
    def prompts_are_done(self) -> bool:
        """Whether the prompts are encoded as they are now."""
        return state.read_marker(self.store.validation, fingerprint=self._wanted) is not None

    def fill(self, missing: Sequence[int]) -> None:
        """Fill these shards, and encode the prompts unless another process does."""
        gpus = _gpus(self.recipe)
        count = min(self.recipe.preprocess.processes or max(1, len(gpus)), len(missing))
        if count > 1:
            logger.info("%d processes fill %d shards", count, len(missing))
            side_by_side([self._part(missing, i, count) for i in range(count)], gpus=gpus)
        elif missing or not self.prompts_are_done:
            self._fill(missing, prompts=True)

    def ensure_prompts(self) -> None:
        """Have the prompts encoded, by this process if the one that encodes them has died.

        Raises:
            Failed: That one takes too long.
        """
        deadline_s = time.monotonic() + PROMPTS_S
        encoders = _loader(self.recipe)
        while not self.prompts_are_done:
            self._encode_prompts(encoders)
            if time.monotonic() > deadline_s:
                raise Failed(
                    f"{self.store.validation}: whoever holds {self.store.prompts_lock} has not "
                    f"encoded the prompts within {PROMPTS_S / 60:.0f} min; see how that task is, "
                    "and run the same command again"
                )
            time.sleep(0 if self.prompts_are_done else 1)

    @functools.cached_property
    def _wanted(self) -> str:
        return prompts_fingerprint(self.plan["settings"], self.prompts)

    def _part(self, missing: Sequence[int], index: int, count: int) -> Callable[[], None]:
        """What one of several processes does; the last one, with the fewest shards, the prompts."""
        return functools.partial(self._fill, missing[index::count], prompts=index == count - 1)

    def _fill(self, missing: Sequence[int], *, prompts: bool) -> None:
        """Do it in this process."""
        recipe, store, plan = self.recipe, self.store, self.plan
        encoders = _loader(recipe)
        if prompts:
            self._encode_prompts(encoders)
        if not missing:
            return
        from fastvideo.data import encode

        if isinstance(recipe.source, ParquetSource):
            encode.adopt_shards(recipe, store, plan, missing=missing)
        else:
            encode.fill_shards(recipe, store, plan, missing=missing, encoders=encoders())

    def _encode_prompts(self, encoders: "Callable[[], Encoders]") -> None:
        """Encode the prompts, unless it is done or another process is at it."""
        with contextlib.ExitStack() as claim:
            try:
                claim.enter_context(atomic.alone(self.store.prompts_lock, busy="is encoded"))
            except UserError:
                return
            if not self.prompts_are_done:
                from fastvideo.data.encode import write_prompts
                from fastvideo.data.shard import Contents

                contents = Contents(self._wanted, self.plan["settings"])
                write_prompts(
                    self.recipe, self.store, self.prompts, contents=contents, encoders=encoders()
                )


def _loader(recipe: Recipe) -> "Callable[[], Encoders]":
    """Loads the encoders once, and only when they are needed."""

    @functools.cache
    def load() -> "Encoders":
        from fastvideo.data.encode import load_encoders

        return load_encoders(recipe)

    return load


def _gpus(recipe: Recipe) -> list[str]:
    """GPUs to encode clips on; rows of a Parquet source come encoded."""
    on_cpu = recipe.preprocess.device == "cpu" or isinstance(recipe.source, ParquetSource)
    return [] if on_cpu else visible_gpus()
