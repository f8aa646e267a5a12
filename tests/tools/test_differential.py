"""The same calls to the Anthropic SDK's own tools and to ours, on equal directories: the model is to see no difference.

Where it does, on purpose, is in `DIFFERENCES`, each with its reason.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from anthropic.lib.tools import ToolError
from anthropic.lib.tools.agent_toolset import AgentToolContext, beta_agent_toolset_20260401

from mabridge.hands import Hands
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandbox import SandboxSpec
from mabridge.tools import SandboxTools
from tests.tools.test_files import ODD_NAMES, PNG

pytestmark = pytest.mark.anyio

Seen = tuple[bool, Any]


@dataclass
class Pair:
    """Both sets of tools, each with a directory."""

    sdk_directory: Path
    our_directory: Path
    ours: SandboxTools

    async def sdk(self, name: str, given: dict[str, Any]) -> Seen:
        tools = {tool.name: tool for tool in beta_agent_toolset_20260401(AgentToolContext(workdir=self.sdk_directory))}
        try:
            content = await tools[name].call(given)
        except ToolError as error:
            return True, self._plain(str(error), self.sdk_directory)
        except Exception as error:  # noqa: BLE001 - what its runner does with any other
            return True, f"{type(error).__name__}"
        if isinstance(content, str):
            return False, self._plain(content or "(no output)", self.sdk_directory)
        return False, list(content)

    async def mabridge(self, name: str, given: dict[str, Any]) -> Seen:
        result = await self.ours.call(name, given, call_id="toolu_1")
        if result.content[0]["type"] == "text":
            return result.is_error, self._plain(result.content[0]["text"], self.our_directory)
        return result.is_error, result.content

    def _plain(self, text: str, directory: Path) -> str:
        return text.replace(str(directory), "WD").encode("utf-8", "replace").decode()

    def build(self, build: Callable[[Path], None]) -> None:
        """Make both directories the same."""
        for directory in (self.sdk_directory, self.our_directory):
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            build(directory)

    def trees(self) -> list[dict[str, bytes | None]]:
        return [
            {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
            for root in (self.sdk_directory, self.our_directory)
        ]


@pytest.fixture
async def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    # Without ripgrep the SDK searches by its own built-in search, whose behaviour is the one that we have everywhere.
    directories = tmp_path / "bin"
    directories.mkdir()
    for name in [
        "sh",
        "bash",
        *[
            "cat",
            "cp",
            "cut",
            "grep",
            "head",
            "ls",
            "mkdir",
            "mv",
            "od",
            "readlink",
            "rm",
            "sort",
            "stat",
            "tail",
            "wc",
            "find",
            "tr",
            "env",
        ],
    ]:
        (directories / name).symlink_to(shutil.which(name) or "/nonexistent")
    monkeypatch.setenv("PATH", str(directories))
    async with LocalProvider(LocalOptions(root=tmp_path / "sandboxes")) as provider:
        sandbox = await provider.create(SandboxSpec(key="mab" + "a" * 24))
        yield Pair(tmp_path / "sdk", Path(sandbox.workdir), SandboxTools(sandbox, Hands(sandbox)))
        await sandbox.teardown()


def a_tree(root: Path) -> None:
    files: dict[str, bytes] = {
        "a.txt": b"one\ntwo\nthree\n",
        "dos.txt": b"one\r\ntwo foo\r\n",
        "sub/b.py": b"import os\n\ndef foo(x):\n    return x\n",
        "sub/deep/c.py": "caf\u00e9 foo\nna\u00efve\n".encode(),
        ".hidden/d.txt": b"foo\n",
        ".git/e.txt": b"foo\n",
        "sub/node_modules/f.txt": b"foo\n",
        "binary": b"\0foo\n",
        "latin": b"\xe9 foo\n",
        "empty": b"",
        "long": b"foo" + b"x" * 1990 + b"\n" + b"foo" + b"x" * 1997 + b"\nfoo\n",
        "pic.png": PNG,
        "big": b"line of text\n" * 30_000,
        "wide": b"x" * 300_000 + b"\n",
        "medium": b"line of text\n" * 10_000,
    }
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    for name in ODD_NAMES:
        (root / "odd" / name).parent.mkdir(parents=True, exist_ok=True)
        (root / "odd" / name).write_bytes(b"foo\n")
    for name, target in {
        "link": "a.txt", "way": "sub", "loop": "loop", "out": "/etc/hostname", "outdir": "/etc", "dangling": "nowhere",
        "lost": "/nowhere/at/all", "up": "../../../etc", "sub/back": "..", "chain": "link", "far": "sub/deep",
        "long-chain": "way/deep/../b.py",
    }.items():  # fmt: skip
        (root / name).symlink_to(target)


PATHS = [
    "a.txt", "./a.txt", "sub/../a.txt", "none", "none/x", "a.txt/x", "a.txt/x/y", "", ".", "..", "/etc/passwd",
    "sub", "link", "way/b.py",
    "loop", "loop/x", "out", "outdir/hostname", "dangling", "lost", "up/passwd", "sub/back/a.txt", "chain",
    "long-chain", "binary",
    "latin", "empty", "big", "wide", "dos.txt", "pic.png", "sub/deep/c.py", "a\0b", "x" * 255, "x" * 256,
    "medium", "nowhere", "~", "a.txt/", "a.txt/..",
    "none/../a.txt", "//etc", "way/../a.txt", "dangling/x", "far/../a.txt", "far/../c.py",
    *[f"odd/{name}" for name in ODD_NAMES],
]  # fmt: skip
VIEWS = [
    None,
    [],
    [1, 1],
    [2, 3],
    [0, 2],
    [3, -1],
    [4, 9],
    [3, 1],
    [1],
    [1, 2, 3],
    [29_999, 30_000],
    [30_000, 40_000],
    [1, 30_000],
]


def calls() -> list[tuple[str, dict[str, Any]]]:
    every: list[tuple[str, dict[str, Any]]] = [("read", {"file_path": path}) for path in PATHS]
    every += [
        ("read", {"file_path": path, "view_range": view})
        for path in ["a.txt", "dos.txt", "big", "wide", "empty", "pic.png", "binary", "none"]
        for view in VIEWS
    ]
    every += [("write", {"file_path": path, "content": "n\u00e9w\r\n"}) for path in PATHS]
    every += [
        ("edit", {"file_path": path, "old_string": "o", "new_string": "0", "replace_all": True}) for path in PATHS
    ]
    every += [
        ("edit", {"file_path": "a.txt", "old_string": old, "new_string": new, "replace_all": every})
        for old in ["one", "t", "zzz", "e\nt", "two\n"]
        for new in ["", "one", "x\\1$&"]
        for every in [None, False, True]
    ]
    every += [
        ("glob", {"pattern": pattern, "path": path})
        for pattern in [
            "*.txt",
            "**/*.py",
            "sub/*",
            "*/b.py",
            "/etc/*",
            "../*",
            "",
            "link",
            "d*",
            "l*",
            "[ab]*",
            ".*/*",
            "odd/*",
            "*/",
            "none/*",
        ]
        for path in [None, ".", "sub", "way", "/etc", "a.txt", "none"]
    ]
    every += [
        ("grep", {"pattern": pattern, "path": path})
        for pattern in ["foo", "^foo", "foo$", r"\bfoo\b", "(", "[", r"caf\w", r"\s{4}return", "zzz", "",
        "o{2}", "(?i)FOO|IMPORT"]
        for path in [None, "sub", "a.txt", "dos.txt", "way", ".git", "binary", "none", "/etc", "chain", "odd"]
    ]  # fmt: skip
    return every


CALLS = calls()


def difference(name: str, given: dict[str, Any], sdk: Seen, ours: Seen) -> str | None:
    """Return why the two results are allowed to differ, if they are."""
    (_, theirs), (is_error, text) = sdk, ours
    for why, applies in DIFFERENCES.items():
        if applies(name, given, theirs, text, is_error):
            return why
    return None


def _lines(text: Any) -> list[str]:
    return sorted(str(text).split("\n"))


Applies = Callable[[str, dict[str, Any], Any, Any, bool], bool]
DIFFERENCES: dict[str, Applies] = {
    "grep's lines are sorted by path; the SDK's come as the directory has them": lambda name, _, sdk, ours, error: (
        name == "grep" and not error and _lines(sdk) == _lines(ours)
    ),
    "files of one time come in any order": lambda name, _, sdk, ours, error: (
        name == "glob" and not error and _lines(sdk) == _lines(ours)
    ),
    "a search of what is not there says so; 'no matches' would mislead": lambda name, _, sdk, ours, error: (
        name in ("glob", "grep") and sdk == "no matches" and error and ours.endswith("no such file or directory")
    ),
    "a wildcard does not lead through a link to a directory, as find does not": lambda name, given, sdk, ours, error: (
        name == "glob" and given["pattern"] in ("*/b.py", ".*/*") and not error and set(_lines(ours)) < set(_lines(sdk))
    ),
    "a result is cut below 100,000 characters, with a hint, and not moved out of the model's sight": (
        lambda name, _, sdk, ours, error: (
            name in ("read", "grep")
            and not error
            and len(sdk) > 99_000
            and sdk.startswith(ours[:90_000])
            and "[" in ours
        )
    ),
    "of what is cut, the beginning depends on the order": lambda name, _, sdk, ours, error: (
        name == "grep" and not error and "\n[output truncated" in sdk and "\n[output truncated" in ours
    ),
    "of two faults, the one in the pattern is told": lambda name, given, sdk, ours, error: (
        error and given.get("path") == "/etc" and given["pattern"] in ("", "(", "[") and "outside" in sdk
    ),
    "a name that is too long is quoted in part": lambda _, given, sdk, ours, __: (
        "file name too long" in str(sdk) and "file name too long" in ours
    ),
}


async def test_every_call_says_what_the_sdk_says(pair: Pair) -> None:
    wrong, used, fresh = [], set(), False
    for name, given in CALLS:
        changes = name in ("write", "edit")
        if changes or not fresh:
            pair.build(a_tree)
        fresh = not changes
        sdk, ours = await pair.sdk(name, given), await pair.mabridge(name, given)
        if sdk != ours:
            why = difference(name, given, sdk, ours)
            used.add(why)
            if why is None:
                wrong.append((name, given, sdk, ours))
        if changes and len({str(tree) for tree in pair.trees()}) > 1:
            wrong.append((name, given, "what is written differs"))
    assert not wrong, "\n".join(str(case)[:600] for case in wrong)
    # A reason that excuses nothing any more goes.
    assert used == set(DIFFERENCES)
