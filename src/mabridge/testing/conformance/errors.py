"""What a provider says when it cannot: the right class, whether to try again, and what to do."""

from __future__ import annotations

import re

import anyio
import pytest
from pydantic import ValidationError

from mabridge.errors import ConfigError, CreateFailed, SandboxError, SandboxUnavailable
from mabridge.sandbox import Provider
from mabridge.testing.conformance.helpers import find, new_key, new_spec

__all__ = ["ErrorsTests"]

_SOON = 90.0  # seconds within which a failure must be told


class ErrorsTests:
    """Failures that a user can put right. Each needs a provider made wrong in one way, which is a fixture."""

    async def test_unknown_option_is_refused_by_name(self, provider: Provider) -> None:
        with pytest.raises(ValidationError, match="no_such_option"):
            type(provider).Options.model_validate({"no_such_option": 1})

    async def test_every_option_says_what_it_is_for(self, provider: Provider) -> None:
        fields = type(provider).Options.model_fields
        assert [name for name, field in fields.items() if not field.description] == []

    async def test_bad_credentials_fail_the_check_and_say_so(self, bad_credentials: Provider) -> None:
        async with bad_credentials as provider:
            with anyio.fail_after(_SOON), pytest.raises((SandboxError, ConfigError)) as caught:
                await provider.check()
        _is_final(caught.value, about="credential|key|token|log ?in|auth|denied|secret")

    async def test_bad_credentials_fail_the_create_for_good(self, bad_credentials: Provider) -> None:
        async with bad_credentials as provider:
            with anyio.fail_after(_SOON), pytest.raises((CreateFailed, ConfigError)) as caught:
                await provider.create(new_spec())
        _is_final(caught.value, about="credential|key|token|log ?in|auth|denied|secret")

    async def test_bad_credentials_are_no_proof_of_absence(self, bad_credentials: Provider) -> None:
        async with bad_credentials as provider:
            with anyio.fail_after(_SOON), pytest.raises((SandboxError, ConfigError)):
                await provider.attach(new_key())
            with anyio.fail_after(_SOON), pytest.raises((SandboxError, ConfigError)):
                _ = [info async for info in provider.list()]

    async def test_missing_image_fails_the_create_for_good_and_leaves_nothing(self, missing_image: Provider) -> None:
        spec = new_spec()
        async with missing_image as provider:
            with anyio.fail_after(_SOON), pytest.raises(CreateFailed) as caught:
                await provider.create(spec)
            assert await find(provider, spec.key) is None
        _is_final(caught.value, about="")

    async def test_unreachable_provider_is_unavailable_and_may_be_tried_again(self, unreachable: Provider) -> None:
        async with unreachable as provider:
            for call in (provider.check, lambda: provider.create(new_spec())):
                with anyio.fail_after(_SOON), pytest.raises(SandboxUnavailable) as caught:
                    await call()
                assert caught.value.retryable
                assert "\n" not in str(caught.value).strip()

    async def test_unreachable_provider_is_no_proof_of_absence(self, unreachable: Provider) -> None:
        async with unreachable as provider:
            with anyio.fail_after(_SOON), pytest.raises(SandboxUnavailable):
                await provider.attach(new_key())
            with anyio.fail_after(_SOON), pytest.raises(SandboxUnavailable):
                _ = [info async for info in provider.list()]


def _is_final(error: Exception, *, about: str) -> None:
    """Trying again will not help, and one line says why."""
    said = str(error).strip()
    assert said
    assert "\n" not in said, "a message is one line"
    assert re.search(about, said, re.IGNORECASE), f"it does not say what is wrong: {said}"
    assert not getattr(error, "retryable", False), "trying again would not help"
