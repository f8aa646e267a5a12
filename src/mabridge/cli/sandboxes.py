"""``mabridge ls``, ``rm`` and ``exec``: the sandboxes that are there now."""

from __future__ import annotations

import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from mabridge.cli._common import UserError, command, config_option, explain, json_option

if TYPE_CHECKING:
    from mabridge.config import Config
    from mabridge.sandbox import ExecResult, Sandbox, SandboxInfo

_KEY = re.compile(r"mab[a-z2-7]{24}")
_MAX_OUTPUT = 64 * 1024 * 1024

Listed = dict[tuple[str, str], "tuple[list[str], SandboxInfo]"]


@command()
@config_option
@json_option
def ls(config_file: str | None, as_json: bool) -> None:
    """List the sandboxes of every configured provider.

    With the environment key at hand, the platform is asked when a worker last had to do with each.
    """
    import anyio

    from mabridge.cli._output import echo_json, seconds, table
    from mabridge.config import load_config
    from mabridge.identity import SESSION_LABEL

    config = load_config(config_file)
    listed, failures = anyio.run(_list, config)
    active = anyio.run(_last_active, config, failures) if listed else {}
    if as_json:
        rows = [_row(names, info, active.get(info.labels.get(SESSION_LABEL, ""))) for names, info in listed.values()]
        echo_json({"sandboxes": rows, "failures": failures})
    else:
        table(
            ("key", "session", "provider", "state", "age", "last active", "id"),
            [
                (
                    info.key,
                    info.labels.get(SESSION_LABEL),
                    ",".join(names),
                    info.state,
                    seconds(_age(info.created_at)),
                    seconds(_age(active.get(info.labels.get(SESSION_LABEL, "")))),
                    info.id[-40:],
                )
                for names, info in listed.values()
            ],
        )
    for name, failure in failures.items():
        click.echo(f"mabridge: {name} could not be listed: {failure}", err=True)
    if failures:
        raise click.exceptions.Exit(2)


@command()
@click.argument("keys", nargs=-1, required=True, metavar="KEY...")
@config_option
def rm(keys: tuple[str, ...], config_file: str | None) -> None:
    """Remove sandboxes, with all that is in them. KEY is as `ls` shows it, or the id of a session."""
    import anyio

    from mabridge.config import load_config

    config = load_config(config_file)
    failures = []
    for key in [_key(key, config) for key in keys]:
        try:
            click.echo(f"removed {key} at {anyio.run(_remove, config, key)}")
        except UserError as exc:
            failures.append(exc.message)
    if failures:
        raise UserError("; ".join(failures))


@command("exec")
@click.argument("key")
@click.argument("argv", nargs=-1, required=True, metavar="-- CMD [ARG]...", type=click.UNPROCESSED)
@click.option("-i", "--stdin", "with_stdin", is_flag=True, help="Pass on what is read from stdin, all of it.")
@click.option("--timeout", type=click.FloatRange(min=0, min_open=True), default=600.0, show_default=True, metavar="S")
@config_option
def exec_(key: str, argv: tuple[str, ...], with_stdin: bool, timeout: float, config_file: str | None) -> None:
    """Run a command in a sandbox. KEY is as `ls` shows it, or the id of a session.

    The exit code is the command's, or 124 if it took longer than --timeout.
    """
    import anyio

    from mabridge.config import load_config

    config = load_config(config_file)
    stdin = sys.stdin.buffer.read() if with_stdin else None
    result = anyio.run(_exec, config, _key(key, config), argv, stdin, timeout)
    click.echo(result.stdout, nl=False)
    click.echo(result.stderr, nl=False, err=True)
    if result.truncated:
        click.echo(f"mabridge: only the first {_MAX_OUTPUT} bytes of the output are shown", err=True)
    if result.timed_out:
        click.echo(f"mabridge: the command was killed after {timeout:g} s", err=True)
    raise click.exceptions.Exit(124 if result.exit_code is None else result.exit_code)


