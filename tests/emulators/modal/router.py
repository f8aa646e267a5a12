"""The command router: what a worker's host of Modal answers, with the commands that run there."""

# ruff: noqa: N802 - calls are named as the service names them

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import tempfile
from typing import Any

from grpclib import GRPCError, Status
from modal_proto import task_command_router_pb2 as pb
from modal_proto.task_command_router_grpc import TaskCommandRouterBase

from tests.emulators.machine import Machine
from tests.emulators.modal.service import Faults, Service
from tests.emulators.modal.storage import Snapshots

_CHUNK = 65536
_KEPT = 64 * 1024 * 1024


class Spool:
    """One output stream: what a command wrote, on disk, to be read from any offset."""

    def __init__(self) -> None:
        self._file = tempfile.SpooledTemporaryFile(1_000_000)  # noqa: SIM115 - closed with the exec
        self._source, self.sink = os.pipe()
        os.set_blocking(self._source, False)
        self._size = 0
        self.ended = False
        self._changed = asyncio.Event()
        asyncio.get_running_loop().add_reader(self._source, self._take)

    def _take(self) -> None:
        data = os.read(self._source, _CHUNK)
        self._file.seek(self._size)
        self._file.write(data)
        self._size += len(data)
        if not data:
            self._end()
        elif self._size >= _KEPT:
            asyncio.get_running_loop().remove_reader(self._source)
        self._changed.set()

    def _end(self) -> None:
        if not self.ended:
            self.ended = True
            asyncio.get_running_loop().remove_reader(self._source)
            os.close(self._source)

    async def chunk(self, offset: int) -> bytes:
        """What follows `offset`, as soon as there is something; nothing at the end."""
        while self._size <= offset and not self.ended:
            self._changed = asyncio.Event()
            await self._changed.wait()
        if self._file.closed:
            raise GRPCError(Status.NOT_FOUND, "the task has ended")
        self._file.seek(offset)
        return self._file.read(_CHUNK)

    def close(self) -> None:
        self._end()
        self._changed.set()
        self._file.close()


class Exec:
    """A command."""

    def __init__(self, machine: Machine, request: pb.TaskExecStartRequest, env: dict[str, str]) -> None:
        self.spools = {1: Spool(), 2: Spool()}
        piped = {
            1: request.stdout_config == pb.TASK_EXEC_STDOUT_CONFIG_PIPE,
            2: request.stderr_config == pb.TASK_EXEC_STDERR_CONFIG_PIPE,
        }
        out, err = (self.spools[n].sink if piped[n] else subprocess.DEVNULL for n in (1, 2))
        argv = machine.argv(list(request.command_args), cwd=request.workdir or "/")
        self._process = subprocess.Popen(
            argv, env=env, stdin=subprocess.PIPE, stdout=out, stderr=err, start_new_session=True, bufsize=0
        )
        for spool in self.spools.values():
            os.close(spool.sink)
        assert self._process.stdin is not None
        self._stdin = self._process.stdin
        os.set_blocking(self._stdin.fileno(), False)
        self.written = 0
        self._writing = asyncio.Lock()
        self.over = asyncio.Event()
        self._pidfd = os.pidfd_open(self._process.pid)
        loop = asyncio.get_running_loop()
        loop.add_reader(self._pidfd, self._exited)
        self._clock = asyncio.create_task(self._kill_after(request.timeout_secs)) if request.timeout_secs else None

    def _exited(self) -> None:
        self._process.wait()
        self._release()

    def _release(self) -> None:
        if not self.over.is_set():
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            if self._clock is not None:
                self._clock.cancel()
            if not self._writing.locked():
                self._stdin.close()
            self.over.set()

    async def _kill_after(self, seconds: int) -> None:
        await asyncio.sleep(seconds)
        leader = await Machine.leader(self._process)  # type: ignore[arg-type]
        if leader:
            os.kill(leader, signal.SIGKILL)

    def status(self) -> dict[str, int]:
        code = self._process.returncode
        return {"code": code} if code >= 0 else {"signal": -code}

    async def write(self, offset: int, data: bytes, eof: bool) -> None:
        async with self._writing:
            data = data[max(0, self.written - offset) :]
            try:
                while data:
                    if self.over.is_set() or self._stdin.closed:
                        raise GRPCError(Status.FAILED_PRECONDITION, "stdin is closed")
                    try:
                        count = os.write(self._stdin.fileno(), data[:_CHUNK])
                        self.written += count
                        data = data[count:]
                    except BlockingIOError:
                        await asyncio.sleep(0.005)
                    except BrokenPipeError:
                        raise GRPCError(Status.FAILED_PRECONDITION, "stdin is closed") from None
                if eof:
                    self._stdin.close()
            finally:
                if self.over.is_set():
                    self._stdin.close()

    def close(self) -> None:
        if not self.over.is_set():
            self._process.kill()
            self._process.wait()
            self._release()
        self._stdin.close()
        for spool in self.spools.values():
            spool.close()


