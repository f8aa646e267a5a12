"""`SandboxConformance`: the groups of tests in one class, its fixtures, and its rules."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar

import anyio
import pytest

from mabridge.errors import NotSupported
from mabridge.sandbox import Provider, Sandbox
from mabridge.testing.conformance.egress import EgressTests
from mabridge.testing.conformance.errors import ErrorsTests
from mabridge.testing.conformance.exec import ExecTests
from mabridge.testing.conformance.files import FilesTests
from mabridge.testing.conformance.helpers import made_keys, new_spec, sh
from mabridge.testing.conformance.lifecycle import LifecycleTests
from mabridge.testing.conformance.process import ProcessTests
from mabridge.testing.conformance.running import RunningTests

__all__ = ["SandboxConformance"]

_CLEAN_UP = 120.0  # seconds
_CLEAR = 'cd / && chmod -R u+rwx "$1" 2>/dev/null; rm -rf "$1"/* "$1"/.[!.]*'


class SandboxConformance(ExecTests, RunningTests, ProcessTests, FilesTests, LifecycleTests, ErrorsTests, EgressTests):
    """The contract as tests. Inherit it, name it ``Test...``, and give it a fixture `provider`.

    The other fixtures are optional: a test that needs one which is not given is skipped, and says which. Each
    is a provider that is not entered yet, except `egress_target` and `break_connections`.

    A test may be neither overridden nor removed. One that a provider cannot pass is named in `deviations`.
    """

    __test__ = False
    pytestmark = pytest.mark.anyio
    is_mabridge_conformance: ClassVar[bool] = True

    deviations: ClassVar[Mapping[str, str]] = {}
    """Tests that fail for a reason that no adapter could mend, each with that reason. One that passes all the same
    fails the run until it is taken off the list."""

    page_size: ClassVar[int] = 149
    """How many sandboxes one page of the provider's list holds; the tests make one more. Lower it to what is true."""

    shortest_ttl: ClassVar[float] = 1.0
    """Seconds: the least `SandboxSpec.ttl` that the provider takes for what it is."""

    ttl_grace: ClassVar[float] = 20.0
    """Seconds by which the provider may be late to remove a sandbox whose time is up."""

    list_lag: ClassVar[float] = 0.0
    """Seconds by which `Provider.list` may lag behind."""

    def __init_subclass__(cls, **kwargs: Any) -> None:  # noqa: ANN401 - passed on
        """Hold the subclass to the rules.

        Raises:
            TypeError: it breaks one.
        """
        super().__init_subclass__(**kwargs)
        if "__test__" not in vars(cls):
            cls.__test__ = True
        for name, kept in _KEPT.items():
            if inspect.getattr_static(cls, name, None) is not kept:
                raise TypeError(
                    f"{cls.__name__} overrides or removes {name}, which is the conformance kit's; "
                    f"name it in deviations, with the reason why no adapter could pass it"
                )
        for name, reason in cls.deviations.items():
            if name not in _KEPT or not name.startswith("test_"):
                raise TypeError(f"{cls.__name__}.deviations names {name!r}, which is no test of the conformance kit")
            if not isinstance(reason, str) or not reason.strip():
                raise TypeError(f"{cls.__name__}.deviations[{name!r}] does not say why")

    @pytest.fixture(scope="session")
    @staticmethod
    def anyio_backend() -> str:
        """asyncio: the one that every provider must run on."""
        return "asyncio"

    @pytest.fixture(scope="class")
    async def provider(self, anyio_backend: str) -> Provider:
        """The provider to test, entered. Its scope is ``class`` or wider."""
        raise NotImplementedError("define the fixture provider, which yields the entered provider")

    @pytest.fixture
    def bad_credentials(self) -> Provider:
        """The provider with credentials that it refuses."""
        return _not_given("bad_credentials", "a provider with wrong credentials")

    @pytest.fixture
    def missing_image(self) -> Provider:
        """The provider with an image, template or snapshot that does not exist."""
        return _not_given("missing_image", "a provider with an image that does not exist")

    @pytest.fixture
    def unreachable(self) -> Provider:
        """The provider at an address where nobody answers."""
        return _not_given("unreachable", "a provider at an address where nobody answers")

    @pytest.fixture
    def no_egress(self) -> Provider:
        """The provider with options by which the sandbox may reach nothing."""
        return _not_given("no_egress", "a provider whose options forbid the network")

    @pytest.fixture
    def open_egress(self) -> Provider:
        """The provider with options by which the sandbox may reach `egress_target`."""
        return _not_given("open_egress", "a provider whose options allow the network")

    @pytest.fixture
    def egress_target(self) -> tuple[str, int]:
        """Host and port of something that accepts TCP connections."""
        return ("1.1.1.1", 443)

    @pytest.fixture
    def break_connections(self) -> Callable[[], Awaitable[None]]:
        """An async function that cuts every connection between the provider object and the provider."""
        _not_given("break_connections", "a way to cut the provider's connections")
        raise AssertionError  # it was skipped

    @pytest.fixture(scope="class")
    async def shared_sandbox(self, anyio_backend: str, provider: Provider) -> AsyncIterator[Sandbox]:
        """One sandbox for all tests that leave it as it was, with ``FROM_SPEC`` set to ``a b``."""
        made = await provider.create(new_spec(env={"FROM_SPEC": "a b"}, ttl=1800.0))
        yield made
        await made.teardown()

    @pytest.fixture
    async def sandbox(self, anyio_backend: str, shared_sandbox: Sandbox) -> Sandbox:
        """The shared sandbox, with its working directory empty."""
        await sh(shared_sandbox, _CLEAR, shared_sandbox.workdir)
        return shared_sandbox

    @pytest.fixture
    async def own_sandbox(self, anyio_backend: str, provider: Provider) -> AsyncIterator[Sandbox]:
        """A sandbox that the test may break."""
        made = await provider.create(new_spec())
        yield made
        await made.teardown()

    @pytest.fixture(autouse=True)
    def _deviation(self, request: pytest.FixtureRequest) -> None:
        reason = self.deviations.get(request.function.__name__)
        if reason is not None:
            request.applymarker(pytest.mark.xfail(reason=reason, strict=True))

    @pytest.fixture(scope="class", autouse=True)
    async def _nothing_is_left(self, anyio_backend: str, provider: Provider) -> AsyncIterator[None]:
        """Leaked sandboxes fail the run; and are removed."""
        earlier = frozenset(made_keys)
        yield
        with anyio.fail_after(_CLEAN_UP):
            left = await _left(provider, made_keys - earlier)
            for key in left:
                if (sandbox := await provider.attach(key)) is not None:
                    await sandbox.teardown()
        assert not left, f"the tests left sandboxes behind, which are removed now: {left}"


async def _left(provider: Provider, keys: AbstractSet[str]) -> list[str]:
    try:
        return [info.key async for info in provider.list() if info.key in keys]
    except NotSupported:  # it has no list, and says so
        return [key for key in sorted(keys) if await provider.attach(key) is not None]


def _not_given(name: str, what: str) -> Provider:
    pytest.skip(f"not tried: the fixture {name} is not given ({what})")


_RULES = ("_deviation", "_nothing_is_left")
_KEPT = {
    name: inspect.getattr_static(SandboxConformance, name)
    for name in dir(SandboxConformance)
    if name.startswith("test") or name in _RULES
}
