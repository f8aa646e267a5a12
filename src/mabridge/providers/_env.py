"""The option ``env`` of the providers that have one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import AfterValidator

from mabridge.errors import ConfigError
from mabridge.providers._shell import check_env
from mabridge.sandbox import EnvVar

__all__ = ["SandboxEnv", "read_env"]

_KEY = "sk-ant-"  # what keys and tokens of Anthropic's begin with


def _no_keys(env: dict[str, str | EnvVar]) -> dict[str, str | EnvVar]:
    for name, value in env.items():
        given = [name.upper(), value.env.upper() if isinstance(value, EnvVar) else ""]
        if any(each.startswith("ANTHROPIC_") for each in given) or (isinstance(value, str) and _KEY in value):
            raise ValueError(f"{name}: no credential of Anthropic's enters a sandbox")
    check_env({name: value if isinstance(value, str) else "" for name, value in env.items()})
    return env


SandboxEnv = Annotated[dict[str, str | EnvVar], AfterValidator(_no_keys)]
"""Variables of every command in a sandbox: values, or the names of variables of the worker's that hold them. None of
Anthropic's."""


def read_env(env: Mapping[str, str | EnvVar]) -> dict[str, str]:
    """Return the variables with their values.

    Raises:
        ConfigError: a variable of the worker's is not set, or holds a credential of Anthropic's.
    """
    values = {name: value if isinstance(value, str) else value.read() for name, value in env.items()}
    for name, value in values.items():
        if _KEY in value:
            raise ConfigError(f"env: {name}: no credential of Anthropic's enters a sandbox")
    return values
