"""`Sandbox.read_file` and `Sandbox.write_file`."""

from __future__ import annotations

import hashlib

import anyio
import pytest

from mabridge.errors import FileTooLarge
from mabridge.sandbox import Sandbox
from mabridge.testing.conformance.helpers import is_root, run, sh, stat

__all__ = ["FilesTests"]

_NAMES = [
    "plain",
    "-rf",
    "a b",
    "$(id)",
    "it's",
    '"',
    "new\nline",
    "ends\n",
    "*",
    "é☃",
    ".hidden",
    "back\\slash",
    "a=b",
]
_LARGE = 50 * 1024 * 1024


class FilesTests:
    """Files: every byte, every name, and the right error."""

    async def test_what_was_written_is_read(self, sandbox: Sandbox) -> None:
        for data in (b"", b"x", b"no end", b"\r\n\xff\xfe\0", bytes(range(256)) * 4000):
            await sandbox.write_file("file", data)
            assert await sandbox.read_file("file", max_bytes=len(data)) == data

    async def test_file_of_50_mib_passes_whole(self, sandbox: Sandbox) -> None:
        data = hashlib.sha256(b"x").digest() * (_LARGE // 32)
        await sandbox.write_file("file", data)
        assert await sandbox.read_file("file", max_bytes=len(data)) == data

    async def test_any_name_is_just_a_name(self, sandbox: Sandbox) -> None:
        async def one(name: str) -> None:
            await sandbox.write_file(f"in {name}/{name}", name.encode())
            assert await sandbox.read_file(f"{sandbox.workdir}/in {name}/{name}", max_bytes=100) == name.encode()
            assert (await sh(sandbox, 'cat "$1"', f"./in {name}/{name}")).stdout == name.encode()

        async with anyio.create_task_group() as group:
            for name in _NAMES:
                group.start_soon(one, name)
        made = (await sh(sandbox, 'for d in in*; do printf "%s\\0" "$d"; done')).stdout.split(b"\0")
        assert len(made) == len(_NAMES) + 1

    async def test_commands_and_files_see_the_same(self, sandbox: Sandbox) -> None:
        await sandbox.write_file("file", b"written")
        assert (await run(sandbox, "cat", f"{sandbox.workdir}/file")).stdout == b"written"
        await sh(sandbox, "printf changed > file")
        assert await sandbox.read_file("file", max_bytes=100) == b"changed"

    async def test_directories_on_the_way_are_made(self, sandbox: Sandbox) -> None:
        await sandbox.write_file("a/b/c/file", b"x")
        assert await stat(sandbox, "a/b", "%a") == "755"

    async def test_mode_is_set_for_a_new_file_and_an_old_one(self, sandbox: Sandbox) -> None:
        await sh(sandbox, "touch old; chmod 640 old")
        for mode in (0o755, 0o600, 0o644, 0o444):
            for name in ("old", f"new{mode}"):
                await sh(sandbox, "chmod u+w old")
                await sandbox.write_file(name, b"x", mode=mode)
                assert await stat(sandbox, name, "%a") == f"{mode:o}"

    async def test_file_belongs_to_whom_commands_run_as(self, sandbox: Sandbox) -> None:
        await sandbox.write_file("a/file", b"x")
        uid = (await run(sandbox, "id", "-u")).stdout.decode().strip()
        assert await stat(sandbox, "a/file", "%u") == uid
        assert await stat(sandbox, "a", "%u") == uid

    async def test_writing_replaces_the_whole_and_leaves_nothing_beside_it(self, sandbox: Sandbox) -> None:
        await sandbox.write_file("file", b"a long text")
        await sandbox.write_file("file", b"short")
        assert await sandbox.read_file("file", max_bytes=100) == b"short"
        assert (await run(sandbox, "ls", "-A")).stdout == b"file\n"

    async def test_writers_at_once_leave_the_whole_of_one(self, sandbox: Sandbox) -> None:
        async with anyio.create_task_group() as group:
            for number in range(8):
                group.start_soon(sandbox.write_file, "file", b"%d" % number * 200_000)
        data = await sandbox.read_file("file", max_bytes=1_000_000)
        assert (len(data), len(set(data))) == (200_000, 1)

    async def test_cancelled_write_leaves_a_whole_file_and_nothing_beside_it(self, sandbox: Sandbox) -> None:
        old, new = b"old", bytes(20_000_000)
        for delay in (0.01, 0.03, 0.05):
            await sandbox.write_file("file", old)
            with anyio.move_on_after(delay):
                await sandbox.write_file("file", new)
            assert await sandbox.read_file("file", max_bytes=len(new)) in (old, new)
            assert (await run(sandbox, "ls", "-A")).stdout == b"file\n"

    async def test_link_is_followed_when_read_and_when_written(self, sandbox: Sandbox) -> None:
        await sh(sandbox, "mkdir d; echo old > d/target; ln -s d/target link; ln -s d/new dangling")
        assert await sandbox.read_file("link", max_bytes=100) == b"old\n"
        await sandbox.write_file("link", b"new")
        assert await sandbox.read_file("d/target", max_bytes=100) == b"new"
        await sandbox.write_file("dangling", b"there")
        assert await sandbox.read_file("d/new", max_bytes=100) == b"there"
        assert (await sh(sandbox, "[ -h link ] && [ -h dangling ]")).exit_code == 0

    async def test_missing_file_is_not_found(self, sandbox: Sandbox) -> None:
        await sh(sandbox, "touch file; ln -s loop loop; ln -s none dangling")
        for path in ("none", "no/such", "file/below", "loop", "dangling", "a\0b", "\ud800"):
            with pytest.raises(FileNotFoundError):
                await sandbox.read_file(path, max_bytes=100)

    async def test_directory_is_neither_read_nor_written(self, sandbox: Sandbox) -> None:
        await run(sandbox, "mkdir", "d")
        for path in ("d", "d/", ".", "..", "", "/"):
            with pytest.raises(IsADirectoryError):
                await sandbox.read_file(path, max_bytes=100)
            with pytest.raises(IsADirectoryError):
                await sandbox.write_file(path, b"x")

    async def test_new_file_with_a_directorys_name_is_refused(self, sandbox: Sandbox) -> None:
        with pytest.raises(IsADirectoryError):
            await sandbox.write_file("new/", b"x")
        assert (await run(sandbox, "ls", "-A")).stdout == b""

    async def test_file_on_the_way_is_not_a_directory(self, sandbox: Sandbox) -> None:
        await sandbox.write_file("file", b"x")
        with pytest.raises(NotADirectoryError):
            await sandbox.write_file("file/below/it", b"x")

    async def test_what_is_no_regular_file_is_refused_at_once(self, sandbox: Sandbox) -> None:
        await run(sandbox, "mkfifo", "fifo")
        for path in ("fifo", "/dev/zero"):
            with anyio.fail_after(30):
                with pytest.raises(PermissionError):
                    await sandbox.read_file(path, max_bytes=100)
                with pytest.raises(PermissionError):
                    await sandbox.write_file(path, b"x")

    async def test_forbidden_file_is_a_permission_error(self, sandbox: Sandbox) -> None:
        await _skip_root(sandbox)
        await sh(sandbox, "echo x > secret; chmod 000 secret; mkdir -p shut/in; echo x > shut/in/file; chmod 000 shut")
        for path in ("secret", "shut/in/file", "shut/none"):
            with pytest.raises(PermissionError):
                await sandbox.read_file(path, max_bytes=100)
            with pytest.raises(PermissionError):
                await sandbox.write_file(path, b"y")
        for path, near in (("/etc/new", "/etc"), ("/etc/passwd", "/etc/passwd"), ("/new/file", "/")):
            if (await sh(sandbox, '[ -w "$1" ]', near)).exit_code != 0:
                with pytest.raises(PermissionError):
                    await sandbox.write_file(path, b"y")

    async def test_file_that_may_not_be_written_keeps_what_it_holds(self, sandbox: Sandbox) -> None:
        await _skip_root(sandbox)
        await sandbox.write_file("fixed", b"old", mode=0o444)
        with pytest.raises(PermissionError):
            await sandbox.write_file("fixed", b"new")
        assert await sandbox.read_file("fixed", max_bytes=100) == b"old"

    async def test_file_is_written_in_place_where_the_directory_takes_no_new_one(self, sandbox: Sandbox) -> None:
        await _skip_root(sandbox)
        await sh(sandbox, "mkdir d; echo a long text > d/file; chmod 555 d")
        await sandbox.write_file("d/file", b"new")
        assert await sandbox.read_file("d/file", max_bytes=100) == b"new"
        with pytest.raises(PermissionError):
            await sandbox.write_file("d/other", b"new")

    async def test_file_above_the_bound_is_too_large_and_says_how_large(self, sandbox: Sandbox) -> None:
        await sandbox.write_file("file", bytes(5000))
        assert len(await sandbox.read_file("file", max_bytes=5000)) == 5000
        with pytest.raises(FileTooLarge) as caught:
            await sandbox.read_file("file", max_bytes=4999)
        assert (caught.value.size, caught.value.limit) == (5000, 4999)

    async def test_file_that_hides_its_size_is_bounded_too(self, sandbox: Sandbox) -> None:
        with pytest.raises(FileTooLarge):
            await sandbox.read_file("/proc/self/status", max_bytes=10)
        assert b"Pid:" in await sandbox.read_file("/proc/self/status", max_bytes=100_000)

    async def test_full_disk_is_told_and_the_old_file_is_kept(self, sandbox: Sandbox) -> None:
        """It is tried on the shared memory of a container, whose size is known."""
        if (await sh(sandbox, '[ "$(stat -f -c "%S * %b" /dev/shm)" = "4096 * 16384" ]')).exit_code != 0:
            pytest.skip("the sandbox has no small file system to fill (/dev/shm of 64 MiB)")
        await sandbox.write_file("/dev/shm/file", b"old")  # noqa: S108 - of the sandbox
        with pytest.raises(OSError, match="No space left"):
            await sandbox.write_file("/dev/shm/file", bytes(70_000_000))  # noqa: S108
        assert await sandbox.read_file("/dev/shm/file", max_bytes=100) == b"old"  # noqa: S108
        assert (await run(sandbox, "ls", "-A", "/dev/shm")).stdout == b"file\n"  # noqa: S108


async def _skip_root(sandbox: Sandbox) -> None:
    if await is_root(sandbox):
        pytest.skip("commands run as root there, to whom nothing is forbidden")
