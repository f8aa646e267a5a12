"""Finding and loading providers: the built-in ones and those of plugins, through one and the same hook.

Plugins are loaded one at a time. One that cannot be imported, or registers something wrong, is kept in
`Registry.failures` with the cause, and harms no other.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pluggy
from pydantic import ValidationError

from mabridge import hookspecs
from mabridge.config_problems import problems_in
from mabridge.errors import ConfigError, PluginError
from mabridge.hookspecs import PROJECT
from mabridge.routing import Decision, Route, SessionFacts, route
from mabridge.sandbox import Provider

if TYPE_CHECKING:
    import click

    from mabridge.config import ProviderConfig
    from mabridge.observe import Event

__all__ = ["LOAD_PLUGINS", "PluginFailure", "ProviderEntry", "Registry", "make_provider", "registry"]

LOAD_PLUGINS = "MABRIDGE_LOAD_PLUGINS"
"""Environment variable: a comma-separated list of the entry points to load; empty loads none. Unset loads all."""

BUILT_IN = "mabridge.providers.builtin"

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class ProviderEntry:
    """One registered type of provider.

    Attributes:
        name: its `Provider.type`.
        plugin: the plugin that registered it.
        target: the class, or where it is.
        sdk: the module of the vendor's SDK, if it needs one.
        install: what to give to ``pip install`` for it.
    """

    name: str
    plugin: str
    target: type[Provider] | str
    sdk: str | None = None
    install: str | None = None

    @property
    def installed(self) -> bool:
        """Whether the vendor's SDK can be found. Imports nothing but the packages it lies in."""
        try:
            return self.sdk is None or find_spec(self.sdk) is not None
        except ModuleNotFoundError:
            return False

    @property
    def hint(self) -> str:
        """How to install what is missing."""
        return f"pip install '{self.install or self.sdk}'"

    def load(self) -> type[Provider]:
        """Return the class, imported now if it was registered by name.

        Raises:
            PluginError: it cannot be imported, or is not a provider of that name.
        """
        loaded = self.target if isinstance(self.target, type) else self._import(self.target)
        _check_class(loaded, self.plugin)
        if loaded.type != self.name:
            raise PluginError(
                f"the plugin {self.plugin!r} registered {self.name!r}, but {_describe(loaded)}.type is {loaded.type!r}"
            )
        return loaded

    def _import(self, target: str) -> type[Provider]:
        module, _, attribute = target.partition(":")
        try:
            loaded: type[Provider] = getattr(import_module(module), attribute)
        except Exception as exc:
            raise PluginError(
                f"the plugin {self.plugin!r} registered {self.name!r} as {target!r}, which cannot be imported: {exc!r}"
            ) from exc
        return loaded


@dataclass(frozen=True)
class PluginFailure:
    """A plugin that could not be loaded, and why."""

    plugin: str
    error: Exception

    def __str__(self) -> str:
        cause = str(self.error) if isinstance(self.error, PluginError) else repr(self.error)
        return f"the plugin {self.plugin!r} could not be loaded: {cause}"


