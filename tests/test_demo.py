from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import anyio
import pytest
from rich.console import Console

from mabridge.demo.choose import Choice, choose
from mabridge.demo.image import tiny_image
from mabridge.demo.projects import PYTHON, SHELL, Project
from mabridge.demo.screen import Screen
from mabridge.errors import MabridgeError
from mabridge.observe import Event


def demo(tmp_path: Path, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "mabridge.cli", "demo", "--pace", "0", *arguments],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path), **env},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_demo_works_on_local_sandboxes_and_leaves_nothing(tmp_path: Path) -> None:
    done = demo(tmp_path, "--provider", "local", "--sessions", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "isolates nothing: it was asked for" in done.stdout
    assert "3 agents worked side by side" in done.stdout
    assert "36 tool calls" in done.stdout
    assert "; 3 failed," in done.stdout
    assert "exactly one result for 36 of 36 calls" in done.stdout
    assert list(tmp_path.glob("mabridge-demo-*")) == []


def tiny_docker_image() -> str:
    """Return the tag of the demo's own image, made if it is not there; it is small, and stays for the next demo."""
    if not shutil.which("docker") or subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("no Docker engine answers")
    tag, archive = tiny_image()
    subprocess.run(["docker", "load"], input=archive, capture_output=True, check=True)
    return tag


@pytest.mark.docker
def test_demo_works_on_an_image_made_without_a_registry(tmp_path: Path) -> None:
    tag = tiny_docker_image()
    done = demo(tmp_path, "--image", tag, "--sessions", "3")
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Docker, image {tag}: it was asked for" in done.stdout
    assert "bash cd roman && export REPORT=report.md && sh test.sh: failed" in done.stdout
    assert "exactly one result for 36 of 36 calls" in done.stdout


def test_demo_without_an_engine_says_so_and_uses_local(tmp_path: Path) -> None:
    done = demo(tmp_path, "--sessions", "1", DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "isolates nothing: Docker cannot be used (" in done.stdout


def test_demo_on_docker_without_an_engine_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = demo(tmp_path, "--provider", "docker", DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "is Docker running" in line


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("provider", "number"),
    [("local", signal.SIGINT), pytest.param("docker", signal.SIGTERM, marks=pytest.mark.docker)],
)
async def test_interrupted_demo_removes_its_sandboxes(tmp_path: Path, provider: str, number: signal.Signals) -> None:
    where = ["--image", tiny_docker_image()] if provider == "docker" else ["--provider", "local"]
    command = [sys.executable, "-m", "mabridge.cli", "demo", "--sessions", "1", "--pace", "3", *where]
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    output, created = b"", None
    with anyio.fail_after(60):
        async with await anyio.open_process(command, env=env, stderr=subprocess.STDOUT) as process:
            assert process.stdout is not None
            while created is None:
                output += await process.stdout.receive()
                created = re.search(rb"sandbox\.created \w+ (\w+)", output)
            process.send_signal(number)
            async for chunk in process.stdout:
                output += chunk
            assert await process.wait() == 1
    assert b"Traceback" not in output
    assert list(tmp_path.glob("mabridge-demo-*")) == []
    if provider == "docker":
        inspected = await anyio.run_process(["docker", "inspect", created[1].decode()], check=False)
        assert b"No such object" in inspected.stderr


@pytest.mark.anyio
async def test_local_is_not_preferred_when_docker_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_HOST", "unix:///nowhere/none.sock")
    with pytest.raises(MabridgeError):
        await choose(Choice(provider="docker"), print)
    assert (await choose(Choice(), print)).config.type == "local"


@pytest.mark.parametrize("project", [*PYTHON, *SHELL], ids=lambda project: project.source)
def test_project_has_one_fault_and_its_test_finds_it(project: Project, tmp_path: Path) -> None:
    for name, text in project.files.items():
        (tmp_path / name).write_text(text)
    source = tmp_path / project.source
    assert source.read_text().count(project.fault) == 1
    command = ["/bin/sh", "-c", project.test]
    failed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False)
    assert failed.returncode == 1
    assert "FAILED" in failed.stdout + failed.stderr
    source.write_text(source.read_text().replace(project.fault, project.fix))
    subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=30, check=True)


def test_screen_shows_who_runs_where_and_what_the_last_call_took() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, height=30)
    with Screen(console, {"sesn_1": "roman-1", "sesn_2": "slug-2"}) as screen:
        screen(Event(name="sandbox.created", session_id="sesn_1", provider="docker", sandbox_id="abc123", seconds=0.2))
        screen(
            Event(
                name="call.started",
                session_id="sesn_1",
                call_id="c",
                tool="bash",
                input={"command": "make\n  it [red]"},
            )
        )
        screen(Event(name="call.ended", session_id="sesn_1", call_id="c", tool="bash", seconds=0.25, is_error=True))
        screen(Event(name="session.released", session_id="sesn_unknown"))
    last = out.getvalue().rpartition("last call")[2]
    assert "docker abc123" in last
    assert "bash make it [red]: failed, 250 ms" in last
    assert "queued" in last
