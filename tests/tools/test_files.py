"""`read`, `write` and `edit`, in every place."""

from __future__ import annotations

import base64

import pytest

from mabridge.tools import ToolLimits
from tests.tools.conftest import Place

pytestmark = pytest.mark.anyio

ODD_NAMES = [
    "with space.txt",
    "new\nline.txt",
    "$(touch pwned).txt",
    "`touch pwned`;touch pwned.txt",
    "'quote\".txt",
    "-n",
    "--help",
    "-dir/-file",
    "back\\slash\\n.txt",
    "*?[a-z].txt",
    "日本語 é 🎉.txt",
    "trailing newline\n",
    "%s%d\\0.txt",
    "~",
    "a=b",
]
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAQAAAC1HAwCAAAAC0lEQVR42mNkYAAAAAYAAjCB0C8AAAAASUVORK5CYII=")


@pytest.mark.parametrize("name", ODD_NAMES)
async def test_any_name_is_written_read_and_edited_as_it_is(place: Place, name: str) -> None:
    assert await place.said("write", file_path=name, content="one\n") == f"wrote 4 bytes to {name}"
    assert await place.said("edit", file_path=name, old_string="one", new_string="two") == (
        f"edited {name} (1 replacement(s))"
    )
    assert await place.said("read", file_path=name) == "two\n"
    assert await place.sh('cat "./$1"', name) == b"two\n"
    assert b"pwned\n" not in await place.sh("ls")


async def test_content_arrives_byte_for_byte(place: Place) -> None:
    content = "".join(map(chr, range(1, 0x300))) + "\r\n\r\0 \\n %s $HOME 🎉\ufeff"
    await place.said("write", file_path="all", content=content)
    assert await place.sh("cat all") == content.encode()
    assert await place.said("read", file_path="all") == content


async def test_large_content_arrives_whole(place: Place) -> None:
    content = "0123456789abcde\n" * 200_000
    await place.said("write", file_path="large", content=content)
    assert await place.sh("cat large") == content.encode()


async def test_empty_file_reads_as_no_output(place: Place) -> None:
    assert await place.said("write", file_path="empty", content="") == "wrote 0 bytes to empty"
    assert await place.said("read", file_path="empty") == "(no output)"


VIEWS = [
    ([1, 1], "one"),
    ([2, 3], "two\nthree"),
    ([0, 1], "one"),
    ([-5, 2], "one\ntwo"),
    ([3, -1], "three\n"),
    ([3, 0], "three\n"),
    ([2, 99], "two\nthree\n"),
    ([4, 4], "(no output)"),
    ([9, 12], "(no output)"),
    ([3, 2], "(no output)"),
]


@pytest.mark.parametrize("limit", [14, 13])
@pytest.mark.parametrize(("view", "lines"), VIEWS)
async def test_view_range_counts_lines_from_one(place: Place, view: list[int], lines: str, limit: int) -> None:
    """A file beyond the limit is cut in the sandbox, another one here: both must come to the same."""
    await place.put("file", "one\ntwo\nthree\n")
    place = Place(place.sandbox, ToolLimits(max_file_bytes=limit))
    assert await place.said("read", file_path="file", view_range=view) == lines


async def test_empty_view_range_is_the_whole_file(place: Place) -> None:
    await place.put("file", "one\ntwo\nthree\n")
    for view in ([], [1, -1], [1, 4]):
        assert await place.said("read", file_path="file", view_range=view) == "one\ntwo\nthree\n"


async def test_lines_keep_their_carriage_returns(place: Place) -> None:
    await place.put("dos", "a\r\nb\r\nc")
    assert await place.said("read", file_path="dos", view_range=[1, 2]) == "a\r\nb\r"
    place = Place(place.sandbox, ToolLimits(max_file_bytes=6))
    assert await place.said("read", file_path="dos", view_range=[1, 2]) == "a\r\nb\r"
    assert await place.said("read", file_path="dos", view_range=[3, 9]) == "c"


