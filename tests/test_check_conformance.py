"""``mabridge check --conformance``: the kit against a configured provider."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BLOCKED = """
import sys
from importlib.machinery import PathFinder
real = PathFinder.find_spec
PathFinder.find_spec = classmethod(lambda cls, name, *rest: None if name == "pytest" else real(name, *rest))
from mabridge.cli import main
main(sys.argv[1:], prog_name="mabridge")
"""


@pytest.fixture
def mabridge(tmp_path: Path):
    (tmp_path / "mabridge.toml").write_text('[providers.mine]\ntype = "local"\nroot = "sandboxes"\n')
    # Whatever the directory has for its own tests does not count.
    (tmp_path / "conftest.py").write_text("raise RuntimeError")
    (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = --no-such-option\n")

    def run(*args: str, program: tuple[str, ...] = ("-m", "mabridge.cli")) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *program, "check", *args]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    return run


def test_every_test_is_told_with_its_outcome_and_nothing_is_left(mabridge, tmp_path: Path) -> None:
    done = mabridge("mine", "--conformance", "--only", "exec", "--only", "errors", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    reports = json.loads(done.stdout)
    assert {report["group"] for report in reports} == {"exec", "errors"}
    outcomes = {report["test"]: (report["outcome"], report["why"]) for report in reports}
    assert outcomes["test_exit_codes_are_told_as_they_are"] == ("passed", "")
    outcome, why = outcomes["test_bad_credentials_fail_the_create_for_good"]
    assert outcome == "skipped"
    assert why == "not tried: it has no credentials among its options"
    assert list((tmp_path / "sandboxes").iterdir()) == []


def test_failure_is_told_in_a_line_and_is_exit_code_2(mabridge, tmp_path: Path) -> None:
    """No sandbox can be made below a file."""
    (tmp_path / "sandboxes").touch()
    done = mabridge("--conformance", "--only", "process")
    assert done.returncode == 2
    assert "failed" in done.stdout
    assert "set the option root" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


def test_unknown_group_and_missing_pytest_are_one_line(mabridge) -> None:
    done = mabridge("--conformance", "--only", "nonsense")
    assert done.returncode == 2
    assert "there is no group 'nonsense'; there are exec, running" in done.stderr
    done = mabridge("--conformance", program=("-c", BLOCKED))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mabridge: --conformance needs pytest: pip install 'mabridge[testing]'\n"
