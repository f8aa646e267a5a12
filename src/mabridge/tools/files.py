"""The tools `read`, `write` and `edit`."""

from __future__ import annotations

import base64
import secrets
from pathlib import PurePosixPath

from mabridge.sandbox import Sandbox
from mabridge.tools.inputs import EditInput, ReadInput, WriteInput, check_text
from mabridge.tools.limits import ToolLimits
from mabridge.tools.result import ToolFailure, ToolResult, text_result
from mabridge.tools.script import Reply, Roots, run_script

__all__ = ["FileTools"]

_IMAGES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp"})
_PDF = ".pdf"
_MOST_LINES = 2**31 - 1
_EDITED_BYTES = 32 * 1024 * 1024
# Where a file's stamp would be, if the call had been done before.
_DONE = "done"


class FileTools:
    """`read`, `write` and `edit` over a sandbox.

    Args:
        sandbox: whose files they are.
        roots: the directories that may be reached.
        limits: the bounds.
    """

    def __init__(self, sandbox: Sandbox, roots: Roots, limits: ToolLimits) -> None:
        self._sandbox = sandbox
        self._roots = roots
        self._limits = limits

    async def read(self, given: ReadInput) -> ToolResult:
        """Return a text file, or lines of it, or an image or a PDF as its block."""
        path, view = check_text("read", "file_path", given.file_path), given.view_range
        if view and len(view) != 2:
            raise ToolFailure("read: view_range must be [start_line, end_line]")
        first, last = (max(view[0], 1), view[1] if view[1] > 0 else None) if view else (1, None)
        empty = last is not None and last < first
        reply = await self._fetch("read", path, first=first if view and not empty else None, last=last)
        canonical, size = reply.fields[0], _number(reply.fields[1])
        suffix = PurePosixPath(canonical).suffix.lower()
        if suffix in _IMAGES or suffix == _PDF:
            if view:
                raise ToolFailure("read: view_range is not supported for image/PDF files")
            return self._block(path, suffix, size, reply.rest)
        limit = self._limits.max_file_bytes
        if size > limit:
            if not view:
                raise ToolFailure(
                    f"read: {path} is {size} bytes, exceeds {limit}-byte limit. "
                    "Use the view_range parameter to read specific line ranges, e.g. view_range: [1, 500]."
                )
            text = _decode("read", path, self._lines(path, view, first, last, reply.rest))
        else:
            text = _decode("read", path, reply.rest)
            if view:
                text = "\n".join(text.split("\n")[first - 1 : last]) if not empty else ""
        return text_result(self._fit(text, first))

    async def write(self, given: WriteInput, *, note: str = "") -> ToolResult:
        """Write a whole file, with the directories on the way to it.

        Args:
            given: what, and where.
            note: absolute path, in the sandbox, of a file that says that this was done. Where it is there, nothing is
                done any more; where not, it is made in the moment in which it is done. Empty is none.
        """
        path = check_text("write", "file_path", given.file_path)
        said = f"wrote {len(given.content)} bytes to {path}"
        content = check_text("write", "content", given.content).encode("utf-8")
        await self._store("write", path, content, note=note, said=said)
        return text_result(said)

    async def edit(self, given: EditInput, *, note: str = "") -> ToolResult:
        """Replace a text in a file by another; `note` as for `write`."""
        path = check_text("edit", "file_path", given.file_path)
        old = check_text("edit", "old_string", given.old_string)
        new = check_text("edit", "new_string", given.new_string)
        if not old:
            raise ToolFailure("edit: old_string must not be empty; use write to make a file or to replace all of it")
        reply = await self._fetch("edit", path, note=note)
        if reply.fields[2] == _DONE:
            return text_result(reply.rest.decode("utf-8", "replace") or f"edited {path}")
        size, stamp, limit = _number(reply.fields[1]), reply.fields[2], self._limits.max_file_bytes
        if size > limit:
            raise ToolFailure(
                f"edit: {path} is {size} bytes, exceeds {limit}-byte limit. "
                "The edit tool loads the whole file and cannot modify a file this large."
            )
        text = _decode("edit", path, reply.rest)
        count = text.count(old)
        if count == 0:
            raise ToolFailure(f"edit: old_string not found in {path}")
        if count > 1 and not given.replace_all:
            raise ToolFailure(f"edit: old_string appears {count} times in {path} (must be unique)")
        if len(text) + count * len(new) > _EDITED_BYTES:
            raise ToolFailure(f"edit: {path} would grow to more than {_EDITED_BYTES} bytes; nothing was changed")
        said = f"edited {path} ({count} replacement(s))"
        await self._store("edit", path, text.replace(old, new).encode("utf-8"), stamp=stamp, note=note, said=said)
        return text_result(said)

    async def _fetch(
        self, tool: str, path: str, *, first: int | None = None, last: int | None = None, note: str = ""
    ) -> Reply:
        limits = self._limits
        image, pdf = limits.max_image_base64_bytes // 4 * 3, limits.max_pdf_bytes
        if tool == "edit":
            image = pdf = limits.max_file_bytes
        start = "" if first is None else str(min(first, _MOST_LINES))
        count = "" if first is None or last is None else str(min(last - first + 1, _MOST_LINES))
        reply = await run_script(
            self._sandbox,
            "read",
            path,
            [str(limits.max_file_bytes), str(image), str(pdf), start, count, note],
            roots=self._roots,
            fields=3,
            max_output=max(limits.max_file_bytes, image, pdf) + 1,
            timeout=limits.file_timeout,
            tool=tool,
        )
        if reply.timed_out or reply.truncated:
            raise ToolFailure(f"{tool}: {path}: could not be read in {limits.file_timeout:g}s")
        return reply

    async def _store(self, tool: str, path: str, content: bytes, *, stamp: str = "", note: str = "", said: str) -> None:
        await run_script(
            self._sandbox,
            "write",
            path,
            [str(len(content)), secrets.token_hex(8), stamp, note, said],
            roots=self._roots,
            fields=0,
            max_output=0,
            timeout=self._limits.file_timeout,
            stdin=content,
            tool=tool,
        )

    def _block(self, path: str, suffix: str, size: int, content: bytes) -> ToolResult:
        pdf = suffix == _PDF
        limit = self._limits.max_pdf_bytes if pdf else self._limits.max_image_base64_bytes // 4 * 3
        if size > limit:
            raise ToolFailure(f"read: {path} is {size} bytes, exceeds {limit}-byte limit for image/PDF files.")
        media_type = _media_type(content)
        if media_type is None or (media_type == "application/pdf") is not pdf:
            # The platform refuses the whole result if a block is not what it says it is.
            kind = "a PDF" if pdf else "a PNG, JPEG, GIF or WebP image"
            raise ToolFailure(f"read: {path}: the content is not {kind}, whatever its name says")
        data = base64.standard_b64encode(content).decode("ascii")
        source = {"type": "base64", "media_type": media_type, "data": data}
        return ToolResult(content=[{"type": "document" if pdf else "image", "source": source}])

    def _lines(self, path: str, view: list[int], first: int, last: int | None, found: bytes) -> bytes:
        """Return the lines of a large file as `str.split` would cut them: no newline after the last one asked for."""
        limit = self._limits.max_file_bytes
        if last is not None and found.count(b"\n") == last - first + 1 and found.endswith(b"\n"):
            found = found[:-1]
        if len(found) <= limit:
            return found
        if last == first:
            raise ToolFailure(
                f"read: line {first} of {path} alone exceeds {limit}-byte limit. "
                "The read tool cannot return part of a line, so view_range cannot narrow this further."
            )
        raise ToolFailure(
            f"read: view_range [{view[0]}, {view[1]}] of {path} exceeds {limit}-byte limit. "
            "Narrow the view_range to read a smaller portion."
        )

    def _fit(self, text: str, first: int) -> str:
        """Return `text`, whose first line has the number `first`, cut to what one result may hold."""
        most = self._limits.max_chars
        if len(text) <= most:
            return text
        end = text.rfind("\n", 0, most)
        if end < 0:
            return (
                text[:most]
                + f"\n[cut after {most} of {len(text)} characters of line {first}: one result holds no more. "
                "Use bash to see another part of the line, e.g. with `cut -c`.]"
            )
        shown = text.count("\n", 0, end) + 1
        return (
            text[:end] + f"\n[cut after line {first + shown - 1}: one result holds at most {most} characters. "
            f"Use view_range to read on, from line {first + shown}.]"
        )


def _decode(tool: str, path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as exc:
        hint = (
            "binary files are only supported for image/PDF extensions" if tool == "read" else "cannot edit binary files"
        )
        raise ToolFailure(f"{tool}: {path}: not valid UTF-8 text ({hint})") from exc


def _media_type(content: bytes) -> str | None:
    """Return what the first bytes say that a file is, if it is something that a block can hold."""
    if content.startswith(b"\x89PNG\r\n\x1a\n"):
        return "image/png"
    if content.startswith(b"\xff\xd8\xff"):
        return "image/jpeg"
    if content.startswith((b"GIF87a", b"GIF89a")):
        return "image/gif"
    if content.startswith(b"RIFF") and content[8:12] == b"WEBP":
        return "image/webp"
    # Readers allow some bytes before the mark.
    if b"%PDF-" in content[:1024]:
        return "application/pdf"
    return None


def _number(field: str) -> int:
    if not (field.isascii() and field.isdigit() and len(field) < 20):
        raise ToolFailure("the sandbox's shell gave a size that makes no sense")
    return int(field)