def _age(since: datetime | None) -> float | None:
    return (datetime.now(UTC) - since).total_seconds() if since else None


def _row(names: list[str], info: SandboxInfo, active: datetime | None) -> dict[str, object]:
    from mabridge.identity import ENVIRONMENT_LABEL, SESSION_LABEL

    return {
        "key": info.key,
        "providers": names,
        "id": info.id,
        "state": info.state,
        "session": info.labels.get(SESSION_LABEL),
        "environment": info.labels.get(ENVIRONMENT_LABEL),
        "age": _age(info.created_at),
        "last_active": _age(active),
    }


def _key(text: str, config: Config) -> str:
    """Return the key that is meant: a session's id stands for the key of its sandbox."""
    from mabridge.identity import is_safe_id, sandbox_key

    if _KEY.fullmatch(text):
        return text
    if is_safe_id(text) and text.startswith("sesn_"):
        return sandbox_key(config.worker.read_environment_id(), text)
    raise UserError(f"{text!r} is neither a key, such as `mabridge ls` shows, nor the id of a session")


async def _list(config: Config) -> tuple[Listed, dict[str, str]]:
    """List every provider; those that cannot be listed, with the reason, are in the second value."""
    from mabridge.plugins import make_provider

    listed: Listed = {}
    failures: dict[str, str] = {}
    for name, entry in config.providers.items():
        try:
            async with make_provider(entry, name) as provider:
                found = [info async for info in provider.list()]
        except Exception as exc:
            reason = explain(exc)
            if reason is None:
                raise
            failures[name] = reason
            continue
        for info in found:
            # Two entries of one type may well see the same sandboxes.
            listed.setdefault((entry.type, info.id), ([], info))[0].append(name)
    return listed, failures


async def _last_active(config: Config, failures: dict[str, str]) -> dict[str, datetime]:
    """Return when a worker last had to do with each session, as far as the platform can be asked and tells."""
    import os

    if not os.environ.get(config.worker.environment_key.env):
        return {}
    from mabridge.cli._platform import connect
    from mabridge.control_plane.queue import WorkQueue

    try:
        async with connect(config.worker) as client:
            queue = WorkQueue(
                client,
                environment_id=config.worker.read_environment_id(),
                environment_key=config.worker.environment_key.read(),
                worker_id="mabridge-ls",
            )
            statuses = await queue.statuses()
    except Exception as exc:
        reason = "no answer in time" if isinstance(exc, TimeoutError) else explain(exc)
        if reason is None:
            raise
        failures["anthropic"] = reason
        return {}
    return {session: status.last_active for session, status in statuses.items() if status.last_active is not None}


@asynccontextmanager
async def _attached(config: Config, key: str) -> AsyncIterator[tuple[str, Sandbox]]:
    """Find the sandbox of that key, at whichever provider it is."""
    from mabridge.errors import SandboxError
    from mabridge.plugins import make_provider

    failures: list[SandboxError] = []
    for name, entry in config.providers.items():
        async with make_provider(entry, name) as provider:
            try:
                sandbox = await provider.attach(key)
            except SandboxError as exc:
                failures.append(exc)
                continue
            if sandbox is not None:
                yield name, sandbox
                return
    asked = "; ".join(map(str, failures))
    raise UserError(f"there is no sandbox {key} at {', '.join(config.providers)}" + (f" ({asked})" if asked else ""))


async def _remove(config: Config, key: str) -> str:
    async with _attached(config, key) as (name, sandbox):
        await sandbox.teardown()
        return name


async def _exec(config: Config, key: str, argv: tuple[str, ...], stdin: bytes | None, timeout: float) -> ExecResult:
    async with _attached(config, key) as (_, sandbox):
        return await sandbox.exec(list(argv), stdin=stdin, timeout=timeout, max_output=_MAX_OUTPUT)
