"""The ledger's rules, one by one and then over histories that hypothesis makes, shuffles, repeats and cuts."""

from __future__ import annotations

import itertools
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mabridge.control_plane.ledger import Answer, Cancel, Finish, Hold, Ledger, Run, Skip

OURS = frozenset({"bash", "read", "grep", "write"})
READ_ONLY = frozenset({"read", "grep"})


def ledger(max_idle: float | None = 60.0) -> Ledger:
    return Ledger(owns=lambda name, custom: not custom and name in OURS, read_only=READ_ONLY, max_idle=max_idle)


_ids = itertools.count()


def event(type_: str, **fields: Any) -> SimpleNamespace:
    return SimpleNamespace(type=type_, **{"id": f"sevt_{next(_ids)}", **fields})


def use(call_id: str, name: str = "bash", *, permission: str | None = "allow", thread: str | None = None, **kw: Any):
    return event(
        "agent.tool_use",
        id=call_id,
        name=name,
        input={},
        evaluated_permission=permission,
        session_thread_id=thread,
        **kw,
    )


def result(call_id: str, kind: str = "user.tool_result"):
    return event(kind, tool_use_id=call_id)


def verdict(call_id: str, word: str):
    return event("user.tool_confirmation", tool_use_id=call_id, result=word)


def idle(reason: str = "end_turn"):
    return event("session.status_idle", stop_reason=SimpleNamespace(type=reason))


def given_events(*events: object, into: Ledger | None = None, now: float = 0.0):
    """The actions that the ledger takes when these events come in live, one after the other."""
    book = into or ledger()
    actions = []
    for one in events:
        book.receive(one, now)
        actions += book.actions()
    return actions


def shape(actions):
    return [(type(a).__name__, a.call.id) if not isinstance(a, Finish) else ("Finish", a.reason) for a in actions]


# ---- what is run


def test_allowed_call_of_our_tool_is_run():
    assert shape(given_events(use("a"))) == [("Run", "a")]


def test_call_without_a_permission_is_run():
    assert shape(given_events(use("a", permission=None))) == [("Run", "a")]


def test_call_of_another_tool_is_left_alone():
    assert shape(given_events(use("a", "web_search"))) == [("Skip", "a")]


def test_custom_call_named_like_our_tool_is_left_alone():
    custom = event("agent.custom_tool_use", id="a", name="bash", input={})
    assert shape(given_events(custom)) == [("Skip", "a")]


def test_denied_call_is_never_run_even_if_a_verdict_allows_it():
    assert shape(given_events(use("a", permission="deny"), verdict("a", "allow"))) == [("Skip", "a")]


@pytest.mark.parametrize("permission", ["ask", "a word of next year"])
def test_call_that_needs_permission_is_held_until_it_is_allowed(permission):
    book = ledger()
    assert shape(given_events(use("a", permission=permission), into=book)) == [("Hold", "a")]
    assert shape(given_events(verdict("a", "allow"), into=book)) == [("Run", "a")]


@pytest.mark.parametrize("word", ["deny", "a word of next year"])
def test_held_call_is_not_run_on_any_other_verdict(word):
    assert shape(given_events(use("a", permission="ask"), verdict("a", word))) == [("Hold", "a"), ("Skip", "a")]


def test_verdict_that_came_before_the_call_counts():
    assert shape(given_events(verdict("a", "allow"), use("a", permission="ask"))) == [("Run", "a")]
    assert shape(given_events(verdict("a", "deny"), use("a"))) == [("Skip", "a")]


def test_denial_is_not_taken_back():
    actions = given_events(verdict("a", "deny"), verdict("a", "allow"), use("a", permission="ask"))
    assert shape(actions) == [("Skip", "a")]


@pytest.mark.parametrize("kind", ["user.tool_result", "agent.tool_result"])
def test_call_that_anyone_answered_is_not_run(kind):
    book = ledger()
    book.history_begins()
    assert given_events(use("a"), result("a", kind), into=book) == [Skip(_call(book, "a"), "answered")]
    book.history_ends()
    assert book.actions() == []


def _call(book: Ledger, call_id: str):
    return book._entries[call_id].call


def test_nothing_is_run_until_the_history_was_read_whole():
    book = ledger()
    book.history_begins()
    assert given_events(use("a"), use("b"), into=book) == []
    book.history_ends()
    assert shape(book.actions()) == [("Run", "a")]


def test_input_of_null_is_an_empty_one():
    call = event("agent.tool_use", id="a", name="bash", input=None, evaluated_permission="allow")
    (run,) = given_events(call)
    assert run.call.input == {}


