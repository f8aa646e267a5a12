"""The bridge in Python answers as the real one does, to all that mabridge asks and to what is wrong."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest

from mabridge.testing.conformance import new_key
from tests.emulators.cloudflare import BridgeInPython, CloudflareEmulator

pytestmark = pytest.mark.anyio

ANSWER = ("content-type", "cache-control")
CHANGING = ("created", "deadline", "container")
MIB = 1024 * 1024


@dataclass
class Both:
    """The real bridge and ours, each with a client."""

    emulators: tuple[CloudflareEmulator, BridgeInPython]
    clients: tuple[httpx2.AsyncClient, httpx2.AsyncClient]

    async def answers(self, method: str, path: str, **what: Any) -> Any:
        """What both answer, which is the same."""
        real, ours = [await _answer(client, method, path, **what) for client in self.clients]
        assert ours == real, f"{method} {path}"
        return real

    async def runs(self, key: str, *argv: str, **body: Any) -> Any:
        """What both say of a command."""
        return await self.answers("POST", f"/v1/sandbox/{key}/exec", json={"argv": argv, **body})


async def _answer(client: httpx2.AsyncClient, method: str, path: str, **what: Any) -> Any:
    response = await client.request(method, path, **what)
    headers = {name: value for name, value in response.headers.items() if name in ANSWER}
    headers["content-type"] = headers.get("content-type", "").split(";")[0]
    if headers["content-type"] == "text/event-stream":
        return response.status_code, headers, _events(response.text)
    if headers["content-type"] != "application/json":
        return response.status_code, headers, response.text
    return response.status_code, headers, _settled(response.json())


def _settled(body: Any) -> Any:
    """A body without what is never the same."""
    if isinstance(body, list):
        return [_settled(item) for item in body]
    if isinstance(body, dict):
        return {name: name if name in CHANGING else _settled(value) for name, value in body.items()}
    return body


def _events(text: str) -> dict[str, Any]:
    """What each stream said, and the last event; how the streams are cut, and mingle, is chance."""
    said: dict[str, Any] = {"stdout": b"", "stderr": b""}
    for event in text.split("\n\n")[:-1]:
        name, data = (line.partition(": ")[2] for line in event.split("\n"))
        if name in ("stdout", "stderr"):
            said[name] += base64.b64decode(data)
        else:
            said["last"] = name, json.loads(data)
    return said


async def _both(worker: Any, **bindings: str | None) -> AsyncIterator[Both]:
    async with AsyncExitStack() as stack:
        emulators = CloudflareEmulator(worker, bindings=bindings), BridgeInPython(worker, bindings=bindings)
        clients = []
        for emulator in emulators:
            await stack.enter_async_context(emulator)
            headers = {"Authorization": f"Bearer {emulator.api_key}"}
            client = httpx2.AsyncClient(base_url=emulator.url, headers=headers, timeout=60)
            clients.append(await stack.enter_async_context(client))
        yield Both(emulators, (clients[0], clients[1]))


@pytest.fixture(scope="module")
async def vendor(anyio_backend: str) -> AsyncIterator[Both]:
    async for both in _both("vendor"):
        yield both


@pytest.fixture(scope="module")
async def ours(anyio_backend: str) -> AsyncIterator[Both]:
    async for both in _both("ours"):
        yield both


@pytest.fixture
async def key(vendor: Both) -> AsyncIterator[str]:
    key = new_key()
    yield key
    assert (await vendor.answers("DELETE", f"/v1/sandbox/{key}"))[0] == 204


class TestCommands:
    @pytest.mark.parametrize(
        "argv",
        [
            ("echo", "hi"),
            ("printf", "%s|", "a b", "it's", "\\n", "\n\t\r", "$HOME", "*", "é", "", "\\'"),
            ("sh", "-c", "printf '\\377\\376é'; echo err >&2; exit 3"),
            ("nosuch",),
            ("sh", "-c", "kill -9 $$"),
            ("cat",),
            ("pwd",),
        ],
        ids=lambda argv: argv[0],
    )
    async def test_command_has_the_same_output_and_end(self, vendor: Both, key: str, argv: tuple[str, ...]) -> None:
        status, _, said = await vendor.runs(key, *argv)
        assert status == 200
        assert said["last"][0] == "exit"

    async def test_command_out_of_time_is_told_in_the_same_way(self, vendor: Both, key: str) -> None:
        _, _, said = await vendor.runs(key, "sh", "-c", "echo before; sleep 30", timeout_ms=300)
        assert said["last"] == ("exit", {"exit_code": 124})
        assert said["stdout"] == b"before\n"

    async def test_directory_is_refused_in_the_same_way(self, vendor: Both, key: str) -> None:
        assert (await vendor.runs(key, "pwd", cwd="/tmp"))[0] == 403
        assert (await vendor.runs(key, "pwd", cwd="/workspace/nosuch"))[2]["last"][0] == "error"

    async def test_request_that_is_none_is_refused_in_the_same_way(self, vendor: Both, key: str) -> None:
        path = f"/v1/sandbox/{key}/exec"
        assert (await vendor.answers("POST", path, content=b"{"))[0] == 400
        assert (await vendor.runs(key))[0] == 400
        assert (await vendor.answers("POST", path, json={}))[0] == 400


class TestFiles:
    async def test_file_is_written_with_the_same_bytes(self, vendor: Both, key: str) -> None:
        data = bytes(range(256)) * 1000
        url = f"/v1/sandbox/{key}/file/workspace/new/file"
        assert (await vendor.answers("PUT", url, content=data))[0] == 200
        _, _, said = await vendor.runs(key, "sha256sum", "/workspace/new/file")
        assert said["last"] == ("exit", {"exit_code": 0})

    @pytest.mark.parametrize(("path", "size", "status"), [("etc/x", 1, 403), ("workspace/x", 12 * MIB, 502)])
    async def test_file_is_refused_in_the_same_way(
        self, vendor: Both, key: str, path: str, size: int, status: int
    ) -> None:
        assert (await vendor.answers("PUT", f"/v1/sandbox/{key}/file/{path}", content=bytes(size)))[0] == status


class TestPool:
    async def test_containers_are_counted_and_start_for_whoever_asks(self, vendor: Both, key: str) -> None:
        before = (await vendor.answers("GET", "/v1/pool/stats"))[2]["assigned"]
        assert (await vendor.answers("GET", f"/v1/sandbox/{key}/running"))[2] == {"running": True}
        assert (await vendor.answers("GET", "/v1/pool/stats"))[2]["assigned"] == before + 1

    async def test_no_room_is_told_in_the_same_way(self, vendor: Both) -> None:
        try:
            for emulator in vendor.emulators:
                emulator.control.max_instances = len(emulator.control.containers)
            assert (await vendor.runs(new_key(), "true"))[0] == 503
        finally:
            for emulator in vendor.emulators:
                emulator.control.max_instances = 1000


class TestDoor:
    @pytest.mark.parametrize("worker", ["vendor", "ours"])
    async def test_same_are_let_in(self, vendor: Both, ours: Both, worker: str) -> None:
        both = {"vendor": vendor, "ours": ours}[worker]
        refused = []
        for path in ("/health", "/v1/pool/stats", "/v1/sandbox/UPPER/running", "/v1/sandbox/abc/nosuch", "/nosuch"):
            for headers in ({}, {"Authorization": ""}, {"Authorization": "Bearer wrong"}):
                status, _, _ = await both.answers("GET", path, headers=headers)
                refused.append(status)
        assert {200, 401} < set(refused)


class TestRegister:
    async def test_sandbox_is_made_found_kept_listed_and_removed_in_the_same_way(self, ours: Both) -> None:
        key = new_key()
        path = f"/mabridge/v1/sandboxes/{key}"
        assert (await ours.answers("GET", "/mabridge/v1"))[2] == {"mabridge": 1}
        assert (await ours.answers("GET", path))[0] == 404
        assert (await ours.runs(key, "true"))[0] == 502
        body = {"labels": {"a": "b"}, "ttl": 60}
        assert (await ours.answers("PUT", path, json=body))[0] == 201
        assert (await ours.answers("PUT", path, json=body))[0] == 200
        assert (await ours.answers("GET", path))[2]["labels"] == {"a": "b"}
        assert (await ours.answers("POST", f"{path}/keep-alive", json={"ttl": 90}))[0] == 200
        listed = (await ours.answers("GET", "/mabridge/v1/sandboxes"))[2]
        assert [entry["id"] for entry in listed["sandboxes"]] == [key]
        assert (await ours.runs(key, "echo", "hi"))[2]["stdout"] == b"hi\n"
        assert (await ours.answers("DELETE", f"/v1/sandbox/{key}"))[0] == 204
        assert (await ours.answers("GET", path))[0] == 404
        assert (await ours.answers("POST", f"{path}/keep-alive", json={"ttl": 90}))[0] == 404
        assert (await ours.answers("DELETE", f"/v1/sandbox/{key}"))[0] == 502

    @pytest.mark.parametrize("body", ["", "{", "[]", '{"ttl": 0}', '{"ttl": "1"}'])
    async def test_what_makes_no_sense_is_refused_in_the_same_way(self, ours: Both, body: str) -> None:
        for method, path in (
            ("PUT", new_key()),
            ("POST", f"{new_key()}/keep-alive"),
            ("PUT", "other"),
            ("GET", "other"),
        ):
            assert (await ours.answers(method, f"/mabridge/v1/sandboxes/{path}", content=body))[0] in (400, 404)
