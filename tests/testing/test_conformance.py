"""The conformance kit: it catches what is broken, and holds those who use it to its rules."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from mabridge.testing import SandboxConformance
from tests.testing import broken_providers

pytest_plugins = ["pytester"]

BROKEN = Path(broken_providers.__file__)


@pytest.mark.parametrize("part", range(3))
def test_broken_provider_is_caught_by_a_test_that_says_what_is_wrong(part: int) -> None:
    """In three processes only, for each takes a while to begin."""
    broken = list(broken_providers.CAUGHT_BY.items())[part::3]
    sound = [("TestSound", test) for _, test in broken]
    chosen = [f"{BROKEN}::{name}::{test}" for name, test in broken + sound]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-n", "0", "-p", "no:cacheprovider", "--noconftest", *chosen],
        cwd=BROKEN.parent.parent.parent,
        check=False,
        capture_output=True,
        text=True,
        timeout=300,
    )
    said = re.findall(r"::(\w+)::(\w+) (PASSED|FAILED)", done.stdout)
    wanted = [(*each, "FAILED") for each in broken] + [(*each, "PASSED") for each in sound]
    assert sorted(said) == sorted(wanted)


CONFORMANCE = """
    import dataclasses
    import pytest
    from mabridge.providers.local import LocalOptions, LocalProvider
    from mabridge.testing import SandboxConformance

    class Unlabelled(LocalProvider):
        async def list(self):
            async for info in super().list():
                yield dataclasses.replace(info, labels={{}})

    class TestLocal(SandboxConformance):
        make = LocalProvider
        {body}

        @pytest.fixture(scope="class")
        async def provider(self, tmp_path_factory):
            async with self.make(LocalOptions(root=tmp_path_factory.mktemp("local"))) as provider:
                yield provider
"""


def run(pytester: pytest.Pytester, body: str, *args: str) -> pytest.RunResult:
    """Run a stranger's conformance class, in a directory with nothing else."""
    pytester.makepyfile(CONFORMANCE.format(body=body))
    off = [option for name in ("cacheprovider", "xdist", "asyncio") for option in ("-p", f"no:{name}")]
    return pytester.runpytest_subprocess(*off, *args, timeout=60)


def test_stranger_needs_nothing_but_the_class(pytester: pytest.Pytester) -> None:
    result = run(pytester, "", "-k", "test_exit_codes or test_sandbox_is_listed", "-W", "error")
    result.assert_outcomes(passed=2, deselected=len(TESTS) - 2)


TESTS = [name for name in dir(SandboxConformance) if name.startswith("test_")]


def test_what_is_not_given_is_skipped_and_named(pytester: pytest.Pytester) -> None:
    result = run(pytester, "", "-k", "bad_credentials or missing_image or unreachable or egress", "-rs")
    result.assert_outcomes(skipped=8, deselected=len(TESTS) - 8)
    for name in ("bad_credentials", "missing_image", "unreachable", "no_egress", "open_egress"):
        result.stdout.fnmatch_lines([f"*not tried: the fixture {name} is not given*"])


def test_deviation_is_expected_to_fail_and_its_reason_is_told(pytester: pytest.Pytester) -> None:
    body = 'make, deviations = Unlabelled, {"test_sandbox_is_listed_with_its_labels": "the vendor keeps no labels"}'
    result = run(pytester, body, "-rx", "-k", "test_sandbox_is_listed")
    result.assert_outcomes(xfailed=1, deselected=len(TESTS) - 1)
    result.stdout.fnmatch_lines(["*the vendor keeps no labels*"])


def test_deviation_that_is_mended_fails_until_it_is_removed(pytester: pytest.Pytester) -> None:
    body = 'deviations = {"test_exit_codes_are_told_as_they_are": "was once so"}'
    result = run(pytester, body, "-k", "test_exit_codes")
    result.assert_outcomes(failed=1, deselected=len(TESTS) - 1)
    result.stdout.fnmatch_lines(["*XPASS(strict)*was once so*"])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('deviations = {"test_no_such": "why"}', "names 'test_no_such', which is no test of the conformance kit"),
        ('deviations = {"test_check_passes": " "}', "deviations['test_check_passes'] does not say why"),
        ("test_check_passes = None", "overrides or removes test_check_passes"),
        ("async def test_check_passes(self): pass", "overrides or removes test_check_passes"),
        ("_nothing_is_left = None", "overrides or removes _nothing_is_left"),
    ],
)
def test_rule_that_is_broken_is_an_error(pytester: pytest.Pytester, body: str, said: str) -> None:
    result = run(pytester, body)
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines([f"*TypeError: TestLocal*{said.replace('[', '[[]')}*"])


def test_test_cannot_be_overridden_by_a_class_beside_the_kit() -> None:
    class Beside:
        async def test_check_passes(self) -> None:
            pass

    with pytest.raises(TypeError, match="overrides or removes test_check_passes"):
        type("TestBoth", (Beside, SandboxConformance), {})


def test_sandbox_that_is_left_behind_fails_the_run_and_is_removed(pytester: pytest.Pytester) -> None:
    body = """
        async def test_own(self, provider):
            from mabridge.testing.conformance import new_spec
            await provider.create(new_spec())

        @pytest.fixture(scope="session", autouse=True)
        def left(self, tmp_path_factory):
            yield
            print("LEFT:", [path.name for path in tmp_path_factory.getbasetemp().glob("local*/mab*")])
    """
    result = run(pytester, body, "-k", "test_own", "-s")
    assert result.ret == 1
    result.assert_outcomes(passed=1, errors=1, deselected=len(TESTS))
    result.stdout.fnmatch_lines(["*LEFT: []*", "*the tests left sandboxes behind*"])


def test_what_costs_money_runs_only_when_asked(pytester: pytest.Pytester) -> None:
    body = "pytestmark = pytest.mark.mabridge_live"
    args = ("-k", "test_check_passes", "--strict-markers")
    run(pytester, body, *args).assert_outcomes(skipped=1, deselected=len(TESTS) - 1)
    run(pytester, body, *args, "--mabridge-live").assert_outcomes(passed=1, deselected=len(TESTS) - 1)


def test_pytest_plugin_imports_no_sdk() -> None:
    script = """
import sys, pytest
before = set(sys.modules)
import mabridge.testing.plugin
print(sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""
    said = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert said == "['mabridge']\n"
