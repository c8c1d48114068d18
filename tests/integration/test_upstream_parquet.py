# SPDX-License-Identifier: Apache-2.0
"""Parquet that upstream FastVideo's preprocessing made is trained on as it is."""

import dataclasses
import logging
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from fastvideo import log, state
from fastvideo.data.shard import read_texts
from fastvideo.errors import UserError
from fastvideo.models.family import find_family
from fastvideo.models.tiny_configs import TEXT_DIM
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore
from tests.tiny_world import Pair, digests, make_world
from tests.upstream_files import I2V, Geometry, random_samples, write_legacy, write_new
from tests.upstream_job import (
    HUNYUAN,
    I2V_PAIR,
    T2V_PAIR,
    Job,
    Model,
    assert_as_given,
    make_job,
    models_below,
    same,
)

PAIRS = (
    T2V_PAIR,
    I2V_PAIR,
    Pair("wan2.2-a14b", "i2v"),
    HUNYUAN,
    Pair("wan2.2-ti2v-5b", width=64),
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """Folder of the tiny model of a pair."""
    return models_below(tmp_path_factory.mktemp("models"))


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Messages of the package, which does not pass them on to the root logger."""
    log.logger.addHandler(caplog.handler)
    log.logger.setLevel(logging.INFO)
    yield caplog
    log.logger.removeHandler(caplog.handler)


@pytest.fixture
def job(tmp_path: Path, model: Model) -> Job:
    return make_job(tmp_path, model(T2V_PAIR))


@pytest.fixture
def i2v_job(tmp_path: Path, model: Model) -> Job:
    return make_job(tmp_path, model(I2V_PAIR), I2V_PAIR)


# ---------------------------------------------------------------- what is sound


@pytest.mark.parametrize("write", [write_legacy, write_new])
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_what_upstream_made_is_kept_bit_for_bit_and_trains(
    pair: Pair,
    write: Callable[..., list[Path]],
    tmp_path: Path,
    model: Model,
    said: pytest.LogCaptureFixture,
) -> None:
    job = make_job(tmp_path, model(pair), pair)
    samples = job.samples(7, text_lengths=(5, 600, 7), swapped=write is write_legacy)
    write(job.given, samples, schema=job.schema, samples_per_file=2)
    assert job.fill() == [0, 1, 2]
    assert "latents were taken as raw VAE output" in said.text
    assert "deviation of 1.0" in said.text or "deviation of 0.9" in said.text
    assert not [record for record in said.records if record.levelno >= logging.WARNING]
    stored = job.stored()
    assert stored.keys() == {sample.id for sample in samples}
    for sample in samples:
        assert_as_given(stored[sample.id], sample, pair=pair)
    assert len(set(job.train())) > 1


@pytest.mark.parametrize("image", ["empty", "float32", "uint8", "mislabelled"])
def test_the_first_frame_may_be_stored_in_any_of_upstreams_ways(image: str, i2v_job: Job) -> None:
    samples = i2v_job.samples(3, image=image)
    write_new(i2v_job.given, samples, schema=I2V)
    i2v_job.fill()
    stored = i2v_job.stored()
    for sample in samples:
        assert_as_given(stored[sample.id], sample, pair=I2V_PAIR)


def test_text_to_video_trains_on_the_rows_of_image_to_video(job: Job) -> None:
    """Upstream's I2V columns are T2V's and more; a fault in what is not used does not matter."""
    samples = random_samples(
        2,
        task="i2v",
        geometry=Geometry(latent=(16, 3, 4, 6)),
        columns={"pil_image_bytes": b"1", "first_frame_latent_dtype": "unknown"},
    )
    write_new(job.given, samples, schema=I2V)
    job.fill()
    assert job.stored().keys() == {sample.id for sample in samples}


def test_row_groups_make_no_difference(job: Job) -> None:
    path = job.write(job.samples(5))
    job.fill()
    expected = digests(job.world.shards, "shard-*.parquet")
    shutil.rmtree(job.world.shards)
    pq.write_table(pq.read_table(path, partitioning=None), path, row_group_size=2)
    assert pq.ParquetFile(path).num_row_groups == 3
    job.fill()
    assert digests(job.world.shards, "shard-*.parquet") == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_type_in_the_file_is_honoured(dtype: str, job: Job) -> None:
    """Upstream reads every tensor as float32, whatever the column says."""
    samples = job.samples(2, stored_as=dtype)
    job.write(samples)
    job.fill()
    for sample in samples:
        given = torch.from_numpy(sample.tensors["vae_latent"])
        kept = job.stored()[sample.id].vae_latent
        torch.testing.assert_close(kept, given, rtol=2**-7, atol=2**-20)
        assert same(kept, kept.to(getattr(torch, dtype)).float())


def test_shards_keep_latents_in_the_recipes_type_and_text_in_its_own(job: Job) -> None:
    samples = job.samples(2)
    job.write(samples)
    job.fill("shards.dtype=float16")
    for sample in samples:
        kept = job.stored()[sample.id]
        assert same(kept.vae_latent, torch.from_numpy(sample.tensors["vae_latent"]).half())
        assert same(kept.texts[0].embedding, torch.from_numpy(sample.tensors["text_embedding"]))


def test_columns_of_our_shards_speak_of_the_clip(job: Job) -> None:
    (sample,) = job.samples(1, caption="a caption", fps=30.0, columns={"num_frames": 9})
    job.write([sample])
    job.fill()
    row = pq.read_table(job.world.shards / "shard-00000.parquet").to_pylist()[0]
    assert (row["id"], row["file_name"], row["caption"]) == (sample.id, sample.id, "a caption")
    assert (row["width"], row["height"], row["num_frames"]) == (48, 32, 3)


# ---------------------------------------------------------------- normalisation


def test_latents_that_look_normalised_are_reported(
    job: Job, said: pytest.LogCaptureFixture
) -> None:
    job.write(random_samples(3, geometry=Geometry(latent=(16, 3, 4, 6))))
    job.fill()
    (warning,) = {r.getMessage() for r in said.records if r.levelno == logging.WARNING}
    assert "look normalised already" in warning
    assert "source.latents: normalised" in warning


def test_normalised_latents_are_brought_back_to_raw_if_the_recipe_says_so(
    job: Job, said: pytest.LogCaptureFixture
) -> None:
    normalised = random_samples(3, geometry=Geometry(latent=(16, 3, 4, 6)))
    job.write(normalised)
    job.fill("source.latents=normalised")
    assert "latents were taken as already normalised" in said.text
    assert not [record for record in said.records if record.levelno == logging.WARNING]
    raw = job.samples(3)  # of the same seed
    statistics = find_family(job.world.load()).latent_statistics(Path(job.world.load().model.path))
    for one, other in zip(normalised, raw, strict=True):
        kept = job.stored()[one.id].vae_latent
        assert same(kept, torch.from_numpy(other.tensors["vae_latent"]))
        again = statistics.normalise(kept)
        torch.testing.assert_close(again, torch.from_numpy(one.tensors["vae_latent"]))
    assert job.train("source.latents=normalised")


def test_raw_latents_that_are_said_to_be_normalised_are_reported(
    job: Job, said: pytest.LogCaptureFixture
) -> None:
    job.write(job.samples(3))
    job.fill("source.latents=normalised")
    assert "they look raw; if so, set source.latents: raw" in said.text


def test_another_reading_of_the_latents_makes_all_shards_anew(job: Job) -> None:
    job.write(job.samples(4))
    assert job.fill() == [0, 1]
    assert job.fill("source.latents=normalised") == [0, 1]


# ---------------------------------------------------------------- what is not used


def test_rows_that_cannot_be_used_are_named_and_the_others_train(job: Job) -> None:
    sound = job.samples(4)
    spoiled = {
        "cut": {"vae_latent_bytes": b"1234"},
        "empty": {"vae_latent_bytes": b"", "vae_latent_shape": []},
        "silent": {"text_embedding_bytes": b""},
        "strange": {"text_embedding_dtype": "float8"},
    }
    faulty = [
        job.samples(1, seed=i, id=name, columns=columns)[0]
        for i, (name, columns) in enumerate(spoiled.items(), start=1)
    ]
    for name, value in (("nan", np.nan), ("inf", np.inf)):
        (sample,) = job.samples(1, seed=len(name), id=name)
        sample.tensors["vae_latent"][3, 1, 2, 2] = value
        faulty.append(sample)
    job.write([*faulty[:3], *sound[:2], *faulty[3:], *sound[2:]])
    with pytest.raises(UserError, match=r"6 of 10 clips failed.*max_failed=0\.1"):
        job.fill()
    assert job.fill("source.max_failed=0.6") == []
    reasons = {id: found for id, found in job.ledger().items() if found[0] != "encoded"}
    assert reasons == {
        "cut": ("failed", "wrong_byte_count"),
        "empty": ("failed", "empty_latent"),
        "silent": ("failed", "empty_text"),
        "strange": ("failed", "unknown_dtype"),
        "nan": ("failed", "not_finite"),
        "inf": ("failed", "not_finite"),
    }
    stored = job.stored()
    assert stored.keys() == {sample.id for sample in sound}
    for sample in sound:
        assert_as_given(stored[sample.id], sample, pair=T2V_PAIR)
    assert job.train()


def test_longer_clips_are_cut_and_others_are_filtered(i2v_job: Job) -> None:
    longer = i2v_job.samples(2, latent=(16, 5, 4, 6))
    shorter = i2v_job.samples(1, seed=1, latent=(16, 2, 4, 6))
    larger = i2v_job.samples(1, seed=2, latent=(16, 3, 6, 4))
    i2v_job.write([*longer, *shorter, *larger])
    i2v_job.fill()
    stored = i2v_job.stored()
    assert stored.keys() == {sample.id for sample in longer}
    for sample in longer:
        cut = {
            stem: tensor[:, :3] if stem.endswith("latent") else tensor
            for stem, tensor in sample.tensors.items()
        }
        assert_as_given(stored[sample.id], dataclasses.replace(sample, tensors=cut), pair=I2V_PAIR)
    reasons = {id: found for id, found in i2v_job.ledger().items() if found[0] != "encoded"}
    assert reasons == {
        shorter[0].id: ("filtered", "too_short"),
        larger[0].id: ("filtered", "other_size"),
    }
    assert i2v_job.train()


def test_clip_features_that_the_model_needs_must_be_there(
    i2v_job: Job, said: pytest.LogCaptureFixture
) -> None:
    i2v_job.write(i2v_job.samples(2, image_features=None))
    with pytest.raises(UserError, match=r"2 of 2 clips failed, most often no_clip_feature"):
        i2v_job.fill()
    assert "clip_feature is empty" in said.text
    with pytest.raises(UserError, match=r"not one of 2 clips.*no_clip_feature 2"):
        i2v_job.fill("source.max_failed=1")


def test_image_to_video_does_not_train_on_the_rows_of_text_to_video(i2v_job: Job) -> None:
    write_new(i2v_job.given, random_samples(2, geometry=Geometry(latent=(16, 3, 4, 6))))
    with pytest.raises(UserError, match=r"2 of 2 clips failed, most often no_clip_feature"):
        i2v_job.fill()


def test_a_first_frame_of_another_shape_is_a_fault_of_the_row(i2v_job: Job) -> None:
    good, bad = i2v_job.samples(2)
    shape = {"first_frame_latent_shape": [16, 3, 6, 4], "pil_image_bytes": b"1"}
    i2v_job.write([good, dataclasses.replace(bad, columns=shape)])
    i2v_job.fill("source.max_failed=0.5")
    assert i2v_job.ledger() == {good.id: ("encoded", ""), bad.id: ("failed", "unequal_latents")}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        ({"text_dim": 64}, "other_text_encoder"),
        ({"latent": (48, 3, 4, 6)}, "other_vae"),
        ({"image_features": (257, 64)}, "other_image_encoder"),
    ],
)
def test_what_another_model_encoded_is_refused(
    made: dict[str, Any], reason: str, i2v_job: Job, said: pytest.LogCaptureFixture
) -> None:
    i2v_job.write(i2v_job.samples(2, **made))
    with pytest.raises(UserError, match=f"2 of 2 clips failed, most often {reason}"):
        i2v_job.fill(manifest_only=True)
        i2v_job.fill()
    assert i2v_job.world.load().model.path in said.text


def test_hunyuan_video_needs_more_than_the_pooled_text(tmp_path: Path, model: Model) -> None:
    job = make_job(tmp_path, model(HUNYUAN), HUNYUAN)
    (good,), (bad,) = job.samples(1), job.samples(1, seed=1, text_lengths=(1,))
    job.write([good, bad])
    job.fill("source.max_failed=0.5")
    assert job.ledger() == {good.id: ("encoded", ""), bad.id: ("failed", "empty_text")}


# ---------------------------------------------------------------- ids, copies, captions


def test_rows_that_upstream_wrote_twice_count_once(job: Job) -> None:
    """A second run of upstream's preprocessing writes the same rows into further files."""
    samples = job.samples(4)
    job.write(samples, "m.parquet")
    assert job.fill() == [0, 1]
    before = digests(job.world.shards, "shard-*")
    job.write(samples, "a.parquet")  # sorts before the first
    assert job.fill() == []
    assert digests(job.world.shards, "shard-*") == before
    assert job.stored().keys() == {sample.id for sample in samples}
    states = [found for found in job.ledger().values() if found[0] != "encoded"]
    assert states == [("filtered", "duplicate_content")] * 4
    assert job.fill("source.allow_duplicates=true") == [2, 3]
    assert len(job.stored()) == 8


def test_rows_with_one_id_all_train_and_stay_on_one_side(job: Job) -> None:
    """One video with two captions, or of two folders; upstream's ids are file names."""
    samples = [job.samples(1, seed=i, id=f"{i // 2}.mp4")[0] for i in range(24)]
    job.write(samples)
    job.fill("source.heldout=0.5")
    halves = [job.stored(split) for split in ("train", "heldout")]
    assert sorted(len(half) for half in halves) != [0, 24]
    assert sum(len(half) for half in halves) == 24
    for half in halves:
        videos = [id.partition("#")[0] for id in half]
        assert all(videos.count(video) == 2 for video in videos)
    given = {sample.caption: sample for sample in samples}
    table = pq.read_table(job.world.shards / "shard-00000.parquet").to_pylist()
    both = halves[0] | halves[1]
    for row in table:
        assert_as_given(both[row["id"]], given[row["caption"]], pair=T2V_PAIR)


def test_rows_without_an_id_get_one(job: Job) -> None:
    job.write([*job.samples(2, id=""), *job.samples(1, seed=1)])
    job.fill()
    file = "training_dataset/worker_0/worker_0/a.parquet"
    assert job.stored().keys() == {f"#{file}:0", f"#{file}:1", "clip 1 0.mp4"}


def test_an_id_that_looks_like_a_made_one_loses_no_row(job: Job) -> None:
    file = "training_dataset/worker_0/worker_0/a.parquet"
    ids = (f"x#{file}:2", "x", "x", f"x#{file}:2")
    job.write([job.samples(1, seed=i, id=id)[0] for i, id in enumerate(ids)])
    job.fill()
    assert len(job.stored()) == 4


def test_rows_with_an_empty_caption_train(job: Job, said: pytest.LogCaptureFixture) -> None:
    """Upstream's training_cfg_rate in preprocessing empties captions, and encodes what is left."""
    samples = [*job.samples(2), *job.samples(1, seed=1, caption="", text_lengths=(1,))]
    job.write(samples)
    job.fill()
    assert job.stored().keys() == {sample.id for sample in samples}
    assert "1 clips have an empty caption" in said.text
    assert job.train("train.text_dropout=0.5")


def test_prompts_come_from_the_models_own_encoders(i2v_job: Job, tmp_path: Path) -> None:
    """The same file as for raw clips: the empty prompt, validation prompts and first images."""
    i2v_job.write(i2v_job.samples(2))
    i2v_job.fill()
    path = Path(i2v_job.world.load().model.path)
    raw = make_world(tmp_path / "raw", clips=1, model=path, pair=I2V_PAIR)
    preprocess(raw.load("shards.dtype=float32"))
    found, expected = (
        pq.read_table(shards / "validation.parquet").to_pylist()
        for shards in (i2v_job.world.shards, raw.shards)
    )
    assert [row["caption"] for row in found] == ["", "a red square moves right", "nothing at all"]
    assert found == expected
    store = ShardStore(i2v_job.world.shards)
    marker = state.read_marker(store.validation)
    assert marker is not None
    (empty,) = read_texts(store.validation, marker["rows"][0])
    assert empty.embedding.shape[1] == TEXT_DIM
    assert i2v_job.train("train.text_dropout=1")
