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
@click.option("--conformance", is_flag=True, help="Put each provider to all the tests of the contract instead.")
@click.option("--only", metavar="GROUP", multiple=True, help="With --conformance: only this group of tests.")
@json_option
def check(
    names: tuple[str, ...],
    config_file: str | None,
    platform: bool,
    conformance: bool,
    only: tuple[str, ...],
    as_json: bool,
) -> None:
    """Check the environment key, and each provider by making, using and removing a sandbox.

    With NAMEs, only those providers are checked, and the API is not asked.

    With --conformance some dozens of sandboxes are made and removed. It needs pytest: pip install 'mabridge[testing]'.
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
    if conformance:
        _check_conformance(config, names or tuple(config.providers), only, as_json)
        return
    if only:
        raise click.UsageError("--only goes with --conformance")
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


def _check_conformance(config: Config, names: tuple[str, ...], only: tuple[str, ...], as_json: bool) -> None:
    from importlib.util import find_spec

    from mabridge.cli._output import echo_json, progress, seconds, table
    from mabridge.errors import ConfigError
    from mabridge.plugins import make_provider

    if find_spec("pytest") is None:
        raise ConfigError("--conformance needs pytest: pip install 'mabridge[testing]'")
    from mabridge.cli._conformance import GROUPS, run_conformance

    for group in only:
        if group not in GROUPS:
            raise click.BadParameter(f"there is no group {group!r}; there are {', '.join(GROUPS)}", param_hint="--only")
    for name in names:  # what is wrong with the configuration is told before anything is made
        make_provider(config.providers[name], name)
    with progress() as tell:
        done = {name: run_conformance(config.providers[name], name, groups=only, tell=tell) for name in names}
    if as_json:
        echo_json([{"name": name, **vars(report)} for name, reports in done.items() for report in reports])
    else:
        rows = [
            (name, report.group, report.test, seconds(report.seconds), report.outcome, report.why)
            for name, reports in done.items()
            for report in reports
        ]
        table(("name", "group", "test", "seconds", "", "why"), rows)
        for name, reports in done.items():
            counts = {kind: sum(r.outcome == kind for r in reports) for kind in ("passed", "failed", "skipped")}
            said = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
            click.echo(f"mabridge: {name}: {said or 'no test was run'}", err=True)
    if not all(done.values()) or any(report.outcome == "failed" for reports in done.values() for report in reports):
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
