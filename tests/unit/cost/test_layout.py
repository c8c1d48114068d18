# SPDX-License-Identifier: Apache-2.0
"""Layouts that are derived, and those that cannot be, with the numbers that would do."""

from pathlib import Path

import pytest

from fastvideo.config.architectures import release
from fastvideo.config.recipe import Recipe
from fastvideo.cost.fit import nearest_fit
from fastvideo.cost.layout import Layout, choose, problems
from fastvideo.cost.memory import GIB
from fastvideo.errors import UserError

RECIPES = Path(__file__).parents[3] / "configs/recipes"
SMALL, LARGE = "wan2.1_t2v_1.3b", "wan2.1_t2v_14b"
H100_GIB = 79.1


def recipe(name: str, *overrides: str) -> Recipe:
    return Recipe.load(RECIPES / f"{name}_full.yaml", ["train.global_batch_size=48", *overrides])


def chosen(name: str, *overrides: str, processes: int, gib: float | None = H100_GIB) -> Layout:
    spec = recipe(name, *overrides)
    return choose(spec, release(name).transformer, processes=processes, memory_gib=gib)


def wrong(name: str, *overrides: str, processes: int) -> str:
    with pytest.raises(UserError) as caught:
        chosen(name, *overrides, processes=processes)
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], (8, 1)),
        (["parallel.shard=4"], (2, 4)),
        (["parallel.replicate=4"], (4, 2)),
        (["parallel.replicate=2", "parallel.shard=4"], (2, 4)),
        (["parallel.cpu_offload=true"], (1, 8)),
        (["train.optimizer.kind=apex_adamw"], (8, 1)),
    ],
)
def test_empty_keys_are_derived(overrides: list[str], expected: tuple[int, int]) -> None:
    found = chosen(SMALL, *overrides, processes=8)
    assert (found.replicate, found.shard) == expected
    assert found.processes == 8 and found.data == 8


def test_what_fits_is_whole_and_what_does_not_is_spread() -> None:
    small, large = chosen(SMALL, processes=8), chosen(LARGE, processes=8)
    assert (small.shard, large.shard) == (1, 8)
    assert "fits into 79.1 GiB" in small.reason and "weights" in small.reason
    assert "whole copies need" in large.reason and "61.5 GiB fits" in large.reason
    assert "is the least there is" in chosen(LARGE, processes=2).reason


def test_adapters_of_a_large_model_are_whole_where_its_weights_are_not() -> None:
    adapters = "train.method={kind: lora}"
    whole, spread = (chosen(LARGE, adapters, processes=8, gib=gib) for gib in (H100_GIB, 39.4))
    assert (whole.shard, spread.shard) == (1, 8)
    assert "DDP: weights 27.2 + gradients 0.6" in whole.reason
    assert "more than 39.4 GiB; over 8 processes 32.6 GiB fits" in spread.reason
    found = nearest_fit(
        recipe(LARGE, adapters, "parallel.shard=1"),
        release(LARGE).transformer,
        processes=8,
        memory_gib=39.4,
    )
    assert found is not None and found.memory.total < 39.4 * GIB
    assert (found.shard, found.changes) == (1, {"parallel.sequence": 4})


def test_without_gpus_memory_does_not_decide() -> None:
    assert chosen(LARGE, processes=8, gib=None).shard == 1


def test_one_process_holds_everything() -> None:
    assert chosen(LARGE, processes=1) == Layout(1, 1, 1, "one process")


def test_groups_share_samples() -> None:
    found = chosen(LARGE, "parallel.sequence=4", processes=8)
    assert (found.sequence, found.data, found.processes) == (4, 2, 8)


def test_layouts_that_do_not_make_the_number_of_processes() -> None:
    text = wrong(LARGE, "parallel.replicate=8", "parallel.shard=1", processes=16)
    assert "parallel.replicate=8 x parallel.shard=1 makes 8 processes, not 16" in text
    assert "use parallel.replicate=16, use parallel.shard=2, leave both empty" in text
    text = wrong(LARGE, "parallel.shard=3", processes=8)
    assert "parallel.shard=3: does not divide the 8 processes; use 2 or 4" in text
    text = wrong(LARGE, "parallel.replicate=16", processes=8)
    assert text.endswith("parallel.replicate=16: does not divide the 8 processes; use 8")


@pytest.mark.parametrize(
    ("name", "sequence", "processes", "says"),
    [
        (SMALL, 8, 8, "the model's 12 attention heads; use 4"),
        (LARGE, 16, 16, "the model's 40 attention heads; use 8"),
        (LARGE, 5, 8, "does not divide the 8 processes; use 4 or 8"),
        ("wan2.2_ti2v_5b", 16, 16, "the model's 24 attention heads; use 8"),
        ("hunyuan_t2v", 5, 8, "the 8 processes nor the model's 24 attention heads; use 4 or 8"),
    ],
)
def test_sequences_divide_processes_and_heads(
    name: str, sequence: int, processes: int, says: str
) -> None:
    text = wrong(name, f"parallel.sequence={sequence}", processes=processes)
    assert f"parallel.sequence={sequence}: does not divide" in text and says in text


