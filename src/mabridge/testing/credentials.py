"""Who calls: environment keys, the sessions tokens of single work items, and API keys.

Read in the platform's documentation (self-hosted sandboxes, security), in the endpoints' docstrings, and in
`anthropic.lib.environments` for the work item's ``secret``.
An API key comes as a bearer token (as SDK 2.11 sends it) or as ``x-api-key``, which wins over a bearer token; the
others come as bearer tokens only.
"""

from __future__ import annotations

import base64
import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from mabridge.testing.wire import ApiError, Clock

__all__ = ["Credential", "CredentialKind", "Credentials"]

CredentialKind: TypeAlias = Literal["api_key", "environment_key", "sessions_token"]


@dataclass(frozen=True)
class Credential:
    """A credential that the platform gave out.

    Attributes:
        kind: which of the three.
        environment_id: the environment it belongs to; an API key belongs to none.
        session_id: the only session a sessions token is good for.
        expires: seconds on the platform's clock, or ``None``.
    """

    kind: CredentialKind
    environment_id: str | None = None
    session_id: str | None = None
    expires: float | None = None


class Credentials:
    """All credentials of one platform.

    Args:
        clock: the platform's clock.
        token_ttl: seconds that a sessions token is good for; ``None`` for ever.
    """

    def __init__(self, clock: Clock, *, token_ttl: float | None) -> None:
        self._clock = clock
        self._token_ttl = token_ttl
        self._known: dict[str, Credential] = {}

    def new_api_key(self) -> str:
        """Make an organization's API key."""
        return self._add("sk-ant-api03", Credential("api_key"))

    def new_environment_key(self, environment_id: str) -> str:
        """Make an environment's key."""
        return self._add("sk-ant-oat01", Credential("environment_key", environment_id))

    def new_secret(self, environment_id: str, session_id: str) -> str:
        """Make the ``secret`` of a work item: URL-safe base64, unpadded, of JSON with a ``sessions_token``."""
        expires = None if self._token_ttl is None else self._clock.monotonic() + self._token_ttl
        token = self._add("sk-ant-ses01", Credential("sessions_token", environment_id, session_id, expires))
        payload = json.dumps({"version": 1, "sessions_token": token, "ingress_token": secrets.token_urlsafe(16)})
        return base64.urlsafe_b64encode(payload.encode()).decode().rstrip("=")

    def revoke(self, key: str) -> None:
        """Make a key worthless, from the next request on."""
        self._known.pop(key, None)

    def revoke_tokens(self, session_id: str) -> None:
        """Make all sessions tokens of a session worthless."""
        self._known = {key: who for key, who in self._known.items() if who.session_id != session_id}

    def identify(self, headers: Mapping[str, str]) -> Credential | None:
        """Return whose request it is, or ``None``."""
        key = headers.get("x-api-key")
        if key is None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer":
                return None
        who = self._known.get(key)
        if who is None or (who.expires is not None and self._clock.monotonic() >= who.expires):
            return None
        return who if who.kind == "api_key" or "x-api-key" not in headers else None

    def require(self, headers: Mapping[str, str], *kinds: CredentialKind) -> Credential:
        """Return whose request it is.

        Raises:
            ApiError: 401 for an unknown, revoked or expired credential; 403 for one of another kind.
        """
        who = self.identify(headers)
        if who is None:
            raise ApiError(401, "invalid credentials")
        if who.kind not in kinds:
            raise ApiError(403, f"this endpoint does not accept this kind of credential ({who.kind})")
        return who

    def _add(self, prefix: str, credential: Credential) -> str:
        key = f"{prefix}-{secrets.token_urlsafe(32)}"
        self._known[key] = credential
        return key
