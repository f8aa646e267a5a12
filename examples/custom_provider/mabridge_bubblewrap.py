"""A provider for mabridge: sandboxes on this machine, made by bubblewrap (https://github.com/containers/bubblewrap).

A sandbox is a directory and a process namespace. Its files are its own but for ``/usr``, ``/etc`` and ``/opt``, which
are this machine's and read-only; it has no network unless it is given this machine's. As with any container, the kernel
is shared.

What holds the namespace open is a guard that no worker owns: a shell that removes everything when the time is up. So
the sandbox outlives the worker that made it, and another finds it by its directory.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

from mabridge import (
    ConfigError,
    CreateFailed,
    ExecResult,
    Process,
    Provider,
    ProviderOptions,
    Sandbox,
    SandboxGone,
    SandboxInfo,
    SandboxSpec,
    SandboxUnavailable,
    hookimpl,
)
from mabridge.adapters import MARKER, HeldProcess, check_env, communicate, read_file, run_argv, write_file

T = TypeVar("T")

_SHARED = ("usr", "etc", "opt")
_LINKS = ("bin", "sbin", "lib", "lib64")
_DEVICES = ("null", "zero", "full", "random", "urandom", "tty")
_HOME = "/home/agent"
_AGENT = 1000  # who commands run as where the worker is root
_START = 20.0  # seconds for a new sandbox

# Runs in the sandbox's directory, which is renamed once it is ready, so it goes by no path. $@ is the bwrap command.
_GUARD = r"""
"$@" 3>info >ready &
while kill -0 $! 2>/dev/null && until=$(stat -c %Y deadline 2>/dev/null) && [ "$(date +%s)" -le "$until" ]; do
    sleep 1
