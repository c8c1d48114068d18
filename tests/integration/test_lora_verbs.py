# SPDX-License-Identifier: Apache-2.0
"""``fastvideo lora``: merged, fused and extracted weights agree."""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastvideo.cli import run
from fastvideo.lora.extract import Extraction, decompose, extract
from fastvideo.lora.merge import merge
from fastvideo.models.lora_file import Adapter, read_lora, write_comfyui, write_lora
from fastvideo.models.tiny import write_tiny
from fastvideo.models.weights import NAME
from fastvideo.state import LORA_FILES
from tests.lora_files import in_blocks, load, random_adapter, same, sample
from tests.tiny_world import PAIRS, WAN21, Pair, digests, in_fork, passes

A14B = Pair("wan2.2-a14b")
TOLERANCE = 1e-5
"""Of the norm of a change: float32, other orders of summation, and singular values."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of every tiny model, by its name."""
    root = tmp_path_factory.mktemp("models")
    for pair in PAIRS:
        write_tiny(root / str(pair), family=pair.family, task=pair.task)
    return root


def small(pair: Pair, **how: Any) -> Adapter:
    """An adapter that changes weights as much as a finetune does."""
    adapter = random_adapter(pair, **how)
    return Adapter({n: t * 0.05 for n, t in adapter.tensors.items()}, adapter.rank, adapter.alpha)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / NAME)


def apart(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], base: Mapping[str, Tensor]
) -> float:
    """The largest difference of a tensor, by the norm of its change from the base."""
    assert one.keys() == other.keys() == base.keys()
    return max(
        float((one[n].double() - other[n].double()).norm())
        / max(float((other[n].double() - base[n].double()).norm()), 1e-6)
        for n in one
    )


def fused(
    folder: Path, loras: Mapping[str, tuple[Path, float]], transformer: str
) -> dict[str, Tensor]:
    """The weights as diffusers fuses them."""
    import diffusers

    kind = "HunyuanVideoTransformer3DModel" if "hunyuan" in folder.name else "WanTransformer3DModel"
    model = getattr(diffusers, kind).from_pretrained(folder / transformer)
    for name, (file, _) in loras.items():
        metadata = diffusers.loaders.lora_base._load_sft_state_dict_metadata(str(file))
        model.load_lora_adapter(load_file(file), adapter_name=name, metadata=metadata)
    model.set_adapters(list(loras), [scale for _, scale in loras.values()])
    model.fuse_lora(adapter_names=list(loras))
    model.unload_lora()
    found: dict[str, Tensor] = model.state_dict()
    return found


# ---------------------------------------------------------------- merge


@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_merged_weights_are_what_diffusers_fuses(models: Path, tmp_path: Path, pair: Pair) -> None:
    """Two LoRAs with scales, biases too."""
    base, out = models / str(pair), tmp_path / "merged"
    files = [tmp_path / "one.safetensors", tmp_path / "other.safetensors"]
    write_lora(files[0], small(pair, rank=4, alpha=6.0, biases=True))
    write_lora(files[1], small(pair, rank=2, alpha=2.0, seed=1))
    name = "transformer_2" if "a14b" in pair.family else "transformer"
    merge(str(base), [f"{name}={files[0]}:0.7", f"{name}={files[1]}:-1.5"], out)
    expected = fused(base, {"a": (files[0], 0.7), "b": (files[1], -1.5)}, name)
    found, before = weights(out / name), weights(base / name)
    assert apart(found, expected, before) < TOLERANCE
    changed = [n for n in before if not torch.equal(before[n], found[n])]
    assert len(changed) == 2 * len(random_adapter(pair).pairs())
    assert all(found[n].dtype == before[n].dtype for n in found)
    if name == "transformer_2":
        assert os.path.samefile(out / "transformer" / NAME, base / "transformer" / NAME)


def test_a_merged_pipeline_gives_what_the_adapter_gives(models: Path, tmp_path: Path) -> None:
    """Latents after two steps, relative to the largest, float32."""
    base, folder = models / str(A14B), tmp_path / "loras"
    for number, (name, file) in enumerate(LORA_FILES.items()):
        write_lora(folder / file, small(A14B, seed=number))
        assert name in ("transformer", "transformer_2")
    merge(str(base), [str(folder)], tmp_path / "merged")
    pipe = load(A14B, base)
    pipe.load_lora_weights(folder, adapter_name="x")
    file = LORA_FILES["transformer_2"]
    pipe.load_lora_weights(folder, weight_name=file, adapter_name="x", load_into_transformer_2=True)
    expected, found = sample(pipe, A14B), sample(load(A14B, tmp_path / "merged"), A14B)
    assert float((expected - found).abs().max() / expected.abs().max()) < TOLERANCE
    assert not torch.equal(found, sample(load(A14B, base), A14B))


