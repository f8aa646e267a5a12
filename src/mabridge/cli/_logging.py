"""The worker's log on stderr: lines for people, or one JSON object a line."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

__all__ = ["set_up_logging"]

_LIBRARIES = ("httpx", "httpx2", "httpcore", "httpcore2", "anthropic", "aiohttp", "aiodocker", "asyncio", "stamina")
"""Loggers that tell of every request; they are quieter than ours by one level."""


class JsonFormatter(logging.Formatter):
    """One JSON object a record: time, level, logger, message, and the fields of an event as its own."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        event = getattr(record, "event", None)
        fields = getattr(record, "fields", None)
        if event is not None and isinstance(fields, dict):
            line |= {"event": event, **fields}
        else:
            line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def set_up_logging(level: str, log_format: str) -> None:
    """Send the log of this process to stderr.

    Args:
        level: ``debug``, ``info``, ``warning`` or ``error``.
        log_format: ``text`` or ``json``.
    """
    handler = logging.StreamHandler(sys.stderr)
    if log_format == "json":
        handler.setFormatter(JsonFormatter())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(message)s", datefmt="%H:%M:%S"))
    number = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(level=number, handlers=[handler], force=True)
    for name in _LIBRARIES:
        logging.getLogger(name).setLevel(min(number + 10, logging.ERROR))
