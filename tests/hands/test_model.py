"""A shell against a model of it: whatever is done to it and in whatever order, it is where it should be.

The seed of a failure is in its message; `MABRIDGE_MODEL_SEEDS=100-150` and `MABRIDGE_MODEL_STEPS` try others.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass

import anyio
import pytest

from mabridge.hands import Hands
from mabridge.sandbox import Sandbox
from tests.hands.conftest import Shell

pytestmark = pytest.mark.anyio

_FIRST, _, _LAST = os.environ.get("MABRIDGE_MODEL_SEEDS", "1").partition("-")
SEEDS = range(int(_FIRST), int(_LAST or _FIRST) + 1)
STEPS = int(os.environ.get("MABRIDGE_MODEL_STEPS", "30"))


@dataclass
class Model:
    """What the agent's shell should have."""

    variable: str = "none"
    directory: str = "home"
    greeting: str = "none"

    @property
    def said(self) -> str:
        return f"{self.variable} {self.directory} {self.greeting}"


class Walk:
    """Does one thing after another to a shell, by whichever of two workers, and looks at it after each."""

    def __init__(self, seed: int, sandbox: Sandbox, workers: list[Shell], home: str) -> None:
        self._sandbox = sandbox
        self._random = random.Random(seed)
        self._workers = workers
        self._home = home
        self._model = Model()
        self._story: list[str] = [f"seed {seed}"]
        self._restarts = 0
        self._steps = (
            self._set, self._go, self._define, self._undefine, self._leave, self._die, self._be_killed, self._linger,
            self._loop, self._interrupted, self._job, self._say_much, self._restart,
        )  # fmt: skip

    async def step(self) -> None:
        step = self._random.choice(self._steps)
        self._story.append(step.__name__)
        with anyio.fail_after(60):
            await step(self._random.choice(self._workers))
            if self._random.random() < 0.3:
                return
            look = f"""
            p=$PWD; [ "$p" != "{self._home}" ] || p=home
            echo "${{X:-none}} $p $(greet 2>/dev/null || echo none)"
            """
            said = await self._random.choice(self._workers).text(look)
        assert said == self._model.said, " > ".join(self._story)

    def _expect(self, really: object, should: object) -> None:
        assert really == should, " > ".join(self._story)

    async def _set(self, run: Shell) -> None:
        self._model.variable = f"v{self._random.randrange(100)}"
        await run(f"X={self._model.variable}")

    async def _go(self, run: Shell) -> None:
        self._model.directory = self._random.choice(["/", "/tmp", "/proc"])
        await run(f"cd {self._model.directory}")

    async def _define(self, run: Shell) -> None:
        self._model.greeting = f"g{self._random.randrange(100)}"
        await run(f"greet() {{ echo {self._model.greeting}; }}")

    async def _undefine(self, run: Shell) -> None:
        self._model.greeting = "none"
        await run("unset -f greet")

    async def _leave(self, run: Shell) -> None:
        self._expect((await run("X=left; exit 3")).exit_code, 3)
        self._model.variable = "left"

    async def _die(self, run: Shell) -> None:
        """Not by ``$$``: where there is no bash, a shell that took another's place has that of the first."""
        self._expect((await run("X=lost; sh -c 'kill -9 $PPID'; sleep 60")).exit_code, 137)

    async def _be_killed(self, run: Shell) -> None:
        """Between two calls, as by a kernel that is out of memory. What the last has left is written by then."""
        await run("true")
        kill = 'read -r pid _ < "$1/shells/main/inner" && kill -9 "$pid"'
        await self._sandbox.exec(["sh", "-c", kill, "sh", run.hands.directory], timeout=20, max_output=1000)

    async def _linger(self, run: Shell) -> None:
        self._expect((await run("sleep 60 & sleep 60", timeout=0.3)).timed_out, True)

    async def _loop(self, run: Shell) -> None:
        self._expect((await run("while :; do :; done", timeout=0.3)).timed_out, True)

    async def _interrupted(self, run: Shell) -> None:
        call = f"stopped{self._random.random()}"

        async def interrupt() -> None:
            await anyio.sleep(self._random.random() / 3)
            await run.hands.interrupt(call)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(interrupt)
            self._expect((await run.hands.run(call, "sleep 60", timeout=20)).interrupted, True)

    async def _job(self, run: Shell) -> None:
        await run("sleep 20 &")

    async def _say_much(self, run: Shell) -> None:
        result = await run("seq 1 60000")
        self._expect(result.size, 348_894)

    async def _restart(self, run: Shell) -> None:
        self._restarts += 1
        await run.hands.restart(f"restart{self._restarts}")
        self._model = Model()


@pytest.mark.parametrize("seed", SEEDS)
async def test_shell_is_what_its_model_says(reached: Sandbox, seed: int):
    async with Hands(reached) as one, Hands(reached) as other:
        walk = Walk(seed, reached, [Shell(one), Shell(other)], (await Shell(one).text("pwd")))
        for _ in range(STEPS):
            await walk.step()