class Registry:
    """The providers that can be configured, by name.

    Args:
        load: names of the entry points to load; ``None`` is all of them.
    """

    def __init__(self, *, load: Iterable[str] | None = None) -> None:
        self._providers: dict[str, ProviderEntry] = {}
        self._failures: list[PluginFailure] = []
        self._plugins = pluggy.PluginManager(PROJECT)
        self._plugins.add_hookspecs(hookspecs)
        self.register_plugin(import_module(BUILT_IN), PROJECT)
        self._load_entry_points(None if load is None else tuple(load))

    @property
    def providers(self) -> Mapping[str, ProviderEntry]:
        """The registered types of provider, by name."""
        return MappingProxyType(self._providers)

    @property
    def failures(self) -> tuple[PluginFailure, ...]:
        """The plugins that could not be loaded."""
        return tuple(self._failures)

    def register_plugin(self, plugin: object, name: str) -> None:
        """Register a plugin and everything it offers, or nothing of it.

        Raises:
            PluginError: it is not a proper plugin, or what it registers is wrong.
            Exception: whatever its own code raises.
        """
        before = dict(self._providers)
        try:
            self._plugins.register(plugin, name)
            self._plugins.check_pending()
            self._refuse_async(plugin)
            self._call_register_hook(plugin, name)
        except BaseException as exc:
            self._providers = before
            if self._plugins.get_plugin(name) is plugin:
                self._plugins.unregister(plugin)
            if isinstance(exc, (pluggy.PluginValidationError, ValueError)):
                raise PluginError(str(exc)) from exc
            raise

    def get(self, name: str) -> ProviderEntry:
        """Return the entry of a type of provider.

        Raises:
            ConfigError: there is none of that name; says the nearest one, and which plugins failed.
        """
        if name in self._providers:
            return self._providers[name]
        near = get_close_matches(name, self._providers, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(sorted(self._providers))}"
        failed = "".join(f"; {failure}" for failure in self._failures)
        raise ConfigError(f"there is no provider type {name!r}; {hint}{failed}")

    def _call_register_hook(self, plugin: object, plugin_name: str) -> None:
        def register(
            provider: type[Provider] | str,
            *,
            name: str | None = None,
            sdk: str | None = None,
            install: str | None = None,
        ) -> None:
            self._add(provider, plugin=plugin_name, name=name, sdk=sdk, install=install)

        self._hook_of(plugin, "mabridge_register_providers")(register=register)

    def observers(self) -> list[Callable[[Event], None]]:
        """Return what is to be called with each event: one a plugin that has `mabridge_event`."""
        return [
            lambda event, hook=hook: hook(event=event)  # type: ignore[misc]
            for _, hook in self._with_hook("mabridge_event")
        ]

    def decide(self, session: SessionFacts, routes: Sequence[Route]) -> Decision:
        """Return where a session goes: by the routes, and among what they leave by the plugins' `mabridge_route`."""
        decision = route(session, routes)
        for name, hook in self._with_hook("mabridge_route") if decision.providers else ():
            try:
                (answer,) = hook(session=session, candidates=decision.providers) or (None,)
                decision = decision if answer is None else decision.narrowed(by=name, to=answer)
            except Exception as exc:  # noqa: BLE001 - somebody else's code: the session is refused, not the worker ended
                _log.exception("the plugin %r failed to route the session %s", name, session.session_id)
                decision = decision.narrowed(by=name, to=(), why=f"it failed: {exc!r}")
        return decision

    def add_commands(self, cli: click.Group) -> None:
        """Add the commands of the plugins to `cli`. A plugin that fails adds nothing, and is among the failures."""
        import click

        for name, hook in self._with_hook("mabridge_register_commands"):
            group = click.Group()
            try:
                hook(cli=group)
                for command in sorted(group.commands.keys() & cli.commands.keys()):
                    raise PluginError(f"it adds the command {command!r}, which is there already")
            except Exception as exc:  # noqa: BLE001 - somebody else's code: it must harm no other
                self._failed(name, exc)
            else:
                cli.commands.update(group.commands)

    def _with_hook(self, hook: str) -> list[tuple[str, pluggy.HookCaller]]:
        """Return the plugins that have a hook, the first one installed first, each with what calls it alone."""
        found = []
        for name, plugin in self._plugins.list_name_plugin():
            caller = None if plugin is None else self._hook_of(plugin, hook)
            if caller is not None and caller.get_hookimpls():
                found.append((name, caller))
        return found

    def _hook_of(self, plugin: object, hook: str) -> pluggy.HookCaller:
        others = [other for other in self._plugins.get_plugins() if other is not plugin]
        return self._plugins.subset_hook_caller(hook, others)

    def _refuse_async(self, plugin: object) -> None:
        for hook in self._plugins.get_hookcallers(plugin) or ():
            for implementation in hook.get_hookimpls():
                if implementation.plugin is plugin and inspect.iscoroutinefunction(implementation.function):
                    raise PluginError(f"{hook.name} must be a plain function, not async")

    def _add(
        self, provider: type[Provider] | str, *, plugin: str, name: str | None, sdk: str | None, install: str | None
    ) -> None:
        if not isinstance(provider, str):
            _check_class(provider, plugin)
            name = name or provider.type
        elif not name or provider.count(":") != 1:
            raise PluginError(
                f"the plugin {plugin!r} registered the string {provider!r}: that takes 'package.module:Class' and name="
            )
        taken = self._providers.get(name)
        if taken is not None:
            raise PluginError(
                f"the plugin {plugin!r} registers the provider {name!r}, which {taken.plugin!r} has registered already"
            )
        self._providers[name] = ProviderEntry(name=name, plugin=plugin, target=provider, sdk=sdk, install=install)

    def _load_entry_points(self, load: tuple[str, ...] | None) -> None:
        found = sorted(entry_points(group=PROJECT), key=lambda point: (point.name, point.value))
        for point in found:
            if load is None or point.name in load:
                try:
                    self.register_plugin(point.load(), point.name)
                except Exception as exc:  # noqa: BLE001 - somebody else's code, run at import: it must harm no other
                    self._failed(point.name, exc)
        for name in load or ():
            if name not in {point.name for point in found}:
                self._failed(name, PluginError(f"{LOAD_PLUGINS} asks for it, and it is not installed"))

    def _failed(self, plugin: str, error: Exception) -> None:
        failure = PluginFailure(plugin, error)
        self._failures.append(failure)
        _log.error("%s", failure, exc_info=error)


