"""Nothing that can be used is undocumented, and every built-in provider keeps the contract."""

from __future__ import annotations

import inspect
import re
from importlib import import_module
from pathlib import Path

import click
import pytest

from mabridge import hookspecs
from mabridge.cli import main
from mabridge.config import ProviderConfig, WorkerConfig, parse_config
from mabridge.plugins import Registry
from mabridge.routing import Route
from mabridge.testing import SandboxConformance

ROOT = Path(__file__).parent.parent
BUILT_IN = sorted(Registry(load=()).providers)
HOOKS = [hook for name, hook in inspect.getmembers(hookspecs, inspect.isfunction) if name.startswith("mabridge_")]


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    found = re.search(rf"^{re.escape(heading)}$(.*?)(?=^#|\Z)", text, re.MULTILINE | re.DOTALL)
    assert found is not None, f"there is no heading {heading!r}"
    return found[1]


@pytest.mark.parametrize("hook", HOOKS, ids=lambda hook: hook.__name__)
def test_hook_is_documented_under_its_signature(hook) -> None:
    signature = f"{hook.__name__}({', '.join(inspect.signature(hook).parameters)})"
    assert section(page("docs/writing-a-provider.md"), f"### {signature}").strip()


def test_every_documented_hook_exists() -> None:
    told = re.findall(r"^### (mabridge_\w+)\(", page("docs/writing-a-provider.md"), re.MULTILINE)
    assert sorted(told) == sorted(hook.__name__ for hook in HOOKS)


@pytest.mark.parametrize("name", BUILT_IN)
def test_options_of_a_provider_are_documented(name: str) -> None:
    text = page(f"docs/providers/{name}.md")
    rows = re.findall(r"^\| (`[^|]*`) \|", text, re.MULTILINE)
    told = {option for row in rows for option in re.findall(r"`(\w+)", row)}
    fields = Registry(load=()).get(name).load().Options.model_fields
    assert set(fields) - told == set()


@pytest.mark.parametrize("name", BUILT_IN)
def test_configuration_on_the_page_of_a_provider_is_valid(name: str) -> None:
    blocks = re.findall(r"^```toml\n(.*?)^```$", page(f"docs/providers/{name}.md"), re.MULTILINE | re.DOTALL)
    examples = [block for block in blocks if "type = " in block]
    assert examples
    for example in examples:
        assert name in {provider.type for provider in parse_config(example).providers.values()}


@pytest.mark.parametrize("name", sorted(main.commands))
def test_command_is_documented_with_its_options(name: str) -> None:
    text = section(page("docs/cli.md"), f"## mabridge {name}")
    for option in main.commands[name].params:
        if isinstance(option, click.Option):
            names = [long for long in (*option.opts, *option.secondary_opts) if long.startswith("--")]
            assert any(f"`{long}" in text for long in names), f"{names} is not told of"


@pytest.mark.parametrize("model", [WorkerConfig, ProviderConfig, Route])
def test_settings_of_the_configuration_are_documented(model) -> None:
    text = page("README.md") + page("docs/operating.md")
    missing = [name for name in model.model_fields if not re.search(rf"`{name}`|^(# )?{name} = ", text, re.MULTILINE)]
    assert [name for name in missing if name != "options"] == []


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_provider_has_a_conformance_class(name: str) -> None:
    tested = set()
    for path in sorted((ROOT / "tests/providers").glob(f"test_{name}*.py")):
        module = import_module(f"tests.providers.{path.stem}")
        classes = [value for key, value in vars(module).items() if key.startswith("Test") and inspect.isclass(value)]
        tested |= {cls for cls in classes if issubclass(cls, SandboxConformance)}
    assert tested, f"no class of tests/providers/test_{name}*.py inherits SandboxConformance"
