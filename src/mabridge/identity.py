"""From a session to the names its sandbox goes by. Pure.

Any worker on any machine comes to the same names, so the session's sandbox is found again with no database.
"""

from __future__ import annotations

import base64
import hashlib
import re

__all__ = ["ENVIRONMENT_LABEL", "KEY_LABEL", "SESSION_LABEL", "is_safe_id", "sandbox_key", "sandbox_labels"]

ENVIRONMENT_LABEL = "mabridge.environment"
SESSION_LABEL = "mabridge.session"
KEY_LABEL = "mabridge.key"

_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def sandbox_key(environment_id: str, session_id: str) -> str:
    """Return the key of a session's sandbox: ``mab`` and 24 characters of ``a-z2-7``.

    A legal name at every provider: Cloudflare takes only ``[a-z2-7]``, Blaxel at most 49 characters, Kubernetes
    DNS labels.
    """
    digest = hashlib.sha256(f"{environment_id}\n{session_id}".encode()).digest()
    return "mab" + base64.b32encode(digest).decode("ascii").lower()[:24]


def sandbox_labels(environment_id: str, session_id: str) -> dict[str, str]:
    """Return the labels a session's sandbox is created with.

    Keys and values keep to ``[A-Za-z0-9._-]{1,63}``, the tightest rule among the providers (Modal's tags).
    """
    return {
        KEY_LABEL: sandbox_key(environment_id, session_id),
        ENVIRONMENT_LABEL: environment_id,
        SESSION_LABEL: session_id,
    }


def is_safe_id(value: object) -> bool:
    """Whether a platform id may be used in labels, names and paths: what the queue sends is checked before use."""
    return isinstance(value, str) and _SAFE_ID.fullmatch(value) is not None
