# SPDX-License-Identifier: Apache-2.0
"""Numbers of a run: what is written where, and what is left of a killed run's."""

import json
import logging
import math
import os
import signal
import struct
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb  # noqa: F401  once, for the processes that are forked from here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto import wandb_internal_pb2

from fastvideo.config.train import Train
from fastvideo.errors import UserError
from fastvideo.state import RunDir, TrainDir
from fastvideo.train import installed
from fastvideo.train.installed import check_trackers
from fastvideo.train.metrics import Metrics, peak_memory_gib
from tests.ranks import in_ranks

BATCH, TOKENS = 4, 10
WITH_WANDB = Train.model_validate({"wandb": {"project": "squares"}, "tensorboard": False})


def record(step: int) -> dict[str, float]:
    samples = step * BATCH
    return {"samples": samples, "tokens": samples * TOKENS, "loss": 1 / (1 + step), "lr": 0.5}


def write(root: Path, steps: range, *, start_step: int, train: Train | None = None) -> TrainDir:
    directory = RunDir(root).training()
    with closing(Metrics(directory, start_step=start_step, train=train or Train())) as metrics:
        for step in steps:
            metrics.write(step, record(step))
    return directory


def show(directory: TrainDir, *steps: int, start_step: int, train: Train) -> None:
    """A picture for each of some steps; a run beyond its start has a checkpoint."""
    measured = start_step > 0
    with closing(
        Metrics(directory, start_step=start_step, train=train, measured=measured)
    ) as metrics:
        for step in steps:
            metrics.show(step, {"samples/0000": np.full((8, 8, 3), step, np.uint8)})


def lines(directory: TrainDir) -> list[dict[str, Any]]:
    return [json.loads(line) for line in directory.metrics.read_text().splitlines()]


def age(directory: TrainDir) -> None:
    """Make event files older; TensorBoard reads them by the second in their name."""
    for file in directory.tensorboard.rglob("events.*"):
        file.rename(file.with_name(file.name.replace("tfevents.", "tfevents.0")))


