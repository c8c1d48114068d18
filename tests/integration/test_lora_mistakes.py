# SPDX-License-Identifier: Apache-2.0
"""``fastvideo lora``: mistakes and damage are named, and leave nothing behind."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvideo.cli import run
from fastvideo.errors import UserError
from fastvideo.models.lora_file import Adapter, write_lora
from fastvideo.models.lora_pair import Pair as LoraPair
from fastvideo.models.lora_pair import is_finite
from fastvideo.models.tiny import write_tiny
from fastvideo.models.weights import NAME
from tests.lora_files import random_adapter
from tests.tiny_world import WAN21, Pair

A14B, HUNYUAN = Pair("wan2.2-a14b"), Pair("hunyuan-video")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of some tiny models, by their names."""
    root = tmp_path_factory.mktemp("models")
    for pair in (WAN21, A14B, HUNYUAN):
        write_tiny(root / str(pair), family=pair.family, task=pair.task)
    return root


MISTAKES = {
    "merge --base {base} --lora {root}/none.safetensors {root}/out": "there is no such file or",
    "merge --base {base} --lora {root} {root}/out": "holds no pytorch_lora_weights.safetensors and",
    "merge --base {root}/none --lora {lora} {root}/out": "--base {root}/none: there is no such",
    "merge --base {base} --lora {lora} {root}": "{root}: exists; remove it",
    "merge --base {base} --lora transformer_2={lora} {root}/out": "transformer_2 is none of this",
    "merge --base {base} --lora {lora}:inf {root}/out": "the scale inf is not finite",
    "merge --base {a14b} --lora {lora} {root}/out": "does not say for which it is, transformer and",
    "merge --base {hunyuan} --lora {lora} {root}/out": "there is no projection blocks.0.attn1",
    "extract --base {base} --tuned {base} {root}/out": "are those of --base; nothing to do",
    "extract --base {base} --tuned {hunyuan} {root}/out": "is a hunyuan-video model",
    "extract --base {base} --tuned {other} {root}/out": "differs from that of --base in eps",
    "convert {lora} {root}/out --to comfyui": "ends in .safetensors",
    "convert {lora} {lora} --to comfyui": "exists; remove it or choose",
    "convert {foreign} {root}/x.safetensors --to diffusers": "a is no projection of Wan or Hunyuan",
    "convert {vae} {root}/x.safetensors --to comfyui": "is no part of a LoRA",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_mistakes_are_named_and_leave_nothing(
    models: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = models / str(WAN21)
    other = Path(shutil.copytree(base, tmp_path / "other"))
    config = json.loads((other / "transformer/config.json").read_text())
    (other / "transformer/config.json").write_text(json.dumps({**config, "eps": 1e-5}))
    write_lora(tmp_path / "lora.safetensors", random_adapter(WAN21))
    foreign = {f"a.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(foreign, tmp_path / "foreign.safetensors")
    places = {
        "base": base,
        "a14b": models / str(A14B),
        "hunyuan": models / "hunyuan-video-t2v",
        "other": other,
        "root": tmp_path,
        "lora": tmp_path / "lora.safetensors",
        "foreign": tmp_path / "foreign.safetensors",
        "vae": base / "vae" / NAME,
    }
    before = sorted(tmp_path.rglob("*"))
    assert run(["lora", *command.format(**places).split()]) == 2
    assert re.search(re.escape(MISTAKES[command].format(**places)), capsys.readouterr().err)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("verb", ["merge", "convert"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_lora_that_is_not_finite_is_refused(
    models: Path, tmp_path: Path, verb: str, number: float, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    write_lora(file, random_adapter(WAN21))
    tensors, key = load_file(file), "transformer.blocks.1.attn2.to_v.lora_B.weight"
    tensors[key][3, 2] = number
    save_file(tensors, file)
    options = {
        "merge": ["--base", str(models / str(WAN21)), "--lora", str(file)],
        "convert": [str(file), "--to", "comfyui"],
    }
    assert run(["lora", verb, *options[verb], str(out)]) == 2
    assert f"{file}: {key} is not finite" in capsys.readouterr().err
    assert not out.exists()


def test_numbers_too_large_for_a_dtype_are_refused(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """65504 is the largest of float16; a damaged base is not put down to the LoRA."""
    assert [is_finite(torch.tensor([n]).to(torch.float8_e5m2)) for n in (1.0, 1e9)] == [True, False]
    base, out, file = models / str(WAN21), tmp_path / "out", tmp_path / "x.safetensors"
    large = random_adapter(WAN21, only=lambda name: name == "blocks.0.attn1.to_q")
    write_lora(file, large)
    half = ["--lora", f"{file}:1e7", "--dtype", "float16", str(out)]
    assert run(["lora", "merge", "--base", str(base), *half]) == 2
    said = capsys.readouterr().err
    assert f"{base}/transformer: blocks.0.attn1.to_q.weight is too large for float16" in said
    damaged = Path(shutil.copytree(base, tmp_path / "damaged"))
    tensors = load_file(damaged / "transformer" / NAME)
    tensors["proj_out.weight"][0, 0] = float("nan")
    save_file(tensors, damaged / "transformer" / NAME)
    assert run(["lora", "merge", "--base", str(damaged), "--lora", str(file), str(out)]) == 2
    assert "proj_out.weight is not finite; the model is damaged" in capsys.readouterr().err
    assert not out.exists()
    half_pairs = {
        name: LoraPair(pair.down.half(), (pair.up * 1e8).half(), pair.alpha)
        for name, pair in large.pairs().items()
    }
    with pytest.raises(
        UserError, match=r"y.safetensors: .*to_q.lora_B.weight is not finite in float16"
    ):
        write_lora(tmp_path / "y.safetensors", Adapter.of(half_pairs))


@pytest.mark.parametrize(
    ("width", "family", "name"),
    [
        (3072, None, "final_layer.linear"),
        (5120, None, "head.head"),
        (1536, None, "head.head"),
        (128, "hunyuan-video", "final_layer.linear"),
        (128, "wan2.2-a14b", "head.head"),
    ],
)
def test_a_name_that_both_models_have_is_told_by_its_shapes(
    tmp_path: Path, width: int, family: str | None, name: str
) -> None:
    """Or by the option."""
    file, out = tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    only = LoraPair(torch.ones(2, width), torch.ones(64, 2), 2.0)
    write_lora(file, Adapter.of({"proj_out": only}))
    more = ["--family", family] if family else []
    assert run(["lora", "convert", str(file), str(out), "--to", "comfyui", *more]) == 0
    assert {key.split(".lora_")[0].split(".alpha")[0] for key in load_file(out)} == {
        f"diffusion_model.{name}"
    }


def test_a_family_that_cannot_be_told_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Names of diffusers need none; a wrong one is not ignored."""
    file, out = str(tmp_path / "x.safetensors"), str(tmp_path / "y.safetensors")
    only = LoraPair(torch.ones(2, 128), torch.ones(64, 2), 2.0)
    write_lora(Path(file), Adapter.of({"proj_out": only}))
    assert run(["lora", "convert", file, out, "--to", "comfyui"]) == 2
    assert "may be those of wan2.1 or hunyuan-video" in capsys.readouterr().err
    write_lora(Path(file), random_adapter(WAN21))
    for to in ("comfyui", "diffusers"):
        wrong = ["--to", to, "--family", "hunyuan-video"]
        assert run(["lora", "convert", file, out, *wrong]) == 2
        assert "is no projection of hunyuan-video" in capsys.readouterr().err
    assert run(["lora", "convert", file, out, "--to", "diffusers"]) == 0


def test_options_that_make_no_sense_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--rank", "0"], ["--energy", "1.5"], ["--rank", "2", "--energy", "0.5"]):
        with pytest.raises(SystemExit, match="2"):
            run(["lora", "extract", "--base", "a", "--tuned", "b", *options, "out"])
    assert run(["--json", "lora", "x"]) == 2
    assert "fastvideo lora --help" in capsys.readouterr().err


def test_a_stopped_verb_does_not_promise_to_continue(tmp_path: Path) -> None:
    """Stopped while it waits for a pipe that says nothing."""
    pipe, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    os.mkfifo(pipe)
    options = ["lora", "convert", str(pipe), str(out), "--to", "comfyui"]
    command = [sys.executable, "-m", "fastvideo", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child, open(pipe, "wb"):
        child.terminate()
        assert child.stderr is not None
        said = child.stderr.read()
    assert child.returncode == 75
    assert "stopped by SIGTERM; a LoRA verb writes all or nothing, the same command begins" in said
    assert not out.exists()
