"""Jinja2 templates of batch scripts: where they are found, and how values become safe words of shell and sbatch."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from ..errors import ConfigError

SUFFIX = ".sbatch.j2"
_PLAIN = re.compile(r"[A-Za-z0-9_@:,./+=%^-]+")


def directive(option: str, value: object = None) -> str:
    """An option of sbatch as it stands behind ``#SBATCH``: quoted where needed, in sbatch's own way.

    >>> directive("job-name", 'a "b"')
    '--job-name="a \\\\"b\\\\""'
    """
    if value is None:
        return f"--{option}"
    text = str(value)
    if not _PLAIN.fullmatch(text):
        text = '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return f"--{option}={text}"


class Expanded(str):
    """A word that the shell expands when the job runs; it brings its quotes."""


def words(values: Iterable[object]) -> str:
    """Words of a shell command line."""
    return " ".join(value if isinstance(value, Expanded) else shlex.quote(str(value)) for value in values)


def environment(folders: Iterable[Path]) -> jinja2.Environment:
    """Templates of ``folders`` (nearest first), then the package's."""
    loader = jinja2.ChoiceLoader(
        [*(jinja2.FileSystemLoader(str(folder)) for folder in folders), jinja2.PackageLoader("hvd_imaging.cluster")]
    )
    # Shell, not HTML: every value passes `sh`.
    made = jinja2.Environment(
        loader=loader, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True
    )
    made.filters["sh"] = lambda value: words([value] if isinstance(value, str | int | float) else value)
    return made


def names(folders: Iterable[Path]) -> list[str]:
    """All templates that can be asked for."""
    found = environment(folders).list_templates(filter_func=lambda name: name.endswith(SUFFIX) and not name.startswith("_"))
    return [name.removesuffix(SUFFIX) for name in found]


def render(name: str, values: Mapping[str, Any], folders: Iterable[Path] = ()) -> str:
    """The script of template ``name``.

    Raises:
        ConfigError: no such template; a variable that is not there; not valid Jinja2. Each with file and line.
    """
    folders = list(folders)
    jinja = environment(folders)
    full = name if name.endswith(".j2") else name + SUFFIX
    try:
        return jinja.get_template(full).render(values)
    except jinja2.TemplateNotFound as error:
        raise ConfigError(
            f"template '{error.name}': not found; there are {', '.join(names(folders))}; looked in "
            f"{', '.join(str(folder) for folder in folders)} and the package"
        ) from None
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{error.filename or error.name}, line {error.lineno}: {error.message}") from None
    except jinja2.UndefinedError as error:
        where, line = _place(error, jinja, full)
        raise ConfigError(
            f"{where}{line}: {error.message}; known variables: {', '.join(sorted(values))}; give your own by --var NAME=VALUE"
        ) from None


def _place(error: Exception, jinja: jinja2.Environment, name: str) -> tuple[str, str]:
    """File and line of the template where ``error`` arose: Jinja2 puts them into the traceback."""
    where, line, step = name, "", error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename.endswith(".j2"):
            where, line = step.tb_frame.f_code.co_filename, f", line {step.tb_lineno}"
        step = step.tb_next
    return where, line
