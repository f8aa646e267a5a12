"""The images that the Docker tests run on, made without a registry: ``python tests/images.py`` makes what is missing.

`BUSYBOX` is Debian's static busybox and nothing else: the least that a sandbox can be. `DEBIAN` is a minimal Debian
with bash, dash as ``/bin/sh``, GNU tools and Python; `DASH` is the same without bash. Each is tagged with a hash of how
it is made, so it is made once.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

_BUSYBOX = "busybox-static: /bin and its applet links, /tmp, /etc/passwd with root and nobody; 2"
_DASH = "the image of Debian, without /bin/bash; 1"
_DEBIAN = "debootstrap --variant=minbase --include=python3; 2"


def _tag(name: str, recipe: str) -> str:
    return f"{name}:{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


BUSYBOX = _tag("mabridge-test-busybox", _BUSYBOX)
DEBIAN = _tag("mabridge-test-debian", _DEBIAN)
DASH = _tag("mabridge-test-dash", _DASH + _DEBIAN)


class ImageMissing(Exception):
    """An image is not there and cannot be made here; says why."""


def ensure(image: str) -> str:
    """Return `image`, made if it was missing.

    Raises:
        ImageMissing: there is no engine, or what it is made of is not there.
    """
    if shutil.which("docker") is None:
        raise ImageMissing("there is no docker command")
    if image == DASH:
        ensure(DEBIAN)
    with _only_one():
        if _run("docker", "image", "inspect", image, check=False).returncode != 0:
            answer = _run("docker", "version", check=False)
            if answer.returncode != 0:
                raise ImageMissing(f"no Docker engine answers: {answer.stderr.decode(errors='replace').strip()[-300:]}")
            if image == DASH:
                return _make_dash()
            with tempfile.TemporaryDirectory(prefix="mabridge-image-") as directory:
                root = Path(directory, "root")
                root.mkdir(mode=0o755)
                _MAKERS[image](root)
                _import(root, image)
    return image


def _make_busybox(root: Path) -> None:
    busybox = next((path for path in map(Path, ("/bin/busybox", "/usr/bin/busybox")) if path.exists()), None)
    if busybox is None or _run("ldd", str(busybox), check=False).returncode == 0:
        raise ImageMissing(f"{image_name(BUSYBOX)} is made of a static busybox: apt-get install busybox-static")
    for name in ("bin", "etc", "tmp"):
        (root / name).mkdir()
    (root / "tmp").chmod(0o1777)
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/false\n")
    shutil.copy(busybox, root / "bin/busybox")
    for applet in _run(str(busybox), "--list").stdout.decode().split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")


def _make_debian(root: Path) -> None:
    if shutil.which("debootstrap") is None or os.geteuid() != 0:
        raise ImageMissing(f"{image_name(DEBIAN)} is made by debootstrap, by root: apt-get install debootstrap")
    release = dict(line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line)
    suite = release.get("VERSION_CODENAME", "stable").strip('"') if release.get("ID") == "debian" else "stable"
    made = _run("debootstrap", "--variant=minbase", "--include=python3", suite, str(root), _mirror(), check=False)
    if made.returncode != 0:
        said = (made.stdout + made.stderr).decode(errors="replace").strip()
        raise ImageMissing(f"debootstrap failed: {said[-500:]}")
    for cache in ("var/cache/apt", "var/lib/apt/lists", "usr/share/doc", "usr/share/man", "usr/share/locale"):
        shutil.rmtree(root / cache, ignore_errors=True)


def _make_dash() -> str:
    made = (
        _run("docker", "create", "--network=none", DEBIAN, "rm", "-f", "/bin/bash", "/usr/bin/bash")
        .stdout.decode()
        .strip()
    )
    try:
        _run("docker", "start", "--attach", made)
        _run("docker", "commit", made, DASH)
    finally:
        _run("docker", "rm", "--force", made)
    return DASH


def _mirror() -> str:
    """The Debian mirror that this machine installs from."""
    sources = [Path("/etc/apt/sources.list"), *sorted(Path("/etc/apt/sources.list.d").glob("*"))]
    text = "\n".join(path.read_text() for path in sources if path.is_file())
    found = re.search(r"^(?:URIs:|deb(?:\s+\[.*?\])?)\s+(https?://\S+/debian/?)(?:\s|$)", text, re.MULTILINE)
    return found[1] if found else "http://deb.debian.org/debian"


_MAKERS: dict[str, Callable[[Path], None]] = {BUSYBOX: _make_busybox, DEBIAN: _make_debian}


def image_name(image: str) -> str:
    return image.partition(":")[0]


def _import(root: Path, image: str) -> None:
    with subprocess.Popen(["tar", "-C", str(root), "--numeric-owner", "-c", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(["docker", "import", "-", image], stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
    if tar.returncode != 0:
        raise ImageMissing(f"tar failed with {tar.returncode}")


def _run(*argv: str, check: bool = True) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(argv, check=check, stdin=subprocess.DEVNULL, capture_output=True)


@contextlib.contextmanager
def _only_one() -> Iterator[None]:
    """Keep test runs that start together from making the same image twice."""
    with open(Path(tempfile.gettempdir()) / "mabridge-test-images.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


if __name__ == "__main__":
    for wanted in (BUSYBOX, DEBIAN, DASH):
        try:
            print(ensure(wanted), flush=True)
        except ImageMissing as missing:
            sys.exit(f"{image_name(wanted)}: {missing}")