class Router(Service):
    stubs = TaskCommandRouterBase

    def __init__(self, faults: Faults, token: str, snapshots: Snapshots) -> None:
        super().__init__(faults)
        self.tasks: dict[str, Any] = {}
        self._token = token
        self._snapshots = snapshots

    def check(self, stream: Any) -> None:
        if stream.metadata.get("authorization") != f"Bearer {self._token}":
            raise GRPCError(Status.UNAUTHENTICATED, "the token of the command router is wrong")

    def _task(self, task_id: str) -> Any:
        task = self.tasks.get(task_id)
        if task is None or not task.running:
            raise GRPCError(Status.NOT_FOUND, f"task {task_id} is not here")
        return task

    def _exec(self, request: Any) -> Exec:
        found = self._task(request.task_id).execs.get(request.exec_id)
        if found is None:
            raise GRPCError(Status.NOT_FOUND, f"there is no exec {request.exec_id}")
        return found

    async def TaskExecStart(self, stream: Any, request: Any) -> Any:
        task = self._task(request.task_id)
        if request.exec_id not in task.execs:
            env = dict(task.env)
            for source in request.secret_sources:
                env.update(source.env.contents)
            if not request.command_args or sum(map(len, request.command_args)) > 131072:
                raise GRPCError(Status.INVALID_ARGUMENT, "argument list too long")
            if task.bare:
                raise GRPCError(Status.INVALID_ARGUMENT, f"{request.command_args[0]}: no such file or directory")
            task.execs[request.exec_id] = Exec(task.machine, request, env)
        return pb.TaskExecStartResponse()

    async def TaskExecStdioRead(self, stream: Any, request: Any) -> None:
        run = self._exec(request)
        number = 1 if request.file_descriptor == pb.TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDOUT else 2
        offset = request.offset
        while data := await run.spools[number].chunk(offset):
            await stream.send_message(pb.TaskExecStdioReadResponse(data=data))
            offset += len(data)
        self._task(request.task_id)  # the end of a stream that was cut off is an error

    async def TaskExecStdinWrite(self, stream: Any, request: Any) -> Any:
        await self._exec(request).write(request.offset, request.data, request.eof)
        return pb.TaskExecStdinWriteResponse()

    async def TaskExecWait(self, stream: Any, request: Any) -> Any:
        run = self._exec(request)
        await run.over.wait()
        self._task(request.task_id)
        return pb.TaskExecWaitResponse(**run.status())

    async def TaskExecPoll(self, stream: Any, request: Any) -> Any:
        run = self._exec(request)
        return pb.TaskExecPollResponse(**(run.status() if run.over.is_set() else {}))

    async def TaskSnapshotFilesystem(self, stream: Any, request: Any) -> Any:
        task = self._task(request.task_id)
        image_id = await self._snapshots.take(task.machine.tree, request.snapshot_id, request.ttl_seconds)
        return pb.TaskSnapshotFilesystemResponse(image_id=image_id)