# ---- in which order


def test_calls_of_one_thread_run_one_after_the_other():
    book = ledger()
    assert shape(given_events(use("a"), use("b"), into=book)) == [("Run", "a")]
    book.finished("a")
    assert shape(book.actions()) == [("Run", "b")]


def test_neighbouring_read_only_calls_run_together_and_others_wait_for_them():
    book = ledger()
    calls = use("a", "read"), use("b", "grep"), use("c", "bash"), use("d", "read")
    assert shape(given_events(*calls, into=book)) == [("Run", "a"), ("Run", "b")]
    book.finished("a")
    assert book.actions() == []
    book.finished("b")
    # Another worker reads again what was not accepted, and must not see what "c" has changed.
    assert book.actions() == []
    book.settled("a", 0.0)
    assert book.actions() == []
    book.settled("b", 0.0)
    assert shape(book.actions()) == [("Run", "c")]
    book.finished("c")
    assert shape(book.actions()) == [("Run", "d")]


def test_interrupted_read_holds_up_nobody_though_its_answer_is_on_its_way():
    book = ledger()
    interrupt = event("user.interrupt", session_thread_id=None)
    calls = use("a", "read"), use("b", "bash"), use("c", "read")
    assert shape(given_events(*calls, interrupt, use("d", "bash"), into=book)) == [
        ("Run", "a"),
        ("Cancel", "a"),
        ("Answer", "b"),
        ("Answer", "c"),
    ]
    book.finished("a")
    assert shape(book.actions()) == [("Run", "d")]


def test_threads_run_side_by_side():
    assert shape(given_events(use("a"), use("b", thread="t1"), use("c", thread="t1"))) == [("Run", "a"), ("Run", "b")]


def test_held_call_does_not_hold_up_those_after_it():
    assert shape(given_events(use("a", permission="ask"), use("b"))) == [("Hold", "a"), ("Run", "b")]


# ---- what stops a call


def test_interrupt_cancels_what_runs_and_answers_what_waits():
    book = ledger()
    given_events(use("a"), use("b"), use("c", permission="ask"), into=book)
    assert shape(given_events(event("user.interrupt"), into=book)) == [
        ("Cancel", "a"),
        ("Answer", "b"),
        ("Answer", "c"),
    ]
    book.finished("a")
    assert book.actions() == []
    assert book.is_open("a")  # an interrupted call is still to be answered


def test_interrupt_of_one_thread_spares_the_others():
    book = ledger()
    given_events(use("a"), use("b", thread="t1"), into=book)
    assert shape(given_events(event("user.interrupt", session_thread_id="t1"), into=book)) == [("Cancel", "b")]


def test_interrupt_that_names_the_primary_thread_is_for_calls_that_name_none():
    book = ledger()
    given_events(event("session.thread_status_running", session_thread_id="main"), use("a"), into=book)
    assert shape(given_events(event("user.interrupt", session_thread_id="main"), into=book)) == [("Cancel", "a")]


def test_child_thread_that_runs_first_is_not_taken_for_the_primary_one():
    book = ledger()
    created = event("session.thread_created", session_thread_id="t1")
    given_events(created, event("session.thread_status_running", session_thread_id="t1"), use("a"), into=book)
    assert shape(given_events(event("user.interrupt", session_thread_id="t1"), into=book)) == []


def test_call_after_an_interrupt_is_run():
    assert shape(given_events(event("user.interrupt"), use("a"))) == [("Run", "a")]


def test_call_interrupted_before_a_worker_came_is_answered_and_not_run():
    book = ledger()
    book.history_begins()
    actions = given_events(use("a"), event("user.interrupt"), use("b"), into=book)
    book.history_ends()
    assert shape(actions + book.actions()) == [("Answer", "a"), ("Run", "b")]


def test_running_call_that_someone_else_answers_is_cancelled_and_takes_no_result():
    book = ledger()
    given_events(use("a"), into=book)
    assert given_events(result("a", "agent.tool_result"), into=book) == [Cancel(_call(book, "a"), "answered")]
    assert not book.is_open("a")


def test_thread_that_ended_takes_its_calls_with_it():
    book = ledger()
    given_events(use("a", thread="t"), use("b", thread="t"), use("c", thread="t", permission="ask"), into=book)
    ended = event("session.thread_status_terminated", session_thread_id="t")
    assert shape(given_events(ended, use("d", thread="t"), into=book)) == [
        ("Cancel", "a"),
        ("Skip", "b"),
        ("Skip", "c"),
        ("Skip", "d"),
    ]
    assert not any(book.open_calls())


