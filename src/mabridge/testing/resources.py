"""Skills and memory stores.

Read in `anthropic.resources.beta.skills.versions`, `anthropic.resources.beta.memory_stores` and their types.
"""

from __future__ import annotations

import hashlib
import io
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field

from mabridge.testing.wire import ApiError, Clock, Json, decode_cursor, encode_cursor, new_id

__all__ = ["MemoryStore", "Skill"]


@dataclass(kw_only=True)
class Skill:
    """A custom skill with one version.

    Attributes:
        name: its slug, and the directory that wraps the files in the archive.
        archive: the download: a zip.
    """

    name: str
    description: str
    archive: bytes
    created_at: str
    id: str = field(default_factory=lambda: new_id("skill"))
    version_id: str = field(default_factory=lambda: new_id("skillver"))

    @classmethod
    def from_files(cls, name: str, files: Mapping[str, str | bytes], *, clock: Clock, description: str) -> Skill:
        """Make a skill of files; those that begin with ``#!`` are executable in the archive."""
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for path, content in files.items():
                data = content.encode() if isinstance(content, str) else content
                member = zipfile.ZipInfo(f"{name}/{path}")
                member.create_system = 3
                member.external_attr = (0o100755 if data.startswith(b"#!") else 0o100644) << 16
                archive.writestr(member, data)
        return cls(name=name, description=description, archive=buffer.getvalue(), created_at=clock.stamp())

    def reference(self) -> Json:
        """Return what an agent's ``skills`` lists."""
        return {"type": "custom", "skill_id": self.id, "version": "latest"}

    def to_json(self) -> Json:
        """Return the version as the API shows it."""
        return {
            "id": self.version_id,
            "type": "skill_version",
            "skill_id": self.id,
            "name": self.name,
            "description": self.description,
            "created_at": self.created_at,
        }


@dataclass(kw_only=True)
class MemoryStore:
    """A memory store, to be read only.

    Attributes:
        files: the memories: path, beginning with a slash, and text.
    """

    name: str
    files: dict[str, str]
    created_at: str
    access: str = "read_write"
    id: str = field(default_factory=lambda: new_id("memstore"))
    _ids: dict[str, str] = field(default_factory=dict)

    def resource(self) -> Json:
        """Return what a session's ``resources`` lists."""
        slug = re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")
        return {
            "type": "memory_store",
            "memory_store_id": self.id,
            "name": self.name,
            "access": self.access,
            "mount_path": f"/mnt/memory/{slug}",
            "description": "",
            "instructions": None,
        }

    def to_json(self) -> Json:
        """Return the store as the API shows it."""
        return {
            "id": self.id,
            "type": "memory_store",
            "name": self.name,
            "description": "",
            "metadata": {},
            "archived_at": None,
            "created_at": self.created_at,
            "updated_at": self.created_at,
        }

    def page(self, query: Mapping[str, str]) -> Json:
        """Return one page of its memories, by path."""
        full = query.get("view", "basic") == "full"
        limit = min(int(query.get("limit", "20")), 20 if full else 100)
        start = decode_cursor(query["page"]) if "page" in query else 0
        paths = sorted(path for path in self.files if path.startswith(query.get("path_prefix", "/")))
        shown = paths[start : start + limit]
        return {
            "data": [self._memory(path, full=full) for path in shown],
            "next_page": encode_cursor(start + limit) if start + limit < len(paths) else None,
        }

    def memory(self, memory_id: str) -> Json:
        """Return one memory with its content.

        Raises:
            ApiError: 404.
        """
        for path in self.files:
            if self._id(path) == memory_id:
                return self._memory(path, full=True)
        raise ApiError(404, f"memory {memory_id} not found")

    def _id(self, path: str) -> str:
        return self._ids.setdefault(path, new_id("mem"))

    def _memory(self, path: str, *, full: bool) -> Json:
        data = self.files[path].encode()
        digest = hashlib.sha256(data).hexdigest()
        return {
            "id": self._id(path),
            "type": "memory",
            "memory_store_id": self.id,
            "memory_version_id": f"memver_01{digest[:22]}",
            "path": path,
            "content": self.files[path] if full else None,
            "content_sha256": digest,
            "content_size_bytes": len(data),
            "created_at": self.created_at,
            "updated_at": self.created_at,
        }
