"""Every refusal and every crash as one kind of answer: RFC 9457 problem+json with a stable code, and nothing of what was sent.

In: exceptions. Out: responses. `Guard` stands before the application: it bounds bodies, turns a crash into a plain 500, and tells
`Seen` of every request, by its route and never by its path, which may hold ids.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tandem.core import errors
from tandem.service.schemas import FieldProblem, ProblemAnswer, field_problems

log = logging.getLogger("tandem.service")

MEDIA: Final = "application/problem+json"
_PATIENCE: Final = 16
"""A body is read, and thrown away, up to this many times the limit: a client that is still writing would not see the answer."""

PROBES: Final = ("/healthz", "/readyz", "/metrics")
"""Routes that machines ask all the time: they are counted, and logged only when they fail."""


@dataclass(frozen=True)
class Kind:
    """What a class of problem is called. `code` is part of the interface."""

    status: int
    code: str
    title: str
    detail: str


INVALID: Final = Kind(422, "invalid_request", "Invalid request", "A field is missing, unknown or out of range; see `fields`.")
MALFORMED: Final = Kind(400, "malformed_body", "Malformed body", "The body is not JSON text in UTF-8, or is nested too deeply.")
TOO_LARGE: Final = Kind(413, "body_too_large", "Body too large", "The body is larger than this service takes.")
NO_KEY: Final = Kind(
    401, "key_required", "API key required", "Send an API key: `Authorization: Bearer <key>` or `X-API-Key: <key>`."
)
BAD_KEY: Final = Kind(403, "key_refused", "API key refused", "This API key is not one of the service's.")
BAD_HOST: Final = Kind(
    400, "host_refused", "Host refused", "The service does not answer under this host name; see `allowed_hosts`."
)
CRASHED: Final = Kind(500, "internal_error", "Internal error", "The service failed; the log has the place under this request_id.")
STARTING: Final = Kind(503, "not_ready", "Not ready", "No release is loaded yet.")
TOO_MANY: Final = Kind(429, "too_many_requests", "Too many requests", "This caller asks more often than the service allows.")
OVERLOADED: Final = Kind(503, "overloaded", "Overloaded", "More requests are waiting than the service can answer in time.")

_TREE: Final[tuple[tuple[type[errors.TandemError], Kind], ...]] = (
    (errors.InputError, INVALID),
    (errors.NotFoundError, Kind(404, "not_found", "Not found", "The thing that was named does not exist.")),
    (errors.BusyError, Kind(409, "busy", "Busy", "Another run holds the thing; try again later.")),
    (errors.ConflictError, Kind(409, "conflict", "Conflict", "The world moved on since you looked; look again.")),
    (errors.GateRefusedError, Kind(409, "gate_refused", "Gate refused", "A gate said no.")),
    (
        errors.IntegrityError,
        Kind(503, "release_damaged", "Release damaged", "The release on disk is damaged and was not loaded."),
    ),
    (errors.IncompatibleError, Kind(503, "release_incompatible", "Release incompatible", "The parts do not belong together.")),
    (errors.UnavailableError, Kind(503, "unavailable", "Unavailable", "A service that is needed does not answer.")),
)
_STATUSES: Final[Mapping[int, Kind]] = {
    400: MALFORMED,
    404: Kind(404, "no_such_route", "No such route", "See /openapi.json for what there is."),
    405: Kind(405, "method_not_allowed", "Method not allowed", "See /openapi.json for what there is."),
}


class Refused(errors.TandemError):
    """A request that this service turns down by a `Kind` of its own."""

    def __init__(self, kind: Kind, fields: Sequence[FieldProblem] = (), headers: Mapping[str, str] | None = None) -> None:
        super().__init__(kind.title)
        self.kind = kind
        self.fields = tuple(fields)
        self.headers = headers


def kind_of(error: errors.TandemError) -> Kind:
    """The kind of problem that an error is; the error's own message stays inside, for it names values."""
    if isinstance(error, Refused):
        return error.kind
    return next((kind for known, kind in _TREE if isinstance(error, known)), CRASHED)


