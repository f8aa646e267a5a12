"""A stranger's way: docs/writing-a-provider.md in an empty folder, and the package in examples/custom_provider."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.venvs import Venv

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_page_makes_a_plugin_that_is_listed_and_passes(tmp_path: Path) -> None:
    """Blocks that name a file are written to it, in order; then those for the shell are run, in order."""
    folder = tmp_path / "folder"
    folder.mkdir()
    commands = []
    for kind, text in BLOCK.findall((ROOT / "docs/writing-a-provider.md").read_text()):
        named = re.match(r"# ([\w.]+)\n", text)
        if kind == "sh":
            commands.append(text)
            continue
        assert named is not None, f"this block is not run: {text}"
        with open(folder / named[1], "a") as file:
            file.write(text[named.end() :] + "\n\n")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("mabridge.toml", "mabridge_folder.py", "pyproject.toml", "test_folder.py"),
    ]
    venv = Venv(tmp_path)
    said = [venv.run(command, folder) for command in commands]
    assert re.search(r"^folder\tfolder\tyes$", said[0], re.MULTILINE)
    assert re.search(r"^root\t.*\tThe directory that holds a directory for each sandbox.$", said[0], re.MULTILINE)
    assert re.search(r"^\d+ passed, \d+ skipped", said[0], re.MULTILINE)
    assert re.search(r"^main\tfolder\t.*\tok$", said[1], re.MULTILINE)
    assert re.search(r"^main\tfiles\ttest_what_was_written_is_read\t.*passed", said[1], re.MULTILINE)
    assert said[2] == "/tmp/mabridge-folder\n"
    assert [path.name for path in (folder / "dist").iterdir()] == ["mabridge_folder-0.1.0-py3-none-any.whl"]


def test_package_of_the_example_passes_from_its_own_wheel(tmp_path: Path) -> None:
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap is not installed")
    shutil.copytree(
        ROOT / "examples/custom_provider", tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__")
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    shutil.copy(ROOT / "examples/custom_provider/test_bubblewrap.py", elsewhere)
    venv = Venv(tmp_path)
    venv.run("pip wheel --no-deps --wheel-dir dist ./source && pip install dist/*.whl", tmp_path)
    assert re.search(r"^bubblewrap\tbubblewrap\tyes$", venv.run("mabridge providers", elsewhere), re.MULTILINE)
    assert "share_net" in venv.run("mabridge providers bubblewrap", elsewhere)
    said = venv.run("pytest -q -W error -n 2 test_bubblewrap.py", elsewhere)
    assert re.search(r"^\d+ passed, \d+ skipped", said, re.MULTILINE)
