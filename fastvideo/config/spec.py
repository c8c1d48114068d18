# SPDX-License-Identifier: Apache-2.0
"""The base of every config: strict, frozen, documented by its fields, read from YAML."""

import difflib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from fastvideo.errors import UserError


class Spec(BaseModel):
    """A table of a config: unknown keys and wrong types are errors, values never change."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
    )

    @classmethod
    def load(cls, path: Path, overrides: Iterable[str] = ()) -> Self:
        """Read YAML at ``path``, apply ``key.path=value`` overrides and validate.

        Raises:
            UserError: One line per mistake: file, key path, value and what would be right.
        """
        tree = _read_yaml(path)
        _check_plain(tree, origin=str(path))
        for override in overrides:
            _assign(tree, override)
            _check_plain(tree, origin=f"override {_short(override)}")
        return cls.parse(tree, origin=str(path))

    @classmethod
    def parse(cls, tree: dict[str, Any], *, origin: str) -> Self:
        """Validate plain values; ``origin`` names their source in errors."""
        try:
            # JSON mode is strict about types and still reads a path or a tuple from YAML's text
            # and lists.
            return cls.model_validate_json(json.dumps(tree))
        except ValidationError as error:
            lines = [_explain(cls, item, tree) for item in error.errors(include_url=False)]
            raise UserError("\n".join(f"{origin}: {line}" for line in lines)) from None

    def dump(self) -> str:
        """Return the fully resolved config as YAML; ``load`` reads it back equal."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(yaml.SafeLoader):
    """YAML in which 5e-5 is a number, a date is text and a repeated key is an error."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def _mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[str] = set()
    for key, _ in node.value:
        name = str(key.value)
        if name in seen:
            raise yaml.MarkedYAMLError(
                problem=f"key {name!r} is written twice; keep one", problem_mark=key.start_mark
            )
        seen.add(name)
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_yaml_text(text: str) -> Any:
    """Parse YAML as configs are parsed; raises ``yaml.YAMLError``."""
    return yaml.load(text, Loader=_Loader)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = read_yaml_text(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; check the path") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error.reason}); save it as UTF-8") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid YAML: {_yaml_problem(error)}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: holds {type(tree).__name__}, not a table of keys; see configs/")
    return tree


def _check_plain(tree: dict[str, Any], *, origin: str) -> None:
    try:
        json.dumps(tree)
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{origin}: holds a value that configs do not know: {error}") from None


def _yaml_problem(error: Exception) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)


def _assign(tree: dict[str, Any], override: str) -> None:
    """Set one ``key.path=value``; changing ``kind`` starts that table afresh."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(f"override {override!r} is not key.path=value, e.g. train.steps=200")
    try:
        value = read_yaml_text(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        problem = _yaml_problem(error)
        raise UserError(f"override {_short(override)}: not a YAML value: {problem}") from None
    *parents, leaf = key.split(".")
    table = tree
    for depth, parent in enumerate(parents):
        if table.get(parent) is None:
            table[parent] = {}
        table = table[parent]
        if not isinstance(table, dict):
            at = ".".join(parents[: depth + 1])
            raise UserError(f"override {override!r}: {at} is {table!r}, which has no keys in it")
    if leaf == "kind" and table.get("kind") != value:
        table.clear()
    table[leaf] = value


def _explain(root: type[BaseModel], item: Any, tree: Any) -> str:
    """Turn one pydantic error into ``key: value: reason; fix``."""
    path = _without_tags(item["loc"], tree)
    key = ".".join(map(str, path))
    if item["type"] == "extra_forbidden":
        known = _keys_at(root, path[:-1], tree)
        close = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.6)
        hint = f"did you mean {close[0]}?" if close else f"known keys here: {', '.join(known)}"
        return f"{key}: unknown key (value {item['input']!r}); {hint}"
    if item["type"] == "missing":
        return f"{key}: is missing; add it"
    if item["type"] == "value_error":
        # Our own validators: their text already names values and the fix.
        return f"{key}: {item['ctx']['error']}" if key else str(item["ctx"]["error"])
    if item["type"].startswith("union_tag"):
        return _explain_kind(key, item)
    reason = item["msg"][0].lower() + item["msg"][1:]
    close = difflib.get_close_matches(
        str(item["input"]), re.findall(r"'([^']+)'", item["msg"]), n=1, cutoff=0.6
    )
    hint = f"; did you mean {close[0]}?" if close and "literal" in item["type"] else ""
    return f"{key}: {_short(item['input'])} is wrong: {reason}{hint}"


def _explain_kind(key: str, item: Any) -> str:
    """A table that says what it is by ``kind``, and does not, or says what is not known."""
    if item["type"] == "union_tag_not_found":
        return f"{key}.kind: is missing; add it"
    known = item["ctx"]["expected_tags"]
    close = difflib.get_close_matches(item["ctx"]["tag"], re.findall(r"'([^']+)'", known), n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{key}.kind: {item['ctx']['tag']!r} is wrong: write one of {known}{hint}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _without_tags(loc: tuple[Any, ...], tree: Any) -> list[Any]:
    """Drop the union tags that pydantic puts into an error's location."""
    path: list[Any] = []
    for part in loc:
        if isinstance(tree, dict) and part not in tree and part == tree.get("kind"):
            continue
        path.append(part)
        if isinstance(tree, dict):
            tree = tree.get(part)
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
    return path


def _keys_at(root: type[BaseModel], path: list[Any], tree: Any) -> list[str]:
    """Names of the fields of the table at ``path``, following union tags in ``tree``."""
    node: Any = root
    for part in path:
        tree = tree.get(part) if isinstance(tree, dict) else None
        field = getattr(node, "model_fields", {}).get(part)
        if field is None:
            return []
        node = _table_type(field.annotation, tree)
    return sorted(getattr(node, "model_fields", {}))


def _table_type(annotation: Any, tree: Any) -> Any:
    options = getattr(annotation, "__args__", (annotation,))
    tables = [t for t in options if isinstance(t, type) and issubclass(t, BaseModel)]
    kind = tree.get("kind") if isinstance(tree, dict) else None
    tagged = [
        t for t in tables if "kind" in t.model_fields and t.model_fields["kind"].default == kind
    ]
    return (tagged or tables or [annotation])[0]
