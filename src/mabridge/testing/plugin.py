"""The pytest plugin: the option ``--mabridge-live``, and peace between `SandboxConformance` and pytest-asyncio.

pytest loads it wherever mabridge is installed, so it imports nothing but pytest.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

__all__ = ["mabridge_live"]

_IS_OURS = "is_mabridge_conformance"  # an attribute of `SandboxConformance`, which is not imported for this

pytest.register_assert_rewrite("mabridge.testing.conformance")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.getgroup("mabridge").addoption(
        "--mabridge-live",
        action="store_true",
        help="run the tests that use real providers, with your credentials and at your cost",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers", "mabridge_live: uses a real provider, at a cost: skipped without --mabridge-live"
    )


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what would cost money, unless that was asked for."""
    if item.get_closest_marker("mabridge_live") is not None and not item.config.getoption("--mabridge-live"):
        pytest.skip("uses a real provider: give --mabridge-live to run it")


@pytest.fixture(scope="session")
def mabridge_live(request: pytest.FixtureRequest) -> bool:
    """Whether real providers may be used: the option ``--mabridge-live``."""
    return bool(request.config.getoption("--mabridge-live"))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_pycollect_makeitem(
    collector: pytest.Module | pytest.Class, name: str, obj: object
) -> Generator[None, Any, Any]:
    """Keep the tests of the kit from being run by pytest-asyncio."""
    with _strict_asyncio(collector):
        return (yield)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_fixture_setup(fixturedef: object, request: pytest.FixtureRequest) -> Generator[None, Any, Any]:
    """Keep the fixtures of the kit's tests on the event loop of these tests."""
    with _strict_asyncio(request.node):
        return (yield)


@contextmanager
def _strict_asyncio(node: pytest.Item | pytest.Collector) -> Iterator[None]:
    """Put pytest-asyncio into its strict mode for what belongs to the kit: in its auto mode it takes every test."""
    parent = node.getparent(pytest.Class)
    option = node.config.option
    if not hasattr(option, "asyncio_mode") or not getattr(getattr(parent, "obj", None), _IS_OURS, False):
        yield
        return
    before = option.asyncio_mode
    option.asyncio_mode = "strict"
    try:
        yield
    finally:
        option.asyncio_mode = before
