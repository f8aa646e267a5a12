from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from mabridge.errors import ConfigError
from mabridge.routing import Route, SessionFacts, route

RULES = (
    Route(metadata={"team": "data-*", "tier": "?"}, providers=("big",)),
    Route(agent="research-*", providers=("gpu", "big")),
    Route(providers=("small",)),
)

names = st.sampled_from(["a", "b", "ab", "data-1", "Data-1", "research-x", "*", "?", "[a]", ""])
facts = st.builds(
    SessionFacts,
    metadata=st.dictionaries(names, names, max_size=3),
    agent_id=st.none() | names,
    agent_name=st.none() | names,
)
rules = st.lists(
    st.builds(
        Route,
        metadata=st.dictionaries(names, names, max_size=2),
        agent=st.none() | names,
        providers=st.lists(names, min_size=1, max_size=3).map(tuple),
    ),
    max_size=5,
).map(tuple)


@pytest.mark.parametrize(
    ("session", "providers", "rule"),
    [
        (SessionFacts(metadata={"team": "data-x", "tier": "1", "more": "y"}), ("big",), 0),
        (SessionFacts(metadata={"team": "data-x"}), ("small",), 2),
        (SessionFacts(metadata={"team": "Data-x", "tier": "1"}), ("small",), 2),
        (SessionFacts(agent_id="agent_1", agent_name="research-1"), ("gpu", "big"), 1),
        (SessionFacts(agent_id="research-1", agent_name="other"), ("gpu", "big"), 1),
        (SessionFacts(), ("small",), 2),
    ],
)
def test_first_route_whose_conditions_all_hold_is_taken(
    session: SessionFacts, providers: tuple[str, ...], rule: int
) -> None:
    decision = route(session, RULES)
    assert (decision.providers, decision.rule) == (providers, rule)
    assert decision.require() == providers


def test_explanation_names_the_route_and_why_not_the_earlier_ones() -> None:
    session = SessionFacts(metadata={"team": "web"}, agent_id="agent_1", agent_name="coder")
    assert route(session, RULES).explain().splitlines() == [
        "Route 3 (every session) sends it to small.",
        "Route 1 does not match: metadata team is 'web', not 'data-*'.",
        "Route 2 does not match: the agent is 'agent_1' / 'coder', not 'research-*'.",
    ]
    assert route(SessionFacts(metadata={"team": "data-1", "tier": "2"}), RULES).explain() == (
        "Route 1 (metadata.team = 'data-*' and metadata.tier = '?') sends it to big."
    )


def test_session_that_no_route_takes_is_an_error_that_says_why() -> None:
    decision = route(SessionFacts(), RULES[:2])
    assert decision.rule is None
    assert decision.providers == ()
    with pytest.raises(ConfigError, match=r"(?s)No route takes this session.*Route 1 .*'team'.*Route 2 .*not known"):
        decision.require()


def test_route_without_providers_is_refused() -> None:
    with pytest.raises(ValidationError):
        Route(providers=())


@given(facts, rules)
def test_decision_is_the_first_match_and_each_earlier_rule_has_its_reason(session, routes) -> None:
    decision = route(session, routes)
    matching = [index for index, rule in enumerate(routes) if rule.why_not(session) is None]
    assert decision.rule == (matching[0] if matching else None)
    assert len(decision.misses) == (matching[0] if matching else len(routes))
    assert len(re.findall(r"^Route \d+ does not match: ", decision.explain(), re.MULTILINE)) == len(decision.misses)


@given(facts, rules, rules)
def test_rules_after_the_match_change_nothing(session, routes, more) -> None:
    decision = route(session, routes)
    if decision.rule is not None:
        assert route(session, routes + more) == decision


@given(facts, st.dictionaries(names, names, max_size=3))
def test_more_conditions_never_match_more(session, conditions) -> None:
    whole = Route(metadata=conditions, providers=("p",))
    if whole.why_not(session) is None:
        for key in conditions:
            fewer = {k: v for k, v in conditions.items() if k != key}
            assert Route(metadata=fewer, providers=("p",)).why_not(session) is None
