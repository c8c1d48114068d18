# SPDX-License-Identifier: Apache-2.0
"""``fastvideo plan``: every recipe, without torch, real shards, reasons and ways out."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fastvideo.cli import run
from fastvideo.data.loader import Samples
from fastvideo.models.tiny import write_tiny
from fastvideo.plan import plan
from fastvideo.preprocess import preprocess
from fastvideo.state import ShardStore
from tests.tiny_world import make_world

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs/recipes").glob("*.yaml"))
NODE = ROOT / "configs/clusters/local_8gpu.yaml"
WAN_14B = ROOT / "configs/recipes/wan2.1_t2v_14b_full.yaml"
WAN_14B_LORA = ROOT / "configs/recipes/wan2.1_t2v_14b_lora.yaml"
A14B_LORA = ROOT / "configs/recipes/wan2.2_t2v_a14b_lora.yaml"
EVERY = """
import json, sys, time
from pathlib import Path
from fastvideo.cli import run

seconds = {}
for recipe in sys.argv[2:]:
    for more in ([], ["--cluster", sys.argv[1]]):
        start = time.process_time()
        code = run(["plan", recipe, "train.global_batch_size=8", *more])
        seconds[f"{recipe} {more}"] = [time.process_time() - start, code]
heavy = {"torch", "diffusers", "transformers", "pyarrow", "numpy"} & set(sys.modules)
print(json.dumps({"seconds": seconds, "heavy": sorted(heavy)}))
"""


def test_every_recipe_is_answered_at_once_without_torch(tmp_path: Path) -> None:
    """On a fresh checkout: no models, no shards."""
    command = [sys.executable, "-c", EVERY, str(NODE), *map(str, RECIPES)]
    done = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["heavy"] == []
    assert len(found["seconds"]) == 2 * len(RECIPES) >= 30
    assert {name: answer for name, answer in found["seconds"].items() if answer[0] > 3} == {}
    assert {name: answer for name, answer in found["seconds"].items() if answer[1] != 0} == {}


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any]]:
    code = run(["plan", *arguments, "--json"])
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    return code, answer


def test_whole_copies_of_14b_do_not_fit_80_gb(capsys: pytest.CaptureFixture[str]) -> None:
    overrides = ("parallel.replicate=8", "parallel.shard=1")
    code, answer = planned(capsys, str(WAN_14B), "--cluster", str(NODE), *overrides)
    assert code == 2
    figures = answer["transformers"]["transformer"]
    assert figures["fits"] is False and figures["parameters"] == 14_288_491_584
    assert figures["memory"]["total"] > 228 * 2**30  # 16 bytes a parameter, and what is computed
    (problem,) = answer["problems"]
    assert "parallel.replicate=8 parallel.shard=1 needs" in problem
    assert "H100-80GB has 79.1 GiB; use parallel.replicate=1 parallel.shard=8:" in problem

    code, answer = planned(
        capsys, str(WAN_14B), "--cluster", str(NODE), "parallel.replicate=1", "parallel.shard=8"
    )
    assert (code, answer["problems"]) == (0, [])
    assert answer["transformers"]["transformer"]["fits"] is True
    assert answer["transformers"]["transformer"]["smallest_device"] == "A100-80GB"


def test_adapters_of_14b_fit_on_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    one = (str(WAN_14B_LORA), "--cluster", str(NODE), "parallel.processes=1")
    code, answer = planned(capsys, *one, "train.ema={}")
    figures, trained = answer["transformers"]["transformer"], 153_354_240
    assert (code, answer["problems"], figures["fits"]) == (0, [], True)
    assert figures["parameters"] == 14_288_491_584
    assert (figures["adapters"], figures["trained_parameters"]) == (400, trained)
    assert figures["memory"]["gradients"] == figures["memory"]["average"] == 4 * trained
    assert answer["disk"]["checkpoint_bytes"] == {"transformer": 16 * trained}
    assert answer["disk"]["export_bytes"] == 4 * trained
    _, full = planned(capsys, str(WAN_14B), "train.global_batch_size=8")
    work = [a["transformers"]["transformer"]["flops_per_step"] for a in (answer, full)]
    assert 2 / 3 < work[0] / work[1] < 0.9  # attention has all its gradients
    assert run(["plan", *one]) == 0
    assert "frozen beside 400 adapters; 153,354,240 train" in capsys.readouterr().out


def test_adapters_get_the_nearest_setting_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    one = (str(WAN_14B_LORA), "--cluster", str(NODE), "parallel.processes=1")
    code, answer = planned(capsys, *one, "train.activation_checkpointing=none")
    (problem,) = answer["problems"]
    assert code == 2 and "= 366.1 GiB on each GPU, H100-80GB has 79.1 GiB" in problem
    assert "parallel.shard=1 train.activation_checkpointing=selective: weights 27" in problem


def test_sampling_with_both_experts_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """Where a step fits and videos do not, the way out says so."""
    samples = ("train.samples={}", "validation.prompts=prompts.json", "train.micro_batch_size=1")
    one = (str(A14B_LORA), "--cluster", str(NODE), "parallel.processes=1", *samples)
    code, answer = planned(capsys, *one)
    needed = answer["transformers"]["transformer"]["memory"]
    assert code == 0 and needed["sampling"] > 2 * 27 * 2**30
    assert any(note.startswith("train.samples: not counted") for note in answer["notes"])
    code, answer = planned(capsys, *one, "train.method.rank=256", "train.ema={}")
    figures = answer["transformers"]["transformer"]
    assert figures["memory"]["total"] < 79.1 * 2**30 < figures["memory"]["sampling"]
    assert code == 2 and figures["fits"] is False
    assert "GiB while videos are sampled on each GPU" in answer["problems"][0]
    assert answer["problems"][0].endswith("train.samples=null, for only sampling needs so much")
    run(["plan", *one])
    assert "of each GPU while videos are made, by an estimate" in capsys.readouterr().out


def test_comfyuis_files_are_part_of_the_export(capsys: pytest.CaptureFixture[str]) -> None:
    one = (str(WAN_14B_LORA), "export.dtype=bfloat16")
    sizes = [
        planned(capsys, *one, *more)[1]["disk"]["export_bytes"]
        for more in ([], ["export.comfyui=true"])
    ]
    assert sizes == [2 * 153_354_240, 4 * 153_354_240]


def test_projections_that_are_not_there_are_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(WAN_14B_LORA), "train.method.targets=[to_q]"]) == 2
    assert "'to_q' matches no projection of this model" in capsys.readouterr().err


def test_no_known_gpu_is_large_enough(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = planned(capsys, str(WAN_14B), "parallel.replicate=8", "parallel.shard=1")
    assert code == 2
    machine = {"nodes": 1, "processes": 8, "device": None, "is_cpu": False, "host_gib": None}
    assert answer["machine"] == machine
    assert "no known GPU has that; on H100-80GB use parallel.replicate=1" in answer["problems"][0]


def test_where_nothing_is_said_of_gpus_it_is_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    code, answer = planned(capsys, str(WAN_14B))
    assert (code, answer["problems"]) == (0, [])
    (note,) = answer["notes"]
    assert "parallel.replicate=1 parallel.shard=1 needs" in note
    assert "parallel.cpu_offload" not in note and "on 4 GPUs: weights" in note


def cluster(folder: Path, text: str) -> str:
    path = folder / "cluster.yaml"
    path.write_text(f"executor: local\ngpus_per_node: 8\n{text}")
    return str(path)


def test_copies_of_checkpoints_count_in_host_memory(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The state of the 1.3B, 12 bytes a parameter, once on a node: copies share the writing."""
    small = cluster(tmp_path, "device: H100-80GB\nmemory_gib: 10\n")
    arguments = (str(ROOT / "configs/recipes/wan2.1_t2v_1.3b_full.yaml"), "--cluster", small)
    code, answer = planned(capsys, *arguments)
    figures = answer["transformers"]["transformer"]
    assert code == 2 and figures["fits"] and figures["fits_host"] is False
    assert figures["memory"]["host_of_node"] == 12 * figures["parameters"]
    (problem,) = answer["problems"]
    assert "needs 15.9 GiB of host memory on each node, for each of 8 processes 2.0 GiB" in problem
    assert "memory_gib of the cluster is 10; use" in problem
    assert "train.checkpoint.asynchronous=false" in problem

    off = "train.checkpoint.asynchronous=false"
    for way in ([off], ["train.steps=500", "train.checkpoint.every_steps=500"]):
        assert planned(capsys, *arguments, *way)[0] == 0
    enough = cluster(tmp_path, "device: H100-80GB\nmemory_gib: 100\n")
    assert run(["plan", arguments[0], "--cluster", enough, "parallel.shard=8"]) == 0
    text = capsys.readouterr().out
    assert "15.9 GiB of each node: for each process 2.0 GiB, all of it copies of check" in text


