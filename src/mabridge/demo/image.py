"""A small Docker image for a machine that reaches no registry: this machine's own shell and usual programs."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

from mabridge.errors import ConfigError

__all__ = ["TINY", "tiny_image"]

TINY = "mabridge-demo"
"""The repository that the image is tagged with."""

_PROGRAMS = (
    "sh", "bash", "basename", "cat", "chmod", "cp", "cut", "date", "dd", "df", "dirname", "du", "echo", "env", "expr",
    "false", "find", "grep", "head", "id", "kill", "ln", "ls", "mkdir", "mkfifo", "mktemp", "mv", "nl", "od",
    "paste", "ps", "pwd", "readlink", "realpath", "rm", "rmdir", "sed", "seq", "setsid", "sleep", "sort",
    "stat", "stty", "tail", "tee", "test", "timeout", "touch", "tr", "true", "tty", "uname", "uniq", "wc",
    "xargs", "yes", "awk",
)  # fmt: skip
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


def tiny_image() -> tuple[str, bytes]:
    """Return a tag and an archive for ``docker load``.

    Raises:
        ConfigError: this machine has nothing to make it of.
    """
    if sys.platform != "linux":
        raise ConfigError("an image can be made without a registry on Linux only")
    layer = _layer(_host_programs())
    return _archive(layer)


def _host_programs() -> Mapping[str, Path]:
    """Return the image's files: their paths there to where they are here."""
    files: dict[str, Path] = {}
    for name in _PROGRAMS:
        found = shutil.which(name, path="/bin:/usr/bin")
        if found is not None:
            program = Path(found).resolve()
            files[f"bin/{name}"] = program
            files |= {str(library).lstrip("/"): library for library in _libraries(program)}
    if "bin/sh" not in files or "bin/cat" not in files:
        raise ConfigError("this machine has no /bin/sh to make an image of")
    return files


def _libraries(program: Path) -> list[Path]:
    """Return the shared libraries a program needs, its loader among them; none if it is static."""
    listed = subprocess.run(["ldd", str(program)], capture_output=True, text=True, timeout=10, check=False)
    if listed.returncode != 0:
        return []
    return [Path(path) for path in re.findall(r"(?:=> |^\s*)(/\S+) \(0x", listed.stdout, flags=re.MULTILINE)]


def _layer(files: Mapping[str, Path]) -> bytes:
    """Return a tar of the files, the same for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        directories = {str(parent) for name in files for parent in Path(name).parents} - {"."}
        for name in sorted(directories | {"dev", "etc", "proc", "sys", "usr", "usr/bin"}):
            tar.addfile(_member(name, tarfile.DIRTYPE, 0o755))
        tar.addfile(_member("tmp", tarfile.DIRTYPE, 0o1777))
        users = (
            b"root:x:0:0:root:/:/bin/sh\nagent:x:1000:1000:agent:/workspace:/bin/sh\nnobody:x:65534:65534::/:/bin/sh\n"
        )
        passwd = _member("etc/passwd", tarfile.REGTYPE, 0o644, len(users))
        tar.addfile(passwd, io.BytesIO(users))
        for name, source in sorted(files.items()):
            data = source.read_bytes()
            tar.addfile(_member(name, tarfile.REGTYPE, 0o755, len(data)), io.BytesIO(data))
        env = _member("usr/bin/env", tarfile.SYMTYPE, 0o777)
        env.linkname = "/bin/env"
        tar.addfile(env)
    return buffer.getvalue()


def _archive(layer: bytes) -> tuple[str, bytes]:
    """Wrap one layer as ``docker save`` would: https://github.com/moby/docker-image-spec."""
    digest = hashlib.sha256(layer).hexdigest()
    tag = f"{TINY}:{digest[:12]}"
    machine = platform.machine()
    config = json.dumps(
        {
            "architecture": _ARCHITECTURES.get(machine, machine),
            "os": "linux",
            "config": {"Env": ["PATH=/bin:/usr/bin"], "Cmd": ["/bin/sh"], "Labels": {"mabridge.demo": "1"}},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]},
        }
    ).encode()
    name = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = json.dumps([{"Config": name, "RepoTags": [tag], "Layers": ["layer.tar"]}]).encode()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member, data in (("layer.tar", layer), (name, config), ("manifest.json", manifest)):
            tar.addfile(_member(member, tarfile.REGTYPE, 0o644, len(data)), io.BytesIO(data))
    return tag, buffer.getvalue()


def _member(name: str, kind: bytes, mode: int, size: int = 0) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.mode, info.size = kind, mode, size
    return info
