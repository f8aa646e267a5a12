"""Faults on demand, and the record of all requests."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field
from typing import Literal

from mabridge.testing.credentials import CredentialKind
from mabridge.testing.wire import ApiError, Json

__all__ = ["Fault", "Faults", "RequestRecord"]


_LEASE_TAKEN: Json = {
    "error_code": "heartbeat_precondition_failed",
    "current_state": {"state": "queued", "last_heartbeat": None, "lease_extended": False, "ttl_seconds": 300},
}


@dataclass(kw_only=True, eq=False)
class Fault:
    """Something that goes wrong with requests, `times` times.

    Which requests: those whose `method` and `path` fit, without the first `skip`, and of these every `every`-th or,
    with a `rate`, a random share. What happens to them: they wait for `delay` seconds; then, if `effect` says so, the
    platform does what was asked; then the client gets `status`, a broken connection (`cut`), or no answer (`hang`).
    With none of these three the request is served as usual.

    Attributes:
        method: HTTP method, or ``*``.
        path: a regular expression that is searched for in the path.
        times: how often it happens; ``None`` for ever.
        skip: how many fitting requests pass first.
        every: only every n-th of the fitting requests.
        rate: only this share of them, from 0 to 1, chosen by `seed`.
        seed: makes the choice the same in each run.
        delay: seconds before anything else.
        effect: ``before``, the fault strikes instead of the request; ``after``, the request took effect, and only its
            answer is lost.
        status: answer with this status and an error body; a 412 is a heartbeat's, of a lease that is lost.
        body: the body instead of the usual error body.
        headers: more headers, such as ``retry-after``.
        cut: break the connection without an answer.
        hang: never answer.
        drop_after: break an event stream after so many events.
        hits: how often it has happened.
    """

    method: str = "*"
    path: str = ""
    times: int | None = 1
    skip: int = 0
    every: int = 1
    rate: float | None = None
    seed: int = 0
    delay: float = 0.0
    effect: Literal["before", "after"] = "before"
    status: int | None = None
    body: Json | None = None
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    hang: bool = False
    drop_after: int | None = None
    hits: int = 0

    def __post_init__(self) -> None:
        if sum([self.status is not None, self.cut, self.hang]) > 1:
            raise ValueError("a Fault has one of status, cut and hang")
        self._pattern = re.compile(self.path)
        self._random = random.Random(self.seed)  # noqa: S311 - repeatable is the point
        self._fitting = 0

    @property
    def answers(self) -> bool:
        """Whether it takes the place of the usual answer."""
        return self.status is not None or self.cut or self.hang

    def strikes(self, method: str, path: str) -> bool:
        """Whether it happens to this request; counts it."""
        if self.method not in ("*", method) or self._pattern.search(path) is None:
            return False
        self._fitting += 1
        if self._fitting <= self.skip or (self.times is not None and self.hits >= self.times):
            return False
        if (self._fitting - self.skip) % self.every:
            return False
        if self.rate is not None and self._random.random() >= self.rate:
            return False
        self.hits += 1
        return True

    def error_body(self) -> Json:
        """Return the body of an answer with `status`."""
        if self.body is not None:
            return self.body
        assert self.status is not None
        return ApiError(
            self.status, f"fault on demand: {self.status}", details=_LEASE_TAKEN if self.status == 412 else None
        ).body()


class Faults:
    """The faults that are set."""

    def __init__(self) -> None:
        self._faults: list[Fault] = []

    def add(self, fault: Fault) -> Fault:
        """Set a fault. The first that strikes wins."""
        self._faults.append(fault)
        return fault

    def remove(self, fault: Fault) -> None:
        """Take a fault back."""
        self._faults.remove(fault)

    def clear(self) -> None:
        """Take all faults back."""
        self._faults.clear()

    def strike(self, method: str, path: str) -> Fault | None:
        """Return the fault that happens to this request, if one does."""
        return next((fault for fault in self._faults if fault.strikes(method, path)), None)


@dataclass(frozen=True, kw_only=True)
class RequestRecord:
    """One request, as it arrived and was answered.

    Attributes:
        method: HTTP method.
        path: without the query.
        query: the query string.
        status: of the answer; ``None`` if there was none (yet: a record is made when the answer begins or fails).
        credential: the kind of the credential, ``None`` if it was not valid.
        worker_id: the ``Anthropic-Worker-ID`` header.
        at: seconds on the platform's clock when it arrived.
        seconds: how long the answer took to begin.
    """

    method: str
    path: str
    query: str
    status: int | None
    credential: CredentialKind | None
    worker_id: str | None
    at: float
    seconds: float
