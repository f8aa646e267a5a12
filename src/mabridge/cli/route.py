"""``mabridge route``: which rule sends a session where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from mabridge.cli._common import command, config_option, json_option

if TYPE_CHECKING:
    from mabridge.config import Config
    from mabridge.routing import SessionFacts


@command()
@click.option("--session", "session_id", metavar="ID", help="A session of the environment: its facts are asked for.")
@click.option("--metadata", metavar="KEY=VALUE", multiple=True, help="Metadata that a session would have.")
@click.option("--agent", metavar="NAME", help="The name or the id of its agent.")
@config_option
@json_option
def route(
    session_id: str | None, metadata: tuple[str, ...], agent: str | None, config_file: str | None, as_json: bool
) -> None:
    """Say which route takes a session, and why those before it do not."""
    import anyio

    from mabridge.cli._output import echo_json
    from mabridge.config import load_config
    from mabridge.plugins import registry
    from mabridge.routing import SessionFacts

    if session_id and (metadata or agent):
        raise click.UsageError("give --session alone, or --metadata and --agent")
    config = load_config(config_file)
    if session_id:
        facts = anyio.run(_ask, config, session_id)
    else:
        facts = SessionFacts(metadata=dict(map(_pair, metadata)), agent_name=agent)
    decision = registry().decide(facts, config.routes)
    if as_json:
        echo_json({"providers": decision.providers, "route": decision.rule, "explanation": decision.explain()})
    else:
        click.echo(decision.explain())
    if not decision.providers:
        raise click.exceptions.Exit(2)


def _pair(text: str) -> tuple[str, str]:
    key, sign, value = text.partition("=")
    if not key or not sign:
        raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--metadata")
    return key, value


async def _ask(config: Config, session_id: str) -> SessionFacts:
    from mabridge.cli._platform import connect
    from mabridge.errors import ConfigError
    from mabridge.identity import is_safe_id
    from mabridge.routing import SessionFacts

    if not is_safe_id(session_id):
        raise ConfigError(f"{session_id!r} is not the id of a session, such as sesn_011CZ...")
    async with connect(config.worker) as client:
        session = await client.beta.sessions.retrieve(session_id)
    return SessionFacts(
        session_id=session.id,
        metadata=session.metadata,
        agent_id=session.agent.id,
        agent_name=session.agent.name,
    )