@cache
def registry() -> Registry:
    """Return the registry of this process, made once; `LOAD_PLUGINS` says which plugins are loaded."""
    load = os.environ.get(LOAD_PLUGINS)
    return Registry(load=None if load is None else [name.strip() for name in load.split(",") if name.strip()])


def make_provider(config: ProviderConfig, name: str, *, providers: Registry | None = None) -> Provider:
    """Return the provider that `config` describes. Does no I/O.

    Args:
        config: its type and options.
        name: what the configuration calls this instance; used in messages.
        providers: where types are looked up; `registry` by default.

    Raises:
        ConfigError: there is no such type, an option is wrong, or the vendor's SDK is not installed.
        PluginError: the provider's class cannot be loaded.
    """
    entry = (providers or registry()).get(config.type)
    if not entry.installed:
        raise ConfigError(f"the provider {name!r} ({entry.name}) needs {entry.sdk}: {entry.hint}")
    cls = entry.load()
    return cls(_options(cls, config.options, name))


def _options(cls: type[Provider], options: Mapping[str, Any], name: str) -> Any:  # noqa: ANN401 - the provider's own class
    try:
        return cls.Options.model_validate(options)
    except ValidationError as exc:
        problems = problems_in(exc, cls.Options)
    # Raised out here, for the error of pydantic shows the values it was given.
    raise ConfigError(f"the provider {name!r}: {'; '.join(map(str, problems))}")


def _check_class(provider: object, plugin: str) -> None:
    if not (isinstance(provider, type) and issubclass(provider, Provider)):
        raise PluginError(
            f"the plugin {plugin!r} registered {provider!r}, which is not a subclass of mabridge.Provider"
        )
    missing = sorted(getattr(provider, "__abstractmethods__", ()))
    if missing:
        raise PluginError(f"the plugin {plugin!r}: {_describe(provider)} does not define {', '.join(missing)}")
    if not isinstance(getattr(provider, "type", None), str) or not provider.type:
        raise PluginError(f"the plugin {plugin!r}: {_describe(provider)} has no type, the name it is chosen by")


def _describe(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
