"""JSON, YAML and CSV that may come from outside, read with bounds: all readers ask here, so that one rule holds for every file.

A few bytes can ask for much: names that stand for names that stand for names, nesting that no reader returns from, a number of
a million digits. What is refused raises `TextError`, a ValueError, whose text says why and holds nothing of the file.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

LARGEST_JSON = 512 << 20
"""Bytes. The manifest of 400,000 samples."""
LARGEST_YAML = 1 << 20
"""Bytes. A configuration has some KB, and the parser reads some 100 KB/s."""
LARGEST_CSV = 256 << 20
"""Bytes."""
MOST_ITEMS = 10_000_000
"""Items of lists and objects in a JSON file: at most about 700 MB in memory."""
MOST_DEPTH = 64
MOST_NODES = 100_000
"""Nodes of a YAML file, where an alias counts as what it stands for."""
MOST_DIGITS = 300
"""Digits of a whole number. A float has at most 309."""
MOST_CELL = 1024
"""Characters of a cell."""


class TextError(ValueError):
    """Not a text of this kind, or one that no file of ours would have.

    Attributes:
        line: where, from 1; None if that is not known.
    """

    def __init__(self, why: str, line: int | None = None) -> None:
        super().__init__(why)
        self.line = line


def read(path: str | Path, largest: int = LARGEST_JSON) -> str:
    """A file's text, without the byte order mark that some editors put before it.

    Raises:
        OSError: it is not there, or cannot be read.
        TextError: not a plain file, larger than ``largest`` bytes, or not UTF-8.
    """
    # Not blocking: a pipe without a writer would hang.
    with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise TextError("not a plain file")
        data = file.read(largest + 1)
    if len(data) > largest:
        raise TextError(f"larger than {largest >> 20} MiB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise TextError("not UTF-8 text") from None


# --- JSON --------------------------------------------------------------------------------------------------------------


def read_json(path: str | Path) -> Any:
    """The value of a JSON file.

    Raises:
        OSError: it is not there, or cannot be read.
        TextError: not JSON, or beyond the bounds.
    """
    return parse_json(read(path))


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Pure.

    Raises:
        TextError: not JSON, more than `MOST_ITEMS` items, nested more than `MOST_DEPTH` deep, or with a whole number of more than
            `MOST_DIGITS` digits.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            raise TextError("not UTF-8 text") from None
    if text.count(",") + text.count("[") + text.count("{") > MOST_ITEMS:
        raise TextError(f"more than {MOST_ITEMS} items")
    try:
        value = json.loads(text, parse_int=_whole)  # noqa: TID251
    except json.JSONDecodeError as error:
        raise TextError(f"not JSON: {error.msg}, line {error.lineno}", error.lineno) from None
    except RecursionError:
        raise TextError(f"nested more than {MOST_DEPTH} deep") from None
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MOST_DEPTH):
        if not level:
            return value
        level = [
            item for outer in level for item in (outer.values() if isinstance(outer, dict) else outer) if isinstance(item, dict | list)
        ]
    if level:
        raise TextError(f"nested more than {MOST_DEPTH} deep")
    return value


def _whole(digits: str) -> int:
    if len(digits) > MOST_DIGITS:
        raise TextError(f"a whole number of {len(digits)} digits, expected at most {MOST_DIGITS}")
    return int(digits)


# --- YAML --------------------------------------------------------------------------------------------------------------


def read_yaml(path: str | Path) -> Any:
    """The value of a YAML file of plain data.

    Raises:
        OSError: it is not there, or cannot be read.
        TextError: not YAML, or beyond the bounds.
    """
    return parse_yaml(read(path, LARGEST_YAML))


def parse_yaml(text: str) -> Any:
    """The value of a YAML text of plain data. Pure.

    Raises:
        TextError: not YAML; a key that stands twice, where plain YAML lets the second win; more than `MOST_NODES` nodes, aliases
            resolved; nested more than `MOST_DEPTH` deep; or with a whole number of more than `MOST_DIGITS` digits.
    """
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506, TID251 - a SafeLoader with bounds
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        raise TextError(f"not valid YAML ({getattr(error, 'problem', None) or _first_line(error)})", mark.line + 1 if mark else None) from None
    except (ValueError, OverflowError, RecursionError) as error:  # a date that does not exist, for one
        raise TextError(f"not valid YAML ({_first_line(error)})") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


class _Loader(yaml.SafeLoader):
    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._depth, self._nodes = 0, 0
        self._sizes: dict[int, int] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        mark, alias, before = self.peek_event().start_mark, self.check_event(yaml.AliasEvent), self._nodes
        self._depth += 1
        if self._depth > MOST_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested more than {MOST_DEPTH} deep", mark)
        node: Any = super().compose_node(parent, index)
        self._depth -= 1
        if alias:
            size = self._sizes.get(id(node))
            if size is None:
                raise yaml.composer.ComposerError(None, None, "an alias inside of what it stands for", mark)
            self._nodes += size
        else:
            # Long texts count as more: an alias can repeat them.
            self._nodes += 1 + (len(node.value) // 64 if isinstance(node, yaml.ScalarNode) else 0)
            self._sizes[id(node)] = self._nodes - before
        if self._nodes > MOST_NODES:
            raise yaml.composer.ComposerError(None, None, f"more than {MOST_NODES} nodes, aliases resolved", mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key has to be a plain word", key_node.start_mark)
            key = key_node.value
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key '{key[:MOST_DIGITS]}' stands here twice", key_node.start_mark)
            seen.add(key)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            raise yaml.constructor.ConstructorError(None, None, f"a whole number of more than {MOST_DIGITS} digits", node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


# --- CSV ---------------------------------------------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""What a terminal obeys, or what turns the direction of a text; a tab is left to be trimmed."""


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        header: names of the columns in small letters.
        rows: (line in the file, cells without space around them), without empty rows.
    """

    header: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...] = field(repr=False)


def read_csv(path: str | Path) -> Table:
    """The table of a CSV file.

    Raises:
        OSError: it is not there, or cannot be read.
        TextError: see `parse_csv`.
    """
    return parse_csv(read(path, LARGEST_CSV))


def parse_csv(text: str) -> Table:
    """A table whose cells stand between commas, semicolons or tabs, whichever the header has most of. Pure.

    Raises:
        TextError: with its line: an open quote or text behind a quote, a line break or another control character in a cell, or a cell of
            more than `MOST_CELL` characters. A quote that is not closed would make one cell of all rows below it.
    """
    first = text.split("\n", 1)[0].rstrip("\r")
    delimiter = max(",;\t", key=first.count)
    found: list[tuple[int, tuple[str, ...]]] = []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)  # noqa: TID251
    line = 0
    try:
        for cells in reader:
            begin, line = line + 1, reader.line_num
            if line != begin or any(_CONTROL.search(cell) for cell in cells):
                raise TextError("a line break or another control character in a cell, or a quote that is not closed", begin)
            if any(len(cell) > MOST_CELL for cell in cells):
                raise TextError(f"a cell of more than {MOST_CELL} characters", begin)
            if not found or any(cell.strip() for cell in cells):
                found.append((begin, tuple(cell.strip() for cell in cells)))
    except csv.Error as error:
        raise TextError(f"not a table: {'a quote that is not closed' if 'unexpected end' in str(error) else error}", line + 1) from None
    header = tuple(cell.lower() for cell in found[0][1]) if found else ()
    return Table(header, tuple(found[1:]))


def plain_cell(value: Any) -> Any:
    """A cell to be written: a text that a spreadsheet would take for a formula gets a quote before it. Pure."""
    return f"'{value}" if isinstance(value, str) and value[:1] in tuple("=+-@\t\r") else value