async def test_too_large_a_file_is_refused_with_a_hint(place: Place) -> None:
    place = Place(place.sandbox, ToolLimits(max_file_bytes=100))
    await place.put("big", "x" * 60 + "\n" + "y" * 60 + "\n" + "z" * 150 + "\n")
    assert await place.refused("read", file_path="big") == (
        "read: big is 273 bytes, exceeds 100-byte limit. "
        "Use the view_range parameter to read specific line ranges, e.g. view_range: [1, 500]."
    )
    assert await place.said("read", file_path="big", view_range=[2, 2]) == "y" * 60
    assert "view_range [1, 2] of big exceeds 100-byte limit" in await place.refused(
        "read", file_path="big", view_range=[1, 2]
    )
    assert "line 3 of big alone exceeds 100-byte limit" in await place.refused(
        "read", file_path="big", view_range=[3, 3]
    )
    assert "cannot modify a file this large" in await place.refused(
        "edit", file_path="big", old_string="x", new_string="y"
    )


async def test_text_beyond_what_a_result_holds_is_cut_at_a_line_and_says_where_to_go_on(place: Place) -> None:
    lines = [f"line {number} é" for number in range(1, 15_001)]
    await place.put("long", "\n".join(lines))
    text = await place.said("read", file_path="long")
    shown, _, hint = text.rpartition("\n")
    assert len(text) < 100_000
    last = len(shown.split("\n"))
    assert shown == "\n".join(lines[:last])
    assert f"from line {last + 1}." in hint
    more = await place.said("read", file_path="long", view_range=[last + 1, 15_000])
    assert more.startswith(lines[last])
    await place.put("wide", "é" * 120_000)
    text = await place.said("read", file_path="wide")
    assert len(text) < 100_000
    assert text.startswith("é" * 98_000)
    assert "cut after 99000 of 120000 characters of line 1" in text


async def test_binary_is_no_text(place: Place) -> None:
    await place.put("bin", b"\x00\xff\xfe")
    assert await place.refused("read", file_path="bin") == (
        "read: bin: not valid UTF-8 text (binary files are only supported for image/PDF extensions)"
    )
    assert await place.refused("edit", file_path="bin", old_string="a", new_string="b") == (
        "edit: bin: not valid UTF-8 text (cannot edit binary files)"
    )


async def test_image_and_pdf_come_as_blocks(place: Place) -> None:
    await place.put("pic.PNG", PNG)
    await place.put("doc.pdf", b"%PDF-1.4\n...")
    await place.sh("ln -s pic.PNG link")
    data = base64.standard_b64encode(PNG).decode()
    image = [{"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": data}}]
    assert (await place.call("read", file_path="pic.PNG")).content == image
    assert (await place.call("read", file_path="link")).content == image
    (block,) = (await place.call("read", file_path="doc.pdf")).content
    assert (block["type"], block["source"]["media_type"]) == ("document", "application/pdf")
    assert await place.refused("read", file_path="pic.PNG", view_range=[1, 2]) == (
        "read: view_range is not supported for image/PDF files"
    )


async def test_image_is_called_what_it_is(place: Place) -> None:
    """The platform refuses a block whose media type is wrong, and the call would stay open for good."""
    await place.put("really-a-gif.png", b"GIF89a...")
    (block,) = (await place.call("read", file_path="really-a-gif.png")).content
    assert block["source"]["media_type"] == "image/gif"
    for content in (b"", b"not one"):
        await place.put("fake.png", content)
        assert "not a PNG, JPEG, GIF or WebP image" in await place.refused("read", file_path="fake.png")
    await place.put("fake.pdf", PNG)
    assert "not a PDF" in await place.refused("read", file_path="fake.pdf")


async def test_too_large_an_image_is_refused(place: Place) -> None:
    place = Place(place.sandbox, ToolLimits(max_image_base64_bytes=100, max_pdf_bytes=50))
    await place.put("a.png", PNG + b"x" * 100)
    await place.put("a.pdf", b"%PDF-" + b"x" * 46)
    assert await place.refused("read", file_path="a.png") == (
        f"read: a.png is {len(PNG) + 100} bytes, exceeds 75-byte limit for image/PDF files."
    )
    assert "exceeds 50-byte limit for image/PDF files" in await place.refused("read", file_path="a.pdf")


