"""An emulated Modal, for the SDK as it is: ``MODAL_SERVER_URL`` points it here.

Read in the SDK (modal 1.6.4, and the service definitions `modal_proto.api_grpc` and `task_command_router_grpc` that
come with it): what is asked, in what order, and what the SDK makes of each answer. What it does not tell is emulated at
its worst: a stream stays open while anything holds it, only the leader is killed when an exec's time is up, an exec
shares its session with everything else, stdin is taken no faster than it is read, output that nobody reads stops the
command after 64 MiB; a snapshot has the files alone, and a volume is asked in a few calls and never downloaded from.
Sandboxes with a GPU use other calls (V1), which are not here, and no network is restricted: what
was asked for is in `Emulator.definitions`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.emulators.modal.server import Emulator

__all__ = ["Emulator", "emulated"]


@asynccontextmanager
async def emulated() -> AsyncIterator[Emulator]:
    """One that listens, with the SDK's own settings pointing to it."""
    async with Emulator() as emulator:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MODAL_SERVER_URL", emulator.url)
            patch.setenv("MODAL_TOKEN_ID", emulator.token_id)
            patch.setenv("MODAL_TOKEN_SECRET", emulator.token_secret)
            yield emulator
