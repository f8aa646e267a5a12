"""The Worker of ``examples/cloudflare``: what it lets out, how it speaks with its containers, and what is deployed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import anyio
import pytest

from mabridge.errors import SandboxGone
from mabridge.providers import cloudflare
from mabridge.sandbox import SupportsProcess
from mabridge.testing.conformance import new_spec, run, sh
from tests.emulators.cloudflare import CloudflareEmulator
from tests.emulators.cloudflare.node import EXAMPLE, node, workshop
from tests.providers.test_cloudflare import key, provider_of

__all__ = ["key"]

pytestmark = pytest.mark.anyio


class TestEgress:
    """What our Worker, and Cloudflare's code under it, decide. That nothing goes past them is the platform's part."""

    @staticmethod
    @asynccontextmanager
    async def reach(**bindings: str) -> AsyncIterator[Callable[[str], Awaitable[dict[str, object]]]]:
        emulator = CloudflareEmulator("ours", bindings=bindings, internet=True)
        async with emulator, provider_of(emulator) as provider:
            await provider.create(new_spec())
            ((key, container),) = emulator.control.containers.items()
            assert container.options["enableInternet"] is (bindings.get("ENABLE_INTERNET") == "true")
            yield partial(emulator.outbound, key)

    async def test_allowed_hosts_are_reached_and_no_other(self) -> None:
        allowed = ("https://pypi.org/simple/", "http://pypi.org/", "https://PyPI.org:8443/", "https://a.example.com/x")
        refused = (
            *("https://evil.test/", "http://evil.test/", "https://pypi.org.evil.test/", "https://xpypi.org/"),
            *("https://pypi.org@evil.test/", "https://evil.test/?pypi.org", "https://evil.test/#pypi.org"),
            *("https://151.101.0.223/", "http://169.254.169.254/latest/", "http://[::1]/", "https://example.com/"),
        )
        async with self.reach(ALLOWED_HOSTS="pypi.org, *.example.com") as outbound:
            for url in allowed:
                said = await outbound(url)
                assert (said["by"], said["status"]) == ("worker", 200), url
                assert str(said["text"]).startswith("reached http"), url
            for url in refused:
                said = await outbound(url)
                assert (said["by"], said["status"], said["text"]) == ("worker", 520, "Origin is disallowed"), url

    async def test_no_host_is_reached_where_none_is_allowed(self) -> None:
        async with self.reach() as outbound:
            for url in ("https://pypi.org/", "http://pypi.org/"):
                assert (await outbound(url))["status"] == 520

    async def test_open_internet_is_reached_past_the_worker(self) -> None:
        async with self.reach(ENABLE_INTERNET="true", ALLOWED_HOSTS="pypi.org") as outbound:
            assert await outbound("https://evil.test/") == {"by": "internet"}


class TestTransportRpc:
    """What Cloudflare's template has the Worker speak with its containers by; ours, as the SDK does, takes HTTP."""

    async def test_commands_processes_and_files_pass_over_it(self, anyio_backend: str) -> None:
        emulator = CloudflareEmulator("vendor", bindings={"SANDBOX_TRANSPORT": "rpc"})
        async with emulator, provider_of(emulator) as provider:
            sandbox = await provider.create(new_spec(ttl=600))
            said = await sh(sandbox, "cat; printf '\\377\\0'; echo err >&2; exit 3", stdin=b"\xfe\0")
            assert (said.exit_code, said.stdout, said.stderr) == (3, b"\xfe\0\xff\0", b"err\n")
            data = bytes(range(256)) * 33_000  # more than goes in one request
            await sandbox.write_file("large", data)
            assert await sandbox.read_file("large", max_bytes=len(data)) == data
            assert (await run(sandbox, "sleep", "60", timeout=0.5)).timed_out
            assert isinstance(sandbox, SupportsProcess)
            process = await sandbox.open_process(["cat"])
            await process.send(b"one\n")
            assert await process.receive() == b"one\n"
            await process.aclose()
            await emulator.lose_containers()
            with pytest.raises(SandboxGone):
                await run(sandbox, "true")


class TestProgram:
    def test_program_is_clean_for_shellcheck(self) -> None:
        if shutil.which("shellcheck") is None:
            pytest.skip("there is no shellcheck")
        program = Path(cloudflare.__path__[0]) / "program.sh"
        done = subprocess.run(["shellcheck", "-s", "bash", program], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout


class TestExample:
    async def test_worker_is_type_checked(self) -> None:
        tsc = workshop().parent / "node_modules" / "typescript" / "bin" / "tsc"
        done = await anyio.run_process(
            [node(), str(tsc), "--project", str(workshop() / "example" / "tsconfig.json")], check=False
        )
        assert done.returncode == 0, done.stdout.decode()

    def test_bridge_image_and_rig_are_of_one_version(self) -> None:
        """The bridge and the server in the image must be of one version, and it is that which is tested."""
        package = json.loads((EXAMPLE / "package.json").read_text())
        lock = json.loads((Path(workshop().parent) / "package-lock.json").read_text())
        version = package["dependencies"]["@cloudflare/sandbox"]
        assert lock["packages"]["node_modules/@cloudflare/sandbox"]["version"] == version
        assert f"cloudflare/sandbox:{version}" in (EXAMPLE / "Dockerfile").read_text()

    def test_configuration_binds_what_the_worker_uses(self) -> None:
        lines = (EXAMPLE / "wrangler.jsonc").read_text().splitlines()
        config = json.loads("\n".join(line for line in lines if not line.lstrip().startswith("//")))
        bound = {item["name"]: item["class_name"] for item in config["durable_objects"]["bindings"]}
        assert bound == {"Sandbox": "Sandbox", "WarmPool": "WarmPool"}
        assert set(config["migrations"][0]["new_sqlite_classes"]) == {"Sandbox", "WarmPool"}
        assert config["containers"][0]["class_name"] == "Sandbox"
        assert (EXAMPLE / config["main"]).is_file()
        assert config["vars"]["WARM_POOL_MAX_INSTANCES"] == str(config["containers"][0]["max_instances"])