def test_samples_are_dealt_out_evenly() -> None:
    text = wrong(LARGE, "train.global_batch_size=10", processes=8)
    assert "train.global_batch_size=10: cannot be dealt out to 8 groups of the 8 processes" in text
    assert text.endswith("use 8 or 16, or parallel.sequence=4")
    text = wrong(LARGE, "train.global_batch_size=4", processes=8)
    assert text.endswith("use 8, or parallel.sequence=2")
    text = wrong(LARGE, "train.global_batch_size=4", "train.micro_batch_size=2", processes=8)
    assert text.endswith("use 8, or parallel.sequence=4")
    assert wrong(SMALL, "train.global_batch_size=1", processes=8).endswith(
        "groups of the 8 processes; use 8"
    )
    overrides = ("train.global_batch_size=24", "train.micro_batch_size=4")
    text = wrong(LARGE, *overrides, processes=4)
    assert "train.micro_batch_size=4: does not divide the 6 samples of a process" in text
    assert text.endswith("use 3 or 6")
    overrides = ("train.global_batch_size=6", "parallel.sequence=2")
    assert "4 groups of 2 of the 8 processes; use 4 or 8" in wrong(LARGE, *overrides, processes=8)


def test_a_sequence_that_is_proposed_suits_the_batch() -> None:
    overrides = ("train.global_batch_size=2", "parallel.sequence=3")
    assert wrong(LARGE, *overrides, processes=8).endswith("the model's 40 attention heads; use 4")
    overrides = ("train.global_batch_size=3", "parallel.sequence=3")
    assert wrong(LARGE, *overrides, processes=8).endswith("the model's 40 attention heads; use 8")
    overrides = ("train.global_batch_size=3", "parallel.sequence=5")
    assert wrong(SMALL, *overrides, processes=8).endswith("12 attention heads; use 4")


def test_whole_weights_are_what_apex_takes() -> None:
    text = wrong(LARGE, "train.optimizer.kind=apex_adamw", "parallel.shard=8", processes=8)
    assert "apex_adamw: works with whole weights only, here parallel.shard is 8" in text
    text = wrong(LARGE, "train.optimizer.kind=apex_adamw", "parallel.cpu_offload=true", processes=1)
    assert "whole weights only, here parallel.cpu_offload=true" in text


def test_all_mistakes_are_told_at_once() -> None:
    overrides = ("parallel.shard=3", "parallel.sequence=7", "train.optimizer.kind=apex_adamw")
    assert len(wrong(LARGE, *overrides, processes=8).splitlines()) == 3


def test_a_14b_in_whole_copies_does_not_fit_80_gb_and_spread_over_8_it_does() -> None:
    spec = recipe(LARGE, "parallel.replicate=8", "parallel.shard=1")
    config = release(LARGE).transformer
    found = nearest_fit(spec, config, processes=8, memory_gib=H100_GIB)
    assert found is not None
    assert found.overrides == "parallel.replicate=1 parallel.shard=8"
    assert found.memory.total < H100_GIB * GIB


@pytest.mark.parametrize(
    ("name", "overrides", "processes", "expected"),
    [
        (SMALL, ["train.activation_checkpointing=none"], 8, "train.activation_checkpointing=selec"),
        (SMALL, ["parallel.shard=1"], 8, "parallel.replicate=8 parallel.shard=1"),
        (LARGE, [], 2, "parallel.replicate=1 parallel.shard=2 parallel.cpu_offload=true"),
        (LARGE, ["train.micro_batch_size=6"], 8, "train.micro_batch_size=1"),
    ],
)
def test_few_keys_change_and_the_slow_ones_last(
    name: str, overrides: list[str], processes: int, expected: str
) -> None:
    spec, config = recipe(name, *overrides), release(name).transformer
    found = nearest_fit(spec, config, processes=processes, memory_gib=H100_GIB)
    assert found is not None and expected in found.overrides


def offloaded(processes: int, *, gib: float, host_gib: float | None = None) -> str | None:
    spec, config = recipe(LARGE), release(LARGE).transformer
    found = nearest_fit(
        spec, config, processes=processes, memory_gib=gib, host_gib=host_gib, offload=True
    )
    return found.overrides if found else None


def test_weights_in_host_memory_are_spread_over_all_and_fit_into_it() -> None:
    asked = "parallel.replicate=1 parallel.shard=4 parallel.cpu_offload=true"
    assert offloaded(4, gib=40.0) == asked
    # 28 bytes a parameter over 4 processes are 93 GiB, without the copies of checkpoints 53 GiB.
    assert offloaded(4, gib=40.0, host_gib=95.0) == asked
    assert offloaded(4, gib=40.0, host_gib=60.0) == f"{asked} train.checkpoint.asynchronous=false"
    assert offloaded(4, gib=40.0, host_gib=50.0) is None


def test_offload_works_with_any_shard() -> None:
    for shard in (1, 2, 8):
        overrides = (f"parallel.shard={shard}", "parallel.cpu_offload=true")
        assert chosen(LARGE, *overrides, processes=8).shard == shard


def test_nothing_may_fit() -> None:
    spec, config = recipe(LARGE), release(LARGE).transformer
    assert nearest_fit(spec, config, processes=2, memory_gib=8.0) is None


def test_what_is_proposed_is_without_problems() -> None:
    spec = recipe(LARGE, "parallel.replicate=8", "parallel.shard=1")
    config = release(LARGE).transformer
    found = nearest_fit(spec, config, processes=8, memory_gib=H100_GIB)
    assert found is not None
    again = recipe(LARGE, *found.overrides.split())
    assert problems(again, config, processes=8) == []
