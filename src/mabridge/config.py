"""The configuration: a TOML file, read into frozen models, with every mistake in it told at once."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mabridge.config_problems import Problem, line_of, nearest, problems_in
from mabridge.errors import ConfigError, PluginError
from mabridge.plugins import Registry, registry
from mabridge.routing import Route
from mabridge.sandbox import EnvVar, Provider

__all__ = ["CONFIG_VARIABLE", "Config", "ProviderConfig", "WorkerConfig", "load_config", "parse_config"]

CONFIG_VARIABLE = "MABRIDGE_CONFIG"
"""Environment variable: the configuration file, if none is given."""

DEFAULT_FILE = "mabridge.toml"


class WorkerConfig(BaseModel):
    """How the worker claims sessions, and from which environment.

    Attributes:
        environment_id: the self-hosted environment, ``env_...``.
        environment_key: the environment variable that holds its key. The key itself is never in a file.
        base_url: of the API; by default the SDK's, which is ``ANTHROPIC_BASE_URL`` where that is set.
        worker_id: what the platform knows this worker by; by default made from the host's name.
        max_sessions: sessions served at once; no more are claimed.
        max_idle: seconds that a session is kept after its agent has ended its turn.
        create_timeout: seconds after which calls are answered with an error if no provider can give a sandbox.
        drain_timeout: seconds that running calls get to end once the worker was told to stop; what runs on goes on in
            its sandbox, and another worker sends its result.
        reap_interval: seconds between two looks for what dead workers left: sandboxes that nobody has any use for, and
            work items that were taken and never claimed. 0 is never to look.
        reap_grace: seconds that those are left alone, at least.
        workdir: absolute path, in each sandbox, of the directory the agent works in.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    environment_id: str | EnvVar = EnvVar(env="ANTHROPIC_ENVIRONMENT_ID")
    environment_key: EnvVar = EnvVar(env="ANTHROPIC_ENVIRONMENT_KEY")
    base_url: str | None = None
    worker_id: str | None = Field(default=None, pattern=r"^[A-Za-z0-9._-]{1,128}$")
    max_sessions: int = Field(default=20, ge=1)
    max_idle: float = Field(default=60.0, ge=0)
    create_timeout: float = Field(default=120.0, gt=0)
    drain_timeout: float = Field(default=25.0, ge=0)
    reap_interval: float = Field(default=300.0, ge=0)
    reap_grace: float = Field(default=300.0, ge=0)
    workdir: str = "/workspace"

    @field_validator("workdir")
    @classmethod
    def _absolute(cls, workdir: str) -> str:
        if not workdir.startswith("/") or "\0" in workdir or ".." in workdir.split("/"):
            raise ValueError("an absolute path without '..' is wanted")
        return workdir

    @field_validator("base_url")
    @classmethod
    def _http(cls, base_url: str | None) -> str | None:
        if base_url is not None and not base_url.startswith(("https://", "http://")):
            raise ValueError("a URL that begins with https:// is wanted")
        return base_url

    def read_environment_id(self) -> str:
        """Return the environment's id, out of its variable if need be.

        Raises:
            ConfigError: the variable is not set.
        """
        return self.environment_id if isinstance(self.environment_id, str) else self.environment_id.read()


class ProviderConfig(BaseModel):
    """A named instance of a provider.

    Attributes:
        type: the type of provider, such as ``docker``; ``mabridge providers`` lists them.
        options: its options, as `Provider.Options` of that type has them. In TOML they stand beside ``type``.
        when_done: what becomes of the sandbox when a session has come to rest: ``keep`` leaves it for the session's
            next message; ``suspend`` stops it meanwhile, with its disk kept, and is refused where the provider cannot;
            ``teardown`` removes it at once. That of a session that was terminated or deleted is removed in any case.
        ttl: seconds after which the sandbox removes itself, counted from the last sign of life of its worker.
        idle_ttl: seconds that a kept or suspended sandbox waits for its session's next message before it is removed;
            `ttl` by default.
        max_sandboxes: how many sandboxes a worker has here at once; by default as many as it has sessions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    type: str
    options: Mapping[str, Any] = Field(default_factory=dict)
    when_done: Literal["keep", "suspend", "teardown"] = "keep"
    ttl: float = Field(default=3600.0, gt=0)
    idle_ttl: float | None = Field(default=None, gt=0)
    max_sandboxes: int | None = Field(default=None, ge=1)


class Config(BaseModel):
    """A whole configuration.

    Attributes:
        worker: the worker's own part.
        providers: the provider instances, by name, in the order of the file.
        routes: the rules, in order. Without any, every session may go to every provider, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    worker: WorkerConfig = Field(default_factory=WorkerConfig)
    providers: Mapping[str, ProviderConfig] = Field(default_factory=dict)
    routes: tuple[Route, ...] = ()

    @model_validator(mode="after")
    def _route_to_all(self) -> Self:
        if not self.providers:
            raise ValueError('there is no provider: add a table such as [providers.main] with type = "docker"')
        if not self.routes:
            object.__setattr__(self, "routes", (Route(providers=tuple(self.providers)),))
        return self


