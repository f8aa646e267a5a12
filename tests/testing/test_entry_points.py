"""Importing `mabridge.testing`, and running the platform by itself."""

from __future__ import annotations

import subprocess
import sys
import urllib.request

import pytest

import mabridge.testing

WITHOUT_SERVER = """
import sys
sys.modules["starlette"] = sys.modules["uvicorn"] = None
import mabridge.testing
assert "anthropic" not in sys.modules
try:
    mabridge.testing.ControlPlane
except ImportError as error:
    print(error)
"""


def test_all_names_can_be_loaded() -> None:
    for name in mabridge.testing.__all__:
        assert getattr(mabridge.testing, name).__doc__ or name == "Brain"
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        mabridge.testing.nonsense  # noqa: B018


def test_missing_server_packages_are_named_with_what_to_install() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_SERVER], capture_output=True, text=True, check=True, timeout=30
    )
    assert "pip install 'mabridge[testing]'" in done.stdout


def test_module_serves_a_platform_and_tells_how_to_reach_it() -> None:
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", "mabridge.testing.control_plane"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        told = dict(process.stdout.readline().removeprefix("export ").strip().split("=") for _ in range(3))
        request = urllib.request.Request(
            f"{told['ANTHROPIC_BASE_URL']}/v1/environments/{told['ANTHROPIC_ENVIRONMENT_ID']}/work/poll",
            headers={
                "authorization": f"Bearer {told['ANTHROPIC_ENVIRONMENT_KEY']}",
                "anthropic-version": "2023-06-01",
                "anthropic-beta": "managed-agents-2026-04-01",
            },
        )
        with urllib.request.urlopen(request, timeout=5) as answer:
            assert b'"state":"queued"' in answer.read()
    finally:
        process.terminate()
        process.wait(timeout=10)
        if process.stdout is not None:
            process.stdout.close()
