# SPDX-License-Identifier: Apache-2.0
"""Rerunning preprocessing fills what is missing, and never reuses what no longer fits."""

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import WanPipeline

from fastvideo import log, state, status
from fastvideo.config.recipe import Recipe
from fastvideo.data import encode
from fastvideo.data.loader import Samples
from fastvideo.data.shard import read_texts
from fastvideo.errors import UserError
from fastvideo.models.family import Encoders, pad_text
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore
from tests.tiny_world import World, digests, in_fork, make_world, write_clip


@pytest.fixture
def world(tmp_path: Path, tiny_model: Path) -> World:
    return make_world(tmp_path, clips=5, model=tiny_model)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Messages of the package, which does not pass them on to the root logger."""
    log.logger.addHandler(caplog.handler)
    log.logger.setLevel(logging.INFO)
    yield caplog
    log.logger.removeHandler(caplog.handler)


def fill(world: World, *overrides: str, **options: Any) -> list[int]:
    filled: list[int] = preprocess(world.load(*overrides), **options)["filled"]
    return filled


def test_a_second_run_encodes_nothing_and_touches_no_file(world: World) -> None:
    assert fill(world) == [0, 1]
    before = {p.name: p.stat().st_mtime_ns for p in world.shards.iterdir()}
    assert fill(world) == []
    assert {p.name: p.stat().st_mtime_ns for p in world.shards.iterdir()} == before


def test_three_more_clips_encode_three_clips(world: World) -> None:
    fill(world)
    old = digests(world.shards, "shard-*")
    for index in (5, 6, 7):
        world.add_clip(index)
    assert fill(world) == [2]
    new = digests(world.shards, "shard-*")
    assert {name: new[name] for name in old} == old
    marker = json.loads((world.shards / "shard-00002.json").read_text())
    assert [row["id"] for row in marker["rows"]] == ["5.mp4", "6.mp4", "7.mp4"]


def test_a_changed_caption_encodes_only_its_shard_again(
    world: World, said: pytest.LogCaptureFixture
) -> None:
    fill(world)
    items = world.items
    items[4]["cap"] = "something else"
    world.write_items(items)
    said.clear()
    assert fill(world) == [1]
    assert "caption" in said.text


def test_changed_content_encodes_only_its_shard_again(world: World) -> None:
    fill(world)
    write_clip(world.root / "clips/videos/0.mp4", index=9)
    assert fill(world) == [0]


def test_a_touched_file_encodes_nothing(world: World) -> None:
    fill(world)
    (world.root / "clips/videos/0.mp4").touch()
    assert fill(world) == []


def test_settings_of_training_encode_nothing(world: World) -> None:
    fill(world)
    changed = ("train.optimizer.lr=0.5", "train.seed=3", "train.text_dropout=0.5")
    assert fill(world, *changed, "shards.rows=7", "source.heldout=0.5") == []


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("clip.height=48", "clip.height"),
        ("clip.fps=10", "clip.fps"),
        ("shards.dtype=float32", "dtype"),
    ],
)
def test_other_geometry_or_dtype_encodes_all_and_says_so(
    world: World, override: str, named: str, said: pytest.LogCaptureFixture
) -> None:
    fill(world)
    said.clear()
    assert fill(world, override) == [0, 1]
    assert named in said.text


def test_another_vae_encodes_all_and_says_so(
    world: World, tiny_model: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    fill(world)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    config = json.loads((other / "vae/config.json").read_text())
    config["latents_mean"][0] += 0.5
    (other / "vae/config.json").write_text(json.dumps(config))
    said.clear()
    assert fill(world, f"model.path={other}") == [0, 1]
    assert "vae" in said.text


def test_another_transformer_encodes_nothing(
    world: World, tiny_model: Path, tmp_path: Path
) -> None:
    fill(world)
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    (other / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"other weights")
    assert fill(world, f"model.path={other}") == []


def test_a_removed_shard_or_marker_is_filled_again(world: World) -> None:
    fill(world)
    expected = digests(world.shards, "shard-*")
    (world.shards / "shard-00000.json").unlink()
    assert fill(world) == [0]
    (world.shards / "shard-00001.parquet").unlink()
    assert fill(world) == [1]
    assert digests(world.shards, "shard-*") == expected


def test_shards_can_be_filled_one_by_one_after_the_manifest(world: World) -> None:
    with pytest.raises(UserError, match="manifest-only"):
        fill(world, shards=[0])
    assert fill(world, manifest_only=True) == []
    assert status.summary(world.load())["shards"] == {"total": 2, "done": 0, "missing": [0, 1]}
    assert fill(world, shards=[1]) == [1]
    assert status.summary(world.load())["clips"]["pending"] == 3
    with pytest.raises(UserError, match=r"--shards 9: the manifest has the shards 0-1"):
        fill(world, shards=[9])
    with pytest.raises(UserError, match="other settings"):
        fill(world, "clip.height=48", shards=[0])
    assert fill(world) == [0]


def test_a_video_that_changed_after_planning_is_not_encoded_under_the_old_name(
    world: World,
) -> None:
    fill(world, manifest_only=True)
    write_clip(world.root / "clips/videos/0.mp4", index=9)
    with pytest.raises(UserError, match=r"0\.mp4: changed since"):
        fill(world, shards=[0])


def test_too_many_failures_fail_as_a_whole_but_keep_the_good_clips(world: World) -> None:
    (world.root / "clips/videos/0.mp4").write_bytes(b"no video")
    with pytest.raises(UserError, match=r"1 of 5 clips failed.*max_failed=0\.1"):
        fill(world)
    counts = status.summary(world.load())["clips"]
    assert counts["encoded"] == 4 and counts["failed"] == {"not_a_video": 1}
    assert fill(world, "source.max_failed=0.2") == []


def test_embeddings_are_those_of_the_pipeline(world: World, tiny_model: Path) -> None:
    """Stored text, padded, and the prompts equal ``WanPipeline.encode_prompt`` bit for bit."""
    items = world.items
    items[1]["cap"] = ["  Two\tcaptions &amp; white   space ", "the second – ünïcode"]
    world.write_items(items)
    fill(world)
    pipeline = WanPipeline.from_pretrained(tiny_model)

    @torch.no_grad()  # as the pipeline calls it
    def theirs(prompt: str) -> torch.Tensor:
        embedding: torch.Tensor = pipeline.encode_prompt(
            prompt, do_classifier_free_guidance=False, max_sequence_length=512
        )[0]
        return embedding

    samples = Samples(ShardStore(world.shards), split="train", columns=())
    found = {samples[i].id: samples[i].texts for i in range(len(samples))}
    for item in world.items:
        assert len(found[item["path"]]) == len(item["cap"])
        for caption, text in zip(item["cap"], found[item["path"]], strict=True):
            assert torch.equal(pad_text([text], length=512), theirs(caption))
    store = ShardStore(world.shards)
    marker = state.read_marker(store.validation)
    assert marker is not None
    prompts = [row["caption"] for row in marker["rows"]]
    assert prompts == ["", "a red square moves right", "nothing at all"]
    for row in marker["rows"]:
        (text,) = read_texts(store.validation, row)
        assert torch.equal(pad_text([text], length=512), theirs(row["caption"]))


def test_latents_are_the_raw_mode_of_the_vae(world: World, tiny_model: Path) -> None:
    fill(world, "shards.dtype=float32")
    from fastvideo.data.decode import decode_clip

    vae = WanPipeline.from_pretrained(tiny_model).vae
    samples = Samples(ShardStore(world.shards), split="train", columns=())
    for i in range(len(samples)):
        frames = decode_clip(
            world.root / "clips/videos" / samples[i].id, num_frames=9, height=32, width=48, fps=8
        )
        pixels = torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 255 * 2 - 1
        with torch.no_grad():
            expected = vae.encode(pixels).latent_dist.mode()[0]
        assert samples[i].vae_latent.shape == (16, 3, 4, 6)
        assert torch.equal(samples[i].vae_latent, expected)


def test_traces_of_what_wrote_a_config_encode_nothing_anew(
    world: World, tiny_model: Path, tmp_path: Path
) -> None:
    """Repositories of other sizes hold the same encoders, saved by other versions."""
    fill(world)
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    where = f"model.path={model}"
    config = model / "vae/config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "_diffusers_version": "0.1", "dtype": "bfloat16"}))
    assert fill(world, where) == []
    mean = [value + 1 for value in content["latents_mean"]]
    config.write_text(json.dumps({**content, "latents_mean": mean}))
    assert fill(world, where) == [0, 1]


def test_a_manifest_planned_anew_while_encoders_load_loses_no_clip(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(world, manifest_only=True)
    load_encoders = encode.load_encoders

    def meanwhile(recipe: Recipe) -> Encoders:
        """Another process plans while this one loads."""
        world.write_items(world.items[1:])
        assert in_fork(lambda: fill(world, manifest_only=True)) == 0
        return load_encoders(recipe)

    monkeypatch.setattr(encode, "load_encoders", meanwhile)
    with pytest.raises(UserError, match="planned anew"):
        fill(world, shards=[0, 1])
    monkeypatch.undo()
    fill(world)
    samples = Samples(ShardStore(world.shards), split="train", columns=())
    assert sorted(samples[i].id for i in range(len(samples))) == [f"{i}.mp4" for i in range(1, 5)]


def test_a_killed_shard_does_not_pass_for_the_one_before(world: World) -> None:
    fill(world)
    expected = digests(world.shards, "shard-*")
    other = world.load("shards.dtype=float32")
    assert in_fork(lambda: preprocess(other), fault="shard.parquet.done") == -9
    assert 0 in fill(world)
    assert digests(world.shards, "shard-*") == expected
