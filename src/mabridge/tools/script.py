"""Runs the tools' shell programs in a sandbox, each in one `exec`, and reads what they answer.

The sandbox is not trusted: an answer is bounded, and one that makes no sense is told to the model like any failure of
its sandbox's shell.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

from mabridge.sandbox import Sandbox
from mabridge.tools.result import ToolFailure

__all__ = ["Reply", "Roots", "run_script"]

_PATH_BYTES = 4095
_NAME_BYTES = 255
_HEADER_BYTES = 16 * 1024


@dataclass(kw_only=True)
class Roots:
    """The directories that the file tools may reach. Absolute paths in the sandbox; symbolic links are followed.

    Attributes:
        workdir: where relative paths start.
        allowed: more directories that may be read and written.
        read_only: directories that may be read only, wherever they lie.
        internal: read-only ones that the messages do not speak of, for they are mabridge's own. Added to as large
            outputs are kept there.
    """

    workdir: str
    allowed: tuple[str, ...] = ()
    read_only: tuple[str, ...] = ()
    internal: set[str] = field(default_factory=set)

    def arguments(self) -> list[str]:
        """Return them as the shell programs take them."""
        writable = [f"w:{root}" for root in (self.workdir, *self.allowed)]
        return writable + [f"r:{root}" for root in (*self.read_only, *sorted(self.internal))]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a shell program answered: its fields after ``ok``, and the bytes after them."""

    fields: list[str]
    rest: bytes
    timed_out: bool
    truncated: bool


@cache
def _program(name: str) -> str:
    directory = resources.files("mabridge.tools") / "sh"
    parts = [(directory / f"{part}.sh").read_text(encoding="utf-8") for part in ("common", name)]
    # Comment lines are of no use in the sandbox, and each call carries the whole program there.
    return "".join(line for part in parts for line in part.splitlines(keepends=True) if not line.startswith("#"))


async def run_script(
    sandbox: Sandbox,
    name: str,
    path: str,
    arguments: Sequence[str],
    *,
    roots: Roots,
    fields: int,
    max_output: int,
    timeout: float,
    stdin: bytes | None = None,
    tool: str | None = None,
) -> Reply:
    """Run the program `name` on what the model calls `path`.

    Args:
        sandbox: where.
        name: of the ``.sh`` file.
        path: as the model gave it.
        arguments: what the program takes beside the path.
        roots: what may be reached.
        fields: how many fields come after ``ok``.
        max_output: bytes kept of what comes after the fields.
        timeout: seconds.
        stdin: the program's input.
        tool: what the messages call it, if not `name`.

    Raises:
        ToolFailure: why it could not be done, in words for the model.
        SandboxError: the sandbox or its provider failed.
    """
    tool = tool or name
    result = await sandbox.exec(
        ["/bin/sh", "-c", _program(name), "mab", _normal(tool, path), *roots.arguments(), "--", *arguments],
        stdin=stdin,
        # The working directory may be gone: the model can remove it.
        cwd="/",
        timeout=timeout,
        max_output=max_output + _HEADER_BYTES,
    )
    status, _, rest = result.stdout.partition(b"\0")
    if status == b"ok":
        parts = rest.split(b"\0", fields)
        if len(parts) == fields + 1:
            head = [part.decode("utf-8", "surrogateescape") for part in parts[:-1]]
            return Reply(fields=head, rest=parts[-1], timed_out=result.timed_out, truncated=result.truncated)
    if result.timed_out:
        raise ToolFailure(f"{tool}: timed out after {timeout:g}s")
    detail = rest.partition(b"\0")[0][:_PATH_BYTES].decode("utf-8", "replace")
    raise ToolFailure(_reason(tool, path, status.decode("utf-8", "replace"), detail, result.stderr, roots))


def _normal(tool: str, path: str) -> str:
    """Return `path` without ``.``, and without ``..`` except at the start, so that a shell can read it by parts."""
    if "\0" in path:
        raise ToolFailure(f"{tool}: embedded null byte")
    encoded = path.encode("utf-8")
    if len(encoded) > _PATH_BYTES or any(len(part) > _NAME_BYTES for part in encoded.split(b"/")):
        raise ToolFailure(f"{tool}: path {path[:200]!r}: file name too long")
    return posixpath.normpath(path)


def _reason(tool: str, path: str, status: str, detail: str, stderr: bytes, roots: Roots) -> str:
    # The words for what goes wrong are those of the Anthropic SDK's own tools, so that the model sees no difference.
    match status:
        case "path":
            return f"{tool}: path {path!r}: {detail}"
        case "outside":
            more = " and its other permitted directories" if roots.allowed or roots.read_only else ""
            return f"{tool}: path {path!r} is outside the session's working directory{more}"
        case "error":
            return f"{tool}: {path}: {detail}"
        case "irregular":
            return f"{tool}: {path}: not a regular file"
        case "readonly":
            return f"{tool}: {path} is inside read-only directory {detail}"
        case "changed":
            return f"{tool}: {path} was changed by something else meanwhile; read it again"
        case "short":
            return f"{tool}: {path}: not all of the content arrived in the sandbox; nothing was changed"
        case "no-tool":
            return f"{tool}: this sandbox has no `{tool}` program; use bash to look through the files"
    return f"{tool}: {path}: {_last_words(stderr)}"


def _last_words(stderr: bytes) -> str:
    """Return the end of a command's complaint, where the operating system's own words stand."""
    lines = stderr.decode("utf-8", "replace").strip().splitlines()
    words = re.split(r":\s+", lines[-1])[-1].strip() if lines else ""
    return words[:200].lower() or "the sandbox's shell gave no answer"
