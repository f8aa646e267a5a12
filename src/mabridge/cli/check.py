"""``mabridge check``: does it work, and how fast is it?"""

from __future__ import annotations

import secrets
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import click

from mabridge.cli._common import command, config_option, explain, json_option

if TYPE_CHECKING:
    from mabridge.config import Config
    from mabridge.sandbox import Provider, Sandbox

STEPS = ("reach", "create", "exec", "write", "read", "teardown")


@dataclass
class Outcome:
    """What the check of one thing came to: the seconds of each step that was done, and what stopped it."""

    name: str
    type: str
    tell: Callable[[str], None] = field(repr=False)
    seconds: dict[str, float] = field(default_factory=dict)
    error: str | None = None

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Take the time of one step."""
        self.tell(f"{self.name}: {name}")
        started = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - started


@command()
@click.argument("names", nargs=-1, metavar="[NAME]...")
@config_option
@click.option("--platform/--no-platform", default=True, help="Whether to ask Anthropic's API too.")
@json_option
def check(names: tuple[str, ...], config_file: str | None, platform: bool, as_json: bool) -> None:
    """Check the environment key, and each provider by making, using and removing a sandbox.

    With NAMEs, only those providers are checked, and the API is not asked.
    """
    import anyio

    from mabridge.cli._output import echo_json, progress, seconds, table
    from mabridge.config import load_config
    from mabridge.config_problems import nearest
    from mabridge.errors import ConfigError

    config = load_config(config_file)
    for name in names:
        if name not in config.providers:
            raise ConfigError(f"there is no provider {name!r} in the configuration{nearest(name, config.providers)}")
    with progress() as tell:
        outcomes = anyio.run(_check_all, config, names, platform and not names, tell)
    if as_json:
        echo_json(
            [
                {"name": o.name, "type": o.type, "ok": not o.error, "seconds": o.seconds, "error": o.error}
                for o in outcomes
            ]
        )
    else:
        rows = [
            (o.name, o.type, *(seconds(o.seconds.get(step)) for step in STEPS), "failed" if o.error else "ok")
            for o in outcomes
        ]
        table(("name", "type", *STEPS, ""), rows)
        for outcome in outcomes:
            if outcome.error:
                click.echo(f"mabridge: {outcome.name}: {outcome.error}", err=True)
    if any(outcome.error for outcome in outcomes):
        raise click.exceptions.Exit(2)


async def _check_all(
    config: Config, names: tuple[str, ...], platform: bool, tell: Callable[[str], None]
) -> list[Outcome]:
    outcomes = []
    if platform:
        outcomes.append(Outcome("anthropic", "platform", tell))
        await _guarded(_check_platform, config, outcomes[0])
    for name in names or config.providers:
        outcome = Outcome(name, config.providers[name].type, tell)
        outcomes.append(outcome)
        await _guarded(_check_provider, config, outcome)
    return outcomes


async def _guarded(step: Callable[[Config, Outcome], Awaitable[None]], config: Config, outcome: Outcome) -> None:
    try:
        await step(config, outcome)
    except Exception as exc:
        outcome.error = explain(exc)
        if outcome.error is None:
            raise


async def _check_platform(config: Config, outcome: Outcome) -> None:
    from mabridge.cli._platform import connect

    environment_id = config.worker.read_environment_id()
    async with connect(config.worker) as client:
        with outcome.step("reach"):
            await client.beta.environments.work.stats(environment_id)


async def _check_provider(config: Config, outcome: Outcome) -> None:
    import anyio

    from mabridge.identity import sandbox_key, sandbox_labels
    from mabridge.plugins import make_provider
    from mabridge.sandbox import SandboxSpec

    session = f"check-{secrets.token_hex(8)}"
    key = sandbox_key("mabridge-check", session)
    spec = SandboxSpec(
        key=key, labels=sandbox_labels("mabridge-check", session), workdir=config.worker.workdir, ttl=300.0
    )
    async with make_provider(config.providers[outcome.name], outcome.name) as provider:
        with outcome.step("reach"):
            await provider.check()
        with outcome.step("create"):
            sandbox = await provider.create(spec)
        try:
            await _use(sandbox, provider, outcome)
        finally:
            with anyio.CancelScope(shield=True), anyio.fail_after(60), outcome.step("teardown"):
                await sandbox.teardown()


async def _use(sandbox: Sandbox, provider: Provider, outcome: Outcome) -> None:
    from mabridge.errors import SandboxError

    data = secrets.token_bytes(64 * 1024)
    path = f"{sandbox.workdir}/mabridge-check"
    with outcome.step("exec"):
        result = await sandbox.exec(["/bin/sh", "-c", 'echo "$1"', "sh", "it's"], timeout=60, max_output=1000)
    if (result.exit_code, result.stdout) != (0, b"it's\n"):
        said = (result.stdout + result.stderr).decode(errors="replace").strip()
        raise SandboxError(f"/bin/sh does not work there: {said}", provider=provider.type, op="exec")
    with outcome.step("write"):
        await sandbox.write_file(path, data)
    with outcome.step("read"):
        read = await sandbox.read_file(path, max_bytes=len(data))
    if read != data:
        raise SandboxError("a file came back changed", provider=provider.type, op="read_file")