async def test_failures_say_why_in_the_words_of_the_sdk(place: Place) -> None:
    await place.put("file", "x")
    await place.sh("mkdir dir; mkfifo fifo; ln -s loop loop")
    assert await place.refused("read", file_path="none") == "read: none: no such file or directory"
    assert await place.refused("read", file_path="none/x") == "read: none/x: no such file or directory"
    assert await place.refused("read", file_path="file/x") == "read: file/x: not a directory"
    assert await place.refused("read", file_path="dir") == "read: dir: not a regular file"
    assert await place.refused("read", file_path="") == "read: : not a regular file"
    assert await place.refused("read", file_path="fifo") == "read: fifo: not a regular file"
    assert await place.refused("read", file_path="loop") == "read: path 'loop': too many levels of symbolic links"
    assert await place.refused("read", file_path="a\0b") == "read: embedded null byte"
    assert await place.refused("read", file_path="x" * 300) == f"read: path {'x' * 200!r}: file name too long"
    assert await place.refused("write", file_path="dir", content="") == "write: dir: is a directory"
    assert await place.refused("write", file_path="fifo", content="") == "write: fifo: not a regular file"
    assert await place.refused("write", file_path="file/x", content="") == "write: file/x: file already exists"
    assert await place.refused("write", file_path="file/x/y", content="") == "write: file/x/y: not a directory"
    assert await place.refused("edit", file_path="none", old_string="a", new_string="b") == (
        "edit: none: no such file or directory"
    )
    assert await place.sh("ls -A") == b"dir\nfifo\nfile\nloop\n"


async def test_nothing_outside_the_working_directory_is_reached(place: Place) -> None:
    await place.sh("mkdir in; ln -s / root; ln -s ../../etc up; ln -s /etc/hostname leaf; ln -s /nowhere/x dangling")
    outside = [
        "/etc/hostname",
        "../../../../../../../../etc/hostname",
        "root/etc/hostname",
        "leaf",
        "dangling",
        "in/../..",
    ]
    for path in outside:
        error = f"path {path!r} is outside the session's working directory"
        assert await place.refused("read", file_path=path) == f"read: {error}"
        assert await place.refused("write", file_path=path, content="") == f"write: {error}"
        assert await place.refused("edit", file_path=path, old_string="a", new_string="b") == f"edit: {error}"
        assert await place.refused("glob", pattern="*", path=path) == f"glob: {error}"
        assert await place.refused("grep", pattern="x", path=path) == f"grep: {error}"


async def test_ways_round_that_end_inside_are_taken(place: Place) -> None:
    await place.put("dir/file", "x")
    await place.sh('ln -s "$PWD/dir" absolute; ln -s dir/../dir relative; ln -s nothing/yet new')
    name = place.sandbox.workdir.rpartition("/")[2]
    for path in [
        "dir/file",
        f"{place.sandbox.workdir}/dir/file",
        "absolute/file",
        "relative/file",
        f"../{name}/dir/file",
        "./dir//file",
        "dir/none/../file",
        "dir/file/",
    ]:
        assert await place.said("read", file_path=path) == "x"
    await place.said("write", file_path="new", content="through a dangling link")
    assert await place.sh("cat nothing/yet") == b"through a dangling link"


async def test_more_roots_are_reached_and_read_only_ones_not_written(place: Place) -> None:
    await place.put("store/rw/a", "x")
    await place.put("store/ro/a", "x")
    base = place.sandbox.workdir
    await place.sh("mkdir work")
    inner = Place(place.sandbox, place.limits)
    tools = inner.tools(allowed_roots=[f"{base}/store/rw"], read_only_roots=[f"{base}/store/ro"])
    for path, error in [
        (f"{base}/store/rw/a", False),
        (f"{base}/store/ro/a", True),
        ("store/ro/new", True),
    ]:
        result = await tools.call("write", {"file_path": path, "content": "new"}, call_id="1")
        assert result.is_error is error, result
    assert result.content[0]["text"] == f"write: store/ro/new is inside read-only directory {base}/store/ro"
    assert not (await tools.call("read", {"file_path": f"{base}/store/ro/a"}, call_id="1")).is_error
    result = await tools.call("read", {"file_path": "/etc/hostname"}, call_id="1")
    assert result.content[0]["text"].endswith("working directory and its other permitted directories")


