"""The tags of a sandbox: what is known of it wherever it is found. Pure.

Modal takes 63 of ``A-Za-z0-9._-`` for a name and for a value.
"""

from __future__ import annotations

import base64
import math
import time
from collections.abc import Mapping
from datetime import UTC, datetime

from mabridge.identity import KEY_LABEL
from mabridge.sandbox import SandboxInfo, SandboxSpec

__all__ = [
    "CREATED",
    "ENV",
    "UNTIL",
    "WOKEN_FROM",
    "WORKDIR_MAX",
    "describe",
    "new_tags",
    "spec_of",
    "workdir_of",
]

WORKDIR_MAX = 47
"""Bytes of a working directory's path that a tag has room for."""
CREATED = "mabridge.created"
"""Seconds since 1970, different for each call that makes a sandbox."""
UNTIL = "mabridge.until"
"""Seconds since 1970, when Modal ends it."""
WOKEN_FROM = "mabridge.woken-from"
"""The snapshot that it was made from, if it had been suspended."""
ENV = "mabridge.env"
"""Is there if it was made with variables of its own (`SandboxSpec.env`)."""
_WORKDIR, _TTL = "mabridge.workdir", "mabridge.ttl"
_OURS = {CREATED, UNTIL, WOKEN_FROM, ENV, _WORKDIR, _TTL}


def new_tags(spec: SandboxSpec, timeout: int, woken_from: str | None) -> dict[str, str]:
    """Return the tags of a sandbox that is made now, and that Modal ends after `timeout` seconds."""
    now = time.time()
    path = base64.urlsafe_b64encode(spec.workdir.encode()).decode().rstrip("=")
    tags = {
        **spec.labels,
        KEY_LABEL: spec.key,
        _WORKDIR: path,
        _TTL: str(math.ceil(spec.ttl)),
        CREATED: f"{now:.6f}",
        UNTIL: f"{now + timeout:.0f}",
    }
    if spec.env:
        tags[ENV] = "yes"
    if woken_from is not None:
        tags[WOKEN_FROM] = woken_from
    return tags


def workdir_of(tags: Mapping[str, str]) -> str:
    """Return the working directory."""
    encoded = tags.get(_WORKDIR, "")
    return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).decode() or "/workspace"


def spec_of(tags: Mapping[str, str]) -> SandboxSpec:
    """Return what a sandbox was made to be, but for its variables."""
    ttl = float(tags.get(_TTL, SandboxSpec.ttl))
    return SandboxSpec(key=tags[KEY_LABEL], labels=_labels(tags), workdir=workdir_of(tags), ttl=ttl)


def describe(sandbox_id: str, tags: Mapping[str, str], state: str) -> SandboxInfo:
    """Return what the tags tell of a sandbox."""
    created = datetime.fromtimestamp(float(tags[CREATED]), UTC) if CREATED in tags else None
    return SandboxInfo(key=tags[KEY_LABEL], id=sandbox_id, labels=_labels(tags), state=state, created_at=created)


def _labels(tags: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in tags.items() if name not in _OURS}
