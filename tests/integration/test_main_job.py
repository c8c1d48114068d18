# SPDX-License-Identifier: Apache-2.0
"""The main job through the command line: clips in, a model and videos out, in real processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from fastvideo.generate import generate
from fastvideo.state import RunDir
from tests.tiny_world import World, fastvideo, in_fork, make_world, start_command, wait_for


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> World:
    """A finished job."""
    root = tmp_path_factory.mktemp("job")
    world = make_world(root, clips=4, heldout=1, model=tiny_model)
    command = [sys.executable, "-m", "fastvideo", "run", str(world.recipe)]
    subprocess.run(command, check=True)
    return world


def records(world: World) -> list[dict[str, Any]]:
    lines = RunDir(world.run_dir).training().metrics.read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_status_counts_clips_shards_and_steps(world: World) -> None:
    done = fastvideo("status", world, "--json")
    assert json.loads(done.out) == {
        "clips": {"total": 5, "encoded": 5, "filtered": {}, "failed": {}, "pending": 0},
        "shards": {"total": 2, "done": 2, "missing": []},
        "train": {"transformer": {"step": 6, "steps": 6, "checkpoints": [4, 6]}},
        "jobs": [],
    }
    ledger = fastvideo("status", world, "--clips").out.splitlines()
    assert len(ledger) == 6
    assert ledger[0].split("\t")[:3] == ["item", "state", "reason"]
    assert ledger[5].split("\t")[:4] == ["4", "encoded", "", "heldout"]


def test_videos_open_with_the_size_frames_and_rate_of_the_recipe(world: World) -> None:
    videos = sorted(RunDir(world.run_dir).generated("export").glob("*.mp4"))
    assert len(videos) == 2
    for video in videos:
        with av.open(str(video)) as container:
            stream = container.streams.video[0]
            frames = list(container.decode(stream))
            assert (stream.width, stream.height, len(frames)) == (48, 32, 9)
            assert stream.average_rate == 8


def test_a_second_run_changes_no_file(world: World) -> None:
    def stamps() -> dict[str, int]:
        # Locks name who is at work; they are no result.
        others = (".txt", ".lock", "lock")
        files = [p for p in world.root.rglob("*") if p.is_file() and not p.name.endswith(others)]
        return {str(p): p.stat().st_mtime_ns for p in files}

    before = stamps()
    for verb in ("preprocess", "train", "export", "generate"):
        done = fastvideo(verb, world)
        assert done.code == 0, done.err
    assert stamps() == before


def test_the_export_holds_the_weights_of_the_checkpoint_bit_for_bit(world: World) -> None:
    run_dir = RunDir(world.run_dir)
    dcp_to_torch_save(run_dir.training().checkpoint(6), world.root / "last.pt")
    trained = torch.load(world.root / "last.pt")["model"]
    exported = load_file(run_dir.export / "transformer/diffusion_pytorch_model.safetensors")
    assert exported.keys() == trained.keys()
    for name, tensor in exported.items():
        assert torch.equal(tensor, trained[name]), name


def test_the_export_runs_in_diffusers_alone(world: World, tiny_model: Path) -> None:
    script = f"""
import sys
from diffusers import WanPipeline
pipe = WanPipeline.from_pretrained({str(RunDir(world.run_dir).export)!r})
video = pipe("a red square", height=32, width=48, num_frames=9, num_inference_steps=2).frames[0]
assert video.shape == (9, 32, 48, 3), video.shape
assert not any(name.split(".")[0] == "fastvideo" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=world.root)
    base = json.loads((tiny_model / "transformer/config.json").read_text())
    export = RunDir(world.run_dir).export
    assert json.loads((export / "transformer/config.json").read_text()) == base


def test_a_small_shard_size_splits_the_export_with_an_index(world: World) -> None:
    done = fastvideo("export", world, "export.max_shard_gib=0.001")
    assert done.code == 0, done.err
    folder = RunDir(world.run_dir).export / "transformer"
    assert (folder / "diffusion_pytorch_model.safetensors.index.json").is_file()
    from diffusers import WanTransformer3DModel

    WanTransformer3DModel.from_pretrained(folder)
    assert fastvideo("export", world).code == 0


