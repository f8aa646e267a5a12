"""Unpacks the archive of a skill, which anybody may have made, in memory and within bounds.

Nothing is written anywhere here, and what comes out can be written below one directory without leaving it.
"""

from __future__ import annotations

import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

__all__ = ["MAX_ARCHIVE_BYTES", "ArchiveError", "Member", "pack", "unpack"]

MAX_ARCHIVE_BYTES = 32 * 1024 * 1024
_MAX_CONTENT_BYTES = 64 * 1024 * 1024
_MAX_MEMBERS = 5_000
_MAX_PATH_BYTES = 1_024
_MAX_NAME_BYTES = 255
_GZIP = b"\x1f\x8b"
_CENTRAL_ENTRY = b"PK\x01\x02"
# Systems whose zips keep a Unix mode: Unix and macOS.
_UNIX_HOSTS = (3, 19)
_PLAIN_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class ArchiveError(ValueError):
    """The archive cannot be read, or holds what no honest one does. Says what."""


@dataclass(frozen=True, kw_only=True)
class Member:
    """A file or a directory of an archive.

    Attributes:
        path: relative, of plain names, with no ``.`` or ``..`` among them.
        data: the file's bytes; ``None`` for a directory.
        executable: whether anyone may execute it. No other permission is taken over.
    """

    path: str
    data: bytes | None
    executable: bool = False


def unpack(archive: bytes) -> list[Member]:
    """Return the files and directories in a zip, or in a tar that may be gzipped.

    If all lie in one directory, it is taken off: skills come wrapped in one that has their name. Links, devices and
    the like are left out. Of two with one name, the later one counts.

    Raises:
        ArchiveError: it is no such archive, or too large, or a member's name leads out of it.
    """
    if len(archive) > MAX_ARCHIVE_BYTES:
        raise ArchiveError(f"the archive holds more than {MAX_ARCHIVE_BYTES} bytes")
    try:
        # A zip is known by its end; but a tar may hold one.
        members = list(_from_zip(archive) if archive.startswith(b"PK") else _from_tar(archive))
    # zipfile raises more kinds than it documents: RuntimeError for a password, NotImplementedError for a method.
    except (zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError, RuntimeError, OSError) as exc:
        raise ArchiveError(f"the archive cannot be read: {exc}") from exc
    return _unwrapped(members)


def pack(members: list[Member], *, below: str, last: str) -> bytes:
    """Return a plain tar of `members` below the directory `below`, with an empty file `last` at its very end."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for member in [Member(path="", data=None), *members]:
            info = tarfile.TarInfo(f"{below}/{member.path}" if member.path else below)
            if member.data is None:
                info.type = tarfile.DIRTYPE
            else:
                info.size = len(member.data)
            info.mode = 0o755 if member.data is None or member.executable else 0o644
            tar.addfile(info, None if member.data is None else io.BytesIO(member.data))
        tar.addfile(tarfile.TarInfo(last))
    return buffer.getvalue()


def _from_zip(archive: bytes) -> Iterator[Member]:
    # Counted before zipfile makes an object of each.
    if archive.count(_CENTRAL_ENTRY) > 2 * _MAX_MEMBERS:
        raise ArchiveError(f"the archive has more than {_MAX_MEMBERS} members")
    with zipfile.ZipFile(io.BytesIO(archive)) as source:
        budget = _Budget()
        for info in source.infolist():
            path = _safe_path(info.filename)
            mode = info.external_attr >> 16 if info.create_system in _UNIX_HOSTS else 0
            kind = stat.S_IFMT(mode)
            budget.count()
            if not path or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                continue
            if info.is_dir() or kind == stat.S_IFDIR:
                yield Member(path=path, data=None)
                continue
            if info.compress_type not in _PLAIN_METHODS:
                raise ArchiveError(f"{path!r} is compressed by method {info.compress_type}, which no skill needs")
            budget.spend(info.file_size)
            with source.open(info) as file:
                # With a number: without one, zipfile unpacks whatever there is before it looks at the stated size.
                data = file.read(info.file_size + 1)
            yield Member(path=path, data=data, executable=bool(mode & 0o111))


def _from_tar(archive: bytes) -> Iterator[Member]:
    if archive.startswith(_GZIP):
        limit = _MAX_CONTENT_BYTES + 512 * _MAX_MEMBERS
        # Before tarfile sees it, which would unpack whatever a header states.
        archive = zlib.decompressobj(wbits=31).decompress(archive, limit + 1)
        if len(archive) > limit:
            raise ArchiveError(f"the archive unpacks to more than {_MAX_CONTENT_BYTES} bytes")
    with tarfile.open(fileobj=io.BytesIO(archive), mode="r:") as source:
        budget = _Budget()
        for info in source:
            path = _safe_path(info.name)
            budget.count()
            if not path or not (info.isreg() or info.isdir()):
                continue
            if info.isdir():
                yield Member(path=path, data=None)
                continue
            budget.spend(info.size)
            file = source.extractfile(info)
            data = b"" if file is None else file.read()
            yield Member(path=path, data=data, executable=bool(info.mode & 0o111))


class _Budget:
    def __init__(self) -> None:
        self._members = _MAX_MEMBERS
        self._content = _MAX_CONTENT_BYTES

    def count(self) -> None:
        self._members -= 1
        if self._members < 0:
            raise ArchiveError(f"the archive has more than {_MAX_MEMBERS} members")

    def spend(self, size: int) -> None:
        self._content -= size
        if self._content < 0:
            raise ArchiveError(f"the archive unpacks to more than {_MAX_CONTENT_BYTES} bytes")


def _safe_path(name: str) -> str:
    """Return a member's name as a relative path of plain names; empty if it names the archive's own root."""
    unified = name.replace("\\", "/")
    parts = [part for part in unified.split("/") if part not in ("", ".")]
    if unified.startswith("/") or (parts and len(parts[0]) == 2 and parts[0][1] == ":"):
        raise ArchiveError(f"refusing archive member with absolute path {name!r}")
    if ".." in parts:
        raise ArchiveError(f"refusing archive member with '..' component: {name!r}")
    try:
        sizes = [len(part.encode("utf-8")) for part in parts]
    except UnicodeEncodeError as exc:
        raise ArchiveError(f"refusing archive member whose name is not Unicode: {name!r}") from exc
    if "\0" in unified or sum(sizes) + len(sizes) > _MAX_PATH_BYTES or any(size > _MAX_NAME_BYTES for size in sizes):
        raise ArchiveError(f"refusing archive member with a name that no file can have: {name[:100]!r}")
    return "/".join(parts)


def _unwrapped(members: list[Member]) -> list[Member]:
    """Return `members`, each name once, without the one directory that they may all lie in."""
    tops = {PurePosixPath(member.path).parts[0] for member in members}
    wrapped = len(tops) == 1 and any("/" in member.path for member in members)
    final: dict[str, Member] = {}
    for member in members:
        path = member.path.partition("/")[2] if wrapped else member.path
        if path:
            final[path] = Member(path=path, data=member.data, executable=member.executable)
    files = {path for path, member in final.items() if member.data is not None}
    for path in final:
        for parent in PurePosixPath(path).parents:
            if str(parent) in files:
                raise ArchiveError(f"the archive has {str(parent)!r} both as a file and as a directory")
    return list(final.values())
