"""What a tool call comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = ["ToolFailure", "ToolResult", "text_result"]

_EMPTY = "(no output)"


@dataclass(frozen=True, kw_only=True)
class ToolResult:
    """The answer to one tool call.

    Attributes:
        content: blocks as ``user.tool_result`` takes them (text, image, document). Never empty.
        is_error: whether the model is told that the call failed.
    """

    content: list[dict[str, Any]]
    is_error: bool = False


class ToolFailure(Exception):
    """The call failed for a reason that the model is told, in the exception's own words."""


def text_result(text: str, *, is_error: bool = False) -> ToolResult:
    """Return a result of one text block. The platform takes no empty text, so that becomes ``(no output)``."""
    return ToolResult(content=[{"type": "text", "text": text or _EMPTY}], is_error=is_error)
