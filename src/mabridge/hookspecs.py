"""The hooks of mabridge's plugins.

A plugin is a module (or any object) with functions marked ``@hookimpl``, named by an entry point of the group
``mabridge``. Hooks are plain functions: pluggy does not await, so an ``async def`` is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import pluggy

if TYPE_CHECKING:
    import click

    from mabridge.observe import Event
    from mabridge.routing import SessionFacts
    from mabridge.sandbox import Provider

__all__ = ["PROJECT", "RegisterProvider", "hookimpl", "hookspec"]

PROJECT = "mabridge"
"""Pluggy's name for us, and the group of entry points that plugins are found in."""

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class RegisterProvider(Protocol):
    """What `mabridge_register_providers` is given."""

    def __call__(
        self,
        provider: type[Provider] | str,
        *,
        name: str | None = None,
        sdk: str | None = None,
        install: str | None = None,
    ) -> None:
        """Register one provider.

        Args:
            provider: the class, or where it is, ``"package.module:Class"``: then it is imported when first used.
            name: its `Provider.type`; needed with a string, and taken from the class otherwise.
            sdk: the module of the vendor's SDK, such as ``aiodocker``. It is looked for before the provider is
                made, so that its absence is told in one line.
            install: what to give to ``pip install`` for that SDK, such as ``mabridge[docker]``.

        Raises:
            PluginError: the name is taken, or this is not a provider.
        """


@hookspec
def mabridge_register_providers(register: RegisterProvider) -> None:
    """Call ``register(MyProvider)`` for each provider class of yours."""


@hookspec
def mabridge_route(session: SessionFacts, candidates: Sequence[str]) -> Sequence[str] | None:
    """Return which of the candidates may serve the session, in the order to try them; ``None`` leaves it as it is.

    `candidates` are names of configured providers, those of the route that took the session. Each plugin is asked in
    turn, about what the one before it left. To return none of them, to name another, or to raise, is to refuse the
    session.
    """


@hookspec
def mabridge_event(event: Event) -> None:
    """See everything that a worker does, in the event loop: return at once. What is raised is logged."""


@hookspec
def mabridge_register_commands(cli: click.Group) -> None:
    """Add commands of your own to ``mabridge``, as in ``@cli.command()``. One that is there already stays as it is."""
