# SPDX-License-Identifier: Apache-2.0
"""What is done and what is missing, from the files alone; no torch, no pyarrow."""

import collections
import json
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from fastvideo import state
from fastvideo.config.recipe import Recipe
from fastvideo.errors import UserError
from fastvideo.launch import table
from fastvideo.launch.statuses import recent
from fastvideo.launch.watch import Watcher
from fastvideo.state import LedgerRow, RunDir, ShardStore

CLEAR = "\x1b[H\x1b[2J"
"""Empties a terminal."""


def summary(recipe: Recipe) -> dict[str, Any]:
    """Counts of clips, shards and steps; zeros where nothing is planned or trained yet."""
    store = ShardStore(recipe.shards.path)
    plan = store.read_plan()
    return {
        "clips": _clips(state.ledger(store, plan) if plan else ()),
        "shards": _shards(store, plan),
        "train": _training(recipe),
    }


def progress(recipe: Recipe) -> int:
    """A number that differs between two moments if a shard or a checkpoint was completed."""
    store = ShardStore(recipe.shards.path)
    trained = sum(training["step"] for training in _training(recipe).values())
    return int(_shards(store, store.read_plan())["done"] + trained)


def clip_lines(recipe: Recipe, *, as_json: bool = False) -> Iterator[str]:
    """The ledger, tab-separated with a header, line breaks escaped; or a JSON object per line."""
    store = ShardStore(recipe.shards.path)
    plan = store.read_plan()
    if plan is None:
        raise UserError(f"{store.plan}: no manifest yet; run preprocess --manifest-only")
    if as_json:
        yield from (json.dumps(vars(row), ensure_ascii=False) for row in state.ledger(store, plan))
        return
    names = ("item", "state", "reason", "split", "shard", "id", "detail")
    yield "\t".join(names)
    for row in state.ledger(store, plan):
        values = ("" if (v := getattr(row, name)) is None else str(v) for name in names)
        yield "\t".join(
            value.encode("unicode_escape").decode() if _breaks(value) else value for value in values
        )


def _breaks(text: str) -> bool:
    return any(not c.isprintable() for c in text)


def describe(counts: dict[str, Any]) -> str:
    """The summary for people."""
    clips, shards = counts["clips"], counts["shards"]
    lines = [
        f"clips   {clips['total']} total, {clips['encoded']} encoded, "
        f"{sum(clips['filtered'].values())} filtered, {sum(clips['failed'].values())} failed, "
        f"{clips['pending']} pending"
    ]
    for kind in ("filtered", "failed"):
        for reason, count in clips[kind].items():
            lines.append(f"        {kind}: {reason} {count}")
    missing = f", missing {state.shorten(shards['missing'])}" if shards["missing"] else ""
    lines.append(f"shards  {shards['done']} of {shards['total']} done{missing}")
    for name, training in counts["train"].items():
        kept = ", ".join(map(str, training["checkpoints"])) or "none"
        lines.append(
            f"train   {name}: step {training['step']} of {training['steps']}, checkpoints {kept}"
        )
    return "\n".join(lines)


def report(recipe: Recipe) -> tuple[dict[str, Any], str]:
    """The summary with the newest jobs of the run, as plain values and for people."""
    counts, jobs = summary(recipe), recent(recipe.run_dir)
    text = "\n".join([describe(counts), *([table.describe(jobs)] if jobs else [])])
    return counts | {"jobs": [job.as_json() for job in jobs]}, text


def watch(recipe: Recipe, *, as_json: bool = False) -> None:
    """Show the summary and the jobs until none is under way: live on a terminal, else changes."""
    watcher, last = Watcher(), ""
    for _ in watcher.turns():
        counts, jobs = summary(recipe), recent(recipe.run_dir, watcher=watcher)
        value = json.dumps(counts | {"jobs": [job.as_json() for job in jobs]})
        text = value if as_json else "\n".join([describe(counts), table.describe(jobs)])
        if sys.stdout.isatty() and not as_json:
            print(f"{CLEAR}{text}\n{time.strftime('%H:%M:%S')}, Ctrl-C ends only this", flush=True)
        elif value != last:  # in which no time goes by
            print(text, flush=True)
        last = value
        if all(job.is_final for job in jobs):
            return


def _clips(rows: Iterable[LedgerRow]) -> dict[str, Any]:
    counts: dict[str, Any] = {"total": 0, "encoded": 0, "pending": 0}
    reasons = {"filtered": collections.Counter[str](), "failed": collections.Counter[str]()}
    for row in rows:
        counts["total"] += 1
        if row.state in reasons:
            reasons[row.state][row.reason] += 1
        else:
            counts[row.state] += 1
    return {**counts, **{kind: dict(sorted(found.items())) for kind, found in reasons.items()}}


def _shards(store: ShardStore, plan: dict[str, Any] | None) -> dict[str, Any]:
    if plan is None:
        return {"total": 0, "done": 0, "missing": []}
    missing, total = state.missing_shards(store, plan), len(plan["shards"])
    return {"total": total, "done": total - len(missing), "missing": missing}


def _training(recipe: Recipe) -> dict[str, Any]:
    run_dir = RunDir(recipe.run_dir)
    found = {}
    for folder in recipe.architecture.transformers:
        steps = run_dir.training(folder).complete_checkpoints()
        if folder in recipe.transformers or steps:
            step = steps[-1] if steps else 0
            found[folder] = {"step": step, "steps": recipe.train.steps, "checkpoints": steps}
    return found
