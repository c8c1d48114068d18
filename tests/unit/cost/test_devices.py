# SPDX-License-Identifier: Apache-2.0
"""Devices by the names of drivers, and the share of their peak."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fastvideo.config.architectures import release
from fastvideo.config.cluster import Cluster
from fastvideo.config.recipe import Recipe
from fastvideo.cost import duration
from fastvideo.cost.devices import DEVICES, Device, find_device, mfu
from fastvideo.cost.flops import hardware_flops
from fastvideo.errors import UserError

RECIPES = Path(__file__).parents[3] / "configs/recipes"
TOY = Device("Toy", 1.0, bf16_tflops=2.0, float32_tflops=1.0, reported=("ACME Toy",), source="")


@pytest.mark.parametrize(
    ("reported", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("nvidia l40s ", "L40S"),
        ("h100-80gb", "H100-80GB"),
    ],
)
def test_drivers_names_are_known(reported: str, name: str) -> None:
    found = find_device(reported)
    assert found is not None and found.name == name


@pytest.mark.parametrize("name", ["cpu", "", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "NVIDIA H100"])
def test_others_are_not(name: str) -> None:
    assert find_device(name) is None


def test_the_table_is_in_order_and_without_doubles() -> None:
    names = [name.lower() for device in DEVICES for name in (device.name, *device.reported)]
    assert len(set(names)) == len(names)
    assert [d.memory_gib for d in DEVICES] == sorted(d.memory_gib for d in DEVICES)
    assert all(device.bf16_tflops > device.float32_tflops > 0 for device in DEVICES)
    assert all(device.source for device in DEVICES)


def test_a_table_of_ones_own() -> None:
    assert find_device("acme toy", [TOY]) is TOY
    assert find_device("NVIDIA H200", [TOY]) is None


def seconds(clock: Callable[[], float]) -> float:
    start = clock()
    return clock() - start


def test_utilisation_is_work_over_the_peak_of_all() -> None:
    ticks: Iterator[float] = iter([10.0, 14.0])
    took = seconds(lambda: next(ticks))
    # 4e12 operations in 4 s on two devices of 2e12 a second each.
    assert mfu(4e12, seconds=took, device=TOY, processes=2, dtype="bfloat16") == 0.25
    assert mfu(4e12, seconds=took, device=TOY, processes=2, dtype="float32") == 0.5
    assert mfu(4e12, seconds=seconds(time.perf_counter), device=TOY, processes=1, dtype="float32")


def test_published_rates_are_the_shares_they_are_said_to_be() -> None:
    """NVIDIA DFM: 175.88 TFLOP/s for each of 8 H100s is 17.8 % of their peak."""
    h100 = find_device("H100-80GB")
    assert h100 is not None
    share = mfu(8 * 175.88e12, seconds=1.0, device=h100, processes=8, dtype="bfloat16")
    assert share == pytest.approx(0.178, abs=5e-4)


def test_a_step_takes_its_work_over_what_is_assumed_of_the_peak() -> None:
    spec = Recipe.load(RECIPES / "wan2.1_t2v_14b_full.yaml")
    config = release("wan2.1_t2v_14b").transformer
    work = spec.train.global_batch_size * hardware_flops(spec, config).actual
    took = duration.step_s(spec, config, processes=4, device=TOY)
    share = mfu(work, seconds=took, device=TOY, processes=4, dtype=spec.train.dtype)
    assert share == pytest.approx(duration.EFFICIENCY)


def test_clusters_name_known_devices_of_gpus_they_have() -> None:
    tree = {"gpus_per_node": 8, "device": "NVIDIA H200"}
    assert Cluster.parse(tree, origin="here").device == "NVIDIA H200"
    with pytest.raises(
        UserError, match=r"device.*'H1000' is not known; use one of RTX4090, .*H200"
    ):
        Cluster.parse({**tree, "device": "H1000"}, origin="here")
    with pytest.raises(UserError, match="has no effect with gpus_per_node=0"):
        Cluster.parse({"device": "H200"}, origin="here")
