"""The option ``env``, which several providers have."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from mabridge.config import WorkerConfig
from mabridge.errors import ConfigError
from mabridge.providers._env import read_env
from mabridge.providers.cloudflare import CloudflareOptions
from mabridge.providers.docker import DockerOptions
from mabridge.providers.e2b import E2BOptions
from mabridge.providers.modal import ModalOptions
from mabridge.sandbox import EnvVar, ProviderOptions

OPTIONS: list[tuple[type[ProviderOptions], dict[str, Any]]] = [
    (CloudflareOptions, {"worker_url": "https://worker.example"}),
    (DockerOptions, {}),
    (E2BOptions, {}),
    (ModalOptions, {}),
]


@pytest.mark.parametrize(("options", "needed"), OPTIONS)
@pytest.mark.parametrize(
    "env",
    [
        {"ANTHROPIC_API_KEY": "x"},
        {"anthropic_base_url": "x"},
        {"TOKEN": {"env": "ANTHROPIC_ENVIRONMENT_KEY"}},
        {"TOKEN": "sk-ant-oat01-abc"},
        {"BAD NAME": "x"},
        {"NUL": "a\0b"},
    ],
)
def test_what_may_not_enter_a_sandbox_is_refused(options, needed, env) -> None:
    with pytest.raises(ValidationError, match=next(iter(env))):
        options(**needed, env=env)


def test_values_come_from_the_configuration_or_from_the_workers_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "secret")
    options = DockerOptions(env={"A": "1", "B": {"env": "MINE"}})
    assert read_env(options.env) == {"A": "1", "B": "secret"}


def test_key_of_anthropics_in_another_variable_is_refused_when_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINE", "sk-ant-oat01-abc")
    with pytest.raises(ConfigError, match="TOKEN: no credential of Anthropic's") as caught:
        read_env({"TOKEN": EnvVar(env="MINE")})
    assert "sk-ant" not in str(caught.value)


def test_error_does_not_show_what_was_given() -> None:
    with pytest.raises(ValidationError) as caught:
        E2BOptions(api_key="e2b_secret")
    assert "e2b_secret" not in str(caught.value)
    with pytest.raises(ValidationError) as caught:
        WorkerConfig(environment_key="sk-ant-oat01-secret")
    assert "sk-ant" not in str(caught.value)