def curve(folder: Path, tag: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return [(scalar.step, round(scalar.value, 6)) for scalar in events.Scalars(tag)]


# ---------------------------------------------------------------- files


def test_a_record_is_a_line_and_a_point_of_each_curve(tmp_path: Path) -> None:
    directory = write(tmp_path, range(1, 4), start_step=0)
    assert lines(directory) == [{"step": step, **record(step)} for step in (1, 2, 3)]
    points = [round(1 / (1 + step), 6) for step in (1, 2, 3)]
    assert curve(directory.tensorboard, "loss") == list(zip((1, 2, 3), points, strict=True))
    assert curve(directory.tensorboard, "lr") == [(1, 0.5), (2, 0.5), (3, 0.5)]
    by_samples = curve(directory.tensorboard / "by_samples", "by_samples/loss")
    assert by_samples == list(zip((4, 8, 12), points, strict=True))
    by_tokens = curve(directory.tensorboard / "by_tokens", "by_tokens/loss")
    assert by_tokens == list(zip((40, 80, 120), points, strict=True))


def test_a_resumed_run_repeats_nothing_on_any_axis(tmp_path: Path) -> None:
    directory = write(tmp_path, range(0, 8), start_step=0)
    age(directory)
    with open(directory.metrics, "a") as file:
        file.write('{"step": 8, "lo')  # cut by a kill
    write(tmp_path, range(6, 11), start_step=5)
    assert [r["step"] for r in lines(directory)] == list(range(11))
    assert [x for x, _ in curve(directory.tensorboard, "loss")] == list(range(11))
    for axis, each in (("samples", BATCH), ("tokens", BATCH * TOKENS)):
        found = curve(directory.tensorboard / f"by_{axis}", f"by_{axis}/loss")
        assert [x for x, _ in found] == [each * step for step in range(11)]


def test_a_run_that_starts_anew_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    directory = write(tmp_path, range(0, 5), start_step=0)
    age(directory)
    write(tmp_path, range(0, 3), start_step=0)
    assert [r["step"] for r in lines(directory)] == [0, 1, 2]
    assert [x for x, _ in curve(directory.tensorboard, "loss")] == [0, 1, 2]


def test_pictures_are_shown_once_and_those_beyond_the_checkpoint_are_forgotten(
    tmp_path: Path,
) -> None:
    """Records are rare here: they do not say how far the run was."""
    directory = RunDir(tmp_path).training()

    for start_step, steps in ((0, [0]), (0, [0, 5, 10]), (5, [10])):
        show(directory, *steps, start_step=start_step, train=Train())
        age(directory)
    events = EventAccumulator(str(directory.tensorboard))
    events.Reload()
    assert [image.step for image in events.Images("samples/0000")] == [0, 5, 10]


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    directory = RunDir(tmp_path).training()
    with closing(Metrics(directory, start_step=0, train=Train())) as metrics:
        metrics.write(1, {"loss": math.nan, "grad_norm": math.inf, "by_quantile": [1, -math.inf]})
    (line,) = directory.metrics.read_text().splitlines()
    found = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert found == {"step": 1, "loss": None, "grad_norm": None, "by_quantile": [1, None]}
    ((_, shown),) = curve(directory.tensorboard, "loss")
    assert math.isnan(shown)


def test_tensorboard_can_be_left_out(tmp_path: Path) -> None:
    directory = write(tmp_path, range(1, 3), start_step=0, train=Train(tensorboard=False))
    assert len(lines(directory)) == 2
    assert not directory.tensorboard.exists()


def test_memory_is_in_gib() -> None:
    assert 0.05 < peak_memory_gib("cpu") < 64


# ---------------------------------------------------------------- Weights & Biases


@pytest.fixture
def no_account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(logging.getLogger("fastvideo"), "propagate", True)


def apart(action: Callable[[], Any]) -> Any:
    """What ``action`` returns in a process of its own: wandb starts threads that do not fork."""
    return in_ranks(1, lambda rank: action(), join=False)[0]


@pytest.mark.usefixtures("no_account")
def test_wandb_offline_holds_every_record_of_one_run_over_restarts(tmp_path: Path) -> None:
    folder = RunDir(tmp_path).training().root / "wandb"

    def parts() -> None:
        write(tmp_path, range(1, 5), start_step=0, train=WITH_WANDB)
        write(tmp_path, range(3, 6), start_step=2, train=WITH_WANDB)

    apart(parts)
    first, second = map(reported, sorted(folder.glob("offline-run-*/*.wandb")))
    assert first[0] == second[0] == ((folder / "id").read_text(), "squares")
    assert first[1] == [{"_step": step, **record(step)} for step in range(1, 5)]
    assert second[1] == [{"_step": step, **record(step)} for step in range(3, 6)]
    assert len(lines(RunDir(tmp_path).training())) == 5


@pytest.mark.usefixtures("no_account")
def test_wandb_offline_holds_pictures(tmp_path: Path) -> None:
    directory = RunDir(tmp_path).training()
    apart(lambda: show(directory, 0, 5, start_step=0, train=WITH_WANDB))
    (file,) = directory.root.glob("wandb/offline-run-*/*.wandb")
    _, history = reported(file)
    assert [entry["_step"] for entry in history] == [0, 5]
    assert all("samples/0000" in str(entry) for entry in history)
    assert len(list(directory.root.glob("wandb/offline-run-*/files/media/images/**/*.png"))) == 2


@pytest.mark.usefixtures("no_account")
def test_without_an_account_wandb_is_one_warning_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    online = Train.model_validate({"wandb": {"project": "squares", "mode": "online"}})

    def warnings() -> list[str]:
        write(tmp_path, range(1, 4), start_step=0, train=online)
        return [r.message for r in caplog.records if r.name == "fastvideo"]

    (warning,) = apart(warnings)
    assert "train.wandb: switched off" in warning and "API key" in warning
    assert len(lines(RunDir(tmp_path).training())) == 3


@pytest.mark.usefixtures("no_account")
def test_wandb_that_dies_is_one_warning_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = RunDir(tmp_path).training()

    def warnings() -> list[str]:
        with closing(Metrics(directory, start_step=0, train=WITH_WANDB)) as metrics:
            metrics.write(1, record(1))
            for children in Path("/proc/self/task").glob("*/children"):
                for child in map(int, children.read_text().split()):
                    os.kill(child, signal.SIGKILL)
            for step in (2, 3):
                metrics.write(step, record(step))
        return [r.message for r in caplog.records if r.name == "fastvideo"]

    assert len(apart(warnings)) == 1
    assert len(lines(directory)) == 3


def test_a_missing_wandb_is_told_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    check_trackers(WITH_WANDB)
    monkeypatch.setattr(installed, "find_spec", lambda name: None)
    check_trackers(Train())
    with pytest.raises(UserError, match=r"train\.wandb.*pip install .*wandb"):
        check_trackers(WITH_WANDB)


Reported = tuple[tuple[str, str], list[dict[str, Any]]]


def reported(file: Path) -> Reported:
    """Id and project, and the records of an offline run."""
    about, history = ("", ""), []
    for message in logged(file.read_bytes()):
        entry = wandb_internal_pb2.Record.FromString(message)  # type: ignore[attr-defined]
        if entry.WhichOneof("record_type") == "run":
            about = (entry.run.run_id, entry.run.project)
        if entry.WhichOneof("record_type") == "history":
            items = {item.nested_key[0]: json.loads(item.value_json) for item in entry.history.item}
            history.append({k: v for k, v in items.items() if k not in ("_timestamp", "_runtime")})
    return about, history


def logged(data: bytes) -> Iterator[bytes]:
    """Messages of a file in LevelDB's log format, after seven bytes that say what it is."""
    at, message = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)
        message += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # all of it, or its last part
            yield message
            message = b""
