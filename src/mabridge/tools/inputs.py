"""What the model passes to the tools, checked.

Fields that a tool does not know are left aside; a missing or wrong one is named in a plain sentence. The fields are
those of ``agent_toolset_20260401`` (https://platform.claude.com/docs/en/managed-agents/tools).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mabridge.tools.result import ToolFailure

__all__ = [
    "BashInput",
    "EditInput",
    "GlobInput",
    "GrepInput",
    "ReadInput",
    "ToolInput",
    "WriteInput",
    "check_text",
    "parse_input",
]

_Text = Annotated[str, Field(description="a string")]
_Flag = Annotated[bool | None, Field(description="true or false")]
_Range = Annotated[list[int] | None, Field(description="a list of two whole numbers, [start_line, end_line]")]


class ToolInput(BaseModel):
    """Base of the tools' inputs."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class BashInput(ToolInput):
    """Input of `bash`."""

    command: Annotated[str | None, Field(description="a string")] = None
    restart: _Flag = None
    timeout_ms: Annotated[int | None, Field(description="a whole number of milliseconds")] = None


class ReadInput(ToolInput):
    """Input of `read`."""

    file_path: _Text
    view_range: _Range = None


class WriteInput(ToolInput):
    """Input of `write`."""

    file_path: _Text
    content: _Text


class EditInput(ToolInput):
    """Input of `edit`."""

    file_path: _Text
    old_string: _Text
    new_string: _Text
    replace_all: _Flag = None


class GlobInput(ToolInput):
    """Input of `glob`."""

    pattern: _Text
    path: Annotated[str | None, Field(description="a string")] = None


class GrepInput(ToolInput):
    """Input of `grep`."""

    pattern: _Text
    path: Annotated[str | None, Field(description="a string")] = None


T = TypeVar("T", bound=ToolInput)


def parse_input(tool: str, model: type[T], given: Mapping[str, Any] | None) -> T:
    """Return `given` as `model`; ``None`` is no fields at all.

    Raises:
        ToolFailure: a field is missing, or not of its type.
    """
    try:
        return model.model_validate({} if given is None else dict(given))
    except ValidationError as exc:
        problem = exc.errors(include_url=False, include_context=False, include_input=False)[0]
    name = str(problem["loc"][0])
    if problem["type"] == "missing":
        raise ToolFailure(f"{tool}: {name} is required")
    raise ToolFailure(f"{tool}: {name} must be {model.model_fields[name].description}")


def check_text(tool: str, name: str, value: str) -> str:
    """Return `value`, if it can be written as UTF-8.

    Raises:
        ToolFailure: it holds half of a surrogate pair, which no file and no name can hold.
    """
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as exc:
        raise ToolFailure(
            f"{tool}: {name} is not valid Unicode: it holds an unpaired surrogate at character {exc.start}"
        ) from exc
    return value
