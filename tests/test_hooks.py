"""The hooks beside that of the providers: what plugins may say of routes, see of a worker, and add to the commands."""

from __future__ import annotations

import types
from collections.abc import Callable

import click
import pytest
from click.testing import CliRunner

import mabridge
from mabridge.cli._common import Group
from mabridge.errors import PluginError
from mabridge.observe import Event, Observers
from mabridge.plugins import Registry
from mabridge.routing import Route, SessionFacts

FACTS = SessionFacts(session_id="sesn_1", metadata={"team": "data"})
ROUTES = [Route(metadata={"team": "none"}, providers=("c",)), Route(providers=("a", "b"))]


@pytest.fixture
def plug() -> Callable[..., Registry]:
    """Make a registry with one plugin a function, each named by it."""

    def plug(**hooks: Callable) -> Registry:
        registry = Registry(load=())
        for name, function in hooks.items():
            module = types.ModuleType(name)
            setattr(module, function.__name__, mabridge.hookimpl(function))
            registry.register_plugin(module, name)
        return registry

    return plug


def routing(answer: object) -> Callable:
    def mabridge_route(session, candidates):
        if isinstance(answer, Exception):
            raise answer
        return answer(session, candidates) if callable(answer) else answer

    return mabridge_route


def test_routes_decide_where_no_plugin_does(plug) -> None:
    assert plug().decide(FACTS, ROUTES).providers == ("a", "b")
    decision = plug(silent=routing(None)).decide(FACTS, ROUTES)
    assert decision.providers == ("a", "b")
    assert decision.choices == ()


def test_plugins_choose_in_turn_among_what_is_left(plug) -> None:
    seen = []

    def swap(session: SessionFacts, candidates):
        seen.append((session.metadata, candidates))
        return candidates[::-1]

    decision = plug(one=routing(swap), two=routing(swap), three=routing(["a"])).decide(FACTS, ROUTES)
    assert decision.providers == ("a",)
    assert seen == [(FACTS.metadata, ("a", "b")), (FACTS.metadata, ("b", "a"))]
    assert decision.explain().splitlines() == [
        "Route 2 (every session) sends it to a.",
        "Of a, b the plugin 'one' takes b, then a.",
        "Of b, a the plugin 'two' takes a, then b.",
        "Of a, b the plugin 'three' takes a.",
        "Route 1 does not match: metadata team is 'data', not 'none'.",
    ]


@pytest.mark.parametrize("answer", [[], (), ["a", "c"], "ab", RuntimeError("broken"), 7])
def test_answer_that_is_no_choice_refuses_the_session(plug, answer: object) -> None:
    decision = plug(strict=routing(answer)).decide(FACTS, ROUTES)
    assert decision.providers == ()
    assert "takes it, and a plugin refuses it" in decision.explain()
    assert "the plugin 'strict' takes none" in decision.explain()
    with pytest.raises(mabridge.ConfigError, match="strict"):
        decision.require()


def test_plugins_are_not_asked_about_a_session_that_no_route_takes(plug) -> None:
    decision = plug(never=routing(AssertionError())).decide(FACTS, ROUTES[:1])
    assert (decision.providers, decision.choices) == ((), ())


def test_every_plugin_sees_events_though_one_raises(plug, caplog: pytest.LogCaptureFixture) -> None:
    seen = []

    def broken():
        def mabridge_event(event):
            raise RuntimeError("no good")

        return mabridge_event

    def sound():
        def mabridge_event(event):
            seen.append(event.name)

        return mabridge_event

    observers = Observers(plug(first=sound(), broken=broken(), last=sound()).observers())
    observers.emit(Event(name="worker.started"))
    assert seen == ["worker.started"] * 2
    assert "no good" in caplog.text


def adding(name: str, *, fails: bool = False) -> Callable:
    def mabridge_register_commands(cli):
        @cli.command(name)
        def added() -> None:
            click.echo(f"this is {name}")

        if fails:
            raise RuntimeError("broken")

    return mabridge_register_commands


def test_commands_of_plugins_are_there_and_ours_stay_ours(plug) -> None:
    main = Group("mabridge")
    main.command("ours")(lambda: click.echo("this is ours"))
    registry = plug(good=adding("theirs"), thief=adding("ours"), broken=adding("half", fails=True))
    registry.add_commands(main)
    assert sorted(main.commands) == ["ours", "theirs"]
    assert CliRunner().invoke(main, ["theirs"]).output == "this is theirs\n"
    assert CliRunner().invoke(main, ["ours"]).output == "this is ours\n"
    assert [failure.plugin for failure in registry.failures] == ["thief", "broken"]
    assert "'ours', which is there already" in str(registry.failures[0])


@pytest.mark.parametrize(
    ("hook", "parameters"),
    [("mabridge_route", "session"), ("mabridge_event", "event"), ("mabridge_register_commands", "cli")],
)
def test_async_hook_is_refused(hook: str, parameters: str) -> None:
    space: dict = {}
    exec(f"async def {hook}({parameters}): ...", space)
    module = types.ModuleType("a_plugin")
    setattr(module, hook, mabridge.hookimpl(space[hook]))
    with pytest.raises(PluginError, match=f"{hook} must be a plain function, not async"):
        Registry(load=()).register_plugin(module, "a_plugin")
