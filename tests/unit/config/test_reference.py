# SPDX-License-Identifier: Apache-2.0
"""Tests of the files that are generated from the config models."""

import json
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, PositiveInt

from fastvideo.config import reference
from fastvideo.config.spec import Spec

ROOT = Path(__file__).parents[3]


class Lora(Spec):
    """Train low-rank adapters."""

    kind: Literal["lora"] = "lora"
    """What trains."""
    rank: PositiveInt = 32
    """Rank; `a | b` is
    no end of a cell."""


class Full(Spec):
    """Update every weight."""

    kind: Literal["full"] = "full"
    """What trains."""


class Toy(Spec):
    """A toy."""

    method: Annotated[Full | Lora, Field(discriminator="kind")] = Full()
    """How to train."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Two of them."""
    name: str | None = None
    """A name."""
    size: int = Field(ge=0, lt=8)
    """A size."""


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CONFIGS", {"toy": Toy})


def test_a_row_says_path_type_limits_default_and_meaning(toy: None) -> None:
    page = reference.generated()["docs/config.md"].splitlines()
    assert "| `method` | [table](#method) | its own | How to train. |" in page
    assert "| `betas` | list of 2 × float | `[0.9, 0.999]` | Two of them. |" in page
    assert "| `name` | text or empty | empty | A name. |" in page
    assert "| `size` | int ≥ 0, < 8 | required | A size. |" in page
    assert r"| `method.rank` | int > 0 | `32` | Rank; `a \| b` is no end of a cell. |" in page


def test_each_alternative_of_a_table_has_a_section(toy: None) -> None:
    page = reference.generated()["docs/config.md"]
    assert page.count("### `method`") == 2
    assert "`kind: lora`. Train low-rank adapters." in page
    assert "`kind: full`. Update every weight." in page


def test_an_undocumented_option_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Spec):
        """Says nothing about its option."""

        option: int = 0

    monkeypatch.setattr(reference, "CONFIGS", {"silent": Silent})
    with pytest.raises(KeyError, match="description"):
        reference.generated()


def test_the_schemas_describe_the_shipped_configs() -> None:
    schema = json.loads(reference.generated()["configs/schema/recipe.schema.json"])
    assert schema["additionalProperties"] is False
    assert {"model", "clip", "train"} <= schema["properties"].keys()


def test_what_was_written_is_current_and_what_was_changed_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert reference.main(["--root", str(tmp_path)]) == 0
    assert reference.main(["--root", str(tmp_path), "--check"]) == 0

    (tmp_path / "docs/config.md").write_text("edited by hand\n")
    (tmp_path / "configs/schema/cluster.schema.json").unlink()
    assert reference.main(["--root", str(tmp_path), "--check"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "configs/schema/cluster.schema.json: is stale; run make format",
        "docs/config.md: is stale; run make format",
    ]


def test_a_config_that_does_not_load_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference.write(tmp_path)
    broken = tmp_path / "configs/clusters/broken.yaml"
    broken.parent.mkdir()
    broken.write_text("executor: slurn\n")
    assert reference.main(["--root", str(tmp_path), "--check"]) == 1
    assert f"{broken}: executor:" in capsys.readouterr().err


def test_every_shipped_config_loads() -> None:
    assert list(reference.broken_configs(ROOT)) == []
