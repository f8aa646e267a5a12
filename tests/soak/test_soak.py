from __future__ import annotations

import pytest

from tests.soak.soak import Plan, Soak

pytestmark = pytest.mark.anyio


async def test_nothing_is_lost_repeated_silent_or_left_behind():
    """The short form; `nox -s soak` is the long one."""
    report = await Soak(Plan(sessions=16, turns=5, think=0.7, restarts=2, lease_ttl=3.0, timeout=150)).run()
    print(report)
    assert not report.wrong, report
    assert report.most_at_once == 16
    assert report.faults > 10
