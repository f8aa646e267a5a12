"""Which providers may serve a session. Pure: from a session's facts and a list of rules to a decision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from pydantic import BaseModel, ConfigDict, Field, field_validator

from mabridge.errors import ConfigError

__all__ = ["Decision", "Route", "SessionFacts", "route"]


class Route(BaseModel):
    """One rule. All conditions it names must hold; with none, it takes every session.

    Conditions are globs (``*``, ``?``, ``[...]``), compared with upper and lower case told apart.

    Attributes:
        metadata: keys that the session's metadata must have, each with a glob for its value.
        agent: a glob for the agent's id or its name.
        providers: names of the configured providers that may serve the session, tried in this order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    metadata: Mapping[str, str] = Field(default_factory=dict)
    agent: str | None = None
    providers: tuple[str, ...]

    @field_validator("providers")
    @classmethod
    def _at_least_one(cls, providers: tuple[str, ...]) -> tuple[str, ...]:
        if not providers:
            raise ValueError("name at least one provider")
        return providers

    def why_not(self, session: SessionFacts) -> str | None:
        """Return the first condition that does not hold for `session`, in words, or ``None`` if all do."""
        for key, pattern in self.metadata.items():
            value = session.metadata.get(key)
            if value is None:
                return f"the session has no metadata {key!r} (wanted {pattern!r})"
            if not fnmatchcase(value, pattern):
                return f"metadata {key} is {value!r}, not {pattern!r}"
        if self.agent is not None:
            names = [name for name in (session.agent_id, session.agent_name) if name]
            if not any(fnmatchcase(name, self.agent) for name in names):
                found = " / ".join(map(repr, names)) or "not known"
                return f"the agent is {found}, not {self.agent!r}"
        return None

    def __str__(self) -> str:
        conditions = [f"metadata.{key} = {pattern!r}" for key, pattern in self.metadata.items()]
        if self.agent is not None:
            conditions.append(f"agent = {self.agent!r}")
        return " and ".join(conditions) or "every session"


@dataclass(frozen=True, kw_only=True)
class SessionFacts:
    """What rules may ask of a session."""

    session_id: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    agent_id: str | None = None
    agent_name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Where a session goes, and why.

    Attributes:
        providers: names of the providers to try, in order; empty if no rule matched.
        rule: index of the rule that matched, from 0; ``None`` if none did.
        reason: what that rule asks for, in words; empty if none matched.
        misses: for each rule before that one, why it did not match.
        choices: what plugins made of it since, each a sentence.
    """

    providers: tuple[str, ...]
    rule: int | None
    reason: str
    misses: tuple[str, ...]
    choices: tuple[str, ...] = ()

    def narrowed(self, *, by: str, to: Sequence[str], why: str | None = None) -> Decision:
        """Return this decision with fewer providers, or in another order.

        Args:
            by: the plugin that says so.
            to: names of providers, out of `providers`; none refuses the session.
            why: why there are none.
        """
        strange = [name for name in to if name not in self.providers]
        if isinstance(to, str) or strange:
            why, to = f"it named {to!r}, and there was {', '.join(self.providers)}", ()
        said = f"{', then '.join(to)}" if to else f"none{f', for {why}' if why else ''}"
        choice = f"Of {', '.join(self.providers)} the plugin {by!r} takes {said}."
        return replace(self, providers=tuple(dict.fromkeys(to)), choices=(*self.choices, choice))

    def require(self) -> tuple[str, ...]:
        """Return the providers to try.

        Raises:
            ConfigError: no rule matched, or a plugin refused; the message says why.
        """
        if not self.providers:
            raise ConfigError(self.explain())
        return self.providers

    def explain(self) -> str:
        """Say which rule matched and why those before it did not: a sentence and one line a rule, from 1."""
        if self.rule is None:
            head = "No route takes this session; add one without conditions to the end of [[routes]]."
        else:
            to = ", then ".join(self.providers)
            what = f"sends it to {to}" if to else "takes it, and a plugin refuses it"
            head = f"Route {self.rule + 1} ({self.reason}) {what}."
        misses = (f"Route {i} does not match: {why}." for i, why in enumerate(self.misses, start=1))
        return "\n".join((head, *self.choices, *misses))


def route(session: SessionFacts, routes: Sequence[Route]) -> Decision:
    """Return the decision of the first of `routes` that takes `session`."""
    misses: list[str] = []
    for index, rule in enumerate(routes):
        why_not = rule.why_not(session)
        if why_not is None:
            return Decision(providers=rule.providers, rule=index, reason=str(rule), misses=tuple(misses))
        misses.append(why_not)
    return Decision(providers=(), rule=None, reason="", misses=tuple(misses))