def problem(
    kind: Kind, request_id: str, fields: Sequence[FieldProblem] = (), headers: Mapping[str, str] | None = None
) -> Response:
    """The answer for one kind of problem."""
    body = ProblemAnswer(
        title=kind.title,
        status=kind.status,
        code=kind.code,
        detail=kind.detail,
        request_id=request_id,
        fields=tuple(fields) or None,
    )
    return Response(body.model_dump_json(exclude_none=True), kind.status, dict(headers or {}), MEDIA)


def install(app: FastAPI) -> None:
    """Answer our errors, FastAPI's and Starlette's in one form."""

    @app.exception_handler(errors.TandemError)
    async def _ours(request: Request, error: errors.TandemError) -> Response:
        kind = kind_of(error)
        if kind.status >= 500:
            log_failure(error, request_id_of(request.scope))
        refused = error if isinstance(error, Refused) else None
        return problem(
            kind, request_id_of(request.scope), refused.fields if refused else (), refused.headers if refused else None
        )

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        broken = any(each["type"] == "json_invalid" for each in error.errors())
        kind = MALFORMED if broken else INVALID
        return problem(kind, request_id_of(request.scope), field_problems(error.errors()))

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        kind = _STATUSES.get(error.status_code, Kind(error.status_code, "refused", "Refused", "The request cannot be answered."))
        return problem(kind, request_id_of(request.scope), headers=error.headers)


def request_id_of(scope: Scope) -> str:
    """The id that `Guard` gave to this HTTP request."""
    return str(scope["state"]["request_id"])


def deadline(scope: Scope, budget_ms: float) -> float:
    """When a request's budget is spent, on `time.perf_counter`: waiting for a thread counts, too."""
    return float(scope["state"]["started"]) + budget_ms / 1000


def log_line(event: str, **fields: Any) -> None:
    """One JSON object per line. Never put ids of users, queries or messages of exceptions into it."""
    log.info(json.dumps({"event": event, **fields}))


def log_failure(error: BaseException, request_id: str) -> None:
    """Where it failed and with which class; not its message, which may repeat what was sent."""
    frames = [
        f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno} {frame.name}" for frame in traceback.extract_tb(error.__traceback__)
    ]
    log.error(json.dumps({"event": "failure", "error": type(error).__name__, "request_id": request_id, "where": frames[-8:]}))


Seen = Callable[[str, int, float], None]
"""Told of every request: its route's template, its status, and the seconds it took."""


class Guard:
    """ASGI middleware: gives every request an id, bounds its body to `limit` bytes, and answers a crash with a plain 500."""

    def __init__(self, app: ASGIApp, limit: int, seen: Seen) -> None:
        self.app = app
        self.limit = limit
        self.seen = seen

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = uuid.uuid4().hex
        started = time.perf_counter()
        scope.setdefault("state", {}).update(request_id=request_id, started=started)
        watched = _Watched(send, request_id)
        try:
            await self._answer(scope, receive, watched)
        except Exception as error:
            log_failure(error, request_id)
            if not watched.status:
                await problem(CRASHED, request_id)(scope, receive, watched)
        took = time.perf_counter() - started
        route = getattr(scope.get("route"), "path", "unmatched")
        self.seen(route, watched.status, took)
        if watched.status >= 400 or not route.endswith(PROBES):
            log_line("request", route=route, status=watched.status, ms=round(took * 1000, 1), request_id=request_id)

    async def _answer(self, scope: Scope, receive: Receive, send: _Watched) -> None:
        body = await self._body(scope, receive)
        if body is None:
            await problem(TOO_LARGE, request_id_of(scope), headers={"connection": "close"})(scope, receive, send)
        else:
            await self.app(scope, _replay(body, receive), send)

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        """The whole body, or None when it is larger than the limit."""
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit() or int(declared[:20]) > self.limit * _PATIENCE:
            return None
        chunks, size, more = [], 0, True
        while more and size <= self.limit * _PATIENCE:
            message = await receive()
            chunk = message.get("body", b"")
            size += len(chunk)
            more = message.get("more_body", False)
            if size <= self.limit:
                chunks.append(chunk)
        return b"".join(chunks) if size <= self.limit else None


class _Watched:
    """`send` that remembers the status and adds the request's id."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._request_id = request_id
        self.status = 0

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), (b"x-request-id", self._request_id.encode())]
        await self._send(message)


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body that was read, then what comes after it."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return waiting.pop() if waiting else await receive()

    return again
