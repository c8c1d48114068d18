# SPDX-License-Identifier: Apache-2.0
"""Writes what the config models say: the JSON schemas that editors use and docs/config.md.

``python -m fastvideo.config.reference`` writes them; with ``--check`` it exits 1 and names each
file that is stale and each file under configs/ that does not load.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastvideo.config.cluster import Cluster
from fastvideo.config.prompts import Prompt
from fastvideo.config.recipe import Recipe
from fastvideo.config.spec import Spec
from fastvideo.errors import UserError

CONFIGS: dict[str, type[Spec]] = {"recipe": Recipe, "cluster": Cluster}

_INTRODUCTION = """\
# Configuration

<!-- Written by `make format` from fastvideo/config/; edit the docstrings there. -->

A recipe says what to train, a cluster says where. Every key below can be set in the YAML file or on
the command line as `key.path=value`. An unknown key or a wrong type is an error.
"""

_LIMITS = {
    "minimum": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "exclusiveMaximum": "< {}",
    "minLength": "at least {} characters",
    "maxLength": "at most {} characters",
    "minItems": "at least {} items",
    "maxItems": "at most {} items",
    "pattern": "matches `{}`",
}
_TYPES = {
    "string": "text",
    "path": "path",
    "integer": "int",
    "number": "float",
    "boolean": "bool",
    "null": "empty",
}

Schema = dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    """Write the generated files, or check them and every config; return the exit status."""
    parser = argparse.ArgumentParser(prog="fastvideo.config.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, exit 1 if stale")
    parser.add_argument("--root", type=Path, default=Path(), help="root of the repository")
    args = parser.parse_args(argv)
    if not args.check:
        write(args.root)
        return 0
    problems = [*stale(args.root), *broken_configs(args.root)]
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


def generated() -> dict[str, str]:
    """Text of every generated file, by its path below the root of the repository."""
    files = {}
    pages = [_INTRODUCTION]
    for name, spec in CONFIGS.items():
        schema = json_schema(spec)
        text = json.dumps(schema, indent=2, ensure_ascii=False)
        files[f"configs/schema/{name}.schema.json"] = text + "\n"
        pages.append(_page(name, schema))
    pages.append(_page("prompt", json_schema(Prompt)))
    return files | {"docs/config.md": "\n".join(pages)}


def write(root: Path) -> None:
    """Write every generated file below ``root``."""
    for name, text in generated().items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def stale(root: Path) -> Iterator[str]:
    """Name each generated file that differs from what the models say."""
    for name, text in generated().items():
        path = root / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            yield f"{name}: is stale; run make format"


def broken_configs(root: Path) -> Iterator[str]:
    """Say what is wrong with each YAML file in configs/ that does not load."""
    for name, spec in CONFIGS.items():
        for path in sorted((root / "configs" / f"{name}s").glob("*.yaml")):
            try:
                spec.load(path)
            except UserError as error:
                yield str(error)


def json_schema(spec: type[Spec]) -> Schema:
    """JSON schema of a config file (draft 2020-12), without pydantic's generated titles."""
    schema = spec.model_json_schema()
    for table in (schema, *schema.get("$defs", {}).values()):
        table.pop("title", None)
        for field in table.get("properties", {}).values():
            field.pop("title", None)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _page(name: str, schema: Schema) -> str:
    """One chapter: a section for each table, in the order of the keys."""
    lines = [f"## {name.capitalize()}", "", schema["description"], ""]
    for path, table in _tables("", schema, definitions=schema.get("$defs", {})):
        if path:
            lines += [f"### `{path}`", "", _kind(table) + _prose(table["description"]), ""]
        lines += ["| key | type | default | meaning |", "|---|---|---|---|"]
        required = table.get("required", [])
        for key, field in table.get("properties", {}).items():
            dotted = f"{path}.{key}" if path else key
            default = "required" if key in required else _default(field)
            meaning = _prose(field["description"])
            cells = (f"`{dotted}`", _type(field, at=dotted), default, meaning)
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def _tables(path: str, table: Schema, *, definitions: Schema) -> Iterator[tuple[str, Schema]]:
    """Yield ``table`` and every table below it, each with its key path."""
    yield path, table
    for key, field in table.get("properties", {}).items():
        for option in _options(field.get("items", field)):
            if "$ref" in option:
                child = definitions[option["$ref"].removeprefix("#/$defs/")]
                dotted = f"{path}.{key}" if path else key
                yield from _tables(dotted, child, definitions=definitions)


def _options(field: Schema) -> list[Schema]:
    """Alternatives of a field, itself if it has one type only."""
    options: list[Schema] = field.get("oneOf") or field.get("anyOf") or [field]
    return options


def _kind(table: Schema) -> str:
    kind = table.get("properties", {}).get("kind", {}).get("const")
    return f"`kind: {kind}`. " if kind else ""


def _type(field: Schema, *, at: str) -> str:
    """Type and limits of a field in words; ``at`` is its key path, for the link to its table."""
    names = [_type_of_one(option, at=at) for option in _options(field)]
    return " or ".join(dict.fromkeys(names))


def _type_of_one(option: Schema, *, at: str) -> str:
    if "$ref" in option:
        return f"[table](#{at.replace('.', '')})"
    if "const" in option or "enum" in option:
        return " or ".join(f"`{value}`" for value in option.get("enum", [option.get("const")]))
    if option["type"] == "array":
        items = option.get("prefixItems", [option.get("items")])
        size = f"{len(items)} × " if "prefixItems" in option else ""
        return f"list of {size}{_type(items[0], at=at)}"
    if option["type"] == "object":
        return f"table of {_type(option['additionalProperties'], at=at)}"
    name = _TYPES[option.get("format") or option["type"]]
    limits = [text.format(option[key]) for key, text in _LIMITS.items() if key in option]
    return f"{name} {', '.join(limits)}".strip()


def _default(field: Schema) -> str:
    value = field.get("default")
    if value is None:
        return "empty"
    if any("$ref" in option for option in _options(field)):
        return "its own"
    return f"`{value if isinstance(value, str) and value else json.dumps(value)}`"


def _prose(text: str) -> str:
    return " ".join(text.split())


if __name__ == "__main__":
    sys.exit(main())
