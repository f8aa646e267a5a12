"""A worker of your own: mabridge as a library, without a configuration file.

It has a client of its own, a custom tool beside those of the sandbox, and a say in the routing. It needs
``pip install 'mabridge[docker]'``, and the variables ``ANTHROPIC_ENVIRONMENT_ID`` and ``ANTHROPIC_ENVIRONMENT_KEY``.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence

import anyio
from anthropic import AsyncAnthropic, beta_async_tool
from anyio.abc import TaskGroup

from mabridge import Event, ProviderConfig, Route, Worker, hookimpl
from mabridge.plugins import registry
from mabridge.routing import SessionFacts

PRICES = {"apple": 3, "pear": 4}


@beta_async_tool
async def price_of(product: str) -> str:
    """Look a price up, with what this process may know and the sandbox may not. The agent declares it as `custom`."""
    return f"{PRICES[product]} cents"


@hookimpl
def mabridge_route(session: SessionFacts, candidates: Sequence[str]) -> Sequence[str]:
    """Routing in code, after the routes below: who is not trusted gets nothing big."""
    trusted = session.metadata.get("trusted") == "yes"
    return [name for name in candidates if trusted or name != "big"]


class CustomTools:
    """Answers the calls of `price_of` in every session that the worker serves; mabridge leaves those alone."""

    def __init__(self, client: AsyncAnthropic, key: str, tasks: TaskGroup) -> None:
        self._client = client
        self._key = key
        self._tasks = tasks
        self._serving: set[str] = set()

    def see(self, event: Event) -> None:
        """Note each session that is claimed. An observer is called from the event loop, so it returns at once."""
        if event.name == "session.claimed" and event.session_id and event.session_id not in self._serving:
            self._serving.add(event.session_id)
            self._tasks.start_soon(self._serve, event.session_id)
        elif event.name == "call.ended":
            print(f"{event.session_id} {event.tool}: {'failed' if event.is_error else 'ok'} in {event.seconds:.2f} s")

    async def _serve(self, session_id: str) -> None:
        try:
            runner = self._client.beta.sessions.events.tool_runner(
                session_id, tools=[price_of], environment_key=self._key, max_idle=60
            )
            async for call in runner:
                if call.posted:
                    print(f"{session_id} {call.name}: answered here")
        finally:
            self._serving.discard(session_id)


async def main() -> None:
    """Serve sessions until SIGTERM or Ctrl-C, and then finish those that run."""
    registry().register_plugin(sys.modules[__name__], "my-routing")
    key = os.environ["ANTHROPIC_ENVIRONMENT_KEY"]
    async with (
        AsyncAnthropic(api_key="the environment key is used instead") as client,
        anyio.create_task_group() as tasks,
    ):
        worker = Worker(
            client,
            environment_key=key,
            providers={
                "small": ProviderConfig(type="docker", options={"image": "python:3.13-slim", "memory": "512m"}),
                "big": ProviderConfig(type="docker", options={"image": "python:3.13-slim", "memory": "8g"}),
            },
            routes=[Route(metadata={"team": "data"}, providers=("big", "small")), Route(providers=("small", "big"))],
            max_sessions=50,
            observers=[CustomTools(client, key, tasks).see],
        )

        async def work() -> None:
            await worker.run()
            tasks.cancel_scope.cancel()

        tasks.start_soon(work)
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            await anext(signals)
            worker.drain()


if __name__ == "__main__":
    anyio.run(main)
