"""A platform, and clients for it: the real SDK over HTTP, which checks every answer against its types."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from anthropic import AsyncAnthropic

from mabridge.testing import Agent, ControlPlane, Environment, Session

MakeClient = Callable[[str], AsyncAnthropic]


@pytest.fixture
async def plane() -> AsyncIterator[ControlPlane]:
    async with ControlPlane(lease_ttl=1.0) as plane:
        yield plane


@pytest.fixture
def environment(plane: ControlPlane) -> Environment:
    return plane.create_environment()


@pytest.fixture
async def make_client(plane: ControlPlane, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MakeClient]:
    for name in ("ANTHROPIC_API_KEY", "ANTHROPIC_AUTH_TOKEN", "ANTHROPIC_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    clients = []

    def make(credential: str, **options: Any) -> AsyncAnthropic:
        who: Any = {"api_key": credential} if credential.startswith("sk-ant-api") else {"auth_token": credential}
        client = AsyncAnthropic(
            base_url=plane.url, max_retries=0, timeout=10, _strict_response_validation=True, **who, **options
        )
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()


@pytest.fixture
def client(make_client: MakeClient, environment: Environment) -> AsyncAnthropic:
    """A client with the environment key."""
    return make_client(environment.key)


@pytest.fixture
def owner(make_client: MakeClient, plane: ControlPlane) -> AsyncAnthropic:
    """A client with an API key."""
    return make_client(plane.api_key)


async def one_bash(agent: Agent) -> None:
    await agent.call("bash", {"command": "true"})


async def ask(agent: Agent) -> None:
    await agent.call("bash", {"command": "true"}, permission="ask")


async def custom(agent: Agent) -> None:
    await agent.call("lookup", {"q": 1}, custom=True)


async def silent(agent: Agent) -> None:
    await agent.say("hello")


async def until_calls(session: Session, count: int = 1) -> list[str]:
    """Wait until so many calls are open, and return their ids."""
    await session.wait_for(lambda _: len(session.open_calls) >= count, timeout=5)
    return [call.id for call in session.open_calls]


def tool_result(tool_use_id: str, text: str = "ok") -> Any:
    return {"type": "user.tool_result", "tool_use_id": tool_use_id, "content": [{"type": "text", "text": text}]}
