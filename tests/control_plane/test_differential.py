"""The ledger against the SDK's own ``SessionToolRunner``: the same sessions, on the same platform, by either of them.

What both must do alike: which calls are run, in which order in a thread, which results are sent, what is left to
others, and that both end once the session is idle. Where mabridge differs on purpose is in the ledger's own tests:
an interrupt stops what runs, neighbouring read-only calls and threads run side by side, and a call that the platform
ran itself does not keep the session from its end.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import anyio
import pytest
from anthropic import AsyncAnthropic
from anthropic.lib.tools import beta_async_tool

from mabridge.control_plane.lease import Lease
from mabridge.control_plane.ledger import Answer, Finish, Ledger, Run
from mabridge.control_plane.queue import ClaimedWork, WorkQueue
from mabridge.control_plane.stream import follow, send_result
from mabridge.testing import Agent, ControlPlane, Session, ToolCall

pytestmark = pytest.mark.anyio

OURS = ("bash", "write", "edit")
MAX_IDLE = 0.3


@dataclass(frozen=True)
class Script:
    """A session's whole life: the calls of each turn, and what the people around it do."""

    turns: list[list[ToolCall]]
    verdicts: dict[str, str]
    child_thread: bool
    drops: frozenset[int]


def script_of(seed: int) -> Script:
    rng = random.Random(seed)
    turns, verdicts = [], {}
    for turn in range(rng.randint(1, 4)):
        calls = []
        for number in range(rng.randint(1, 4)):
            tag = f"{turn}.{number}"
            if rng.random() < 0.15:
                calls.append(ToolCall(name="weather", input={"tag": tag}, custom=True))
                continue
            permission = rng.choice(["allow", "allow", "allow", "ask", "deny"])
            verdicts[tag] = rng.choice(["allow", "deny"])
            calls.append(ToolCall(name=rng.choice(OURS), input={"tag": tag}, permission=permission))
        turns.append(calls)
    drops = frozenset(turn for turn in range(len(turns)) if rng.random() < 0.5)
    return Script(turns, verdicts, child_thread=rng.random() < 0.4, drops=drops)


async def play(plane: ControlPlane, script: Script, serve: Any) -> tuple[list[str], list[Any]]:
    """Run the script, with calls served by `serve`; return the tags in the order they were run, and all replies."""
    environment = plane.create_environment()
    replies: list[Any] = []
    ran: list[str] = []

    async def brain(agent: Agent) -> None:
        speaker = await agent.thread("helper") if script.child_thread else agent
        for number, calls in enumerate(script.turns):
            if number in script.drops:
                plane.drop_streams()
            if speaker is agent:
                results = await agent.calls(calls)
            else:
                async with agent.idle():
                    results = await speaker.calls(calls)
            replies.append([(r.by, r.is_error, r.text) for r in results])
        if speaker is not agent:
            await speaker.finish()

    session = environment.create_session(brain, message="go")

    async def people() -> None:
        """Confirm what is asked, and answer what is the application's."""
        told: set[str] = set()
        while True:
            for call in session.open_calls:
                if call.id not in told and (call.held or call.custom):
                    told.add(call.id)
                    if call.custom:
                        session.answer(call.id, "sunny")
                    else:
                        session.confirm(call.id, script.verdicts[call.input["tag"]])
            await session.log.changed()

    async with (
        AsyncAnthropic(base_url=plane.url, api_key="unused") as client,
        anyio.create_task_group() as tasks,
    ):
        tasks.start_soon(people)
        with anyio.fail_after(30):
            await serve(client, environment, session, ran)
        tasks.cancel_scope.cancel()
    assert session.status == "idle"
    assert all(len(session.results(call.id).accepted) <= 1 for call in session.calls)
    return ran, replies


async def by_the_sdk(client: AsyncAnthropic, environment: Any, session: Session, ran: list[str]) -> None:
    def tool(name: str) -> Any:
        schema = {"type": "object", "properties": {"tag": {"type": "string"}}}

        @beta_async_tool(name=name, description="A tool of the test.", input_schema=schema)
        async def run(tag: str) -> str:
            ran.append(tag)
            return f"{name} {tag}"

        return run

    runner = client.beta.sessions.events.tool_runner(
        session.id, tools=[tool(name) for name in OURS], max_idle=MAX_IDLE, environment_key=environment.key
    )
    async for _ in runner:
        pass


async def by_the_ledger(client: AsyncAnthropic, environment: Any, session: Session, ran: list[str]) -> None:
    queue = WorkQueue(client, environment_id=environment.id, environment_key=environment.key, worker_id="w")
    work = await queue.poll()
    assert work is not None
    await work.acknowledge()
    lease = Lease(work)
    await lease.claim()
    await Driver(work, lease, ran).drive()


class Driver:
    """The least that a ledger needs to serve a session."""

    def __init__(self, work: ClaimedWork, lease: Lease, ran: list[str]) -> None:
        self.work, self.lease, self.ran = work, lease, ran
        self.ledger = Ledger(
            owns=lambda name, custom: not custom and name in OURS, read_only=frozenset(), max_idle=MAX_IDLE
        )
        self.woken = anyio.Event()
        self.history_begins = self.ledger.history_begins

    def history_ends(self) -> None:
        self.ledger.history_ends()
        self.woken.set()

    def receive(self, event: object) -> None:
        self.ledger.receive(event, anyio.current_time())
        self.woken.set()

    async def drive(self) -> None:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(follow, self.work, self)
            while True:
                self.woken = anyio.Event()
                for action in self.ledger.actions():
                    if isinstance(action, Finish):
                        tasks.cancel_scope.cancel()
                        return
                    assert not isinstance(action, Answer)
                    if isinstance(action, Run):
                        tasks.start_soon(self.run, action)
                with anyio.CancelScope(deadline=self.ledger.deadline() or float("inf")):
                    await self.woken.wait()
                self.ledger.tick(anyio.current_time())

    async def run(self, action: Run) -> None:
        call = action.call
        self.ran.append(str(call.input["tag"]))
        self.ledger.finished(call.id)
        self.woken.set()
        content = [{"type": "text", "text": f"{call.name} {call.input['tag']}"}]
        result = {"type": "user.tool_result", "tool_use_id": call.id, "is_error": False, "content": content}
        await send_result(self.work, self.lease, result, lambda: self.ledger.is_open(call.id))
        self.ledger.settled(call.id, anyio.current_time())
        self.woken.set()


@pytest.mark.parametrize("seed", range(20))
async def test_both_serve_a_session_alike(seed: int):
    script = script_of(seed)
    async with ControlPlane() as plane:
        sdk_ran, sdk_replies = await play(plane, script, by_the_sdk)
        our_ran, our_replies = await play(plane, script, by_the_ledger)
    assert our_replies == sdk_replies
    assert sorted(our_ran) == sorted(sdk_ran)
    assert len(set(our_ran)) == len(our_ran)
    allowed = [call.input["tag"] for turn in script.turns for call in turn if call.permission == "allow"]
    in_order = [tag for tag in our_ran if tag in allowed and not script.drops]
    assert in_order == [tag for tag in sdk_ran if tag in in_order]