async def test_write_keeps_mode_and_hard_links_and_leaves_nothing_beside(place: Place) -> None:
    await place.put("script", "old")
    await place.put("linked", "old")
    await place.sh("chmod 751 script; ln linked other")
    for name in ("script", "linked"):
        await place.said("write", file_path=name, content="new")
    assert await place.sh("stat -c %a script; cat other; ls -A") == b"751\nnewlinked\nother\nscript\n"


async def test_write_replaces_in_one_step(place: Place) -> None:
    """Whoever has the old file open goes on with it whole."""
    await place.put("file", "old")
    seen = await place.sh("exec 3<file; stat -c %i file >ino; cat <&3", "")
    before = await place.sh("stat -c %i file")
    await place.said("write", file_path="file", content="new")
    assert seen == b"old"
    assert await place.sh("stat -c %i file") != before


async def test_edit_needs_one_match_or_replace_all(place: Place) -> None:
    await place.put("file", "a b a\r\n")
    edit = {"file_path": "file", "old_string": "a", "new_string": "aa"}
    assert await place.refused("edit", **edit) == "edit: old_string appears 2 times in file (must be unique)"
    assert await place.refused("edit", **{**edit, "old_string": "z"}) == "edit: old_string not found in file"
    assert "must not be empty" in await place.refused("edit", **{**edit, "old_string": ""})
    assert await place.said("edit", **edit, replace_all=True) == "edited file (2 replacement(s))"
    assert await place.sh("cat file") == b"aa b aa\r\n"


async def test_edit_that_would_grow_out_of_bounds_is_refused(place: Place) -> None:
    await place.put("file", "a" * 1000)
    assert "would grow" in await place.refused(
        "edit", file_path="file", old_string="a", new_string="b" * 100_000, replace_all=True
    )
    assert await place.sh("cat file") == b"a" * 1000


async def test_edit_does_not_undo_what_changed_meanwhile(place: Place) -> None:
    await place.put("file", "one")

    class Meddler(type(place.sandbox)):  # type: ignore[misc]
        """Changes the file between the edit's reading and its writing."""

        def __init__(self) -> None:
            self.__dict__.update(place.sandbox.__dict__)

        async def exec(self, argv: list[str], **options: object) -> object:
            result = await place.sandbox.exec(argv, **options)
            if options["stdin"] is None:
                await place.put("file", "one, and more")
            return result

    result = await Place(Meddler(), place.limits).call("edit", file_path="file", old_string="one", new_string="two")
    assert result.is_error
    assert "changed by something else meanwhile" in place.text(result)
    assert await place.sh("cat file") == b"one, and more"


async def test_content_that_does_not_arrive_whole_changes_nothing(place: Place) -> None:
    await place.put("file", "old")

    class Cut(type(place.sandbox)):  # type: ignore[misc]
        """Its connection drops the end of stdin."""

        def __init__(self) -> None:
            self.__dict__.update(place.sandbox.__dict__)

        async def exec(self, argv: list[str], *, stdin: bytes | None = None, **options: object) -> object:
            return await place.sandbox.exec(argv, stdin=stdin and stdin[:-1], **options)

    for name in ("file", "new"):
        result = await Place(Cut(), place.limits).call("write", file_path=name, content="longer")
        assert result.is_error
        assert "not all of the content arrived" in place.text(result)
    assert await place.sh("cat *; ls -A") == b"oldfile\n"


async def test_half_a_character_is_refused(place: Place) -> None:
    for given in [
        {"file_path": "a\ud800", "content": "x"},
        {"file_path": "a", "content": "x\udfff"},
    ]:
        assert "unpaired surrogate at character 1" in await place.refused("write", **given)
    assert await place.sh("ls -A") == b""


async def test_removed_working_directory_is_made_again_by_write(place: Place) -> None:
    await place.sh('rm -rf "$PWD"')
    assert await place.refused("read", file_path="a") == "read: a: no such file or directory"
    assert await place.said("write", file_path="a", content="x") == "wrote 1 bytes to a"
    assert await place.said("read", file_path="a") == "x"
