"""Makes a user's own configuration wrong in one way, to see what its provider says."""

from __future__ import annotations

import os
import secrets
import string
from collections.abc import Mapping
from typing import Any, get_args

from pydantic import ValidationError

from mabridge.config import ProviderConfig
from mabridge.sandbox import EnvVar, Provider

__all__ = ["with_missing_image", "with_wrong_credentials"]

_IMAGES = {
    "snapshot": "mabridge-has-no-such-snapshot",
    "template": "mabridge-has-no-such-template",
    "image": "localhost:9/mabridge/no-such-image:1",
}
"""The options that say what a sandbox starts from, and what is nowhere."""

_CLASSES = (string.digits, "abcdef", string.ascii_lowercase, string.ascii_uppercase)


def with_wrong_credentials(provider: Provider, config: ProviderConfig) -> tuple[ProviderConfig, dict[str, str]] | None:
    """Return the configuration with other credentials, and the environment variables that hold those.

    The credentials are the options that are references to environment variables. ``None`` if there are none.
    """
    kinds = {name: field.annotation for name, field in type(provider).Options.model_fields.items()}
    names = [name for name, kind in kinds.items() if kind is EnvVar or EnvVar in get_args(kind)]
    used = [name for name in names if getattr(provider.options, name) is not None]
    for some in (used, names, names[:1]):
        held = {f"MABRIDGE_CHECK_WRONG_{name.upper()}": _unlike(getattr(provider.options, name)) for name in some}
        options = {name: {"env": variable} for name, variable in zip(some, held, strict=True)}
        if options and _fits(provider, wrong := {**config.options, **options}):
            return config.model_copy(update={"options": wrong}), held
    return None


def with_missing_image(provider: Provider, config: ProviderConfig) -> ProviderConfig | None:
    """Return the configuration with an image, or what the vendor has instead, that does not exist; or ``None``."""
    others = {name: value for name, value in config.options.items() if name not in _IMAGES}
    for name, missing in _IMAGES.items():
        wrong = {**others, name: missing}
        if _fits(provider, wrong):  # an option that there is not does not
            return config.model_copy(update={"options": wrong})
    return None


def _fits(provider: Provider, options: Mapping[str, Any]) -> bool:
    try:
        type(provider).Options.model_validate(options)
    except ValidationError:
        return False
    return True


def _unlike(reference: EnvVar | None) -> str:
    """Return a value of the same form as a secret's: what a provider refuses unseen is no wrong key to it."""
    value = os.environ.get(reference.env, "") if reference is not None else ""
    kept = max(value.find(mark, 0, 8) for mark in "_-") + 1  # what comes before it tells its kind, as in "e2b_..."
    return value[:kept] + "".join(map(_other, value[kept:])) or "mabridge-wrong"


def _other(character: str) -> str:
    for characters in _CLASSES:
        if character in characters:
            return secrets.choice([other for other in characters if other != character])
    return character
