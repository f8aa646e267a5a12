"""Runs the conformance kit, which is pytest's, and gathers what its tests say."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

import mabridge.testing
from mabridge.config import ProviderConfig
from mabridge.plugins import make_provider

__all__ = ["GROUPS", "Report", "run_conformance"]

GROUPS = ("exec", "running", "process", "files", "lifecycle", "errors", "egress")
"""The groups of tests: each a module of the kit."""

# The kit itself is not imported here: pytest rewrites its assertions when it does that.
_KIT = Path(mabridge.testing.__file__).parent / "conformance" / "configured.py"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What one test said.

    Attributes:
        group: one of `GROUPS`.
        test: its name.
        outcome: ``passed``, ``failed`` or ``skipped``.
        seconds: how long it took.
        why: why it failed or was skipped, in one line.
    """

    group: str
    test: str
    outcome: str
    seconds: float
    why: str


def run_conformance(
    config: ProviderConfig, name: str, *, groups: Sequence[str] = (), tell: Callable[[str], None]
) -> list[Report]:
    """Run the kit against a configured provider, which makes sandboxes there and removes them.

    Args:
        config: the provider's type and options.
        name: what the configuration calls it.
        groups: only these of `GROUPS`; all by default.
        tell: is told what runs now.
    """
    run = _Run(config, name, groups or GROUPS, tell)
    # Of the project in whose directory this happens to run, nothing counts.
    own = ("-c", os.devnull, "--rootdir", str(_KIT.parent), "--noconftest")
    without = ("-p", "no:cacheprovider", "-p", "no:asyncio", "-p", "no:terminal")
    pytest.main([*own, *without, str(_KIT)], plugins=[_Registrar(run)])
    return run.reports


class _Run:
    """A plugin of the run: what is to be tested, and what came of it."""

    def __init__(self, config: ProviderConfig, name: str, groups: Sequence[str], tell: Callable[[str], None]) -> None:
        self.config = config
        self.make = partial(make_provider, name=name)
        self.reports: list[Report] = []
        self._name = name
        self._groups = groups
        self._tell = tell
        self._group_of: dict[str, str] = {}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            assert isinstance(item, pytest.Function)
            self._group_of[item.nodeid] = item.function.__module__.rpartition(".")[2]
        items[:] = [item for item in items if self._group_of[item.nodeid] in self._groups]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tell(f"{self._name}: {nodeid.rpartition('::')[2]}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            said = Report(
                group=self._group_of[report.nodeid],
                test=report.nodeid.rpartition("::")[2],
                outcome=report.outcome,
                seconds=report.duration,
                why=_why(report),
            )
            self.reports.append(said)


class _Registrar:
    """Registers the run under the name by which the kit finds it."""

    def __init__(self, run: _Run) -> None:
        self._run = run

    def pytest_configure(self, config: pytest.Config) -> None:
        config.pluginmanager.register(self._run, "mabridge-check")


def _why(report: pytest.TestReport) -> str:
    if report.outcome == "passed":
        return ""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2].removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    lines = str(report.longrepr if crash is None else crash.message).strip().splitlines()
    return lines[0] if lines else ""
