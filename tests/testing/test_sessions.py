"""Sessions over HTTP: history, stream, and what may be sent when, through the SDK's typed client."""

from __future__ import annotations

from typing import Any

import anyio
import pytest
from anthropic import APIStatusError, AsyncAnthropic, BadRequestError, NotFoundError, RequestTooLargeError

from mabridge.testing import Agent, ApiError, BrainFailed, ControlPlane, Environment, ToolCall
from tests.testing.conftest import ask, custom, one_bash, silent, tool_result, until_calls

pytestmark = pytest.mark.anyio


def types_of(events: list[Any]) -> list[str]:
    return [event["type"] for event in events]


async def test_turn_emits_the_documented_events_in_order(client: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(one_bash, message="go")
    (call,) = await until_calls(session)
    await client.beta.sessions.events.send(session.id, events=[tool_result(call)])
    await session.wait_idle()
    assert types_of(session.events) == [
        "user.message",
        "session.status_running",
        "session.thread_status_running",
        "agent.tool_use",
        "session.thread_status_idle",
        "session.status_idle",
        "user.tool_result",
        "session.status_running",
        "session.thread_status_running",
        "session.thread_status_idle",
        "session.status_idle",
    ]
    listed = [event async for event in client.beta.sessions.events.list(session.id)]
    assert [event.id for event in listed] == [event["id"] for event in session.events]
    assert listed[5].stop_reason.event_ids == [call]  # type: ignore[union-attr]


async def test_every_kind_of_event_fits_the_sdk_types(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    async def brain(agent: Agent) -> None:
        if agent.text == "fail":
            raise LookupError("on purpose")
        await agent.server_call("web_search", {"query": "x"}, result="found")
        child = await agent.thread("helper")
        await child.say("hello from the child")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(child.calls, [("read", {"file_path": "a"})])
            tasks.start_soon(
                agent.calls,
                [
                    ToolCall(name="bash", input={}, permission="ask"),
                    ToolCall(name="bash", input={}, permission="deny"),
                    ToolCall(name="lookup", input={}, custom=True),
                ],
            )
        await child.terminate()
        await agent.say("done")

    session = environment.create_session(brain, message="go")
    await until_calls(session, 3)
    for call in session.open_calls:
        if call.held:
            session.confirm(call.id, "allow")
        session.answer(call.id, "ok")
    session.send_message("again")
    await until_calls(session, 3)
    session.interrupt()
    session.update(tools=[], metadata={"a": "1"}, title="t")
    session.send_message("fail")
    with pytest.raises(BrainFailed):
        await session.wait_for(lambda e: e["type"] == "session.deleted")

    # The client checks strictly: an event that does not fit raises.
    listed = {event.type async for event in client.beta.sessions.events.list(session.id)}
    assert listed == set(types_of(session.events))
    assert len(listed) == 19


async def test_session_tells_its_agent_metadata_and_resources(
    plane: ControlPlane, client: AsyncAnthropic, environment: Environment
) -> None:
    skill, store = plane.create_skill("pdf", {"SKILL.md": "x"}), plane.create_memory_store("My Notes", {"/a.md": "x"})
    session = environment.create_session(
        silent, metadata={"team": "a"}, agent_name="coder", agent_id="agent_1", skills=[skill], memory_stores=[store]
    )
    got = await client.beta.sessions.retrieve(session.id)
    assert (got.agent.name, got.agent.id, got.metadata, got.status) == ("coder", "agent_1", {"team": "a"}, "idle")
    assert [(s.skill_id, s.version) for s in got.agent.skills] == [(skill.id, "latest")]
    assert got.resources[0].type == "memory_store"
    assert got.resources[0].mount_path == "/mnt/memory/my-notes"


async def test_history_pages_orders_and_filters(client: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(silent)
    for index in range(7):
        session.emit({"type": "agent.message", "content": [{"type": "text", "text": str(index)}]})
    session.emit({"type": "session.status_rescheduled"})
    ids = [event["id"] for event in session.events]
    listing = client.beta.sessions.events.list
    assert [event.id async for event in listing(session.id, limit=3)] == ids
    assert [event.id async for event in listing(session.id, limit=3, order="desc")] == ids[::-1]
    assert [event.id async for event in listing(session.id, types=["session.status_rescheduled"])] == ids[-1:]
    since = session.events[4]["processed_at"]
    assert [event.id async for event in listing(session.id, created_at_gt=since)] == ids[5:]
    assert [event.id async for event in listing(session.id, created_at_lte=since)] == ids[:5]
    with pytest.raises(BadRequestError):
        await listing(session.id, page="nonsense")


async def test_stream_carries_only_what_comes_after_it_opened(client: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(silent)
    session.emit({"type": "session.status_rescheduled"})
    async with await client.beta.sessions.events.stream(session.id) as stream:
        session.send_message("hello")
        seen = []
        async for event in stream:
            seen.append(event.type)
            if event.type == "session.status_idle":
                break
    assert seen[0] == "user.message"
    assert "session.status_rescheduled" not in seen


async def test_message_during_a_turn_waits_and_is_sent_again_when_processed(environment: Environment) -> None:
    async def brain(agent: Agent) -> None:
        await agent.think(0.05)

    session = environment.create_session(brain, message="one")
    second = session.send_message("two")
    assert second["processed_at"] is None
    await session.wait_idle()
    again = next(event for event in session.events if event["id"] == second["id"])
    assert again["processed_at"]
    assert types_of(session.events).count("user.message") == 2
    assert types_of(session.events).count("session.status_running") == 1


async def test_partial_answers_say_what_is_still_waited_for(client: AsyncAnthropic, environment: Environment) -> None:
    async def brain(agent: Agent) -> None:
        replies = await agent.calls([("read", {"file_path": "a"}), ("grep", {"pattern": "x"})])
        assert [reply.text for reply in replies] == ["one", "two"]

    session = environment.create_session(brain, message="go")
    first, second = await until_calls(session, 2)
    await client.beta.sessions.events.send(session.id, events=[tool_result(second, "two")])
    assert session.events[-1]["type"] == "session.status_idle"
    assert session.events[-1]["stop_reason"] == {"type": "requires_action", "event_ids": [first]}
    await client.beta.sessions.events.send(session.id, events=[tool_result(first, "one")])
    await session.wait_idle()


async def test_second_result_of_a_call_is_refused_and_recorded(
    client: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(one_bash, message="go")
    (call,) = await until_calls(session)
    send = client.beta.sessions.events.send
    await send(session.id, events=[tool_result(call, "first")])
    with pytest.raises(BadRequestError, match="not waiting for a result"):
        await send(session.id, events=[tool_result(call, "second")])
    results = session.results(call)
    assert [event["content"][0]["text"] for event in results.accepted] == ["first"]
    assert [event["content"][0]["text"] for event, _ in results.refused] == ["second"]


async def test_request_is_taken_whole_or_not_at_all(client: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(one_bash, message="go")
    (call,) = await until_calls(session)
    with pytest.raises(BadRequestError, match="does not match any tool use"):
        await client.beta.sessions.events.send(session.id, events=[tool_result(call), tool_result("sevt_none")])
    with pytest.raises(BadRequestError, match="not waiting"):
        await client.beta.sessions.events.send(session.id, events=[tool_result(call), tool_result(call)])
    assert session.results(call).accepted == []


@pytest.mark.parametrize(
    ("event", "message"),
    [
        ({"type": "user.nothing"}, "not an event"),
        ({"type": "user.tool_result"}, "field required"),
        ({"type": "user.tool_result", "tool_use_id": "x", "more": 1}, "extra inputs"),
        (tool_result("x", ""), "non-empty"),
        (tool_result("x", "\ud800"), "surrogate"),
        ({"type": "user.tool_result", "tool_use_id": "x", "content": [{"type": "video"}]}, "not a content block"),
        ({"type": "user.message", "content": []}, "list of content blocks"),
        ({"type": "user.tool_confirmation", "tool_use_id": "x", "result": "maybe"}, "'allow' or 'deny'"),
    ],
)
async def test_malformed_event_is_refused(environment: Environment, event: Any, message: str) -> None:
    session = environment.create_session(silent)
    with pytest.raises(ApiError, match=message):
        session.send(event)
    assert session.events == []


async def test_message_while_results_are_awaited_is_refused(environment: Environment) -> None:
    session = environment.create_session(one_bash, message="go")
    (call,) = await until_calls(session)
    with pytest.raises(ApiError, match=f"waiting on responses to events \\['{call}'\\]"):
        session.send_message("hello?")


async def test_interrupt_closes_pending_calls_and_idles(environment: Environment) -> None:
    after = []

    async def brain(agent: Agent) -> None:
        await agent.calls([("bash", {"command": "a"}), ("read", {"file_path": "b"})])
        after.append(True)

    session = environment.create_session(brain, message="go")
    first, second = await until_calls(session, 2)
    session.interrupt()
    await session.wait_idle()
    closing = [event for event in session.events if event["type"] == "agent.tool_result"]
    assert [event["tool_use_id"] for event in closing] == [first, second]
    assert closing[0]["is_error"]
    assert closing[0]["content"][0]["text"].startswith("Tool execution was interrupted before completion.")
    assert session.events[-1]["stop_reason"] == {"type": "end_turn"}
    assert not after
    with pytest.raises(ApiError, match="not waiting for a result"):
        session.answer(first, "late")


async def test_interrupt_with_a_new_message_in_one_request_starts_the_next_turn(environment: Environment) -> None:
    async def brain(agent: Agent) -> None:
        if agent.text == "go":
            await agent.call("bash", {"command": "a"})
        await agent.say(agent.text)

    session = environment.create_session(brain, message="go")
    await until_calls(session)
    session.send({"type": "user.interrupt"}, {"type": "user.message", "content": [{"type": "text", "text": "instead"}]})
    await session.wait_idle()
    said = [event["content"][0]["text"] for event in session.events if event["type"] == "agent.message"]
    assert said == ["instead"]


@pytest.mark.parametrize("closing", ["user.tool_result", None])
async def test_closing_event_of_an_interrupt_can_be_chosen(closing: Any) -> None:
    async with ControlPlane(closing_event=closing) as plane:
        session = plane.create_environment().create_session(one_bash, message="go")
        (call,) = await until_calls(session)
        session.interrupt()
        await session.wait_idle()
        assert "agent.tool_result" not in types_of(session.events)
        assert ("user.tool_result" in types_of(session.events)) == (closing is not None)
        assert session.results(call).accepted == []


async def test_call_that_needs_confirmation_takes_no_result_before_it(environment: Environment) -> None:
    session = environment.create_session(ask, message="go")
    (call,) = await until_calls(session)
    with pytest.raises(ApiError, match="waiting for confirmation"):
        session.answer(call, "too early")
    session.confirm(call, "allow")
    with pytest.raises(ApiError, match="not waiting for confirmation"):
        session.confirm(call, "deny")
    session.answer(call, "done")
    assert session.calls[0].reply is not None
    assert session.calls[0].reply.by == "worker"


async def test_denied_calls_are_closed_by_the_platform(environment: Environment) -> None:
    replies = []

    async def brain(agent: Agent) -> None:
        replies.extend(
            await agent.calls(
                [
                    ToolCall(name="bash", input={"command": "a"}, permission="deny"),
                    ToolCall(name="bash", input={"command": "b"}, permission="ask"),
                    ToolCall(name="bash", input={"command": "c"}),
                ]
            )
        )

    session = environment.create_session(brain, message="go")
    ask, plain = await until_calls(session, 2)
    with pytest.raises(ApiError, match="does not require confirmation"):
        session.confirm(plain, "allow")
    session.confirm(ask, "deny", message="Not today.")
    session.answer(plain, "c")
    await session.wait_idle()
    assert [(reply.by, reply.is_error) for reply in replies] == [("denied", True), ("denied", True), ("worker", False)]
    assert replies[0].text == "Permission to use bash has been denied."
    assert "Not today." in replies[1].text


async def test_custom_call_takes_only_a_custom_result(environment: Environment) -> None:
    session = environment.create_session(custom, message="go")
    (call,) = await until_calls(session)
    with pytest.raises(ApiError, match="of this kind"):
        session.send(tool_result(call))
    session.answer(call, "found")
    assert session.results(call).accepted[0]["custom_tool_use_id"] == call


async def test_calls_of_child_threads_name_the_thread_until_it_terminates(environment: Environment) -> None:
    done = anyio.Event()

    async def brain(agent: Agent) -> None:
        helper, doomed = await agent.thread("helper"), await agent.thread("doomed")
        async with anyio.create_task_group() as tasks, agent.idle():
            tasks.start_soon(helper.call, "read", {"file_path": "a"})
            tasks.start_soon(doomed.call, "bash", {"command": "b"})
            await done.wait()
            await doomed.terminate()

    session = environment.create_session(brain, message="go")
    read, bash = await until_calls(session, 2)
    await session.wait_for(lambda e: e["type"] == "session.status_idle", timeout=5)
    threads = {event["id"]: event.get("session_thread_id") for event in session.events}
    assert threads[read] is not None
    assert threads[bash] is not None
    assert threads[read] != threads[bash]
    assert session.events[-1]["stop_reason"]["event_ids"] == [read, bash]
    assert session.answer(read, "a")["session_thread_id"] == threads[read]
    done.set()
    await session.wait_for(lambda e: e["type"] == "session.thread_status_terminated", timeout=5)
    with pytest.raises(ApiError, match="has terminated"):
        session.answer(bash, "late")
    await session.wait_idle(timeout=5)


async def test_session_is_not_idle_while_another_thread_runs(environment: Environment) -> None:
    release = anyio.Event()

    async def brain(agent: Agent) -> None:
        helper = await agent.thread("helper")
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(helper.call, "read", {"file_path": "a"})
            await release.wait()

    session = environment.create_session(brain, message="go")
    (read,) = await until_calls(session)
    await session.wait_for(lambda e: e["type"] == "session.thread_status_idle", timeout=5)
    assert session.status == "running"
    assert "session.status_idle" not in types_of(session.events)
    session.answer(read, "a")
    release.set()
    await session.wait_idle(timeout=5)


async def test_tools_can_be_replaced_only_while_idle(owner: AsyncAnthropic, environment: Environment) -> None:
    tool: Any = {"type": "custom", "name": "lookup", "description": "d", "input_schema": {"type": "object"}}
    thinking = anyio.Event()

    async def brain(agent: Agent) -> None:
        await thinking.wait()

    session = environment.create_session(brain, message="go")
    with pytest.raises(BadRequestError, match="idle"):
        await owner.beta.sessions.update(session.id, agent={"tools": [tool]})
    thinking.set()
    await session.wait_idle()
    await owner.beta.sessions.update(session.id, agent={"tools": [tool]}, metadata={"a": "1"})
    updated = session.events[-1]
    assert updated["type"] == "session.updated"
    assert [each["name"] for each in updated["agent"]["tools"]] == ["lookup"]
    assert updated["metadata"] == {"a": "1"}


async def test_event_can_be_repeated_on_the_streams(client: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(silent)
    event = session.emit({"type": "session.status_rescheduled"})
    async with await client.beta.sessions.events.stream(session.id) as stream:
        session.log.repeat(event["id"])
        session.delete()
        repeated: Any = [seen async for seen in stream]
        assert [seen.id for seen in repeated] == [event["id"], session.events[-1]["id"]]
    assert len(session.events) == 2


async def test_terminated_session_takes_no_events(client: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(one_bash, message="go")
    (call,) = await until_calls(session)
    session.terminate()
    await session.wait_ended()
    assert (await client.beta.sessions.retrieve(session.id)).status == "terminated"
    with pytest.raises(BadRequestError, match="terminated"):
        await client.beta.sessions.events.send(session.id, events=[tool_result(call)])
    assert len(session.results(call).refused) == 1


async def test_deleting_a_session_ends_its_streams_and_hides_it(
    client: AsyncAnthropic, owner: AsyncAnthropic, environment: Environment
) -> None:
    session = environment.create_session(silent)
    async with await client.beta.sessions.events.stream(session.id) as stream:
        await owner.beta.sessions.delete(session.id)
        assert [event.type async for event in stream] == ["session.deleted"]
    with pytest.raises(NotFoundError):
        await client.beta.sessions.retrieve(session.id)


async def test_archived_session_is_terminated(owner: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(silent)
    got = await owner.beta.sessions.archive(session.id)
    assert got.status == "terminated"
    assert got.archived_at is not None


async def test_result_beyond_32_mb_is_413(client: AsyncAnthropic, environment: Environment) -> None:
    session = environment.create_session(one_bash, message="go")
    (call,) = await until_calls(session)
    with pytest.raises(RequestTooLargeError):
        await client.beta.sessions.events.send(session.id, events=[tool_result(call, "x" * 32_000_000)])
    await client.beta.sessions.events.send(session.id, events=[tool_result(call, "x" * 1_000_000)])
    await session.wait_idle()


async def test_failing_brain_is_told_to_whoever_waits(environment: Environment) -> None:
    async def brain(agent: Agent) -> None:
        raise LookupError("no such plan")

    session = environment.create_session(brain, message="go")
    with pytest.raises(BrainFailed) as caught:
        await session.wait_idle()
    assert isinstance(caught.value.__cause__, LookupError)
    assert types_of(session.events)[-2:] == ["session.error", "session.status_terminated"]


async def test_failing_brain_that_nobody_waited_for_fails_the_plane() -> None:
    async def brain(agent: Agent) -> None:
        raise LookupError("no such plan")

    async def serve() -> None:
        async with ControlPlane() as plane:
            session = plane.create_environment().create_session(brain, message="go")
            await plane.wait_until(lambda: session.status == "terminated")

    with pytest.raises(BrainFailed):
        await serve()


async def test_wait_that_times_out_says_where_the_session_stands(environment: Environment) -> None:
    session = environment.create_session(one_bash, message="go")
    with pytest.raises(TimeoutError, match=r"is idle; work item queued; open calls: bash sevt_"):
        await session.wait_idle(timeout=0.1)


async def test_sessions_can_be_created_over_http_for_the_default_brain() -> None:
    async with (
        ControlPlane(default_brain=silent) as plane,
        AsyncAnthropic(base_url=plane.url, api_key=plane.api_key, _strict_response_validation=True) as owner,
    ):
        environment = plane.create_environment()
        created = await owner.beta.sessions.create(
            agent="agent_1",
            environment_id=environment.id,
            initial_events=[{"type": "user.message", "content": [{"type": "text", "text": "hi"}]}],
        )
        await plane.sessions[created.id].wait_idle()
        assert environment.queue.items[0].id == created.id


async def test_skill_downloads_by_the_version_that_latest_resolves_to(
    plane: ControlPlane, client: AsyncAnthropic
) -> None:
    skill = plane.create_skill("pdf", {"SKILL.md": "x", "run.sh": "#!/bin/sh\n"})
    version = await client.beta.skills.versions.retrieve("latest", skill_id=skill.id)
    assert version.name == "pdf"
    with pytest.raises(NotFoundError):
        await client.beta.skills.versions.download("latest", skill_id=skill.id)
    archive = await client.beta.skills.versions.download(version.id, skill_id=skill.id)
    assert await archive.read() == skill.archive


async def test_memories_are_listed_with_and_without_content(plane: ControlPlane, owner: AsyncAnthropic) -> None:
    store = plane.create_memory_store("Notes", {f"/{n:03}.md": f"text {n}" for n in range(30)})
    listing = owner.beta.memory_stores.memories.list
    basic: list[Any] = [item async for item in listing(store.id, limit=100)]
    full: list[Any] = [item async for item in listing(store.id, view="full")]
    assert [item.path for item in basic] == [item.path for item in full] == sorted(store.files)
    assert {item.content for item in basic} == {None}
    assert full[3].content == "text 3"
    assert full[3].content_sha256 == basic[3].content_sha256


async def test_unknown_endpoint_is_a_json_404(client: AsyncAnthropic) -> None:
    with pytest.raises(APIStatusError) as caught:
        await client.get("/v1/nothing", cast_to=object)
    assert caught.value.body == {"type": "error", "error": {"type": "not_found_error", "message": "Not Found"}}
