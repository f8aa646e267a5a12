"""The ``local`` provider: a directory and processes on this machine, for trying and testing.

It isolates nothing: what an agent runs here has the rights of whoever runs the worker. What it does keep to is the
contract, so everything built on a `Sandbox` can be tried without an engine or an account.
"""

from __future__ import annotations

import contextlib
import errno
import getpass
import json
import logging
import os
import shutil
import stat
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar, Self

import anyio
import anyio.to_thread
from pydantic import Field

from mabridge.errors import ConfigError, CreateFailed, SandboxGone, SandboxUnavailable
from mabridge.providers import _shell
from mabridge.providers._subprocess import HeldProcess, communicate, kill_marked
from mabridge.sandbox import ExecResult, Process, Provider, ProviderOptions, Sandbox, SandboxInfo, SandboxSpec

__all__ = ["LocalOptions", "LocalProvider"]

logger = logging.getLogger(__name__)

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_SWEEP_PERIOD = 60.0  # seconds between two looks for what is past its deadline, besides those of `list`
_SANDBOX = "MAB_SANDBOX"  # marks every process of a sandbox, for teardown


def _default_root() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mabridge" / "sandboxes"


class LocalOptions(ProviderOptions):
    """Options of the ``local`` provider."""

    root: Path = Field(default_factory=_default_root)
    """The directory that holds a directory for each sandbox; made, for this user alone, if missing."""


class LocalProvider(Provider):
    """Sandboxes that are directories of this machine. `SandboxSpec.workdir` becomes a directory among them."""

    type: ClassVar[str] = "local"
    Options = LocalOptions

    def __init__(self, options: LocalOptions | None = None) -> None:
        super().__init__(options or LocalOptions())
        self._root = (options or LocalOptions()).root.expanduser().absolute()
        self._sweep_at = 0.0

    async def __aenter__(self) -> Self:
        """Say what this provider is not."""
        logger.warning(
            "the local provider isolates nothing: agents' commands run on this machine as %s, with its files and its "
            "network. Use it to try and to test only.",
            getpass.getuser(),
        )
        return self

    async def create(self, spec: SandboxSpec) -> Sandbox:
        try:
            if time.monotonic() > self._sweep_at:  # not each time: it looks at every sandbox
                self._sweep_at = time.monotonic() + _SWEEP_PERIOD
                await anyio.to_thread.run_sync(self._sweep)
            await anyio.to_thread.run_sync(self._make, spec)
        except OSError as exc:
            message = f"no directory for the sandbox under {self._root}: {exc}; set the option root"
            raise CreateFailed(message, provider=self.type, op="create") from exc
        return LocalSandbox(self._root / spec.key)

    async def attach(self, key: str) -> Sandbox | None:
        path = self._root / key
        try:
            if _deadline(path) > time.time():
                return LocalSandbox(path)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise SandboxUnavailable(str(exc), provider=self.type, op="attach", sandbox_id=str(path)) from exc
        await anyio.to_thread.run_sync(_remove, path)
        return None

    async def list(self) -> AsyncIterator[SandboxInfo]:
        try:
            infos = await anyio.to_thread.run_sync(self._sweep)
        except OSError as exc:
            raise SandboxUnavailable(str(exc), provider=self.type, op="list") from exc
        for info in infos:
            yield info

    async def check(self) -> None:
        try:
            self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise ConfigError(f"local: {exc}; set the option root to a directory that can be made") from exc
        if not os.access(self._root, os.W_OK | os.X_OK):
            raise ConfigError(f"local: the directory {self._root} may not be written; set the option root")

    def _make(self, spec: SandboxSpec) -> None:
        """Make the directory whole under another name, and rename it: it is there complete, or not at all."""
        self._root.mkdir(parents=True, exist_ok=True, mode=0o700)
        new = self._root / f".new-{uuid.uuid4().hex}"
        new.mkdir(mode=0o700)
        try:
            for name in ("workspace", "home", "tmp"):
                (new / name).mkdir(mode=0o700)
            about = {"key": spec.key, "labels": dict(spec.labels), "env": _shell.check_env(spec.env)}
            (new / "sandbox.json").write_text(json.dumps(about), encoding="utf-8")
            (new / "deadline").touch()
            os.utime(new / "deadline", (time.time() + spec.ttl,) * 2)
            new.rename(self._root / spec.key)
        except OSError as exc:
            if exc.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        finally:
            shutil.rmtree(new, ignore_errors=True)  # after the rename there is none: the other creator was first

    def _sweep(self) -> Sequence[SandboxInfo]:
        """Remove what is past its deadline or half removed; return the rest."""
        infos = []
        for path in sorted(self._root.iterdir()) if self._root.is_dir() else ():
            try:
                if path.name.startswith(".gone-"):
                    _remove_files(path)
                elif path.name.startswith("."):
                    continue
                elif _deadline(path) <= time.time():
                    _remove(path)
                else:
                    about = json.loads((path / "sandbox.json").read_text(encoding="utf-8"))
                    created = datetime.fromtimestamp((path / "sandbox.json").stat().st_mtime, UTC)
                    infos.append(
                        SandboxInfo(
                            key=about["key"],
                            id=str(path),
                            labels=about["labels"],
                            state="running",
                            created_at=created,
                        )
                    )
            except (FileNotFoundError, NotADirectoryError):
                continue  # another worker removed it meanwhile, or it is not a sandbox
        return infos


