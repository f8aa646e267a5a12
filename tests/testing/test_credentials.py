"""Who may call what: every credential against every endpoint."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import pytest
from anthropic import APIStatusError, AsyncAnthropic, AuthenticationError, PermissionDeniedError

from mabridge.testing import ControlPlane, Environment, Session
from tests.testing.conftest import MakeClient, silent

pytestmark = pytest.mark.anyio

Call = Callable[[AsyncAnthropic, Environment, Session], Awaitable[Any]]

ENDPOINTS: dict[str, tuple[Call, set[str]]] = {
    "poll": (lambda c, e, s: c.beta.environments.work.poll(e.id), {"key"}),
    "ack": (lambda c, e, s: c.beta.environments.work.ack(s.id, environment_id=e.id), {"key"}),
    "heartbeat": (lambda c, e, s: c.beta.environments.work.heartbeat(s.id, environment_id=e.id), {"key", "token"}),
    "stats": (lambda c, e, s: c.beta.environments.work.stats(e.id), {"key", "api"}),
    "list": (lambda c, e, s: c.beta.environments.work.list(e.id), {"key"}),
    "retrieve": (lambda c, e, s: c.beta.environments.work.retrieve(s.id, environment_id=e.id), {"api"}),
    "update": (lambda c, e, s: c.beta.environments.work.update(s.id, environment_id=e.id, metadata={}), {"api"}),
    "session": (lambda c, e, s: c.beta.sessions.retrieve(s.id), {"key", "token", "api"}),
    "session update": (lambda c, e, s: c.beta.sessions.update(s.id, title="t"), {"api"}),
    "events": (lambda c, e, s: c.beta.sessions.events.list(s.id), {"key", "token", "api"}),
    "send": (
        lambda c, e, s: c.beta.sessions.events.send(s.id, events=[{"type": "user.interrupt"}]),
        {"key", "token", "api"},
    ),
    "skill": (
        lambda c, e, s: c.beta.skills.versions.retrieve("latest", skill_id=next(iter(e.plane.skills))),
        {"key", "api"},
    ),
    "memories": (
        lambda c, e, s: c.beta.memory_stores.memories.list(next(iter(e.plane.memory_stores))),
        {"token", "api"},
    ),
    "stop": (lambda c, e, s: c.beta.environments.work.stop(s.id, environment_id=e.id), {"key", "token", "api"}),
    "session delete": (lambda c, e, s: c.beta.sessions.delete(s.id), {"api"}),
}


async def token_of(client: AsyncAnthropic, environment: Environment) -> str:
    """Poll, and take the token out of the item's secret."""
    item = await client.beta.environments.work.poll(environment.id)
    assert item is not None
    assert item.secret
    assert "=" not in item.secret
    padded = item.secret + "=" * (-len(item.secret) % 4)
    token: str = json.loads(base64.urlsafe_b64decode(padded))["sessions_token"]
    return token


@pytest.mark.parametrize("who", ["key", "token", "api"])
async def test_endpoint_takes_only_its_credentials(
    plane: ControlPlane, environment: Environment, client: AsyncAnthropic, make_client: MakeClient, who: str
) -> None:
    skill, store = plane.create_skill("pdf", {"SKILL.md": "x"}), plane.create_memory_store("Notes", {"/a.md": "x"})
    session = environment.create_session(silent, skills=[skill], memory_stores=[store])
    token = await token_of(client, environment)
    if who != "key":
        await client.beta.environments.work.ack(session.id, environment_id=environment.id)
    caller = make_client({"key": environment.key, "token": token, "api": plane.api_key}[who])
    taken, refused = set(), set()
    for name, (call, _) in ENDPOINTS.items():
        try:
            await call(caller, environment, session)
            taken.add(name)
        except PermissionDeniedError:
            refused.add(name)
    assert taken == {name for name, (_, who_may) in ENDPOINTS.items() if who in who_may}
    assert refused == set(ENDPOINTS) - taken


async def test_sessions_token_is_good_for_its_own_session_and_item_alone(
    environment: Environment, client: AsyncAnthropic, make_client: MakeClient
) -> None:
    environment.create_session(silent)
    other = environment.create_session(silent)
    caller = make_client(await token_of(client, environment))
    with pytest.raises(PermissionDeniedError):
        await caller.beta.sessions.retrieve(other.id)
    with pytest.raises(PermissionDeniedError):
        await caller.beta.environments.work.stop(other.id, environment_id=environment.id)


async def test_key_of_another_environment_is_401(
    plane: ControlPlane, environment: Environment, make_client: MakeClient
) -> None:
    session = environment.create_session(silent)
    stranger = make_client(plane.create_environment().key)
    with pytest.raises(AuthenticationError):
        await stranger.beta.environments.work.poll(environment.id)
    with pytest.raises(APIStatusError, match="not found"):
        await stranger.beta.sessions.retrieve(session.id)


async def test_revoked_key_is_401_at_the_next_request(environment: Environment, client: AsyncAnthropic) -> None:
    await client.beta.environments.work.poll(environment.id)
    environment.revoke_key()
    with pytest.raises(AuthenticationError) as caught:
        await client.beta.environments.work.poll(environment.id)
    assert caught.value.body == {
        "type": "error",
        "error": {"type": "authentication_error", "message": "invalid credentials"},
    }


async def test_item_without_secret_has_none(environment: Environment, client: AsyncAnthropic) -> None:
    environment.create_session(silent, secret=False)
    item = await client.beta.environments.work.poll(environment.id)
    assert item is not None
    assert item.secret is None


async def test_sessions_token_expires_after_its_ttl(make_client: MakeClient) -> None:
    async with ControlPlane(token_ttl=0.2) as plane:
        environment = plane.create_environment()
        session = environment.create_session(silent)
        client = make_client(environment.key).with_options(base_url=plane.url)
        caller = make_client(await token_of(client, environment)).with_options(base_url=plane.url)
        await caller.beta.sessions.retrieve(session.id)
        await anyio.sleep(0.25)
        with pytest.raises(AuthenticationError):
            await caller.beta.sessions.retrieve(session.id)


async def test_request_without_the_beta_header_is_refused(environment: Environment, client: AsyncAnthropic) -> None:
    with pytest.raises(APIStatusError, match="anthropic-beta"):
        await client.beta.environments.work.poll(environment.id, extra_headers={"anthropic-beta": "other"})
