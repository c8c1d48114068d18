# SPDX-License-Identifier: Apache-2.0
"""Captions become the tokens that tokenizer.json says, whatever class a model names."""

import json
from pathlib import Path

import pytest
from diffusers import HunyuanVideoPipeline
from tokenizers import Tokenizer

from fastvideo.config.recipe import Model
from fastvideo.export_folder import name_tokenizers
from fastvideo.models.family import SamplerSettings
from fastvideo.models.hunyuan import HunyuanVideo
from fastvideo.models.parts import load_tokenizer
from fastvideo.models.tiny import write_tiny
from fastvideo.models.wan21 import Wan21

TEXTS = [
    "a red square moves right",
    "Ein Hügel, 3 Häuser — “Nacht” 🎥",
    "",
    "  two  spaces ",
    "日本",
]
SETTINGS = SamplerSettings(dtype="float32", device="cpu")


def name_class(folder: Path, name: str) -> None:
    """As the published repositories have it, in both places."""
    config = folder / "tokenizer/tokenizer_config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps({**content, "tokenizer_class": name}))
    index = folder / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "tokenizer": ["transformers", name]}))


@pytest.mark.parametrize(
    ("family", "name"), [("wan2.1", "T5TokenizerFast"), ("hunyuan-video", "LlamaTokenizerFast")]
)
def test_tokens_are_those_of_the_file(tmp_path: Path, family: str, name: str) -> None:
    folder = tmp_path / "model"
    write_tiny(folder, family=family)
    name_class(folder, name)
    written = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))
    model = Model.model_validate({"family": family, "path": str(folder)})
    kind = Wan21(model) if family == "wan2.1" else HunyuanVideo(model, guidance=1.0)
    pipeline = kind.load_pipeline(folder, settings=SETTINGS, transformers={})
    for tokenizer in (load_tokenizer(folder, "tokenizer"), pipeline.tokenizer):
        for text in TEXTS:
            assert tokenizer(text).input_ids == written.encode(text).ids, text


def test_an_export_has_these_tokens_in_diffusers_alone(tmp_path: Path) -> None:
    """The class that the base model names has not, with transformers 5."""
    folder = tmp_path / "model"
    write_tiny(folder, family="hunyuan-video")
    name_class(folder, "LlamaTokenizerFast")
    written = Tokenizer.from_file(str(folder / "tokenizer/tokenizer.json"))

    def same() -> list[bool]:
        tokenizer = HunyuanVideoPipeline.from_pretrained(folder).tokenizer
        assert tokenizer.padding_side == "right"
        return [tokenizer(text).input_ids == written.encode(text).ids for text in TEXTS]

    assert not all(same()), "if they are right now, name_tokenizers is needed no more"
    name_tokenizers(folder)
    assert all(same())


def test_a_tokenizer_without_the_file_is_loaded_by_its_class(tmp_path: Path) -> None:
    """CLIP's published ones have a vocabulary and merges only."""
    folder = tmp_path / "model"
    write_tiny(folder, family="hunyuan-video")
    whole = load_tokenizer(folder, "tokenizer_2")
    model = json.loads((folder / "tokenizer_2/tokenizer.json").read_text())["model"]
    (folder / "tokenizer_2/tokenizer.json").unlink()
    (folder / "tokenizer_2/vocab.json").write_text(json.dumps(model["vocab"]))
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "tokenizer_2/merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    found = load_tokenizer(folder, "tokenizer_2")
    assert type(found).__name__.startswith("CLIPTokenizer")
    assert found(TEXTS[0]).input_ids == whole(TEXTS[0]).input_ids
