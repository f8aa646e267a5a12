"""What an emulated sandbox really is: a file tree and a process namespace of its own, made by bubblewrap."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_SYSTEM = ("usr", "etc", "opt")
_LINKS = ("bin", "sbin", "lib", "lib64")
_INIT = "chmod 1777 /dev/shm; echo up; exec >/dev/null; trap : TERM INT HUP; while :; do sleep 3600 & wait; done"
_RUN = 'cd -- "$1" 2>/dev/null || { echo "cwd $1: no such directory" >&2; exit 126; }; shift; exec "$@"'


def require() -> None:
    """Skip the test where a machine cannot be made; with CI set that is a failure."""
    missing = [name for name in ("bwrap", "nsenter") if shutil.which(name) is None]
    if missing:
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"emulated sandboxes need {', '.join(missing)}")


class Machine:
    """One emulated sandbox. Its root directory is `tree` on this side, writable but for the system's directories.

    Args:
        tree: a directory that this machine owns, not there yet.
        uid: who commands run as (only where the tests run as root; otherwise as whoever runs them).
    """

    def __init__(self, tree: Path, *, uid: int = 1000) -> None:
        self.tree = tree
        self.uid = uid if os.geteuid() == 0 else os.geteuid()
        self._init: subprocess.Popen[bytes] | None = None
        self._pid = 0

    @property
    def running(self) -> bool:
        return self._init is not None and self._init.poll() is None

    def start(self) -> None:
        """Bring it up (anew, after `stop`): takes some ten milliseconds, with no process left from before."""
        for name in (*_SYSTEM, "proc", "dev", "tmp", "home", "root", "var/tmp"):
            (self.tree / name).mkdir(parents=True, exist_ok=True)
        for name in ("tmp", "var/tmp"):
            (self.tree / name).chmod(0o1777)
        for name in _LINKS:
            with contextlib.suppress(FileExistsError):
                (self.tree / name).symlink_to(os.readlink(f"/{name}") if os.path.islink(f"/{name}") else f"usr/{name}")
        if os.geteuid() == 0:
            for name in (".", "home", "root"):
                os.chown(self.tree / name, self.uid, self.uid)
        binds = [part for name in _SYSTEM for part in ("--ro-bind", f"/{name}", f"/{name}")]
        told, tells = os.pipe()
        try:
            self._init = subprocess.Popen(
                [
                    *("bwrap", "--unshare-pid", "--unshare-ipc", "--die-with-parent", "--bind", str(self.tree), "/"),
                    *(*binds, "--proc", "/proc", "--dev", "/dev", "--info-fd", str(tells)),
                    *("sh", "-c", _INIT),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                pass_fds=(tells,),
                start_new_session=True,
                env={"PATH": os.environ["PATH"]},
            )
        finally:
            os.close(tells)
        with open(told, "rb") as info:
            self._pid = json.load(info)["child-pid"]
        assert self._init.stdout is not None
        with self._init.stdout as up:
            up.readline()  # its id is told before its files are in place

    def stop(self) -> None:
        """Kill everything in it; the files stay."""
        if self._init is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)  # its first process: the kernel kills the others with it
            self._init.kill()
            self._init.wait()
            self._init = None

    def remove(self) -> None:
        self.stop()
        subprocess.run(["chmod", "-R", "u+rwX", str(self.tree)], check=False, stderr=subprocess.DEVNULL)
        shutil.rmtree(self.tree, ignore_errors=True)

    def path(self, inside: str) -> Path:
        """Where a file of the machine lies on this side. Links that the machine's commands made are not followed."""
        return self.tree / os.path.normpath("/" + inside).lstrip("/")

    def argv(self, argv: Sequence[str], *, cwd: str = "/") -> list[str]:
        """What runs `argv` in it when started on this side."""
        if not self.running:
            raise ProcessLookupError("the machine is stopped")
        enter = ["nsenter", "-t", str(self._pid), "-m", "-p", "-i"]
        if os.geteuid() == 0:
            enter += ["-S", str(self.uid), "-G", str(self.uid)]
        else:
            enter += ["-U", "--preserve-credentials"]
        return [*enter, "--", "/bin/sh", "-c", _RUN, "sh", cwd, *argv]

    async def spawn(
        self, argv: Sequence[str], *, cwd: str = "/", env: Mapping[str, str], **pipes: int
    ) -> asyncio.subprocess.Process:
        """Start a program in it, leader of a process group of its own; `pipes` as for `asyncio`'s subprocesses.

        The process returned is the door (`nsenter`), which is of the program's process group and ends as it does;
        see `leader` and `kill_group`.
        """
        return await asyncio.create_subprocess_exec(*self.argv(argv, cwd=cwd), env=env, start_new_session=True, **pipes)

    @staticmethod
    async def leader(door: asyncio.subprocess.Process) -> int:
        """The process id, on this side, of the program that `spawn` started; 0 if it has ended."""
        for _ in range(200):
            try:
                children = Path(f"/proc/{door.pid}/task/{door.pid}/children").read_text().split()
            except FileNotFoundError:
                return 0
            if children:
                return int(children[0])
            await asyncio.sleep(0.01)
        return 0

    @staticmethod
    def kill_group(door: asyncio.subprocess.Process, number: int = signal.SIGKILL) -> None:
        """Signal the program's process group, as a server does that started it with `setsid`."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(door.pid, number)
