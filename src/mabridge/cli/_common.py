"""What the commands share: their options, and how an error becomes one line and exit code 2."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from typing import IO, Any, TypeVar

import click

from mabridge.errors import MabridgeError

__all__ = ["Group", "UserError", "command", "config_option", "debug_option", "explain", "json_option"]

F = TypeVar("F", bound=Callable[..., Any])

_DEBUG = "mabridge.debug"


def _set_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


debug_option = click.option(
    "--debug",
    is_flag=True,
    expose_value=False,
    callback=_set_debug,
    help="Show the traceback of an error.",
)

config_option = click.option(
    "-c",
    "--config",
    "config_file",
    type=click.Path(dir_okay=False),
    help="The configuration file. Default: $MABRIDGE_CONFIG, else ./mabridge.toml.",
)

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for scripts.")


def command(name: str | None = None) -> Callable[[Callable[..., Any]], click.Command]:
    """Return a decorator as `click.command`, with ``--debug`` added, so that it may stand before or after the name."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        return click.command(name)(debug_option(function))

    return decorate


class UserError(click.ClickException):
    """What the person at the keyboard can put right: told in one line, exit code 2."""

    exit_code = 2

    def show(self, file: IO[Any] | None = None) -> None:
        """Print it to stderr."""
        click.echo(f"mabridge: {self.format_message()}", file=file or sys.stderr)


class Group(click.Group):
    """The group of all commands: ours and those of plugins.

    It tells expected errors without a traceback. An error of our own keeps its traceback.
    """

    _loaded = False

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        self._load_plugins()
        return super().list_commands(ctx)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Return a command. Plugins are loaded only for one that is not ours."""
        if cmd_name not in self.commands:
            self._load_plugins()
        return super().get_command(ctx, cmd_name)

    def _load_plugins(self) -> None:
        from importlib.metadata import entry_points

        if not self._loaded and entry_points(group="mabridge"):
            self._loaded = True
            from mabridge.plugins import registry

            registry().add_commands(self)

    def invoke(self, ctx: click.Context) -> Any:  # noqa: ANN401 - click's own signature
        """Invoke the command."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as exc:
            message = explain(exc)
            if message is None:
                raise
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            raise UserError(message) from exc


def explain(error: BaseException) -> str | None:
    """Return what to tell a person about `error`, or ``None`` if it is a fault of mabridge's own."""
    if isinstance(error, BaseExceptionGroup):
        messages = [explain(part) for part in error.exceptions]
        told = list(dict.fromkeys(message for message in messages if message is not None))
        return "; ".join(told) if len(told) and None not in messages else None
    if isinstance(error, MabridgeError):
        return str(error)
    # The SDK is slow to import, and an error of its own cannot be here unless it was.
    anthropic = sys.modules.get("anthropic")
    if anthropic is None or not isinstance(error, anthropic.APIError):
        return None
    if isinstance(error, anthropic.APIStatusError):
        return _explain_status(error.status_code, error.message, str(error.request.url.host))
    return f"cannot reach {error.request.url.host}: {error.__cause__ or error.message}; check base_url and the network"


def _explain_status(status: int, message: str, host: str) -> str:
    if status in (401, 403):
        return (
            f"{host} rejected the environment key ({status}): it is wrong, was revoked, or belongs to another "
            "environment; make one for this environment in the Console"
        )
    if status == 404:
        return f"{host} knows no such environment or session (404): {message}"
    return f"{host} answered {status}: {message}"
