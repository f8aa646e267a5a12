"""Checks of what clients send: events and their content blocks.

Read in `anthropic.types.beta.sessions` (the ``*_event_params`` and ``*_block_param`` types). Unknown fields, empty text
and unpaired surrogates are refused, as the Messages API refuses them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mabridge.testing.wire import ApiError, Json

__all__ = ["check_event"]

_CONTENT = frozenset({"content"})
_FIELDS: dict[str, tuple[frozenset[str], frozenset[str]]] = {
    "user.message": (_CONTENT, frozenset()),
    "user.interrupt": (frozenset(), frozenset({"session_thread_id"})),
    "user.tool_confirmation": (frozenset({"tool_use_id", "result"}), frozenset({"deny_message"})),
    "user.tool_result": (frozenset({"tool_use_id"}), frozenset({"content", "is_error"})),
    "user.custom_tool_result": (frozenset({"custom_tool_use_id"}), frozenset({"content", "is_error"})),
}
_SOURCES: dict[str, dict[str, frozenset[str]]] = {
    "image": {
        "base64": frozenset({"data", "media_type"}),
        "url": frozenset({"url"}),
        "file": frozenset({"file_id"}),
    },
    "document": {
        "base64": frozenset({"data", "media_type"}),
        "text": frozenset({"data", "media_type"}),
        "url": frozenset({"url"}),
        "file": frozenset({"file_id"}),
    },
}


def check_event(event: object, where: str) -> Json:
    """Return `event` if a client may send it.

    Args:
        event: one entry of the request's ``events``.
        where: its place in the request, for the message.

    Raises:
        ApiError: 400.
    """
    if not isinstance(event, dict) or event.get("type") not in _FIELDS:
        raise ApiError(400, f"{where}.type: not an event that can be sent")
    required, optional = _FIELDS[event["type"]]
    _check_fields(event, required, optional, where)
    for name in ("tool_use_id", "custom_tool_use_id", "session_thread_id", "deny_message"):
        if event.get(name) is not None and not isinstance(event[name], str):
            raise ApiError(400, f"{where}.{name}: must be a string")
    if event["type"] == "user.tool_confirmation":
        if event["result"] not in ("allow", "deny"):
            raise ApiError(400, f"{where}.result: must be 'allow' or 'deny'")
        if event.get("deny_message") is not None and event["result"] != "deny":
            raise ApiError(400, f"{where}.deny_message: only allowed when result is 'deny'")
    if event.get("is_error") not in (None, True, False):
        raise ApiError(400, f"{where}.is_error: must be a boolean")
    content = event.get("content", [])
    if not isinstance(content, list) or (event["type"] == "user.message" and not content):
        raise ApiError(400, f"{where}.content: must be a list of content blocks")
    for index, block in enumerate(content):
        _check_block(block, f"{where}.content.{index}")
    return event


def _check_fields(value: Json, required: frozenset[str], optional: frozenset[str], where: str) -> None:
    for name in required:
        if name not in value:
            raise ApiError(400, f"{where}.{name}: field required")
    for name in value:
        if name not in required | optional | {"type"}:
            raise ApiError(400, f"{where}.{name}: extra inputs are not permitted")
    for text in _strings(value):
        if any("\ud800" <= char <= "\udfff" for char in text):
            raise ApiError(400, f"{where}: the text has an unpaired surrogate")


def _check_block(block: object, where: str) -> None:
    kind = block.get("type") if isinstance(block, dict) else None
    if not isinstance(block, dict) or kind not in ("text", "image", "document", "search_result"):
        raise ApiError(400, f"{where}.type: not a content block")
    if kind == "text":
        _check_fields(block, frozenset({"text"}), frozenset(), where)
        if not isinstance(block["text"], str) or not block["text"]:
            raise ApiError(400, f"{where}.text: text content blocks must be non-empty")
        return
    if kind == "search_result":
        _check_fields(block, frozenset({"content", "source", "title", "citations"}), frozenset(), where)
        return
    _check_fields(block, frozenset({"source"}), frozenset({"title", "context"} if kind == "document" else ()), where)
    source = block["source"]
    sources = _SOURCES[kind]
    if not isinstance(source, dict) or source.get("type") not in sources:
        raise ApiError(400, f"{where}.source.type: must be one of {', '.join(sources)}")
    _check_fields(source, sources[source["type"]], frozenset(), f"{where}.source")


def _strings(value: Any) -> Iterator[str]:  # noqa: ANN401 - any JSON
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield key
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)