class LocalSandbox(Sandbox):
    """A directory of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.id = str(path)
        self.workdir = str(path / "workspace")

    async def exec(
        self,
        argv: Sequence[str],
        *,
        stdin: bytes | None = None,
        cwd: str | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float,
        max_output: int,
    ) -> ExecResult:
        marker = uuid.uuid4().hex
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        process = self._start("exec", argv, cwd, env, marker, stdin=null if stdin is None else pipe, stderr=pipe)
        return await communicate(process, stdin=stdin, marker=marker, timeout=timeout, max_output=max_output)

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program and hold it open; see `mabridge.sandbox.SupportsProcess`."""
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        process = self._start("open_process", argv, cwd, env, uuid.uuid4().hex, stdin=pipe, stderr=null)
        return HeldProcess(self.id, process)

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        return await _shell.read_file(self, path, max_bytes=max_bytes, provider=LocalProvider.type)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        await _shell.write_file(self, path, data, mode=mode, provider=LocalProvider.type)

    async def teardown(self) -> None:
        with anyio.CancelScope(shield=True):
            try:
                await anyio.to_thread.run_sync(_remove, self._path)
            except OSError as exc:
                message = f"could not be removed: {exc}"
                raise SandboxUnavailable(message, provider="local", op="teardown", sandbox_id=self.id) from exc

    async def keep_alive(self, ttl: float) -> None:
        try:
            until = max(time.time() + ttl, _deadline(self._path))
            os.utime(self._path / "deadline", (until, until))
        except FileNotFoundError as exc:
            raise self._gone("keep_alive") from exc

    def _start(
        self,
        op: str,
        argv: Sequence[str],
        cwd: str | None,
        env: Mapping[str, str] | None,
        marker: str,
        *,
        stdin: int,
        stderr: int,
    ) -> subprocess.Popen[bytes]:
        try:
            own = json.loads((self._path / "sandbox.json").read_text(encoding="utf-8"))["env"]
        except FileNotFoundError as exc:
            raise self._gone(op) from exc
        environment = {
            "PATH": os.environ.get("PATH", _PATH),
            "LANG": os.environ.get("LANG", "C.UTF-8"),
            "HOME": str(self._path / "home"),
            "TMPDIR": str(self._path / "tmp"),
            **own,
            **_shell.check_env(env),
            _SANDBOX: self.id,
            _shell.MARKER: marker,
        }
        command = _shell.run_argv(argv, self.workdir if cwd is None else cwd)
        try:
            process = subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=stderr,
                env=environment,
                cwd="/",
                start_new_session=True,
                bufsize=0,
            )
        except OSError as exc:
            message = f"{command[0]} could not be started: {exc}"
            raise SandboxUnavailable(message, provider="local", op=op, sandbox_id=self.id) from exc
        for end in (process.stdin, process.stdout, process.stderr):
            if end is not None:
                os.set_blocking(end.fileno(), False)
        return process

    def _gone(self, op: str) -> SandboxGone:
        return SandboxGone("its directory is not there", provider="local", op=op, sandbox_id=self.id)


def _deadline(path: Path) -> float:
    """Seconds since the epoch: the time of a file, so that setting it is one atomic step."""
    return (path / "deadline").stat().st_mtime


def _remove(path: Path) -> None:
    gone = path.with_name(f".gone-{uuid.uuid4().hex}")
    try:
        path.rename(gone)
    except FileNotFoundError:
        return
    kill_marked(f"{_SANDBOX}={path}")
    _remove_files(gone)


def _remove_files(path: Path) -> None:
    for directory, names, _ in os.walk(path):
        for name in names:  # one that was made unreadable could not be emptied
            inner = os.path.join(directory, name)
            with contextlib.suppress(FileNotFoundError):  # another worker sweeps the same remains
                if not os.path.islink(inner):
                    os.chmod(inner, stat.S_IRWXU)
    shutil.rmtree(path, ignore_errors=True)
    if path.exists():
        raise OSError(errno.EBUSY, "not all of it could be removed", str(path))