# ---- when it is done


def test_idle_session_is_done_with_after_max_idle():
    book = ledger(max_idle=60.0)
    given_events(idle(), into=book, now=10.0)
    assert book.deadline() == 70.0
    book.tick(69.9)
    assert book.actions() == []
    book.tick(70.0)
    assert book.actions() == [Finish("idle")]
    assert book.actions() == []


def test_session_that_waits_for_an_answer_is_not_done_with():
    book = ledger()
    given_events(idle("requires_action"), into=book)
    assert book.deadline() is None


@pytest.mark.parametrize("reason", ["retries_exhausted", "budget_reached", "refusal", "a word of next year"])
def test_every_other_reason_to_be_idle_ends_the_turn(reason):
    book = ledger()
    given_events(idle(reason), into=book)
    assert book.deadline() == 60.0


def test_any_event_puts_an_idle_session_back_to_work_but_for_two():
    for other, deadline in (
        (event("user.message"), None),
        (event("span.model_request_start"), None),
        (verdict("x", "allow"), 60.0),
        (event("session.thread_status_terminated", session_thread_id="t"), 60.0),
    ):
        book = ledger()
        given_events(idle(), other, into=book)
        assert book.deadline() == deadline, other.type


def test_open_call_holds_the_idle_clock_back_and_it_starts_afresh_once_it_is_settled():
    book = ledger()
    given_events(use("a"), idle(), into=book, now=0.0)
    assert book.deadline() is None
    book.finished("a")
    assert book.deadline() is None
    book.settled("a", 30.0)
    assert book.deadline() == 90.0


def test_call_of_the_servers_own_tool_does_not_hold_the_idle_clock_back():
    # The SDK's runner never looks at agent.tool_result, and does not idle out here.
    book = ledger()
    given_events(use("a", "web_search"), result("a", "agent.tool_result"), idle(), into=book)
    assert book.deadline() == 60.0


def test_idle_for_ever_if_asked_for():
    book = ledger(max_idle=None)
    given_events(idle(), into=book)
    assert book.deadline() is None


@pytest.mark.parametrize(
    ("kind", "reason"), [("session.status_terminated", "terminated"), ("session.deleted", "deleted")]
)
def test_ended_session_is_done_with_at_once(kind, reason):
    book = ledger()
    assert shape(given_events(use("a"), event(kind), use("b"), into=book)) == [("Run", "a"), ("Finish", reason)]


# ---- histories

CALLS = [f"c{n}" for n in range(5)]
THREADS = [None, "t1"]


@st.composite
def histories(draw: st.DrawFn) -> list[SimpleNamespace]:
    """What a platform may send: each call once, and anything said about calls, known or not, in any order."""
    uses = [
        use(
            call,
            draw(st.sampled_from(["bash", "write", "read", "grep", "web_search"])),
            permission=draw(st.sampled_from(["allow", "allow", "ask", "deny", None])),
            thread=draw(st.sampled_from(THREADS)),
        )
        for call in CALLS
    ]
    others = draw(
        st.lists(
            st.one_of(
                st.builds(result, st.sampled_from(CALLS), st.sampled_from(["user.tool_result", "agent.tool_result"])),
                st.builds(verdict, st.sampled_from(CALLS), st.sampled_from(["allow", "deny"])),
                st.builds(lambda t: event("user.interrupt", session_thread_id=t), st.sampled_from(THREADS)),
                st.builds(lambda: event("session.thread_status_terminated", session_thread_id="t1")),
                st.builds(idle, st.sampled_from(["end_turn", "requires_action"])),
                st.builds(lambda: event("user.message")),
            ),
            max_size=8,
        )
    )
    return draw(st.permutations(uses + others))


class Play:
    """Drives a ledger the way a session does, and writes down what it was told to do."""

    def __init__(self) -> None:
        self.book = ledger()
        self.log: list[tuple[str, str]] = []
        self.running: dict[str, Run] = {}

    def take(self) -> None:
        for action in self.book.actions():
            if isinstance(action, Finish):
                continue
            self.log.append((type(action).__name__, action.call.id))
            if isinstance(action, Run):
                self.running[action.call.id] = action
            elif isinstance(action, Cancel) and action.reason != "interrupted":
                self.running.pop(action.call.id)

    def finish(self, call_id: str) -> None:
        del self.running[call_id]
        self.book.finished(call_id)
        self.take()
        self.book.settled(call_id, 0.0)
        self.take()

    def finish_all(self) -> None:
        while self.running:
            self.finish(next(iter(self.running)))

    def ran(self) -> set[str]:
        return {call for kind, call in self.log if kind == "Run"}