def load_config(path: str | os.PathLike[str] | None = None, *, providers: Registry | None = None) -> Config:
    """Read the configuration from `path`, else from the file `CONFIG_VARIABLE` names, else from ``./mabridge.toml``.

    Args:
        path: the file.
        providers: where types of providers are looked up; `mabridge.plugins.registry` by default.

    Raises:
        ConfigError: the file cannot be read, or something in it is wrong: each mistake with its line.
    """
    file = Path(path or os.environ.get(CONFIG_VARIABLE) or DEFAULT_FILE)
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            f"there is no configuration file {file}: write one, or name it by --config or {CONFIG_VARIABLE}"
        ) from None
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"the configuration file {file} cannot be read: {exc}") from exc
    return parse_config(text, file=str(file), providers=providers)


def parse_config(text: str, *, file: str = DEFAULT_FILE, providers: Registry | None = None) -> Config:
    """Return the configuration that `text`, as TOML, describes; `file` is its name in messages.

    Raises:
        ConfigError: something in it is wrong: each mistake with its line.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as exc:
        raise ConfigError(f"{file} is not valid TOML: {exc}") from exc
    problems: list[Problem] = []
    if isinstance(data.get("providers"), dict):
        data["providers"] = {name: _with_options(table) for name, table in data["providers"].items()}
    try:
        config = Config.model_validate(data)
    except ValidationError as exc:
        problems.extend(problems_in(exc, Config))
    problems.extend(_provider_problems(data, providers or registry()))
    problems.extend(_route_problems(data))
    if problems:
        located = sorted(
            ((line_of(text, problem.path), problem) for problem in problems), key=lambda pair: pair[0] or 0
        )
        raise ConfigError("\n".join(f"{file}:{line or 1}: {problem}" for line, problem in located))
    return config


# What stands beside ``type`` and is not the provider's own.
_OURS = ("type", "when_done", "ttl", "idle_ttl", "max_sandboxes")


def _with_options(table: object) -> object:
    """Put what is the provider's own into ``options``, where `ProviderConfig` has it."""
    if not isinstance(table, dict):
        return table
    ours = {key: value for key, value in table.items() if key in _OURS}
    return {**ours, "options": {key: value for key, value in table.items() if key not in ours}}


def _provider_problems(data: Mapping[str, Any], types: Registry) -> Iterator[Problem]:
    providers = data.get("providers")
    for name, table in providers.items() if isinstance(providers, dict) else ():
        if not isinstance(table, dict) or not isinstance(table.get("type"), str):
            continue
        try:
            provider = types.get(table["type"]).load()
        except (ConfigError, PluginError) as exc:
            yield Problem(("providers", name, "type"), str(exc))
            continue
        try:
            valid = provider.Options.model_validate(table["options"])
        except ValidationError as exc:
            yield from problems_in(exc, provider.Options, at=("providers", name), also=_OURS)
            continue
        if table.get("when_done") == "suspend" and not (made := provider(valid)).can_suspend:
            yield Problem(("providers", name, "when_done"), cannot_suspend(made))


def cannot_suspend(provider: Provider) -> str:
    """Return why ``when_done`` cannot be ``suspend`` with a provider, and what it can be."""
    return f"with these options, {provider.type} cannot suspend a sandbox; 'keep' leaves it as it is"


def _route_problems(data: Mapping[str, Any]) -> Iterator[Problem]:
    """Find routes to providers that are not there."""
    providers, routes = data.get("providers"), data.get("routes")
    if not isinstance(providers, dict) or not isinstance(routes, list):
        return
    for index, rule in enumerate(routes):
        names = rule.get("providers") if isinstance(rule, dict) else None
        for name in names if isinstance(names, list) else ():
            if isinstance(name, str) and name not in providers:
                hint = nearest(name, providers)
                yield Problem(("routes", index, "providers"), f"there is no provider {name!r} in [providers]{hint}")
