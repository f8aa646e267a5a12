"""A worker of your own: mabridge as a library, without a configuration file.

Needs ``pip install 'mabridge[docker]'``, and ``ANTHROPIC_ENVIRONMENT_ID`` and ``ANTHROPIC_ENVIRONMENT_KEY`` in the
environment. Sessions whose metadata say ``trusted = "yes"`` get a container with more room than the others.
"""

from __future__ import annotations

import signal

import anyio
from anthropic import AsyncAnthropic

from mabridge import Event, ProviderConfig, Route, Worker


def print_calls(event: Event) -> None:
    """Print each call that has ended. An observer is called from the event loop, so it must return at once."""
    if event.name == "call.ended":
        print(f"{event.session_id} {event.tool}: {'failed' if event.is_error else 'ok'} in {event.seconds:.2f} s")


async def main() -> None:
    """Serve sessions until SIGTERM or Ctrl-C, and then finish those that run."""
    async with AsyncAnthropic(api_key="the environment key is used instead") as client:
        worker = Worker(
            client,
            providers={
                "small": ProviderConfig(type="docker", options={"image": "python:3.13-slim", "memory": "512m"}),
                "big": ProviderConfig(type="docker", options={"image": "python:3.13-slim", "memory": "8g"}),
            },
            routes=[Route(metadata={"trusted": "yes"}, providers=("big", "small")), Route(providers=("small",))],
            max_sessions=50,
            observers=[print_calls],
        )
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(worker.run)
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                await anext(signals)
                worker.drain()


if __name__ == "__main__":
    anyio.run(main)