@settings(max_examples=400)
@given(histories(), st.data())
def test_no_call_is_run_twice_however_its_history_is_repeated(events, data):
    play = Play()
    repeats = data.draw(st.lists(st.sampled_from(events), max_size=10))
    cut = data.draw(st.integers(0, len(events)))
    play.book.history_begins()
    for one in events[:cut]:
        play.book.receive(one, 0.0)
        play.take()
    play.book.history_ends()
    play.take()
    for one in [*repeats, *events]:
        play.book.receive(one, 0.0)
        play.take()
        if play.running and data.draw(st.booleans()):
            play.finish(data.draw(st.sampled_from(sorted(play.running))))
    play.finish_all()
    counts = Counter(call for kind, call in play.log if kind == "Run")
    assert set(counts.values()) <= {1}
    answers = Counter(call for kind, call in play.log if kind in ("Run", "Answer"))
    assert set(answers.values()) <= {1}, "a call is answered once: after its run, or instead of one"


@settings(max_examples=400)
@given(histories())
def test_what_is_run_of_a_history_is_what_its_events_say(events):
    """Against the rules written down another way: by looking at the whole history at once."""
    play = Play()
    play.book.history_begins()
    for one in events:
        play.book.receive(one, 0.0)
    play.book.history_ends()
    play.take()
    play.finish_all()
    expected = set()
    for at, one in enumerate(events):
        if one.type != "agent.tool_use" or one.name not in OURS:
            continue
        verdicts = [e.result for e in events if e.type == "user.tool_confirmation" and e.tool_use_id == one.id]
        denied = one.evaluated_permission == "deny" or "deny" in verdicts
        allowed = one.evaluated_permission in ("allow", None) or "allow" in verdicts
        answered = any(e.type.endswith("tool_result") and e.tool_use_id == one.id for e in events)
        ended = one.session_thread_id is not None and any(e.type.endswith("terminated") for e in events)
        interrupted = any(
            e.type == "user.interrupt" and e.session_thread_id in (None, one.session_thread_id) for e in events[at:]
        )
        if allowed and not (denied or answered or ended or interrupted):
            expected.add(one.id)
    assert play.ran() == expected


@settings(max_examples=300)
@given(histories(), st.data())
def test_a_cut_connection_changes_nothing_of_what_is_run(events, data):
    """Live all the way, or cut anywhere and read again from the start: the same calls are run in the end."""

    def play_with(cut: int) -> Play:
        play = Play()
        for one in events[:cut]:
            play.book.receive(one, 0.0)
        play.book.history_begins()
        for one in events:
            play.book.receive(one, 0.0)
        play.book.history_ends()
        play.take()
        play.finish_all()
        return play

    assert play_with(data.draw(st.integers(0, len(events)))).ran() == play_with(0).ran()


@settings(max_examples=300)
@given(histories(), st.data())
def test_in_a_thread_only_read_only_calls_run_together_and_in_the_order_of_the_agent(events, data):
    play = Play()
    order = [one.id for one in events if one.type == "agent.tool_use"]
    began: list[str] = []
    for one in events:
        play.book.receive(one, 0.0)
        before = set(play.running)
        play.take()
        began += sorted(set(play.running) - before, key=order.index)
        for thread in THREADS:
            together = [run.call.name for run in play.running.values() if run.call.thread == thread]
            assert len(together) <= 1 or all(name in READ_ONLY for name in together)
        if play.running and data.draw(st.booleans()):
            play.finish(data.draw(st.sampled_from(sorted(play.running))))
    assert play.book.deadline() is None or not any(play.book.open_calls())


@settings(max_examples=200)
@given(histories())
def test_every_call_of_ours_ends_up_answered_or_excused(events):
    play = Play()
    for one in events:
        play.book.receive(one, 0.0)
        play.take()
    play.finish_all()
    waiting = {call.id for call in play.book.open_calls()}
    held = {call for kind, call in play.log if kind == "Hold"}
    answered = {call for kind, call in play.log if kind == "Answer"}
    assert waiting <= held | answered
    assert isinstance(play.book.deadline(), (float, type(None)))
    assert not any(isinstance(action, (Hold, Skip, Answer, Run, Cancel)) for action in play.book.actions())
