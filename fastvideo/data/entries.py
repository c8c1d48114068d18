# SPDX-License-Identifier: Apache-2.0
"""Reads a JSON list, or a JSON object per line; every mistake is told with its line."""

import json
import re
from collections.abc import Iterator
from typing import Any

from fastvideo.data.items import short
from fastvideo.errors import UserError


def parse_entries(data: bytes, *, file: str, example: str, one: bool = False) -> list[Any]:
    """Return the entries of a JSON list, or of lines with an object each.

    Args:
        data: Content of the file.
        file: Its name, for the message.
        example: What to write, for the message.
        one: Whether a single object is an entry, rather than a list without its brackets.

    Raises:
        UserError: It is neither, with the line at fault.
    """
    if data.startswith(b"\xef\xbb\xbf"):
        raise UserError(f"{file}: line 1: starts with a byte order mark; save as plain UTF-8")
    text = decoded(data, file=file)
    return list(_parse(text, file=file, example=example, one=one))


def decoded(data: bytes, *, file: str, encoding: str = "utf-8") -> str:
    """The text of a file in a form of UTF-8; a ``UserError`` names the line that is not."""
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = data[error.start]
        raise UserError(
            f"{file}: line {line}: byte {byte:#x} is not UTF-8; save as UTF-8"
        ) from None


def _parse(text: str, *, file: str, example: str, one: bool) -> Iterator[Any]:
    """Yield the items of a JSON list, or of lines with an object each."""
    start = text.lstrip()[:1]
    if start == "{":
        yield from _parse_lines(text, file=file, one=one)
    elif start in ("[", ""):
        yield from _loads(text, file=file, line=1) if start else ()
    else:
        first = text.lstrip().splitlines()[0]
        line = text[: len(text) - len(text.lstrip())].count("\n") + 1
        raise UserError(
            f"{file}: line {line}: {short(first)} is neither a JSON list nor a JSON object; write "
            f"{example}"
        )


def _parse_lines(text: str, *, file: str, one: bool) -> Iterator[Any]:
    try:
        entry = json.loads(text)
    except ValueError:
        pass
    else:
        if one:
            yield entry
            return
        raise UserError(f"{file}: line 1: is one object, not a list; put [ and ] around it")
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _loads(line, file=file, line=number)


def _loads(text: str, *, file: str, line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = line + error.lineno - 1
        # Python points at the bracket, from 3.13 on at the comma before it.
        dangling = re.search(r",\s*[]}]\Z", text[: error.pos + 1]) or re.match(
            r",\s*[]}]", text[error.pos :]
        )
        fix = "remove the comma before the closing bracket" if dangling else error.msg
        where = f"line {at}, column {error.colno}"
        raise UserError(f"{file}: {where}: is not valid JSON: {fix}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: line {line}: cannot be read as JSON: {error}") from None
