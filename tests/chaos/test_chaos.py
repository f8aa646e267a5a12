"""The short form of the chaos test. The long one is `nox -s chaos`, which takes its seed from the command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.chaos.run import Chaos, run
from tests.chaos.script import LOG, Writer, Wrong, check_log
from tests.images import BUSYBOX

pytestmark = pytest.mark.anyio

SEED = 20261121


async def test_each_call_runs_once_though_workers_are_killed_on_local(tmp_path: Path):
    options = {"root": str(tmp_path / "sandboxes")}
    outcome = await run(Chaos(seed=SEED, provider="local", options=options), tmp_path)
    assert outcome.kills == Chaos.kills
    assert outcome.moments["running"] >= 2


@pytest.mark.docker
async def test_each_call_runs_once_though_workers_are_killed_on_docker(tmp_path: Path, image: Callable[[str], str]):
    options = {"image": image(BUSYBOX), "pull": "never"}
    outcome = await run(Chaos(seed=SEED, provider="docker", options=options), tmp_path)
    assert outcome.kills == Chaos.kills
    assert outcome.moments["running"] >= 2


def test_what_a_call_leaves_twice_or_not_at_all_is_seen():
    writer = Writer(SEED, "w")
    while len(writer.appended) < 3:
        writer.turn()
    first, *rest = writer.appended
    check_log([first, *rest], [writer])
    for lines in ([first, first, *rest], rest, [first, *rest, "x"]):
        with pytest.raises(Wrong, match=LOG):
            check_log(lines, [writer])


def test_same_seed_makes_the_same_calls():
    one, two = Writer(SEED, "w"), Writer(SEED, "w")
    assert [[(s.tool, s.input) for s in one.turn()] for _ in range(20)] == [
        [(s.tool, s.input) for s in two.turn()] for _ in range(20)
    ]
