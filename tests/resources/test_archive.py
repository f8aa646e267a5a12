"""Unpacking what a stranger may have packed."""

from __future__ import annotations

import gzip
import io
import posixpath
import stat
import tarfile
import tracemalloc
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mabridge.resources import archive as module
from mabridge.resources.archive import ArchiveError, Member, pack, unpack


def a_zip(*members: tuple[str, bytes | str | None, int], host: int = 3, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Make a zip of names, contents (``None`` is a directory) and modes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content, mode in members:
            info = zipfile.ZipInfo(name)
            info.create_system, info.external_attr, info.compress_type = host, mode << 16, method
            file.writestr(info, b"" if content is None else content)
    return buffer.getvalue()


def a_tar(*members: tuple[str, bytes | None, bytes, int]) -> bytes:
    """Make a tar of names, contents, types and modes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, content, kind, mode in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.size = kind, mode, len(content or b"")
            info.linkname = "/etc/passwd"
            file.addfile(info, io.BytesIO(content or b""))
    return buffer.getvalue()


def paths(members: list[Member]) -> list[str]:
    return [member.path for member in members]


def test_zip_is_unwrapped_and_modes_are_reduced() -> None:
    archive = a_zip(
        ("pdf/", None, 0o40755),
        ("pdf/SKILL.md", "how", 0o100666),
        ("pdf/scripts/run.sh", "#!", 0o104751),
        ("pdf/empty/", None, 0o40777),
    )
    assert unpack(archive) == [
        Member(path="SKILL.md", data=b"how"),
        Member(path="scripts/run.sh", data=b"#!", executable=True),
        Member(path="empty", data=None),
    ]


def test_tar_plain_or_gzipped_is_unpacked() -> None:
    archive = a_tar(
        ("pdf", None, tarfile.DIRTYPE, 0o755),
        ("./pdf/SKILL.md", b"how", tarfile.REGTYPE, 0o600),
        ("pdf/run", b"#!", tarfile.REGTYPE, 0o4711),
    )
    expected = [Member(path="SKILL.md", data=b"how"), Member(path="run", data=b"#!", executable=True)]
    assert unpack(archive) == expected
    assert unpack(gzip.compress(archive)) == expected


def test_what_has_no_one_wrapper_is_left_as_it_is() -> None:
    assert paths(unpack(a_zip(("a/x", "1", 0), ("b/x", "2", 0)))) == ["a/x", "b/x"]
    assert paths(unpack(a_zip(("SKILL.md", "1", 0)))) == ["SKILL.md"]
    assert unpack(a_zip()) == []


def test_mode_of_a_system_without_modes_is_none() -> None:
    assert unpack(a_zip(("a", "x", 0o120777), host=0)) == [Member(path="a", data=b"x")]


def test_links_and_devices_are_left_out() -> None:
    for kind in (stat.S_IFLNK, stat.S_IFCHR, stat.S_IFBLK, stat.S_IFIFO, stat.S_IFSOCK):
        assert paths(unpack(a_zip(("s/a", "x", 0), ("s/b", "/etc/passwd", kind | 0o777)))) == ["a"]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        assert paths(unpack(a_tar(("s/a", b"x", tarfile.REGTYPE, 0), ("s/b", None, kind, 0)))) == ["a"]


def test_file_behind_a_link_of_the_archive_stays_a_plain_path() -> None:
    archive = a_tar(("s/way", None, tarfile.SYMTYPE, 0), ("s/way/x", b"x", tarfile.REGTYPE, 0))
    assert paths(unpack(archive)) == ["way/x"]


HOSTILE = [
    "/etc/passwd",
    "../x",
    "s/../../x",
    "..",
    "\\x",
    "..\\x",
    "s\\..\\..\\x",
    "C:/x",
    "C:\\x",
    "a" * 300,
    "a/" * 600 + "x",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_name_that_leads_out_is_refused(name: str) -> None:
    with pytest.raises(ArchiveError, match="refusing archive member"):
        unpack(a_zip(("s/SKILL.md", "x", 0), (name, "x", 0)))
    with pytest.raises(ArchiveError, match="refusing archive member"):
        unpack(a_tar(("s/SKILL.md", b"x", tarfile.REGTYPE, 0), (name, b"x", tarfile.REGTYPE, 0)))
    # Even on what would be left out.
    with pytest.raises(ArchiveError, match="refusing archive member"):
        unpack(a_tar(("s/SKILL.md", b"x", tarfile.REGTYPE, 0), (name, None, tarfile.SYMTYPE, 0)))


names = st.lists(
    st.sampled_from(["a", "b", ".", "..", "", "/", "\\", "C:", "\n", "é", " ", "..a", "a..", "~", "-", "a" * 256]),
    max_size=6,
).flatmap(lambda parts: st.sampled_from(["/".join(parts), "\\".join(parts), "".join(parts)]))


@pytest.mark.filterwarnings("ignore:Duplicate name")
@settings(deadline=None)
@given(st.lists(names | st.text(max_size=20), max_size=6))
def test_no_name_leads_out(given_names: list[str]) -> None:
    packed = [(name, b"x", tarfile.REGTYPE, 0) for name in given_names if "\0" not in name]
    for archive in (lambda: a_tar(*packed), lambda: a_zip(*((name, "x", 0) for name, *_ in packed))):
        try:
            members = unpack(archive())
        except (ArchiveError, UnicodeEncodeError):
            continue
        for member in members:
            assert member.path == posixpath.normpath(member.path)
            assert not member.path.startswith(("/", "../"))
            assert member.path not in ("", ".", "..")
        assert len(set(paths(members))) == len(members)


def test_file_that_is_a_directory_too_is_refused() -> None:
    with pytest.raises(ArchiveError, match="both as a file and as a directory"):
        unpack(a_zip(("s/a", "x", 0), ("s/a/b", "x", 0)))


def test_of_two_with_one_name_the_later_counts() -> None:
    archive = a_zip(("s/a", "old", 0), ("s/./a", "new", 0), ("s//a", "newest", 0))
    assert unpack(archive) == [Member(path="a", data=b"newest")]


@pytest.mark.parametrize(
    "archive", [b"", b"PK", b"\x1f\x8b", b"\x1f\x8bxxxx", b"junk" * 300, a_zip(("a", "x", 0))[:-5]]
)
def test_what_is_no_archive_is_refused(archive: bytes) -> None:
    with pytest.raises(ArchiveError, match="cannot be read"):
        unpack(archive)


def test_unusual_compression_and_passwords_are_refused() -> None:
    with pytest.raises(ArchiveError, match="compressed by method 14"):
        unpack(a_zip(("a", "x", 0), method=zipfile.ZIP_LZMA))
    locked = bytearray(a_zip(("a", "x", 0)))
    for header, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        locked[locked.index(header) + offset] |= 1
    with pytest.raises(ArchiveError, match="cannot be read"):
        unpack(bytes(locked))


def bounded(archive: bytes, match: str, *, most: int = 150_000_000) -> None:
    """See an archive refused, in no more memory than that."""
    tracemalloc.start()
    try:
        with pytest.raises(ArchiveError, match=match):
            unpack(archive)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most


def test_bombs_are_refused_within_bounds() -> None:
    zeros = b"\0" * (65 * 1024 * 1024)
    bounded(a_zip(("a", zeros, 0)), "unpacks to more than")
    bounded(gzip.compress(a_tar(("a", zeros, tarfile.REGTYPE, 0)) + zeros), "unpacks to more than")
    part = b"\0" * (9 * 1024 * 1024)
    bounded(a_zip(*((f"s/{number}", part, 0) for number in range(8))), "unpacks to more than")
    # A size that is a lie: the contents are a thousand times what the entry says.
    lying = bytearray(a_zip(("a", zeros, 0)))
    for header, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = lying.index(header) + offset
        lying[at : at + 4] = (1000).to_bytes(4, "little")
    bounded(bytes(lying), "cannot be read", most=20_000_000)


def test_too_many_members_are_refused() -> None:
    bounded(a_zip(*((str(number), "", 0) for number in range(5001))), "more than 5000 members")
    bounded(a_zip(*((str(number), "", 0) for number in range(20_000))), "more than 5000 members", most=1_000_000)
    bounded(a_tar(*((str(number), b"", tarfile.REGTYPE, 0) for number in range(5001))), "more than 5000 members")


def test_too_large_an_archive_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_ARCHIVE_BYTES", 10)
    with pytest.raises(ArchiveError, match="holds more than 10 bytes"):
        unpack(b"PK" + b"x" * 10)


def test_packed_tree_has_plain_owners_and_modes_and_an_end() -> None:
    packed = pack(
        [Member(path="d/a", data=b"x", executable=True), Member(path="e", data=None)], below="tree", last="end"
    )
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        found = [(info.name, info.mode, info.uid, info.isdir()) for info in tar]
    assert found == [
        ("tree", 0o755, 0, True), ("tree/d/a", 0o755, 0, False), ("tree/e", 0o755, 0, True), ("end", 0o644, 0, False),
    ]  # fmt: skip