def test_offload_is_proposed_where_the_host_has_room_for_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tight = cluster(tmp_path, "device: H100-80GB\nmemory_gib: 256\n")
    _, answer = planned(capsys, str(WAN_14B), "--cluster", tight, "parallel.processes=2")
    offloaded = "parallel.cpu_offload=true train.checkpoint.asynchronous=false:"
    assert f"use parallel.replicate=1 parallel.shard=2 {offloaded}" in answer["problems"][0]
    none = cluster(tmp_path, "device: H100-80GB\nmemory_gib: 100\n")
    _, answer = planned(capsys, str(WAN_14B), "--cluster", none, "parallel.processes=2")
    assert "cpu_offload" not in answer["problems"][0] and "on 4 GPUs:" in answer["problems"][0]


@pytest.mark.parametrize(("processes", "smallest"), [(8, "A100-80GB"), (2, "B200")])
def test_an_unknown_gpu_leaves_the_layout_open(
    processes: int, smallest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, answer = planned(capsys, str(WAN_14B), f"parallel.processes={processes}")
    figures = answer["transformers"]["transformer"]
    assert (code, figures["fits"], figures["smallest_device"]) == (0, None, smallest)
    assert f"DDP or FSDP, as the GPU allows; on {smallest} FSDP:" in figures["layout"]["reason"]


def test_the_smallest_gpu_has_the_layout_it_would_get(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "configs/recipes/wan2.1_t2v_1.3b_full.yaml")
    _, auto = planned(capsys, recipe, "--cluster", str(NODE))
    _, whole = planned(capsys, recipe, "--cluster", str(NODE), "parallel.shard=1")
    names = [a["transformers"]["transformer"]["smallest_device"] for a in (auto, whole)]
    assert names == ["RTX4090", "A100-40GB"]


def test_where_apex_fits_nowhere_adamw_is_tried(capsys: pytest.CaptureFixture[str]) -> None:
    kind = "train.optimizer.kind=apex_adamw"
    code, answer = planned(capsys, str(WAN_14B), "--cluster", str(NODE), kind)
    assert code == 2
    assert (
        "use train.optimizer.kind=adamw, for apex_adamw fits nowhere, with parallel.replicate=1 "
        "parallel.shard=8: weights"
    ) in answer["problems"][0]


def test_cpus_are_as_many_as_the_launcher_starts_and_nothing_is_judged(
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = (str(WAN_14B), "--cluster", str(NODE), "train.device=cpu")
    for more, count in (((), 1), (("parallel.processes=16",), 16)):
        code, answer = planned(capsys, *arguments, *more)
        figures = answer["transformers"]["transformer"]
        assert (code, answer["problems"], answer["notes"]) == (0, [], [])
        assert (answer["machine"]["processes"], answer["machine"]["device"]) == (count, None)
        assert figures["fits"] is figures["fits_host"] is figures["smallest_device"] is None
    assert run(["plan", *arguments]) == 0
    text = capsys.readouterr().out
    assert "1 process, on CPUs, as train.device says" in text and "  fits" not in text


def test_numbers_that_do_not_divide_are_told_with_those_that_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides = ("parallel.shard=3", "parallel.sequence=16", "parallel.processes=9")
    code, answer = planned(capsys, str(WAN_14B), "--cluster", str(NODE), *overrides)
    assert code == 2
    assert len(answer["problems"]) == 2
    assert "parallel.processes=9: a node of the cluster has 8 GPUs" in answer["problems"][0]
    assert "parallel.sequence=16: does not divide the 9 processes" in answer["problems"][1]
    assert answer["transformers"]["transformer"]["memory"] is None
    assert answer["transformers"]["transformer"]["flops_per_step"] > 0


def test_both_experts_are_told_and_share_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(ROOT / "configs/recipes/wan2.2_t2v_a14b_full.yaml")
    _, both = planned(capsys, recipe, "--cluster", str(NODE))
    _, one = planned(capsys, recipe, "--cluster", str(NODE), "train.expert=low")
    assert list(both["transformers"]) == ["transformer", "transformer_2"]
    assert list(one["transformers"]) == ["transformer_2"]
    assert both["disk"]["checkpoints_bytes"] == 2 * one["disk"]["checkpoints_bytes"]
    memory = [figures["memory"] for figures in both["transformers"].values()]
    assert memory == [one["transformers"]["transformer_2"]["memory"]] * 2


def test_an_unknown_model_is_assumed_to_be_a_known_one(capsys: pytest.CaptureFixture[str]) -> None:
    _, answer = planned(capsys, str(WAN_14B), "model.path=somebody/some_finetune")
    assert answer["model"]["config"].startswith("assumed to be those of Wan-AI/Wan2.1-T2V-14B")


def test_a_folder_is_read_and_planned_clips_are_counted(tmp_path: Path) -> None:
    write_tiny(tmp_path / "model")
    config = tmp_path / "model/transformer/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": 5}))
    world = make_world(tmp_path, clips=5, heldout=1, model=tmp_path / "model")
    recipe = world.load()
    before = plan(recipe)
    assert before["model"]["config"] == "the folder model.path"
    tiny = plan(world.load(f"model.path={tmp_path}/tiny_other"))["transformers"]["transformer"]
    assert before["transformers"]["transformer"]["parameters"] > tiny["parameters"]
    assert before["data"]["clips"] is None and not before["data"]["measured"]

    preprocess(recipe, shards=None, manifest_only=True)
    only_planned = plan(recipe)["data"]
    assert (only_planned["clips"], only_planned["measured"]) == (5, False)
    assert only_planned["steps_per_epoch"] == 2.5
    assert only_planned["epochs"] == recipe.train.steps * 2 / 5

    preprocess(recipe, shards=None, manifest_only=False)
    data = plan(recipe)["data"]
    files = [path.stat().st_size for path in world.shards.glob("shard-*.parquet")]
    assert data["measured"] and data["bytes_per_clip"] == round(sum(files) / 6)
    assert data["clips"] == len(
        Samples(ShardStore(recipe.shards.path), split="train", columns=("vae_latent",))
    )


