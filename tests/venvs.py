"""A virtual environment for a test that installs something: it sees what this one has, and keeps what it gets."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

_PROGRAMS = {"python": "", "pip": "-m pip", "pytest": "-m pytest", "mabridge": "-m mabridge.cli"}


class Venv:
    """Made at `path`, in a second, with nothing downloaded."""

    def __init__(self, path: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", path / "venv"], check=True)
        self.python = path / "venv/bin/python"
        places = sysconfig.get_paths(vars={"base": str(path / "venv"), "platbase": str(path / "venv")})
        Path(places["purelib"], "parent.pth").write_text("".join(f"{entry}\n" for entry in sys.path if entry))
        self._bin = path / "bin"
        self._bin.mkdir()
        for name, module in _PROGRAMS.items():
            program = self._bin / name
            program.write_text(f'#!/bin/sh\nexec "{self.python}" {module} "$@"\n')
            program.chmod(0o755)

    def run(self, script: str, cwd: Path, *, timeout: float = 300) -> str:
        """Run shell commands with this environment first in the path, and return what they said."""
        own = {"PATH": f"{self._bin}:{os.environ['PATH']}", "PYTHONDONTWRITEBYTECODE": "1"}
        # The build backend is this environment's own, for a test downloads nothing.
        own |= {"PIP_NO_BUILD_ISOLATION": "false", "PIP_NO_DEPS": "1", "PIP_NO_INDEX": "1", "PIP_QUIET": "1"}
        own |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_ROOT_USER_ACTION": "ignore"}
        # Of a stranger's own choice, and not there unless they have it.
        own |= {"PYTEST_ADDOPTS": "-p no:asyncio"}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PIP_"))}
        done = subprocess.run(
            ["sh", "-ec", script],
            cwd=cwd,
            env={**inherited, **own},
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout,
        )
        assert done.returncode == 0, done.stdout
        return done.stdout
