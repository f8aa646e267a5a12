"""What the agents of the chaos test do, and what they must then see. All of it follows from one seed.

Each call leaves its own number in its sandbox, at the end of a file, so that a call that was run twice, or not at all,
shows. Each command of a shell counts in a variable as well, which shows a shell that was lost.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mabridge.testing import Reply

__all__ = ["LOG", "Step", "Writer", "Wrong"]

LOG = "calls.log"
_KINDS = {"quick": 6, "long": 1, "slow": 3, "late": 2, "child": 2, "exit": 1, "killed": 1, "write": 1}
_KINDS |= {"edit": 3, "read": 2}
# What a new sandbox's first result begins with, when the session had one before.
_FRESH = "[The sandbox of this session was lost."


class Wrong(AssertionError):
    """An agent saw what it must not see."""


@dataclass(frozen=True)
class Step:
    """One call, and what its result must be."""

    tool: str
    input: dict[str, Any]
    expected: Callable[[str], bool]
    wanted: str
    is_error: bool = False

    def check(self, reply: Reply, *, fresh: bool) -> None:
        """Compare the result.

        Args:
            reply: the result.
            fresh: whether it may begin with the notice of a new sandbox.
        """
        text = reply.text
        if fresh and text.startswith(_FRESH):
            text = text.partition("\n")[2]
        if reply.by != "worker" or reply.is_error is not self.is_error or not self.expected(text):
            how = "with an error" if reply.is_error else "without an error"
            raise Wrong(
                f"{reply.tool_use_id}: {self.tool} {self.input}\n"
                f"  was answered by {reply.by} {how}: {reply.text!r}\n"
                f"  wanted: {self.wanted!r}"
            )


class Writer:
    """Thinks up the calls of one thread, and knows what they come to.

    Args:
        seed: of the whole test.
        name: of the session and the thread; no two writers in a sandbox have the same.
        longest: seconds that some commands take: longer than it takes until another worker has the session.
    """

    def __init__(self, seed: int, name: str, *, longest: float = 3.0) -> None:
        self._name = name
        self._longest = longest
        self._random = random.Random(f"{seed} {name}")
        self._number = 0
        self._counted = 0
        self._begins = True
        self._edited: list[str] | None = None
        self.appended: list[str] = []
        """What must be in the log of the sandbox, once each."""

    def new_round(self, *, new_shell: bool) -> None:
        """Begin again with the files that are there, in the same shell or in one that has counted nothing."""
        self._begins = True
        if new_shell:
            self._counted = 0

    def pause(self, longest: float) -> float:
        """Seconds to think."""
        return self._random.uniform(0, longest)

    def turn(self) -> list[Step]:
        """Return one to three calls, which the agent makes at once."""
        kinds = self._random.choices(list(_KINDS), list(_KINDS.values()), k=self._random.randint(1, 3))
        if self._begins:  # with one that a worker can be killed under
            kinds[0], self._begins = "long", False
        return [self._step(kind) for kind in kinds]

    def _step(self, kind: str) -> Step:
        self._number += 1
        name = f"{self._name}-{self._number}"
        if kind == "write":
            return _exactly("write", {"file_path": f"{self._name}.txt", "content": name}, f"wrote {len(name)} bytes to")
        if kind in ("edit", "read"):
            return self._file_step(kind, name)
        self.appended.append(name)
        append, seconds = f"echo {name} >> {LOG}", self._random.uniform(0.5, 1.5)
        if kind == "long":
            seconds += self._longest - 1.5
        # The variable is kept over the end of a shell, but not over one that came in the middle of a command.
        self._counted += kind != "killed"
        count = "export COUNT=$((${COUNT:-0} + 1)); "
        said = f"{name} {self._counted}"
        after = {
            "quick": "",
            "slow": f"; sleep {seconds:.2f}",
            "long": f"; sleep {seconds:.2f}",
            "late": "",
            "child": f"; (sleep {seconds:.2f}; echo {name}-child >> {LOG}) > /dev/null 2>&1 &",
            "exit": "; exit 3",
            "killed": "; kill -9 $$",
        }[kind]
        if kind == "child":
            self.appended.append(f"{name}-child")
        before = f"sleep {seconds:.2f}; " if kind == "late" else ""
        command = f"{before}{'' if kind == 'killed' else count}{append}; echo {name} $COUNT{after}"
        if kind == "killed":
            said = f"{name} {self._counted or ''}".rstrip()
        code = {"exit": 3, "killed": 137}.get(kind, 0)
        if not code:
            return Step("bash", {"command": command}, lambda text: text == said, said)
        wanted = f"{said}\n...[exit code {code}]"
        return Step("bash", {"command": command}, lambda text: _ends(text, said, code), wanted, is_error=True)

    def _file_step(self, kind: str, name: str) -> Step:
        path = f"edits-{self._name}.txt"
        if self._edited is None:
            self._edited = []
            return _exactly("write", {"file_path": path, "content": "# end\n"}, f"wrote 6 bytes to {path}")
        if kind == "edit":
            self._edited.append(name)
            edit = {"file_path": path, "old_string": "# end\n", "new_string": f"{name}\n# end\n"}
            return _exactly("edit", edit, f"edited {path} (1 replacement(s))")
        edited, before = self._edited, len(self._edited)

        def fits(text: str) -> bool:
            # A read whose result got lost is done again, and sees what later calls of its turn have done meanwhile.
            *lines, end = text.splitlines()
            return end == "# end" and len(lines) >= before and lines == edited[: len(lines)]

        return Step("read", {"file_path": path}, fits, f"{before} lines or more of {edited}")


def _exactly(tool: str, given: dict[str, Any], said: str) -> Step:
    return Step(tool, given, lambda text: text.startswith(said), said)


def _ends(text: str, said: str, code: int) -> bool:
    lines = text.splitlines()
    return lines[0].strip() == said and lines[-1] == f"[exit code {code}]"


def check_log(lines: list[str], writers: list[Writer]) -> None:
    """Compare the log of a sandbox with what its writers appended.

    Raises:
        Wrong: something is missing, or there more than once.
    """
    found, wanted = Counter(lines), Counter(name for writer in writers for name in writer.appended)
    if found != wanted:
        raise Wrong(f"in {LOG} there are too many of {dict(found - wanted)}, and too few of {dict(wanted - found)}")


def settle_command(writers: list[Writer]) -> str:
    """Return a command that waits for the children in the background, and then prints the log."""
    lines = sum(len(writer.appended) for writer in writers)
    waiting = f"[ $(wc -l < {LOG}) -lt {lines} ] && [ $n -lt 200 ]"
    return f"touch {LOG}; n=0; while {waiting}; do n=$((n + 1)); sleep 0.1; done; cat {LOG}"
