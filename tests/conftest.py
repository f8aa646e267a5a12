"""Fixtures and rules for the whole suite."""

from __future__ import annotations

import base64
import contextlib
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path

import pytest

from mabridge.providers.docker import DockerOptions, DockerProvider
from mabridge.providers.local import LocalOptions, LocalProvider
from mabridge.sandbox import Provider, Sandbox, SandboxSpec
from tests import canary, images


def pytest_configure() -> None:
    """A shell without job control starts what is in the background with these ignored, and every child would too."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session", autouse=True)
def process_watch() -> Iterator[canary.ProcessWatch]:
    canary.record()
    with canary.ProcessWatch() as watch:
        yield watch


@pytest.fixture(autouse=True)
def no_secret_is_told(
    request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture, process_watch: canary.ProcessWatch
) -> Iterator[None]:
    """Whatever a test does, no environment key and no sessions token is where it may not be (see `canary`)."""
    directory = request.getfixturevalue("tmp_path") if "tmp_path" in request.fixturenames else None
    caplog.set_level(logging.DEBUG, "mabridge")
    yield
    found = [*canary.in_records([*caplog.get_records("setup"), *caplog.get_records("call")]), *canary.in_telemetry()]
    if directory is not None:
        found += canary.in_files(directory)
    found += process_watch.found
    assert not found, f"a secret is in: {'; '.join(found)}"


@pytest.fixture(autouse=True)
def no_process_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test keeps at the local provider has shells that outlive it: by the hundred, they slow the others."""
    directory = str(request.getfixturevalue("tmp_path")).encode() if "tmp_path" in request.fixturenames else None
    yield
    if directory is None:
        return
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if directory + b"/" in environ.read_bytes() and int(environ.parent.name) != os.getpid():
                os.kill(int(environ.parent.name), signal.SIGKILL)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """No test prints a secret, and with CI set one that needs Docker must run: a skip would be a hole nobody sees."""
    report = yield
    if canary.SECRET.search(f"{report.capstdout} {report.capstderr}".encode()):
        report.outcome, report.longrepr = "failed", "a secret was printed"
    # What the conformance kit has for some providers only, it skips for the others.
    skipped = report.longrepr if isinstance(report.longrepr, tuple) else ("", 0, "")
    optional = "/testing/conformance/" in skipped[0] or "not tried:" in skipped[2]
    must_run = os.environ.get("CI") and item.get_closest_marker("docker") and not optional
    if report.skipped and must_run and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped with CI set, where Docker must be there: {report.longrepr}"
    return report


@pytest.fixture(scope="session")
def image() -> Callable[[str], str]:
    """Make a test image if it is missing, or skip the test."""

    def ensure(name: str) -> str:
        try:
            return images.ensure(name)
        except images.ImageMissing as exc:
            pytest.skip(str(exc))

    return ensure


@pytest.fixture
def key() -> str:
    """A sandbox key that nobody else has."""
    return "mab" + base64.b32encode(os.urandom(15)).decode().lower()


@pytest.fixture(
    params=[
        "local",
        pytest.param("busybox", marks=pytest.mark.docker),
        pytest.param("debian", marks=pytest.mark.docker),
    ]
)
def place(request: pytest.FixtureRequest) -> str:
    """Where a test that concerns every provider runs: each of these in turn."""
    return request.param


@pytest.fixture
async def provider(place: str, tmp_path: Path, image: Callable[[str], str]) -> AsyncIterator[Provider]:
    """The provider of `place`, entered."""
    if place == "local":
        made: Provider = LocalProvider(LocalOptions(root=tmp_path / "sandboxes"))
    else:
        name = image(images.BUSYBOX if place == "busybox" else images.DEBIAN)
        made = DockerProvider(DockerOptions(image=name, pull="never"))
    async with made as entered:
        yield entered


@pytest.fixture
async def sandbox(provider: Provider, key: str) -> AsyncIterator[Sandbox]:
    """A sandbox at `place`, removed when the test is done."""
    made = await provider.create(SandboxSpec(key=key, ttl=600))
    yield made
    await made.teardown()


@pytest.fixture
async def local_provider(tmp_path: Path) -> AsyncIterator[LocalProvider]:
    """The local provider, entered, with a root of its own."""
    async with LocalProvider(LocalOptions(root=tmp_path / "sandboxes")) as entered:
        yield entered


@pytest.fixture
async def local_sandbox(local_provider: LocalProvider, key: str) -> AsyncIterator[Sandbox]:
    """A sandbox of the local provider."""
    made = await local_provider.create(SandboxSpec(key=key))
    yield made
    await made.teardown()
