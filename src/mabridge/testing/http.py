"""The API over HTTP: routes, credentials, and the shape of requests and answers.

Read in `anthropic.resources.beta`: ``environments.work``, ``sessions`` with its ``events``, ``skills.versions``,
``memory_stores``; in the platform's documentation on credentials; and, for the framing of the event stream, in
`anthropic._streaming`.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, cast

import anyio
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from mabridge.testing.credentials import CredentialKind
from mabridge.testing.gate import FAULT
from mabridge.testing.inbox import receive
from mabridge.testing.session import Session
from mabridge.testing.state import check_metadata
from mabridge.testing.wire import ApiError, Json, decode_cursor, encode_cursor

if TYPE_CHECKING:
    from mabridge.testing.eventlog import Subscription
    from mabridge.testing.faults import Fault
    from mabridge.testing.plane import ControlPlane, Environment
    from mabridge.testing.resources import MemoryStore

__all__ = ["make_app"]

_MAX_BODY = 32 * 1000 * 1000
_PING_EVERY = 15.0
_BETA = "managed-agents-2026-04-01"
_MEMORY_BETAS = {_BETA, "agent-memory-2026-07-22"}
_ALL: tuple[CredentialKind, ...] = ("api_key", "environment_key", "sessions_token")


def make_app(plane: ControlPlane) -> Starlette:
    """Return the API of a platform as an ASGI application."""
    api = _Api(plane)
    work = "/v1/environments/{environment_id}/work"
    session = "/v1/sessions/{session_id}"
    skill = "/v1/skills/{skill_id}/versions/{version}"
    store = "/v1/memory_stores/{store_id}"
    routes: list[tuple[str, str, Callable[[Request], Awaitable[Response]]]] = [
        ("GET", f"{work}/poll", api.poll),
        ("GET", f"{work}/stats", api.stats),
        ("GET", work, api.list_work),
        ("GET", f"{work}/{{work_id}}", api.retrieve_work),
        ("POST", f"{work}/{{work_id}}", api.update_work),
        ("POST", f"{work}/{{work_id}}/ack", api.ack),
        ("POST", f"{work}/{{work_id}}/heartbeat", api.heartbeat),
        ("POST", f"{work}/{{work_id}}/stop", api.stop),
        ("POST", "/v1/sessions", api.create_session),
        ("GET", session, api.retrieve_session),
        ("POST", session, api.update_session),
        ("DELETE", session, api.delete_session),
        ("POST", f"{session}/archive", api.archive_session),
        ("GET", f"{session}/events", api.list_events),
        ("POST", f"{session}/events", api.send_events),
        ("GET", f"{session}/events/stream", api.stream_events),
        ("GET", skill, api.retrieve_skill),
        ("GET", f"{skill}/content", api.download_skill),
        ("GET", store, api.retrieve_store),
        ("GET", f"{store}/memories", api.list_memories),
        ("GET", f"{store}/memories/{{memory_id}}", api.retrieve_memory),
    ]
    return Starlette(
        routes=[Route(path, endpoint, methods=[method]) for method, path, endpoint in routes],
        exception_handlers={ApiError: _api_error, HTTPException: _http_error, ClientDisconnect: _disconnected},
    )


class _Api:
    def __init__(self, plane: ControlPlane) -> None:
        self._plane = plane

    # The work queue ------------------------------------------------------------------------------------------------

    async def poll(self, request: Request) -> Response:
        environment = self._environment(request, "environment_key")
        block_ms = _integer(request, "block_ms", low=1, high=999)
        reclaim_ms = _integer(request, "reclaim_older_than_ms", low=0)
        item = await environment.queue.poll(
            block=None if block_ms is None else block_ms / 1000,
            reclaim=None if reclaim_ms is None else reclaim_ms / 1000,
            worker_id=request.headers.get("anthropic-worker-id"),
        )
        if item is None:
            return JSONResponse(None)
        secret = None
        if item.has_secret:
            secret = self._plane.credentials.new_secret(environment.id, str(item.data["id"]))
        return JSONResponse(item.to_json(secret=secret))

    async def ack(self, request: Request) -> Response:
        environment = self._environment(request, "environment_key")
        return JSONResponse(environment.queue.ack(request.path_params["work_id"]).to_json())

    async def heartbeat(self, request: Request) -> Response:
        environment = self._environment(request, "environment_key", "sessions_token")
        desired = _integer(request, "desired_ttl_seconds", low=1)
        return JSONResponse(
            environment.queue.heartbeat(
                request.path_params["work_id"],
                expected=request.query_params.get("expected_last_heartbeat"),
                ttl=desired if self._plane.grants_ttl else None,
            )
        )

    async def stop(self, request: Request) -> Response:
        environment = self._environment(request, *_ALL)
        force = (await _body(request, optional=True)).get("force", False)
        if not isinstance(force, bool):
            raise ApiError(400, "force: must be a boolean")
        return JSONResponse(environment.queue.stop(request.path_params["work_id"], force=force).to_json())

    async def stats(self, request: Request) -> Response:
        return JSONResponse(self._environment(request, "environment_key", "api_key").queue.stats())

    async def list_work(self, request: Request) -> Response:
        items = self._environment(request, "environment_key").queue.items
        limit = _integer(request, "limit", low=1, high=1000) or 20
        start = decode_cursor(request.query_params["page"]) if "page" in request.query_params else 0
        more = start + limit < len(items)
        return JSONResponse(
            {
                "data": [item.to_json() for item in items[start : start + limit]],
                "next_page": encode_cursor(start + limit) if more else None,
            }
        )

    async def retrieve_work(self, request: Request) -> Response:
        environment = self._environment(request, "api_key")
        return JSONResponse(environment.queue.get(request.path_params["work_id"]).to_json())

    async def update_work(self, request: Request) -> Response:
        environment = self._environment(request, "api_key")
        patch = (await _body(request)).get("metadata")
        if not isinstance(patch, dict):
            raise ApiError(400, "metadata: must be an object")
        check_metadata({key: value for key, value in patch.items() if value is not None})
        return JSONResponse(environment.queue.update_metadata(request.path_params["work_id"], patch).to_json())

    # Sessions ------------------------------------------------------------------------------------------------------

    async def create_session(self, request: Request) -> Response:
        _require_beta(request, {_BETA})
        self._plane.credentials.require(request.headers, "api_key")
        body = await _body(request)
        environment = self._plane.environments.get(str(body.get("environment_id")))
        if environment is None:
            raise ApiError(404, "environment not found")
        if self._plane.default_brain is None:
            raise ApiError(400, "this platform has no agent for sessions made over HTTP: give it a default_brain")
        session = environment.create_session(
            self._plane.default_brain, metadata=body.get("metadata") or {}, title=body.get("title")
        )
        if body.get("initial_events"):
            receive(session, body["initial_events"])
        return JSONResponse(session.to_json())

    async def retrieve_session(self, request: Request) -> Response:
        return JSONResponse(self._session(request, *_ALL).to_json())

    async def update_session(self, request: Request) -> Response:
        session = self._session(request, "api_key")
        body = await _body(request)
        agent = body.get("agent") or {}
        if "vault_ids" in body:
            raise ApiError(400, "vault_ids: not supported yet")
        if set(agent) - {"tools", "mcp_servers"}:
            raise ApiError(400, "agent: only tools and mcp_servers can be updated")
        session.update(tools=agent.get("tools"), metadata=body.get("metadata"), title=body.get("title"))
        return JSONResponse(session.to_json())

    async def delete_session(self, request: Request) -> Response:
        session = self._session(request, "api_key")
        if session.status == "running":
            raise ApiError(400, "a running session cannot be deleted: interrupt it first")
        session.delete()
        return JSONResponse({"id": session.id, "type": "session_deleted"})

    async def archive_session(self, request: Request) -> Response:
        session = self._session(request, "api_key")
        if session.status == "running":
            raise ApiError(400, "a running session cannot be archived: interrupt it first")
        session.terminate(archive=True)
        return JSONResponse(session.to_json())

    async def list_events(self, request: Request) -> Response:
        session = self._session(request, *_ALL)
        return JSONResponse(session.log.page(request.query_params, request.query_params.getlist("types[]")))

    async def send_events(self, request: Request) -> Response:
        session = self._session(request, *_ALL)
        events = (await _body(request)).get("events")
        if not isinstance(events, list):
            raise ApiError(400, "events: must be a list")
        if session.deleted:
            raise ApiError(404, f"session {session.id} not found")
        return JSONResponse({"data": receive(session, events)})

    async def stream_events(self, request: Request) -> Response:
        session = self._session(request, *_ALL)
        if self._plane.closing.is_set():
            raise ApiError(503, "the platform is shutting down")
        subscription = session.log.subscribe()
        return StreamingResponse(
            self._frames(request, session, subscription),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    async def _frames(self, request: Request, session: Session, subscription: Subscription) -> AsyncIterator[bytes]:
        fault: Fault | None = request.scope.get(FAULT)
        left = None if fault is None else fault.drop_after
        try:
            while left is None or left > 0:
                try:
                    event = await subscription.receive(timeout=_PING_EVERY)
                except anyio.EndOfStream:
                    break
                if event is None:
                    yield b'event: ping\ndata: {"type": "ping"}\n\n'
                    continue
                left = None if left is None else left - 1
                yield f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()
            if subscription.cut or left == 0:
                self._plane.server.cut(request.scope)
        finally:
            session.log.unsubscribe(subscription)

    # Skills and memory ---------------------------------------------------------------------------------------------

    async def retrieve_skill(self, request: Request) -> Response:
        self._plane.credentials.require(request.headers, "environment_key", "api_key")
        skill = self._plane.skills.get(request.path_params["skill_id"])
        if skill is None or request.path_params["version"] not in ("latest", skill.version_id):
            raise ApiError(404, "skill version not found")
        return JSONResponse(skill.to_json())

    async def download_skill(self, request: Request) -> Response:
        self._plane.credentials.require(request.headers, "environment_key", "api_key")
        skill = self._plane.skills.get(request.path_params["skill_id"])
        # Only the other endpoint resolves "latest".
        if skill is None or request.path_params["version"] != skill.version_id:
            raise ApiError(404, "skill version not found")
        return Response(
            skill.archive,
            media_type="application/zip",
            headers={"content-disposition": f'attachment; filename="{skill.name}.zip"'},
        )

    async def retrieve_store(self, request: Request) -> Response:
        return JSONResponse(self._store(request).to_json())

    async def list_memories(self, request: Request) -> Response:
        return JSONResponse(self._store(request).page(request.query_params))

    async def retrieve_memory(self, request: Request) -> Response:
        return JSONResponse(self._store(request).memory(request.path_params["memory_id"]))

    # Who may -------------------------------------------------------------------------------------------------------

    def _environment(self, request: Request, *kinds: CredentialKind) -> Environment:
        _require_beta(request, {_BETA})
        who = self._plane.credentials.require(request.headers, *kinds)
        environment_id = request.path_params["environment_id"]
        if who.environment_id not in (None, environment_id):
            raise ApiError(401, "the credential belongs to another environment")
        if who.session_id not in (None, request.path_params.get("work_id")):
            raise ApiError(403, "the credential belongs to another work item")
        environment = self._plane.environments.get(environment_id)
        if environment is None:
            raise ApiError(404, f"environment {environment_id} not found")
        return environment

    def _session(self, request: Request, *kinds: CredentialKind) -> Session:
        _require_beta(request, {_BETA})
        who = self._plane.credentials.require(request.headers, *kinds)
        session_id = request.path_params["session_id"]
        if who.session_id not in (None, session_id):
            raise ApiError(403, "the credential belongs to another session")
        session = self._plane.sessions.get(session_id)
        if session is None or session.deleted or who.environment_id not in (None, session.environment.id):
            raise ApiError(404, f"session {session_id} not found")
        return session

    def _store(self, request: Request) -> MemoryStore:
        _require_beta(request, _MEMORY_BETAS)
        who = self._plane.credentials.require(request.headers, "sessions_token", "api_key")
        store = self._plane.memory_stores.get(request.path_params["store_id"])
        session = self._plane.sessions.get(who.session_id or "")
        attached = (
            session is None
            or store is None
            or any(resource.get("memory_store_id") == store.id for resource in session.resources)
        )
        if store is None or not attached:
            raise ApiError(404, "memory store not found")
        return store


def _require_beta(request: Request, betas: set[str]) -> None:
    if not request.headers.get("anthropic-version"):
        raise ApiError(400, "anthropic-version: header is required")
    sent = {beta.strip() for value in request.headers.getlist("anthropic-beta") for beta in value.split(",")}
    if not sent & betas:
        raise ApiError(400, f"this endpoint is in beta: send anthropic-beta: {min(betas)}")


def _integer(request: Request, name: str, *, low: int, high: int | None = None) -> int | None:
    value = request.query_params.get(name)
    if value is None:
        return None
    if not value.isdecimal() or int(value) < low or (high is not None and int(value) > high):
        raise ApiError(400, f"{name}: must be from {low}" + ("" if high is None else f" to {high}"))
    return int(value)


async def _body(request: Request, *, optional: bool = False) -> Json:
    """Return the JSON object in the body. What is beyond the limit is read and dropped, so that 413 can be answered."""
    data, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        if size <= _MAX_BODY:
            data += chunk
    if size > _MAX_BODY:
        raise ApiError(413, "request exceeds the maximum size of 32 MB")
    if optional and not data:
        return {}
    try:
        body = json.loads(data)
    except (ValueError, UnicodeDecodeError):
        body = None
    if not isinstance(body, dict):
        raise ApiError(400, "the request body is not a JSON object")
    return cast("Json", body)


async def _api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return JSONResponse(error.body(), status_code=error.status)


async def _http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse(ApiError(error.status_code, error.detail).body(), status_code=error.status_code)


async def _disconnected(_: Request, __: Exception) -> Response:
    return Response(status_code=499)
