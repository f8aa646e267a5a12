"""What is wrong in a configuration, in words for the person who wrote it. Never shows a value that may be a secret."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from typing import get_args

from pydantic import BaseModel, ValidationError

__all__ = ["Problem", "line_of", "nearest", "problems_in"]

Path = tuple[str | int, ...]

_UNION_MEMBERS = ("str", "EnvVar")
"""What pydantic adds to a path to tell the members of a union such as ``str | EnvVar`` apart."""


@dataclass(frozen=True)
class Problem:
    """One mistake.

    Attributes:
        path: where it is: keys, and indexes from 0.
        message: what is wrong, and what would be right.
    """

    path: Path
    message: str

    def __str__(self) -> str:
        return f"{_dotted(self.path)}: {self.message}" if self.path else self.message


def problems_in(
    error: ValidationError, model: type[BaseModel], *, at: Path = (), also: Iterable[str] = ()
) -> list[Problem]:
    """Return what pydantic found in a model, without the values that it was given.

    Args:
        error: what it raised.
        model: the model that was validated.
        at: where that model stands in the file.
        also: keys that are right beside the model's own.
    """
    problems = {}
    for detail in error.errors(include_url=False, include_input=False):
        path = tuple(part for part in detail["loc"] if part not in _UNION_MEMBERS)
        if detail["type"] == "extra_forbidden":
            known = [*_keys(model, path[:-1]), *(also if len(path) == 1 else ())]
            message = f"there is no such key{nearest(str(path[-1]), known)}"
        elif detail["type"] == "model_type" and detail.get("ctx", {}).get("class_name") == "EnvVar":
            message = (
                'a secret never stands in the file: put it into an environment variable and write { env = "NAME" }'
            )
        elif detail["type"] == "missing":
            message = "it is missing"
        else:
            message = detail["msg"].removeprefix("Value error, ")
        problems[at + path, message] = Problem(at + path, message)
    return list(problems.values())


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint at the one of `known` that `word` was meant to be, or at all of them, to end a sentence with."""
    names = list(known)
    near = get_close_matches(word, names, n=1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; there are {', '.join(names)}" if names else ""


def line_of(text: str, path: Path) -> int | None:
    """Return the number of the line of a TOML text, from 1, where a key or the nearest table around it is.

    A search and not a parser: it knows tables and keys as people write them, and may miss exotic ones.
    """
    best: tuple[int, int] | None = None
    table: Path = ()
    seen: dict[Path, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        here: Path | None = None
        if header := re.match(r"\s*(\[\[?)\s*([^\[\]]+?)\s*\]", line):
            table = _split(header[2])
            if header[1] == "[[":
                seen[table] = seen.get(table, -1) + 1
                table = (*table, seen[table])
            here = table
        elif key := re.match(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""", line):
            here = table + _split(key[1])
        if here is not None and path[: len(here)] == here and (best is None or len(here) > best[0]):
            best = len(here), number
    return best[1] if best else None


def _split(dotted: str) -> Path:
    return tuple(part.strip("\"'") for part in re.findall(r"""[\w-]+|"[^"]*"|'[^']*'""", dotted))


def _dotted(path: Path) -> str:
    """Write a path as people do: indexes from 1, as in ``routes[2].providers``."""
    parts = (f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in path)
    return "".join(parts).lstrip(".")


def _keys(model: type[BaseModel], path: Path) -> list[str]:
    """Return the keys of the model that stands at `path` in `model`, or none if that is no model."""
    found: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, str):
            info = found.model_fields.get(part) if found else None
            if info is not None:
                found = next(_models(info.annotation), None)
    return list(found.model_fields) if found else []


def _models(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models(argument)