def test_untouched_weights_are_links_or_copies_and_the_card_names_the_loras(
    models: Path, tmp_path: Path
) -> None:
    base = models / str(WAN21)
    write_lora(tmp_path / "x.safetensors", small(WAN21))
    merge(str(base), [f"{tmp_path / 'x.safetensors'}:0.5"], tmp_path / "linked")
    merge(str(base), [f"{tmp_path / 'x.safetensors'}:0.5"], tmp_path / "copied", link=False)
    vae = f"vae/{NAME}"
    assert os.path.samefile(tmp_path / "linked" / vae, base / vae)
    assert not os.path.samefile(tmp_path / "copied" / vae, base / vae)
    card = (tmp_path / "linked/README.md").read_text()
    assert "| `transformer` | x.safetensors | 0.5 |" in card
    assert str(tmp_path) not in card.split("added by")[1], "no private path"


def test_merged_weights_may_have_another_dtype(models: Path, tmp_path: Path) -> None:
    """Parts that diffusers keeps in float32 stay so."""
    import diffusers

    write_lora(tmp_path / "x.safetensors", small(WAN21))
    merge(str(models / str(WAN21)), [str(tmp_path / "x.safetensors")], tmp_path / "full")
    merge(
        str(models / str(WAN21)),
        [str(tmp_path / "x.safetensors")],
        tmp_path / "half",
        dtype="bfloat16",
    )
    kind = diffusers.WanTransformer3DModel
    full = kind.from_pretrained(tmp_path / "full/transformer", torch_dtype=torch.bfloat16)
    assert same(weights(tmp_path / "half/transformer"), full.state_dict())


# ---------------------------------------------------------------- extract


@pytest.mark.parametrize("pair", [WAN21, Pair(task="i2v"), Pair("hunyuan-video")], ids=str)
def test_a_change_of_low_rank_is_extracted_whole(models: Path, tmp_path: Path, pair: Pair) -> None:
    base, tuned = models / str(pair), tmp_path / "tuned"
    adapter = small(pair, rank=4, biases=True)
    write_lora(tmp_path / "x.safetensors", adapter)
    merge(str(base), [str(tmp_path / "x.safetensors")], tuned)
    how = Extraction(rank=4, biases=True)
    report = extract(str(base), str(tuned), tmp_path / "loras", how=how)["transformers"]
    assert report.keys() == {"transformer"}
    assert report["transformer"]["kept"] > 1 - 1e-9 and report["transformer"]["left_out"] == {}
    merge(str(base), [str(tmp_path / "loras")], tmp_path / "again")
    parts = [weights(folder / "transformer") for folder in (tmp_path / "again", tuned, base)]
    assert apart(*parts) < TOLERANCE
    found, wanted = (
        read_lora(tmp_path / "loras" / LORA_FILES["transformer"]).pairs(),
        adapter.pairs(),
    )
    for name in wanted:
        one, other = found[name].change("weight"), wanted[name].change("weight")
        assert one is not None and other is not None
        assert float((one - other).norm() / other.norm()) < TOLERANCE, name


def test_both_experts_are_extracted(models: Path, tmp_path: Path) -> None:
    base = models / str(A14B)
    for number, file in enumerate(LORA_FILES.values()):
        write_lora(tmp_path / "given" / file, small(A14B, seed=number, only=in_blocks))
    merge(str(base), [str(tmp_path / "given")], tmp_path / "tuned")
    extract(str(base), str(tmp_path / "tuned"), tmp_path / "found", how=Extraction(rank=4))
    for file in LORA_FILES.values():
        given, found = (read_lora(tmp_path / d / file).pairs() for d in ("given", "found"))
        assert given.keys() == found.keys()
        for name in given:
            one, other = given[name].change("weight"), found[name].change("weight")
            assert one is not None and other is not None
            assert float((one - other).norm() / one.norm()) < TOLERANCE


