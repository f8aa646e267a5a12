"""The control plane: apps, images that are built, and sandboxes with their names and tags."""

# ruff: noqa: N802 - calls are named as the service names them

from __future__ import annotations

import asyncio
import base64
import json
import secrets
import tempfile
import time
from pathlib import Path
from typing import Any, Self

from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb
from modal_proto.api_grpc import ModalClientBase

from tests.emulators import machine
from tests.emulators.machine import Machine
from tests.emulators.modal.router import Router
from tests.emulators.modal.service import Faults, Listener
from tests.emulators.modal.storage import Snapshots, Storage

_DONE = pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_SUCCESS)
_BASE_ENV = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root"}


def _token(seconds: float) -> str:
    """A token as far as the SDK reads it: it looks for the time of expiry."""
    parts = ({"alg": "none"}, {"exp": int(time.time() + seconds)})
    return ".".join(base64.urlsafe_b64encode(json.dumps(part).encode()).decode().rstrip("=") for part in parts) + ".x"


class Task:
    """A sandbox, on the machine that runs it."""

    def __init__(self, tree: Path, definition: pb.Sandbox, env: dict[str, str], tags: dict[str, str]) -> None:
        self.id = f"sb-01{secrets.token_hex(12)}"
        self.task_id = f"ta-01{secrets.token_hex(12)}V"
        self.definition = definition
        self.bare = definition.image_id == "im-bare"
        self.env = env
        self.tags = tags
        self.created_at = time.time()
        self.machine = Machine(tree, uid=0)
        self.execs: dict[str, Any] = {}
        self.up = False
        self.result: pb.GenericResult | None = None
        self.ended = asyncio.Event()
        self.life: asyncio.Task[None] | None = None

    @property
    def running(self) -> bool:
        return self.up and self.result is None

    async def live(self, delay: float, snapshots: Snapshots) -> None:
        """From its start to the end of its first process, or of its time."""
        await asyncio.sleep(delay)
        if self.definition.image_id in snapshots:
            await snapshots.lay(self.definition.image_id, self.machine.tree)
        await asyncio.to_thread(self.machine.start)
        if self.result is not None:  # it was terminated meanwhile
            self.machine.stop()
            return
        self.up = True
        first = await asyncio.create_subprocess_exec(
            *self.machine.argv(list(self.definition.entrypoint_args)),
            env=self.env,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )
        status = pb.GenericResult.GENERIC_STATUS_SUCCESS
        code = 0
        try:
            async with asyncio.timeout(self.definition.timeout_secs):
                code = await first.wait()
                status = status if code == 0 else pb.GenericResult.GENERIC_STATUS_FAILURE
        except TimeoutError:
            status = pb.GenericResult.GENERIC_STATUS_TIMEOUT
        self.end(pb.GenericResult(status=status, exitcode=code))
        await first.wait()

    def end(self, result: pb.GenericResult) -> None:
        if self.result is None:
            self.result = result
            if self.up:
                self.machine.stop()
            for run in self.execs.values():
                run.close()
            self.ended.set()

    async def remove(self) -> None:
        self.end(pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_TERMINATED))
        if self.life is not None:
            self.life.cancel()
            await asyncio.gather(self.life, return_exceptions=True)
        await asyncio.to_thread(self.machine.remove)