def test_a_wrong_folder_and_a_damaged_config_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tiny(tmp_path / "model", family="hunyuan-video")
    assert run(["plan", str(WAN_14B), f"model.path={tmp_path}/model"]) == 2
    assert "hunyuan-video" in capsys.readouterr().err

    write_tiny(tmp_path / "other")
    config = tmp_path / "other/transformer/config.json"
    tree = json.loads(config.read_text())
    del tree["ffn_dim"]
    config.write_text(json.dumps(tree))
    assert run(["plan", str(WAN_14B), f"model.path={tmp_path}/other"]) == 2
    assert "transformer/config.json has no ffn_dim" in capsys.readouterr().err


def test_a_cluster_belongs_to_plan(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["status", str(WAN_14B), "--cluster", str(NODE)]) == 2
    assert "--cluster belongs to plan" in capsys.readouterr().err


def test_people_read_the_same_figures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(WAN_14B), "--cluster", str(NODE)]) == 0
    text = capsys.readouterr().out
    for part in (
        "14,288,491,584 parameters",
        "32760 tokens, 512 of the text",
        "80.56 PFLOP a step, 53% of it attention; 107.4 PFLOP with what is computed again",
        "replicate 1 x shard 8",
        "if 35% of H100-80GB's peak is reached (an assumption)",
        "epoch       unknown until preprocess has planned the clips",
    ):
        assert part in text, text