def test_what_no_lora_can_hold_is_told(
    models: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """And a transformer of which only that changed has no file."""
    base, tuned = models / str(WAN21), tmp_path / "tuned"
    shutil.copytree(base, tuned)
    tensors = weights(tuned / "transformer")
    torch.manual_seed(0)
    changed = ("blocks.0.attn1.to_q.weight", "blocks.0.norm2.weight", "proj_out.bias")
    for name in changed:
        tensors[name] = tensors[name] + torch.randn_like(tensors[name]) * 0.01
    save_file(tensors, tuned / "transformer" / NAME)
    done = extract(str(base), str(tuned), tmp_path / "loras", how=Extraction(rank=8))
    report = done["transformers"]["transformer"]
    assert set(report["left_out"]) == {"blocks.0.norm2.weight", "proj_out.bias"}
    assert report["worst"] == "blocks.0.attn1.to_q" and 0 < report["kept"] < 0.5
    assert report["kept_of_all"] < report["kept"]
    share = report["kept"]
    assert "2 tensors changed that are no matrices" in caplog.text
    with_bias = Extraction(rank=8, biases=True)
    report = extract(str(base), str(tuned), tmp_path / "more", how=with_bias)["transformers"]
    assert set(report["transformer"]["left_out"]) == {"blocks.0.norm2.weight"}
    bias = read_lora(tmp_path / "more" / LORA_FILES["transformer"]).tensors["proj_out.lora_B.bias"]
    change = tensors["proj_out.bias"] - weights(base / "transformer")["proj_out.bias"]
    assert torch.equal(bias, change)
    squares = {
        name: float((tensors[name] - before).double().square().sum())
        for name, before in weights(base / "transformer").items()
    }
    weight, norm, bias_too = (squares.pop(name) for name in changed)
    assert not any(squares.values())
    kept = share * weight + bias_too
    assert report["transformer"]["kept"] == pytest.approx(kept / (weight + bias_too))
    assert report["transformer"]["kept_of_all"] == pytest.approx(kept / (weight + bias_too + norm))


def test_the_share_that_is_kept_is_that_of_the_nearest_matrix() -> None:
    torch.manual_seed(0)
    change = torch.randn(30, 20)
    for rank in (1, 5, 20, 64):
        pair, share = decompose(change, how=Extraction(rank=rank))
        found = pair.change("weight")
        assert found is not None and pair.rank == min(rank, 20) and pair.scale == 1
        left = float((change - found).square().sum() / change.square().sum())
        assert abs(1 - left - share) < 1e-6
    pair, share = decompose(change, how=Extraction(energy=0.6))
    _, less = decompose(change, how=Extraction(rank=pair.rank - 1))
    assert less < 0.6 <= share


@pytest.mark.parametrize("shape", [(48, 40), (40, 48), (300, 200)])
def test_all_of_a_change_of_low_rank_needs_no_more_rank(shape: tuple[int, int]) -> None:
    """The other singular values are rounding; those of a change of full rank are not."""
    for seed in range(5):
        draw = torch.Generator().manual_seed(seed)
        up, down = (torch.randn(size, 4, generator=draw) for size in shape)
        pair, share = decompose(up @ down.T, how=Extraction(energy=1.0))
        assert (pair.rank, share) == (4, 1.0)
        pair, share = decompose(torch.randn(shape, generator=draw), how=Extraction(energy=1.0))
        assert (pair.rank, share) == (min(shape), 1.0)
    pair, share = decompose(torch.eye(10), how=Extraction(energy=0.3))
    assert pair.rank == 3 and share == pytest.approx(0.3)


def test_a_kill_at_any_moment_leaves_nothing_or_all_of_it(models: Path, tmp_path: Path) -> None:
    base, out = str(models / str(WAN21)), tmp_path / "out/loras"
    write_lora(tmp_path / "x.safetensors", small(WAN21, only=in_blocks))
    merge(base, [str(tmp_path / "x.safetensors")], tmp_path / "tuned")

    def again() -> None:
        extract(base, str(tmp_path / "tuned"), out, how=Extraction(rank=4))

    assert in_fork(again, fault_log=tmp_path / "points") == 0
    whole = digests(out.parent, "**/*", "**/.*")
    points = passes(tmp_path / "points")
    assert len(points) > 6
    for point in points:
        shutil.rmtree(out)
        assert in_fork(again, fault=point) == -9, point
        if out.exists():
            assert digests(out.parent, "**/*", "**/.*") == whole
        else:
            assert in_fork(again) == 0
        assert digests(out.parent, "**/*", "**/.*") == whole, "and leftovers are swept"


# ---------------------------------------------------------------- convert, command line


def test_converted_there_and_back_is_the_same_file(tmp_path: Path) -> None:
    for pair in (Pair(task="i2v"), Pair("hunyuan-video")):
        names = [tmp_path / f"{pair}-{n}.safetensors" for n in ("a", "b", "c")]
        write_lora(names[0], random_adapter(pair), about={"license": "apache-2.0"})
        given, middle, again = map(str, names)
        assert run(["lora", "convert", given, middle, "--to", "comfyui"]) == 0
        assert run(["lora", "convert", middle, again, "--to", "diffusers"]) == 0
        assert all(key.startswith("diffusion_model.") for key in load_file(names[1]))
        assert names[0].read_bytes() == names[2].read_bytes()


def test_the_verbs_print_their_results_as_json(
    models: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, file = str(models / str(WAN21)), str(tmp_path / "x.safetensors")
    write_comfyui(tmp_path / "x.safetensors", small(WAN21, only=in_blocks), family="wan2.1")
    out = [str(tmp_path / "merged"), str(tmp_path / "loras")]
    assert run(["lora", "merge", "--base", base, "--lora", file, "--json", out[0]]) == 0
    command = ["--base", base, "--tuned", out[0], "--rank", "4", "--json", out[1]]
    assert run(["lora", "extract", *command]) == 0
    merged, extracted = map(json.loads, capsys.readouterr().out.splitlines())
    assert merged["loras"]["transformer"][0]["scale"] == 1
    assert extracted["transformers"]["transformer"]["modules"] == 2 * 10
