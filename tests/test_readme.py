from __future__ import annotations

import re
import tomllib
import types
from pathlib import Path

import click
import pytest

from mabridge.cli import main
from mabridge.config import parse_config
from mabridge.plugins import Registry

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("text", [text for text in blocks("toml") if "[project" not in text])
def test_configurations_are_valid(text: str) -> None:
    assert parse_config(text).providers


def test_plugin_of_the_readme_can_be_registered() -> None:
    (source,) = [text for text in blocks("python") if "hookimpl" in text]
    module = types.ModuleType("mabridge_acme")
    exec(source, module.__dict__)
    known = Registry(load=())
    known.register_plugin(module, "acme")
    assert known.providers["acme"].install == "mabridge-acme"
    (entry_point,) = [text for text in blocks("toml") if "[project" in text]
    assert tomllib.loads(entry_point)["project"]["entry-points"] == {"mabridge": {"acme": "mabridge_acme"}}


def test_library_example_compiles() -> None:
    (source,) = [text for text in blocks("python") if "Worker(" in text]
    compile(source, "README", "exec", flags=0x2000)  # await at the top level


def test_every_command_is_told_of_and_exists() -> None:
    told = set(re.findall(r"^\| `mabridge (\w+)", README, flags=re.MULTILINE))
    assert isinstance(main, click.Group)
    assert told == set(main.commands)


def test_every_option_of_docker_is_told_of_with_its_default() -> None:
    table = README.partition("<!-- docker options -->")[2].partition("\n\n")[0]
    told = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", table, flags=re.MULTILINE))
    fields = Registry(load=()).get("docker").load().Options.model_fields
    assert list(told) == list(fields)
    for name in ("image", "pull", "network", "user", "cpus", "pids_limit"):
        assert told[name].startswith(f"`{fields[name].default}`")