def test_training_needs_neither_vae_nor_text_encoder(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.load().model.path, model)
    for folder in ("vae", "text_encoder", "tokenizer"):
        shutil.rmtree(model / folder)
    done = fastvideo("train", world, f"model.path={model}", f"run_dir={tmp_path / 'run'}")
    assert done.code == 0, done.err
    lines = (tmp_path / "run/train/transformer/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line).get("loss") for line in lines]
    assert losses == [record.get("loss") for record in records(world)]


def test_losses_do_not_depend_on_threads_micro_batches_or_checkpointing(
    world: World, tmp_path: Path
) -> None:
    expected = [record["loss"] for record in records(world) if "loss" in record]
    for number, override in enumerate(
        (
            "train.loader_workers=3",
            "train.micro_batch_size=1",
            "train.activation_checkpointing=full",
        )
    ):
        run_dir = tmp_path / str(number)
        done = fastvideo("train", world, override, f"run_dir={run_dir}")
        assert done.code == 0, done.err
        lines = (run_dir / "train/transformer/metrics.jsonl").read_text().splitlines()
        found = [r["loss"] for r in map(json.loads, lines) if "loss" in r]
        assert found == pytest.approx(expected, rel=1e-5), override


@pytest.mark.parametrize("how", ["USR2", "TERM", "INT", "STOP"])
def test_a_request_to_stop_saves_and_exits_with_75(world: World, tmp_path: Path, how: str) -> None:
    overrides = (f"run_dir={tmp_path}", "train.steps=2000", "train.checkpoint.every_steps=2000")
    metrics = tmp_path / "train/transformer/metrics.jsonl"
    child = start_command("train", world, *overrides)
    while not (metrics.exists() and '"loss"' in metrics.read_text()):
        time.sleep(0.02)
    if how == "STOP":
        (tmp_path / "STOP").touch()
    else:
        os.kill(child, signal.Signals[f"SIG{how}"])
    code, errors = wait_for(child), (world.root / "stderr.txt").read_text()
    assert code == 75, errors
    assert "the same command continues" in errors and "Traceback" not in errors
    (saved,) = RunDir(tmp_path).training().complete_checkpoints()
    more = (f"run_dir={tmp_path}", f"train.steps={saved + 2}", "train.checkpoint.every_steps=2000")
    done = fastvideo("train", world, *more)
    assert done.code == 0, done.err
    found = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert [r["step"] for r in found if "loss" in r] == list(range(1, saved + 3))
    assert f"continuing from {tmp_path / 'train/transformer/checkpoints'}" in done.err


def test_a_resumed_run_refuses_changes_that_decide_the_result(world: World) -> None:
    more = "train.steps=8"
    done = fastvideo("train", world, more, "train.optimizer.lr=0.5", "train.seed=3")
    assert done.code == 2
    assert "train.optimizer.lr: 0.001 -> 0.5" in done.err and "--force" in done.err
    assert "train.seed: 0 -> 3" in done.err


def test_training_refuses_shards_that_are_not_the_recipes(world: World, tmp_path: Path) -> None:
    elsewhere = f"run_dir={tmp_path / 'run'}"
    done = fastvideo("train", world, elsewhere, "clip.height=48")
    assert done.code == 2 and "was encoded with clip" in done.err
    done = fastvideo("train", world, elsewhere, f"shards.path={tmp_path / 'none'}")
    assert done.code == 2 and "run preprocess" in done.err
    partly = tmp_path / "partly"
    shutil.copytree(world.shards, partly)
    (partly / "shard-00001.json").unlink()
    done = fastvideo("train", world, elsewhere, f"shards.path={partly}")
    assert done.code == 2 and "1 of 2 shards are missing" in done.err


def test_generate_and_export_say_what_must_come_first(world: World, tmp_path: Path) -> None:
    done = fastvideo("export", world, f"run_dir={tmp_path}")
    assert done.code == 2 and "run train first" in done.err
    done = fastvideo("generate", world, f"run_dir={tmp_path}")
    assert done.code == 2 and "run export first" in done.err


def test_results_are_json_on_stdout_and_nothing_else(world: World) -> None:
    for verb in ("preprocess", "train", "export", "generate"):
        done = fastvideo(verb, world, "--json")
        assert done.code == 0, done.err
        assert isinstance(json.loads(done.out), dict)


def test_an_unexpected_error_is_1_and_shows_where(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "shards"
    shutil.copytree(world.shards, broken)
    (broken / "clips.jsonl").write_bytes(b"x" * (broken / "clips.jsonl").stat().st_size)
    done = fastvideo("status", world, f"shards.path={broken}")
    assert done.code == 1 and "Traceback" in done.err


def test_a_run_trained_anew_is_exported_and_sampled_anew(world: World, tmp_path: Path) -> None:
    """The marker of a checkpoint stands for its weights, not for its shape."""
    where = f"run_dir={tmp_path / 'run'}"
    for verb in ("train", "export", "generate"):
        assert fastvideo(verb, world, where).code == 0
    first = weights(tmp_path / "run/export")
    shutil.rmtree(tmp_path / "run/train")
    assert fastvideo("train", world, where, "train.seed=5").code == 0
    done = fastvideo("export", world, where, "--json")
    assert json.loads(done.out)["ran"] is True
    assert weights(tmp_path / "run/export") != first
    assert json.loads(fastvideo("generate", world, where, "--json").out)["made"] == 2


def weights(export: Path) -> bytes:
    return (export / "transformer/diffusion_pytorch_model.safetensors").read_bytes()


def test_another_base_model_at_the_same_path_is_noticed(world: World, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(world.load().model.path, model)
    where = (f"model.path={model}", f"run_dir={tmp_path / 'run'}")
    for verb in ("train", "export"):
        assert fastvideo(verb, world, *where).code == 0
    base = (*where, "generate.weights=base")
    assert json.loads(fastvideo("generate", world, *base, "--json").out)["made"] == 2
    assert json.loads(fastvideo("generate", world, *base, "--json").out)["made"] == 0
    scheduler = model / "scheduler/scheduler_config.json"
    scheduler.write_text(json.dumps({**json.loads(scheduler.read_text()), "flow_shift": 7.0}))
    assert json.loads(fastvideo("generate", world, *base, "--json").out)["made"] == 2
    assert json.loads(fastvideo("export", world, *where, "--json").out)["ran"] is True
    refused = fastvideo("train", world, *where, "train.steps=8")
    assert refused.code == 2 and "flow_shift" in refused.err


def test_editing_an_export_leaves_the_base_model_alone(world: World, tiny_model: Path) -> None:
    export = RunDir(world.run_dir).export
    for path in export.rglob("*.json"):
        base = tiny_model / path.relative_to(export)
        assert not base.exists() or not path.samefile(base), path
    weight = "vae/diffusion_pytorch_model.safetensors"
    assert (export / weight).samefile(tiny_model / weight), "weights take no second place"


def test_a_killed_video_does_not_pass_for_the_one_before(world: World, tmp_path: Path) -> None:
    where = (f"run_dir={tmp_path}", "generate.weights=base")
    assert fastvideo("generate", world, *where).code == 0
    wanted = (tmp_path / "generate/base/0000.mp4").read_bytes()
    recipe = world.load(*where, "generate.seed=7")
    assert in_fork(lambda: generate(recipe), fault="generate.video.done") == -9
    assert (tmp_path / "generate/base/0000.mp4").read_bytes() != wanted
    assert fastvideo("generate", world, *where).code == 0
    assert (tmp_path / "generate/base/0000.mp4").read_bytes() == wanted


@pytest.mark.parametrize("verb", ["preprocess", "run"])
def test_a_request_to_stop_ends_other_verbs_with_75_too(
    world: World, tmp_path: Path, verb: str
) -> None:
    shards = tmp_path / "shards"
    overrides = (f"shards.path={shards}", f"run_dir={tmp_path / 'run'}")
    child = start_command(verb, world, *overrides)
    while not (shards / "manifest.json").exists():
        time.sleep(0.01)
    os.kill(child, signal.SIGTERM)
    assert wait_for(child) == 75, (world.root / "stderr.txt").read_text()
    assert fastvideo("preprocess", world, *overrides).code == 0
