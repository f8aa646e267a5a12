"""What outlives a sandbox: snapshots, which are images, and volumes."""

# ruff: noqa: N802 - calls are named as the service names them

from __future__ import annotations

import asyncio
import hashlib
import secrets
import subprocess
import time
from pathlib import Path
from typing import Any

from google.protobuf.empty_pb2 import Empty
from grpclib import GRPCError, Status
from modal_proto import api_pb2 as pb

from tests.emulators.modal.service import Faults, Service


class Snapshots:
    """File trees by the ids of their images. What is not on a disk is not in them: processes, and what they mounted."""

    def __init__(self, directory: Path, faults: Faults) -> None:
        self._directory = directory
        self._faults = faults
        self.ids: dict[str, float] = {}
        """When each is deleted."""
        self._made: dict[str, str] = {}

    def __contains__(self, image_id: str) -> bool:
        return self.ids.get(image_id, 0.0) > time.time()

    async def take(self, tree: Path, snapshot_id: str, ttl: int) -> str:
        """Copy a tree as it is now; asked again under the same id, it is the same one."""
        if ttl != -1 and ttl <= 0:
            raise GRPCError(Status.INVALID_ARGUMENT, "ttl_seconds must be positive, or -1")
        await asyncio.sleep(self._faults.slow_snapshot)
        if self._faults.fail_snapshot:
            raise GRPCError(Status.FAILED_PRECONDITION, "the snapshot could not be taken")
        if snapshot_id not in self._made:
            image_id = f"im-01{secrets.token_hex(12)}"
            await self._copy(tree, self._directory / image_id)
            self.ids[image_id] = float("inf") if ttl == -1 else time.time() + ttl
            self._made[snapshot_id] = image_id
        return self._made[snapshot_id]

    async def lay(self, image_id: str, tree: Path) -> None:
        """Copy a snapshot to where a new sandbox will have its files."""
        await self._copy(self._directory / image_id, tree)

    @staticmethod
    async def _copy(source: Path, target: Path) -> None:
        await asyncio.to_thread(subprocess.run, ["cp", "-a", str(source), str(target)], check=True)


class Storage(Service):
    """The calls about images that are known by their ids, and about volumes, which hold empty files."""

    def __init__(self, faults: Faults, snapshots: Snapshots, images: set[str]) -> None:
        super().__init__(faults)
        self.snapshots = snapshots
        self._images = images
        self._blobs: set[str] = set()
        self.volumes: dict[str, set[str]] = {"stuff": set()}
        """The paths of the files in each volume."""
        self.volume_version = 1
        """Which of Modal's two file systems the volumes have."""

    def has_image(self, image_id: str) -> bool:
        """Whether a sandbox can be made from it."""
        return image_id in self._images or image_id in self.snapshots

    async def ImageFromId(self, stream: Any, request: Any) -> Any:
        if not self.has_image(request.image_id):
            raise GRPCError(Status.NOT_FOUND, f"Image with ID {request.image_id} not found")
        return pb.ImageFromIdResponse(image_id=request.image_id, metadata=pb.ImageMetadata())

    async def ImageDelete(self, stream: Any, request: Any) -> Any:
        if self.snapshots.ids.pop(request.image_id, None) is None:
            raise GRPCError(Status.NOT_FOUND, f"Image with ID {request.image_id} not found")
        return Empty()

    async def VolumeGetOrCreate(self, stream: Any, request: Any) -> Any:
        name = request.deployment_name
        if name not in self.volumes:
            if request.object_creation_type != pb.OBJECT_CREATION_TYPE_CREATE_IF_MISSING:
                raise GRPCError(Status.NOT_FOUND, f"Volume '{name}' not found in environment 'main'")
            self.volumes[name] = set()
        version = pb.VOLUME_FS_VERSION_V1 if self.volume_version == 1 else pb.VOLUME_FS_VERSION_V2
        metadata = pb.VolumeMetadata(version=version, name=name)
        return pb.VolumeGetOrCreateResponse(volume_id=f"vo-{name}", metadata=metadata)

    async def MountPutFile(self, stream: Any, request: Any) -> Any:
        if request.WhichOneof("data_oneof") is not None:
            assert hashlib.sha256(request.data).hexdigest() == request.sha256_hex
            self._blobs.add(request.sha256_hex)
        return pb.MountPutFileResponse(exists=request.sha256_hex in self._blobs)

    async def VolumePutFiles(self, stream: Any, request: Any) -> Any:
        assert all(file.sha256_hex in self._blobs for file in request.files)
        self._put(request.volume_id, [file.filename for file in request.files])
        return Empty()

    async def VolumePutFiles2(self, stream: Any, request: Any) -> Any:
        assert not any(file.size for file in request.files)
        self._put(request.volume_id, [file.path for file in request.files])
        return pb.VolumePutFiles2Response()

    def _put(self, volume_id: str, paths: list[str]) -> None:
        files, paths = self._files(volume_id), [path.lstrip("/") for path in paths]
        for path in paths:
            if len(path) > 4000 or any(not 0 < len(name) < 256 or name in (".", "..") for name in path.split("/")):
                raise GRPCError(Status.INVALID_ARGUMENT, f"{path}: not a path")
        files.update(paths)

    async def VolumeListFiles(self, stream: Any, request: Any) -> None:
        await self._list(stream, request, pb.VolumeListFilesResponse)

    async def VolumeListFiles2(self, stream: Any, request: Any) -> None:
        await self._list(stream, request, pb.VolumeListFiles2Response)

    async def _list(self, stream: Any, request: Any, response: type[Any]) -> None:
        files, under = self._files(request.volume_id), request.path.strip("/")
        found: dict[str, Any] = {}
        for path in files:
            names = path.split("/")
            if under and path != under and not path.startswith(f"{under}/"):
                continue
            above = len(under.split("/")) if under else 0
            for depth in range(above + 1, len(names) + 1 if request.recursive else above + 2):
                kind = pb.FileEntry.FILE if depth == len(names) else pb.FileEntry.DIRECTORY
                found["/".join(names[:depth])] = kind
        if under and not found:
            raise GRPCError(Status.NOT_FOUND, f"{under}: no such file or directory")
        for path, kind in found.items():  # in more than one piece
            await stream.send_message(response(entries=[pb.FileEntry(path=path, type=kind)]))

    async def VolumeRemoveFile(self, stream: Any, request: Any) -> Any:
        files, path = self._files(request.volume_id), request.path.strip("/")
        gone = {each for each in files if each == path or each.startswith(f"{path}/")}
        if not gone:
            raise GRPCError(Status.NOT_FOUND, f"{path}: no such file or directory")
        if gone != {path} and not request.recursive:
            raise GRPCError(Status.INVALID_ARGUMENT, f"{path} is a directory")
        files -= gone
        return Empty()

    VolumeRemoveFile2 = VolumeRemoveFile

    def _files(self, volume_id: str) -> set[str]:
        name = volume_id.removeprefix("vo-")
        if name not in self.volumes:
            raise GRPCError(Status.NOT_FOUND, f"Volume {volume_id} not found")
        return self.volumes[name]