class Control(Storage):
    stubs = ModalClientBase

    def __init__(self, emulator: Emulator) -> None:
        snapshots = Snapshots(emulator.directory, emulator.faults)
        super().__init__(emulator.faults, snapshots, {emulator.image_id, "im-built", "im-bare"})
        self._emulator = emulator
        self._router_token = _token(3600)
        self.router = Router(emulator.faults, self._router_token, snapshots)
        self.router_url = ""
        self.apps: dict[str, str] = {}
        self.sandboxes: dict[str, Task] = {}
        self._made: dict[str, Task] = {}

    def check(self, stream: Any) -> None:
        given = stream.metadata.get("x-modal-token-id"), stream.metadata.get("x-modal-token-secret")
        if given != (self._emulator.token_id, self._emulator.token_secret):
            raise GRPCError(Status.UNAUTHENTICATED, f"Token ID {given[0]} is not known, or its secret is wrong")

    def _found(self, sandbox_id: str) -> Task:
        if sandbox_id not in self.sandboxes:
            raise GRPCError(Status.NOT_FOUND, f"Sandbox with ID {sandbox_id} not found")
        return self.sandboxes[sandbox_id]

    async def AuthTokenGet(self, stream: Any, request: Any) -> Any:
        return pb.AuthTokenGetResponse(token=_token(1200))

    async def EnvironmentGetOrCreate(self, stream: Any, request: Any) -> Any:
        settings = pb.EnvironmentSettings(image_builder_version="2025.06")
        metadata = pb.EnvironmentMetadata(name="main", settings=settings)
        return pb.EnvironmentGetOrCreateResponse(environment_id="en-1", metadata=metadata)

    async def AppGetOrCreate(self, stream: Any, request: Any) -> Any:
        name = request.app_name
        if name not in self.apps:
            if request.object_creation_type != pb.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
                raise GRPCError(Status.NOT_FOUND, f"App '{name}' not found in environment 'main'")
            self.apps[name] = f"ap-{secrets.token_hex(8)}"
        return pb.AppGetOrCreateResponse(app_id=self.apps[name])

    async def ImageGetOrCreate(self, stream: Any, request: Any) -> Any:
        self._emulator.dockerfiles.append(list(request.image.dockerfile_commands))
        return pb.ImageGetOrCreateResponse(image_id="im-built")

    async def ImageJoinStreaming(self, stream: Any, request: Any) -> Any:
        await asyncio.sleep(0.05)
        result = _DONE
        if self._emulator.dockerfiles[-1][0].removeprefix("FROM ") not in self._emulator.registry:
            failure = pb.GenericResult.GENERIC_STATUS_FAILURE
            result = pb.GenericResult(status=failure, exception="manifest unknown:\nno such image in the registry")
        return pb.ImageJoinStreamingResponse(result=result, metadata=pb.ImageMetadata(), eof=True)

    async def SecretGetOrCreate(self, stream: Any, request: Any) -> Any:
        if request.deployment_name not in self._emulator.secrets:
            raise GRPCError(Status.NOT_FOUND, f"Secret '{request.deployment_name}' not found in environment 'main'")
        return pb.SecretGetOrCreateResponse(secret_id=f"st-{request.deployment_name}")

    async def SandboxCreateV2(self, stream: Any, request: Any) -> Any:
        attempt = stream.metadata["x-idempotency-key"]
        if attempt not in self._made:
            definition = request.definition
            if not self.has_image(definition.image_id):
                raise GRPCError(Status.NOT_FOUND, f"Image with ID {definition.image_id} not found")
            if definition.name and self._named(definition.name) is not None:
                raise GRPCError(Status.ALREADY_EXISTS, f"Sandbox with name '{definition.name}' already exists")
            env = dict(_BASE_ENV)
            for source in request.secret_sources:
                if source.secret_id:
                    env.update(self._emulator.secrets[source.secret_id.removeprefix("st-")])
                env.update(source.env.contents)
            tree = self._emulator.directory / secrets.token_hex(8)
            task = Task(tree, definition, env, {tag.tag_name: tag.tag_value for tag in request.tags})
            self._emulator.definitions.append(definition)
            self.sandboxes[task.id] = self.router.tasks[task.task_id] = self._made[attempt] = task
            task.life = asyncio.create_task(task.live(self.faults.slow_start, self.snapshots))
        task = self._made[attempt]
        if self.faults.lose_create:
            self.faults.lose_create = False
            raise GRPCError(Status.DATA_LOSS, "the answer was lost")
        return pb.SandboxCreateV2Response(sandbox_id=task.id)

    def _named(self, name: str) -> Task | None:
        """The one of that name that runs, or is about to."""
        return next((t for t in self.sandboxes.values() if t.definition.name == name and t.result is None), None)

    async def SandboxGetTaskIdV2(self, stream: Any, request: Any) -> Any:
        task = self._found(request.sandbox_id)
        if task.result is not None:
            return pb.SandboxGetTaskIdResponse(task_result=task.result)
        return pb.SandboxGetTaskIdResponse(task_id=task.task_id if task.up else None)

    async def SandboxGetCommandRouterAccess(self, stream: Any, request: Any) -> Any:
        task = self._found(request.sandbox_id)
        if not task.running:
            raise GRPCError(Status.FAILED_PRECONDITION, "Sandbox has already finished")
        return pb.SandboxGetCommandRouterAccessResponse(url=self.router_url, jwt=self._router_token)

    async def SandboxWaitV2(self, stream: Any, request: Any) -> Any:
        task = self._found(request.sandbox_id)
        if request.timeout and task.result is None:
            try:
                async with asyncio.timeout(request.timeout):
                    await task.ended.wait()
            except TimeoutError:
                pass
        return pb.SandboxWaitResponse(result=task.result)

    async def SandboxTerminateV2(self, stream: Any, request: Any) -> Any:
        task = self._found(request.sandbox_id)

        async def end() -> None:  # some time after the answer
            await asyncio.sleep(0.05)
            task.end(pb.GenericResult(status=pb.GenericResult.GENERIC_STATUS_TERMINATED))

        self._emulator.later.add(asyncio.create_task(end()))
        if self.faults.lose_terminate:
            self.faults.lose_terminate = False
            raise GRPCError(Status.DATA_LOSS, "the answer was lost")
        return pb.SandboxTerminateResponse()

    async def SandboxGetFromNameV2(self, stream: Any, request: Any) -> Any:
        task = self._named(request.sandbox_name) if request.app_name in self.apps else None
        if task is None:
            raise GRPCError(Status.NOT_FOUND, f"Sandbox with name '{request.sandbox_name}' not found")
        return pb.SandboxGetFromNameResponse(sandbox_id=task.id)

    async def SandboxGetFromName(self, stream: Any, request: Any) -> Any:
        raise GRPCError(Status.NOT_FOUND, f"Sandbox with name '{request.sandbox_name}' not found")

    async def SandboxListV2(self, stream: Any, request: Any) -> Any:
        wanted = {tag.tag_name: tag.tag_value for tag in request.tags}.items()
        found = [
            task
            for task in self.sandboxes.values()
            if task.result is None
            and wanted <= task.tags.items()
            and (not request.before_timestamp or task.created_at < request.before_timestamp)
        ]
        found.sort(key=lambda task: -task.created_at)
        page = [
            pb.SandboxInfo(id=task.id, created_at=task.created_at, name=task.definition.name)
            for task in found[: self._emulator.page_size]
        ]
        return pb.SandboxListResponse(sandboxes=page)

    async def SandboxTagsGetV2(self, stream: Any, request: Any) -> Any:
        tags = self._found(request.sandbox_id).tags
        return pb.SandboxTagsGetResponse(tags=[pb.SandboxTag(tag_name=k, tag_value=v) for k, v in tags.items()])


