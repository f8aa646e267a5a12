from __future__ import annotations

import subprocess
import sys
import textwrap
import types
from collections.abc import Callable
from pathlib import Path

import pytest

import mabridge
from mabridge.config import ProviderConfig
from mabridge.errors import ConfigError, PluginError
from mabridge.plugins import LOAD_PLUGINS, Registry, make_provider, registry
from mabridge.sandbox import EnvVar, Provider, ProviderOptions


class ToyOptions(ProviderOptions):
    size: int = 1
    api_key: EnvVar = EnvVar(env="TOY_KEY")


class Toy(Provider):
    type = "toy"
    Options = ToyOptions

    async def create(self, spec): ...
    async def attach(self, key): ...
    def list(self): ...
    async def check(self): ...


def plugin(*args, **kwargs) -> types.ModuleType:
    """Return a plugin that registers what it is given."""
    module = types.ModuleType("a_plugin")

    def mabridge_register_providers(register):
        register(*args, **kwargs)

    module.mabridge_register_providers = mabridge.hookimpl(mabridge_register_providers)
    return module


@pytest.fixture
def bare() -> Registry:
    """A registry with the built-in providers only."""
    return Registry(load=())


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Install a plugin as pip would: a module, and an entry point that names it."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name: str, source: str) -> None:
        module = f"plugin_{tmp_path.name.replace('-', '_')}_{name}"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[mabridge]\n{name} = {module}\n")

    return install


GOOD = """
    from mabridge import hookimpl, Provider

    class {cls}(Provider):
        type = "{name}"
        async def create(self, spec): ...
        async def attach(self, key): ...
        def list(self): ...
        async def check(self): ...

    @hookimpl
    def mabridge_register_providers(register):
        register({cls})
"""


def test_built_in_providers_are_registered_by_a_plugin(bare: Registry) -> None:
    assert {"docker", "local"} <= bare.providers.keys()
    assert {entry.plugin for entry in bare.providers.values()} == {"mabridge"}
    assert bare.failures == ()
    for entry in bare.providers.values():
        assert entry.load().type == entry.name


def test_plugin_is_found_by_its_entry_point(install) -> None:
    install("good", GOOD.format(cls="Good", name="good"))
    found = Registry()
    assert found.providers["good"].plugin == "good"
    provider = make_provider(ProviderConfig(type="good"), "mine", providers=found)
    assert provider.type == "good"


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("import no_such_module_anywhere", "no_such_module_anywhere"),
        ("1 / 0", "ZeroDivisionError"),
        (GOOD.format(cls="Bad", name="bad") + "        raise RuntimeError('half way')\n", "half way"),
        (GOOD.format(cls="Bad", name="docker"), "'docker', which 'mabridge' has registered already"),
        (GOOD.format(cls="Bad", name="bad").replace("register_providers", "register_provider"), "unknown hook"),
        (GOOD.format(cls="Bad", name="bad").replace("(register)", "(register, more)"), "'more'"),
        (GOOD.format(cls="Bad", name="bad").replace("    def mab", "    async def mab"), "not async"),
    ],
)
def test_broken_plugin_is_reported_and_harms_no_other(install, caplog, source: str, cause: str) -> None:
    install("aa_good", GOOD.format(cls="First", name="first"))
    install("bad", source)
    install("zz_good", GOOD.format(cls="Last", name="last"))
    found = Registry()
    assert {"docker", "first", "last"} <= found.providers.keys()
    assert "bad" not in found.providers
    (failure,) = found.failures
    assert failure.plugin == "bad"
    assert cause in str(failure)
    assert len([record for record in caplog.records if "'bad'" in record.getMessage()]) == 1
    with pytest.raises(ConfigError, match="the plugin 'bad' could not be loaded"):
        found.get("bad")


def test_load_plugins_variable_restricts_what_is_loaded(install, monkeypatch: pytest.MonkeyPatch) -> None:
    install("one", GOOD.format(cls="One", name="one"))
    install("two", GOOD.format(cls="Two", name="two"))
    monkeypatch.setenv(LOAD_PLUGINS, "two, absent")
    registry.cache_clear()
    try:
        found = registry()
    finally:
        registry.cache_clear()
    assert "two" in found.providers
    assert "one" not in found.providers
    assert [failure.plugin for failure in found.failures] == ["absent"]


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (str, "not a subclass of mabridge.Provider"),
        (object(), "not a subclass of mabridge.Provider"),
        (type("Half", (Provider,), {"type": "half"}), "does not define attach, check, create, list"),
        (type("Nameless", (Toy,), {"type": ""}), "has no type"),
        ("some.module", "'package.module:Class' and name="),
    ],
)
def test_what_is_no_provider_is_refused_by_the_plugins_name(bare: Registry, what: object, message: str) -> None:
    with pytest.raises(PluginError, match="'shady'") as caught:
        bare.register_plugin(plugin(what), "shady")
    assert message in str(caught.value)


def test_provider_registered_by_name_is_imported_when_first_used(bare: Registry) -> None:
    bare.register_plugin(plugin("no.such.module:Gone", name="gone"), "lazy")
    with pytest.raises(PluginError, match=r"'lazy' registered 'gone' as 'no.such.module:Gone'"):
        make_provider(ProviderConfig(type="gone"), "mine", providers=bare)


def test_missing_sdk_is_told_with_the_command_that_installs_it(bare: Registry) -> None:
    bare.register_plugin(plugin(Toy, sdk="no_such_sdk.sub", install="mabridge-toy[sdk]"), "toys")
    with pytest.raises(ConfigError, match=r"'mine' \(toy\) needs no_such_sdk.sub: pip install 'mabridge-toy\[sdk\]'"):
        make_provider(ProviderConfig(type="toy"), "mine", providers=bare)


def test_options_are_checked_and_their_values_not_shown(bare: Registry) -> None:
    bare.register_plugin(plugin(Toy), "toys")
    options = {"sise": 3, "size": "sk-secret-1", "api_key": "sk-secret-2"}
    with pytest.raises(ConfigError) as caught:
        make_provider(ProviderConfig(type="toy", options=options), "mine", providers=bare)
    message = str(caught.value)
    assert "sise: there is no such key; did you mean 'size'?" in message
    assert "size: " in message
    assert "api_key: a secret never stands in the file" in message
    assert "sk-secret" not in message
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_options_reach_the_provider(bare: Registry) -> None:
    bare.register_plugin(plugin(Toy), "toys")
    provider = make_provider(
        ProviderConfig(type="toy", options={"size": 3, "api_key": {"env": "K"}}), "m", providers=bare
    )
    assert provider.options == ToyOptions(size=3, api_key=EnvVar(env="K"))


def test_unknown_type_is_told_with_the_nearest(bare: Registry) -> None:
    with pytest.raises(ConfigError, match="no provider type 'dokcer'; did you mean 'docker'"):
        bare.get("dokcer")


@pytest.mark.parametrize(
    "statement",
    [
        "import mabridge",
        "import mabridge.plugins, mabridge.config; mabridge.plugins.registry()",
        "import mabridge.cli",
        "import mabridge.plugins; [entry.load() for entry in mabridge.plugins.Registry(load=()).providers.values()]",
    ],
)
def test_importing_imports_no_sdk(statement: str) -> None:
    code = f"{statement}\nimport sys\nprint(*{{'anthropic', 'aiodocker', 'aiohttp'}} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.split() == []
