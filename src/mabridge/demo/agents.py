"""The demo's agents: scripts in place of a model, whose work is real."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from mabridge.demo.projects import PYTHON, SHELL, Project

if TYPE_CHECKING:
    from mabridge.testing.brain import Agent
    from mabridge.testing.calls import Reply

__all__ = ["DemoFailed", "make_brain"]

_LARGE = 100_000
"""Characters that the model is never sent more of."""


class DemoFailed(Exception):
    """A call did not do what the script expects of it."""


def make_brain(number: int, pace: float) -> Callable[[Agent], Awaitable[str | None]]:
    """Return the script of the agent that works on the project `number`, thinking `pace` seconds before each turn."""

    async def brain(agent: Agent) -> None:
        script = _Script(agent, pace * (0.7 + 0.15 * (number % 5)))
        looked = await script.bash("pwd; ls -A; uname -srm; command -v python3 || echo 'there is no python3'")
        projects = SHELL if "there is no python3" in looked.text else PYTHON
        await script.work(projects[number % len(projects)])

    return brain


class _Script:
    def __init__(self, agent: Agent, pace: float) -> None:
        self._agent = agent
        self._pace = pace

    async def work(self, project: Project) -> None:
        """Write the project, see its test fail, find the fault, mend it, see the test pass, and report."""
        name = project.name
        await self._calls(
            *(("write", {"file_path": f"{name}/{file}", "content": text}) for file, text in project.files.items())
        )
        # The shell stays: the later calls are in this directory, and know this variable.
        failed = await self.bash(f"cd {name} && export REPORT=report.md && {project.test}", fails=True)
        _expect("FAILED" in failed.text, failed)
        await self._calls(
            ("read", {"file_path": f"{name}/{project.source}"}),
            ("grep", {"pattern": project.pattern, "path": name}),
        )
        edit = {"file_path": f"{name}/{project.source}", "old_string": project.fault, "new_string": project.fix}
        await self._calls(("edit", edit))
        passed = await self.bash(f"{project.test} && echo 'the test passes'")
        _expect("the test passes" in passed.text, passed)
        long = await self.bash("seq 1 20000")
        _expect("20000" in long.text and len(long.text) < _LARGE, long)
        verdict = next(line for line in reversed(failed.text.splitlines()) if "FAILED" in line)
        await self.bash(f"""cat > "$REPORT" <<'END'\n# {name}\n\nBefore: {verdict}\nAfter: the test passes.\nEND""")
        report, found = await self._calls(
            ("read", {"file_path": f"{name}/report.md"}), ("glob", {"pattern": f"{name}/*"})
        )
        _expect("After: the test passes." in report.text and "report.md" in found.text, report)
        await self._agent.say(f"{name}: mended {project.source}; the test passes.")

    async def bash(self, command: str, *, fails: bool = False) -> Reply:
        """Run a command, which is expected to succeed unless it `fails`."""
        await self._agent.think(self._pace)
        reply = await self._agent.call("bash", {"command": command})
        _expect(reply.is_error == fails, reply)
        return reply

    async def _calls(self, *calls: tuple[str, dict[str, str]]) -> list[Reply]:
        await self._agent.think(self._pace)
        replies = await self._agent.calls(calls)
        for reply in replies:
            _expect(not reply.is_error, reply)
        return replies


def _expect(condition: bool, reply: Reply) -> None:
    if not condition:
        raise DemoFailed(f"a call answered otherwise than it should: {' '.join(reply.text.split())[:300]}")