class Emulator:
    """``async with Emulator() as modal:`` listens at `url`, until the end of the block."""

    token_id = "ak-emulated"
    token_secret = "as-emulated"
    image_id = "im-emulated"
    """Of an image that is there. ``im-bare`` is another, without a shell."""
    page_size = 5

    def __init__(self) -> None:
        self.faults = Faults()
        self.secrets: dict[str, dict[str, str]] = {"known": {"FROM_SECRET": "yes"}}
        self.definitions: list[pb.Sandbox] = []
        """What each sandbox was made with."""
        self.registry = {"python:3.13-slim", "registry.example.com/team/image:1"}
        self.dockerfiles: list[list[str]] = []
        """What each image was built from."""
        self.later: set[asyncio.Task[None]] = set()
        self.url = ""

    @property
    def latency(self) -> float:
        """Seconds added to each call."""
        return self.faults.latency

    @latency.setter
    def latency(self, seconds: float) -> None:
        self.faults.latency = seconds

    async def __aenter__(self) -> Self:
        machine.require()
        self._directory = tempfile.TemporaryDirectory(prefix="emulated-modal-")
        self.directory = Path(self._directory.name)
        self.control = Control(self)
        self._listeners = Listener(self.control), Listener(self.control.router)
        for listener in self._listeners:
            await listener.open()
        self.url, self.control.router_url = (listener.url for listener in self._listeners)
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        for listener in self._listeners:
            await listener.shut()
        for task in self.control.sandboxes.values():
            await task.remove()
        await asyncio.gather(*self.later, return_exceptions=True)
        self._directory.cleanup()

    async def break_connections(self) -> None:
        """Cut every connection."""
        for listener in self._listeners:
            listener.cut()