done
kill -9 $(sed -n 's/.*"child-pid": *\([0-9]*\).*/\1/p' info 2>/dev/null) 2>/dev/null
wait
here=$(pwd -P) && cd .. && chmod -R u+rwx "$here" 2>/dev/null
[ -z "$here" ] || rm -rf "$here"
"""


@hookimpl
def mabridge_register_providers(register: Callable[..., None]) -> None:
    """Tell mabridge of the provider."""
    register(BubblewrapProvider)


class BubblewrapOptions(ProviderOptions):
    """Options of the ``bubblewrap`` provider."""

    root: Path = Path("/var/tmp/mabridge-bubblewrap")
    """The directory that holds a directory for each sandbox; made if missing. Workers that share it share them."""
    share_net: bool = False
    """Whether the sandbox has the network of this machine; otherwise it has none."""


class BubblewrapProvider(Provider):
    """Namespaces of this machine."""

    type = "bubblewrap"
    Options = BubblewrapOptions
    options: BubblewrapOptions

    def __init__(self, options: BubblewrapOptions) -> None:
        super().__init__(options)
        self._root = options.root.absolute()

    async def create(self, spec: SandboxSpec) -> Sandbox:
        """See `mabridge.Provider.create`."""
        found = await self.attach(spec.key)
        if found is not None:
            return found
        await self.check()
        new = self._root / f".new-{uuid.uuid4().hex}"
        try:
            await _in_thread(self._prepare, new, spec)
            with anyio.fail_after(_START):
                while not (new / "ready").exists() or not (new / "ready").stat().st_size:  # noqa: ASYNC110
                    await anyio.sleep(0.01)
            new.rename(self._root / spec.key)  # atomic, and it fails if another creator was first
        except TimeoutError:
            raise self._failed(f"bwrap did not start: {_said(new)}") from None
        except OSError as exc:
            found = await self.attach(spec.key)
            if found is not None:
                return found
            raise self._failed(f"{exc}; set the option root to a directory that can be written") from exc
        finally:
            await _in_thread(_remove, new)  # there is none when all went well
        return BubblewrapSandbox(self._root / spec.key)

    async def attach(self, key: str) -> Sandbox | None:
        """See `mabridge.Provider.attach`."""
        path = self._root / key
        try:
            if _init_of(path) is not None:
                return BubblewrapSandbox(path)
        except FileNotFoundError:
            return None
        except OSError as exc:
            raise SandboxUnavailable(str(exc), provider=self.type, op="attach", sandbox_id=str(path)) from exc
        await _in_thread(_remove, path)  # its processes are gone: the machine was started anew
        return None

    async def list(self) -> AsyncIterator[SandboxInfo]:
        """See `mabridge.Provider.list`."""
        try:
            paths = sorted(self._root.iterdir()) if self._root.exists() else []
        except OSError as exc:
            raise SandboxUnavailable(str(exc), provider=self.type, op="list") from exc
        for path in paths:
            try:
                if path.name.startswith(".") or _init_of(path) is None:
                    continue
                about = json.loads((path / "about.json").read_text())
            except (FileNotFoundError, NotADirectoryError):
                continue  # it was removed meanwhile, or is no sandbox
            created = datetime.fromtimestamp((path / "about.json").stat().st_mtime, UTC)
            yield SandboxInfo(key=path.name, id=str(path), labels=about["labels"], state="running", created_at=created)

    async def check(self) -> None:
        """See `mabridge.Provider.check`."""
        for program in ("bwrap", "nsenter", "setsid"):
            if shutil.which(program) is None:
                raise ConfigError(f"bubblewrap: {program} is not installed: apt-get install bubblewrap util-linux")

    def _prepare(self, new: Path, spec: SandboxSpec) -> None:
        """Make the directory and start the guard."""
        env = check_env(spec.env)
        tree = new / "tree"
        home, workdir = _HOME.strip("/"), os.path.normpath("/" + spec.workdir).strip("/")
        for name in (*_SHARED, "proc", "dev", "tmp", "var/tmp", home, workdir):
            (tree / name).mkdir(parents=True, exist_ok=True)
        for directory in (tree, *tree.glob("**/")):  # whatever the worker's umask is
            directory.chmod(0o755)
        for name in ("tmp", "var/tmp"):
            (tree / name).chmod(0o1777)
        for name in _LINKS:
            link = Path("/", name)
            (tree / name).symlink_to(os.readlink(link) if link.is_symlink() else f"usr/{name}")
        if os.geteuid() == 0:
            for name in (home, workdir):
                os.chown(tree / name, _AGENT, _AGENT)
        about = {"labels": dict(spec.labels), "env": env, "workdir": spec.workdir, "net": self.options.share_net}
        (new / "about.json").write_text(json.dumps(about))
        (new / "deadline").touch()
        os.utime(new / "deadline", (time.time() + spec.ttl,) * 2)
        bwrap = ["bwrap", "--unshare-pid", "--unshare-ipc", "--unshare-uts", "--info-fd", "3", "--bind", str(tree), "/"]
        for name in _SHARED:
            bwrap += ["--ro-bind", f"/{name}", f"/{name}"]
        bwrap += ["--proc", "/proc", "--tmpfs", "/dev", "--perms", "1777", "--dir", "/dev/shm"]
        for name in _DEVICES:  # not --dev: for its terminals bwrap nests user namespaces, and nobody could enter
            bwrap += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            bwrap += ["--symlink", f"/proc/self/fd/{number}", f"/dev/{name}"]
        bwrap += ["--symlink", "/proc/self/fd", "/dev/fd"]
        bwrap += [] if self.options.share_net else ["--unshare-net"]
        bwrap += ["/bin/sh", "-c", "echo; exec sleep infinity"]
        with open(new / "log", "wb") as log:
            subprocess.run(
                ["setsid", "--fork", "/bin/sh", "-c", _GUARD, "guard", *bwrap],
                cwd=new,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
                env={"PATH": os.environ.get("PATH", os.defpath)},
                check=True,
            )

    def _failed(self, why: str) -> CreateFailed:
        return CreateFailed(why, provider=self.type, op="create")


class BubblewrapSandbox(Sandbox):
    """A directory, and the namespaces of the process that `_init_of` tells."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.id = str(path)
        about = json.loads((path / "about.json").read_text())
        self.workdir = about["workdir"]
        self._env: dict[str, str] = about["env"]
        self._namespaces = ["-m", "-p", "-i", "-u"] + ([] if about["net"] else ["-n"])

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
        """See `mabridge.Sandbox.exec`."""
        marker = uuid.uuid4().hex
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        process = self._start("exec", argv, cwd, env, marker, stdin=null if stdin is None else pipe, stderr=pipe)
        result = await communicate(process, stdin=stdin, marker=marker, timeout=timeout, max_output=max_output)
        if result.exit_code != 0 and not result.timed_out:
            self._init("exec")  # whether it is the sandbox that ended
        return result

    async def open_process(
        self, argv: Sequence[str], *, cwd: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """See `mabridge.SupportsProcess`."""
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        process = self._start("open_process", argv, cwd, env, uuid.uuid4().hex, stdin=pipe, stderr=null)
        return HeldProcess(self.id, process, provider=BubblewrapProvider.type)

    async def read_file(self, path: str, *, max_bytes: int) -> bytes:
        """See `mabridge.Sandbox.read_file`."""
        return await read_file(self, path, max_bytes=max_bytes, provider=BubblewrapProvider.type)

    async def write_file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """See `mabridge.Sandbox.write_file`."""
        await write_file(self, path, data, mode=mode, provider=BubblewrapProvider.type)

    async def keep_alive(self, ttl: float) -> None:
        """See `mabridge.Sandbox.keep_alive`."""
        self._init("keep_alive")
        try:
            until = max(time.time() + ttl, (self._path / "deadline").stat().st_mtime)
            os.utime(self._path / "deadline", (until, until))
        except FileNotFoundError:
            raise self._gone("keep_alive") from None

    async def teardown(self) -> None:
        """See `mabridge.Sandbox.teardown`."""
        await _in_thread(_remove, self._path)

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
        command = run_argv(argv, self.workdir if cwd is None else cwd)
        given = {
            "PATH": "/usr/local/bin:/usr/bin:/bin",
            "LANG": "C.UTF-8",
            "HOME": _HOME,
            **self._env,
            **check_env(env),
        }
        enter = ["nsenter", "-t", str(self._init(op)), *self._namespaces]
        if os.geteuid() == 0:
            enter += ["-S", str(_AGENT), "-G", str(_AGENT)]
        else:
            enter += ["-U", "--preserve-credentials"]
        process = subprocess.Popen(
            [*enter, "--", *command],
            env={**given, MARKER: marker},
            stdout=subprocess.PIPE,
            start_new_session=True,
            bufsize=0,
            stdin=stdin,
            stderr=stderr,
        )
        for end in (process.stdin, process.stdout, process.stderr):
            if end is not None:
                os.set_blocking(end.fileno(), False)
        return process

    def _init(self, op: str) -> int:
        try:
            pid = _init_of(self._path)
        except FileNotFoundError:
            pid = None
        if pid is None:
            raise self._gone(op)
        return pid

    def _gone(self, op: str) -> SandboxGone:
        return SandboxGone("it has ended", provider=BubblewrapProvider.type, op=op, sandbox_id=self.id)


def _init_of(path: Path) -> int | None:
    """The id of the first process of a sandbox, or ``None`` if it has ended.

    Raises:
        FileNotFoundError: there is no such sandbox.
    """
    pid: int = json.loads((path / "info").read_text())["child-pid"]
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()
        # Ids are used again: the first process of a namespace has 1 as its innermost id.
        namespaces = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "NSpid" in line)
    except (FileNotFoundError, ProcessLookupError):
        return None
    began = int(stat[19]) / os.sysconf("SC_CLK_TCK") + _booted()
    same = abs(began - (path / "info").stat().st_mtime) < _START
    return pid if stat[0] not in "ZX" and namespaces.endswith("\t1") and same else None


def _booted() -> float:
    """When this machine was started, in seconds since the epoch."""
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def _remove(path: Path) -> None:
    """End what runs in it, and remove the files. Gone already is success."""
    gone = path.with_name(f".gone-{uuid.uuid4().hex}")
    try:
        path.rename(gone)
    except FileNotFoundError:
        return
    for _ in range(500):
        try:
            pid = _init_of(gone)
        except (FileNotFoundError, ValueError):
            break
        if pid is None:
            break
        os.kill(pid, signal.SIGKILL)  # the kernel kills all others of its namespace
        time.sleep(0.01)
    subprocess.run(["chmod", "-R", "u+rwx", str(gone)], check=False, stderr=subprocess.DEVNULL)
    shutil.rmtree(gone, ignore_errors=True)


def _said(new: Path) -> str:
    return (new / "log").read_text(errors="replace").strip()[-300:] or "it says nothing"


async def _in_thread(function: Callable[..., T], *args: object) -> T:
    """Run to its end what takes some milliseconds, cancelled or not."""
    with anyio.CancelScope(shield=True):
        result = await anyio.to_thread.run_sync(function, *args)
    return result  # noqa: RET504 - a scope may end its block early, as far as a type checker knows
