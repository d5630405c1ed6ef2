"""The HTTP service: parse, call, serialise. What is computed is computed by the recommender, in threads of its own.

In: settings and, for tests and embedding, an open recommender. Out: a FastAPI application.

    GET  /                                     a page to try it
    POST /v1/recommend  /v1/similar            slates
    POST /v1/retrieve  /v1/rank                candidates before any ranking, the ranker alone: `*_routes.py`
    PUT, DELETE /v1/items/ID                   single items: `item_routes.py`
    GET  /v1/why  /v1/releases  /v1/metrics    what happened to an item, what is there, Prometheus
    GET  /v1/healthz  /v1/readyz               open to everybody: the process runs; it takes requests

Readiness goes off first at SIGTERM; the port stays open for `DRAIN_SECONDS` more, so that nobody is sent to a closed door.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import re
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, Final, Literal

import polars as pl
from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi import Path as PathParameter
from fastapi.responses import HTMLResponse, JSONResponse, Response
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.concurrency import run_in_threadpool
from starlette.types import Scope

from feature_repo.erase import erase_user
from feature_repo.live import OPTIONAL, EventGate
from tandem.core.errors import InputError
from tandem.core.schema import EVENTS
from tandem.service.asking import AskBody
from tandem.service.body import Id
from tandem.service.filter_schemas import FiltersBody
from tandem.service.follow import Follower
from tandem.service.history import changes
from tandem.service.limits import Crowd, Rates
from tandem.service.live_traffic import LiveTraffic
from tandem.service.problems import (
    BAD_HOST,
    BAD_KEY,
    INVALID,
    NO_KEY,
    STARTING,
    TOO_MANY,
    Guard,
    Refused,
    deadline,
    install,
    log_line,
    request_id_of,
)
from tandem.service.recommend import Recommender
from tandem.service.retrieve import Retrieved
from tandem.service.rollout import Rollout
from tandem.service.schemas import (
    ErasedAnswer,
    EventsAnswer,
    EventsBody,
    FieldProblem,
    HealthAnswer,
    ProblemAnswer,
    RecommendBody,
    RefusedEvent,
    ReleaseAnswer,
    ReleasesAnswer,
    SimilarBody,
    SlateAnswer,
    WhyAnswer,
)
from tandem.service.settings import Settings
from tandem.service.slate import Ask, Slate
from tandem.service.watcher import Watcher

DRAIN_SECONDS: Final = 1.0
_LAST_REQUEST_S: Final = 30.0
_LOCAL_NAMES: Final = ("127.0.0.1", "localhost", "::1")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_HOST: Final = re.compile(r"(?:(?P<name>[a-z0-9._-]+)|\[(?P<six>[0-9a-f:.]+)\])(?::[0-9]{1,5})?")
_PAGE: Final = Path(__file__).with_name("page.html")
_RELEASES: Final = Path(__file__).with_name("releases.html")
_PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)
_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.035, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)

Phase = Literal["starting", "ready", "draining"]


class Metrics:
    """What Prometheus reads. Labels are routes, stages and reasons: never ids."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("tandem_requests", "Requests answered", ["route", "status"], registry=self.registry)
        self.seconds = Histogram("tandem_request_seconds", "Whole request", ["route"], registry=self.registry, buckets=_BUCKETS)
        self.stages = Histogram(
            "tandem_stage_seconds", "One stage of a slate", ["stage"], registry=self.registry, buckets=_BUCKETS
        )
        self.degraded = Counter("tandem_degraded", "Slates that fell back", ["reason"], registry=self.registry)
        self.release = Gauge("tandem_release_info", "1 for the release that answers", ["release"], registry=self.registry)
        self.features_age = Gauge("tandem_features_age_seconds", "Age of the item features in use", registry=self.registry)
        self.features_old = Gauge(
            "tandem_features_old", "1 while the item features are older than checks.freshness", registry=self.registry
        )
        self.rows_dropped = Counter("tandem_served_rows_dropped", "Served-log rows given up", registry=self.registry)
        self.arms = Counter(
            "tandem_arm_requests", "Requests in an experiment", ["experiment", "arm", "outcome"], registry=self.registry
        )
        self.ready = Gauge("tandem_ready", "1 while the service takes requests", registry=self.registry)

    def request(self, route: str, status: int, seconds: float) -> None:
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def arm(self, experiment: str, arm: str, outcome: str) -> None:
        self.arms.labels(experiment, arm, outcome).inc()

    def slate(self, slate: Slate | Retrieved) -> None:
        for stage, milliseconds in slate.took_ms.items():
            self.stages.labels(stage).observe(milliseconds / 1000)
        for reason in slate.degraded:
            self.degraded.labels(reason).inc()


class Service:
    """What the routes share: settings, the recommender once it is open, metrics, and whether to send requests here."""

    def __init__(self, settings: Settings, recommender: Recommender | None, follow: bool) -> None:
        self.settings = settings
        self._retired: dict[Recommender, threading.Timer] = {}
        self._dropped = self._dropped_before = 0
        self.metrics = Metrics()
        self.rates = Rates(settings.service.rate, settings.service.rate_store)
        traffic = LiveTraffic()
        self.rollout = Rollout(traffic, self.metrics.arm)
        every_s, adopt = settings.service.follow_seconds, self.rollout.adopt
        self._follower = Follower(settings, lambda: self.release, self.swap, every_s, adopt) if follow else None
        self._watcher = Watcher(settings, self.rollout, traffic, lambda: self.release, self.retire) if follow else None
        self.phase: Phase = "starting"
        self._recommender = recommender
        self._opened_here = recommender is None

    @property
    def recommender(self) -> Recommender:
        if self._recommender is None:
            raise Refused(STARTING)
        return self._recommender

    @cached_property
    def gate(self) -> EventGate:
        """Where events come in; opened with the first one."""
        return EventGate(self.settings.workspace, self.settings.features, self.settings.events)

    @property
    def release(self) -> str | None:
        return self._recommender.release if self._recommender else None

    @property
    def features_as_of(self) -> datetime | None:
        return self._recommender.features_as_of if self._recommender else None

    @property
    def features_are_old(self) -> bool:
        """Are the item features in use older than the soft limit, by the clock that requests are answered by?"""
        age = self._recommender.features_age if self._recommender else None
        return age is not None and age > self.settings.checks.freshness.fresh

    def count_dropped(self) -> None:
        """Bring the counter of rows that the served-logs gave up to what it is now."""
        answering = [each for each in (self._recommender, self.rollout.challenger, *self._retired) if each is not None]
        dropped = self._dropped_before + sum(each.rows_dropped for each in answering)
        self.metrics.rows_dropped.inc(dropped - self._dropped)
        self._dropped = dropped

    def open(self) -> None:
        """Load the champion unless a recommender was given, warm it up, and go ready."""
        if self._recommender is None:
            from tandem.service.wiring import open_recommender

            self._recommender = open_recommender(self.settings)
        self._recommender.warm()
        self.metrics.release.labels(self._recommender.release).set(1)
        self.turn("ready")
        for following in (self._follower, self._watcher):
            if following is not None:
                following.start()

    def swap(self, recommender: Recommender) -> None:
        """Let another release answer from the next request on; the old one is closed when its last request must be over."""
        old, self._recommender, self._opened_here = self.recommender, recommender, True
        self.metrics.release.labels(old.release).set(0)
        self.metrics.release.labels(recommender.release).set(1)
        log_line("release_swapped", release=recommender.release, before=old.release)
        self.retire(old)

    def retire(self, old: Recommender) -> None:
        """Close a release that answers no more, when its last request must be over."""
        closing = self._retired[old] = threading.Timer(_LAST_REQUEST_S, self._let_go, (old,))
        closing.daemon = True
        closing.start()

    def _let_go(self, old: Recommender) -> None:
        """Close a release that answered before, and give its memory back."""
        old.close()
        self._dropped_before += old.rows_dropped
        self._retired.pop(old, None)

    def turn(self, phase: Phase) -> None:
        if phase == self.phase:
            return
        self.phase = phase
        self.metrics.ready.set(phase == "ready")
        log_line(phase, release=self.release)

    def close(self) -> None:
        self.turn("draining")
        if self._recommender is not None:
            for following in (self._follower, self._watcher):
                if following is not None:
                    following.stop()
        challenger = self.rollout.close()
        if challenger is not None:
            challenger.close()
            self._dropped_before += challenger.rows_dropped
        for old, closing in list(self._retired.items()):
            closing.cancel()
            self._let_go(old)
        if self._opened_here and self._recommender is not None:
            self._recommender.close()

    def asked(self, body: AskBody, scope: Scope) -> Ask:
        """The question of a request, with the time until which stages are begun."""
        return replace(body.ask(request_id_of(scope)), deadline=deadline(scope, self.settings.service.budget_ms))

    def checked(self, k: int, filters: FiltersBody) -> int:
        """`k`, refused above the service's limit, as are filters by what the release's items do not have."""
        if filters.attributes or filters.ranges:
            self._check(filters)
        limit = self.settings.service.max_k
        if k > limit:
            too_many = FieldProblem(
                field="body.k", reason="less_than_equal", message=f"Input should be less than or equal to {limit}"
            )
            raise Refused(INVALID, [too_many])
        return k

    def _check(self, filters: FiltersBody) -> None:
        try:
            self.recommender.check(filters.filters())
        except InputError:
            known = ", ".join(f"{name} ({kind})" for name, kind in self.recommender.attributes.items()) or "none"
            message = f"Attributes and ranges must fit what items have: {known}"
            raise Refused(INVALID, [FieldProblem(field="body.filters", reason="attribute", message=message)]) from None


def service_of(request: Request) -> Service:
    """The service that a request came to."""
    service: Service = request.app.state.service
    return service


Here = Annotated[Service, Depends(service_of)]


def known_host(request: Request, service: Here) -> None:
    """Refuse host names that are not ours: a web page may point its own name at a loopback address."""
    allowed = allowed_hosts(service.settings)
    parsed = _HOST.fullmatch(request.headers.get("host", "").lower())
    name = (parsed["name"] or parsed["six"]) if parsed else ""
    if "*" not in allowed and not any(name == host or (host.startswith("*.") and name.endswith(host[1:])) for host in allowed):
        raise Refused(BAD_HOST)


Bearer = Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))]
Header = Annotated[str | None, Depends(APIKeyHeader(name="X-API-Key", auto_error=False))]


def key_given(request: Request, service: Here, bearer: Bearer, header: Header) -> str:
    """Who asks: the hash of their key, or their address where the service has no keys.

    Refuses a request without one of the service's keys, where it has some. Compared as hashes, in constant time.
    """
    hashes = service.settings.service.keys
    if not hashes:
        return request.client.host if request.client else ""
    key = bearer.credentials if bearer else header
    if not key:
        raise Refused(NO_KEY, headers={"www-authenticate": "Bearer"})
    given = hashlib.sha256(key.encode("latin-1")).hexdigest()  # the header's own bytes
    if not sum(hmac.compare_digest(given, each.lower()) for each in hashes):
        raise Refused(BAD_KEY)
    return given


def within_rate(service: Here, caller: Annotated[str, Depends(key_given)]) -> None:
    """Refuse a caller who asks more often than `service.rate`."""
    wait = service.rates.wait(caller)
    if wait is not None:
        raise Refused(TOO_MANY, headers={"retry-after": str(wait)})


_EVENT: Final = {name: EVENTS[name] for name in ("user_id", "item_id", "action", "timestamp", *OPTIONAL) if name != "propensity"}
PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ProblemAnswer} for status in (401, 403, 404, 413, 422, 429, 503)
}
open_routes = APIRouter(tags=["health"])
routes = APIRouter(prefix="/v1", dependencies=[Depends(within_rate)], responses=PROBLEMS)


@open_routes.get("/", include_in_schema=False)
def page() -> HTMLResponse:
    """A page to try the service by hand."""
    return HTMLResponse(_PAGE.read_text(encoding="utf-8"), headers={"content-security-policy": _PAGE_POLICY})


@open_routes.get("/releases", include_in_schema=False)
def releases_page() -> HTMLResponse:
    """A page that says what was live when, on which data, and why."""
    return HTMLResponse(_RELEASES.read_text(encoding="utf-8"), headers={"content-security-policy": _PAGE_POLICY})


@open_routes.get("/healthz", include_in_schema=False)
@open_routes.get("/v1/healthz")
async def healthz(service: Here) -> HealthAnswer:
    """The process runs."""
    return HealthAnswer(status="ok", release=service.release)


@open_routes.get("/readyz", include_in_schema=False, response_model=HealthAnswer)
@open_routes.get("/v1/readyz", response_model=HealthAnswer, responses={503: {"model": HealthAnswer}})
async def readyz(service: Here) -> Response:
    """200 while requests should be sent here, 503 while it starts or drains."""
    answer = HealthAnswer(status=service.phase, release=service.release)
    return JSONResponse(answer.model_dump(), 200 if service.phase == "ready" else 503)


@routes.post("/recommend")
def recommend(body: RecommendBody, request: Request, service: Here) -> SlateAnswer:
    """A slate for any mix of user, session and sentence."""
    service.checked(body.k, body.filters)
    ask = service.asked(body, request.scope)
    placed = service.rollout.recommend(service.recommender, ask)
    service.metrics.slate(placed.slate)
    return SlateAnswer.of(placed.slate, placed.experiment, placed.arm)


@routes.post("/similar")
def similar(body: SimilarBody, service: Here) -> SlateAnswer:
    """Items like one item."""
    slate = service.recommender.similar(body.item_id, service.checked(body.k, body.filters), body.filters.filters())
    service.metrics.slate(slate)
    return SlateAnswer.of(slate)


@routes.post("/events")
def events(body: EventsBody, service: Here) -> EventsAnswer:
    """Take what users did: it is kept, and their next slate knows it."""
    now = datetime.now(UTC)
    context = [name for name in service.settings.features.context if any(name in each.context for each in body.events)]
    rows = [
        each.model_dump(exclude={"context"})
        | {"timestamp": each.timestamp or now}
        | {name: each.context.get(name) for name in context}
        for each in body.events
    ]
    done = service.gate.push(pl.DataFrame(rows, schema=_EVENT | dict.fromkeys(context, pl.String()), orient="row"), now)
    refused = tuple(RefusedEvent(index=row, reason=reason) for row, reason in done.refused.iter_rows())
    counts = {name: getattr(done, name) for name in ("received", "appended", "duplicates", "users", "items", "pending")}
    return EventsAnswer(refused=refused, **counts)


@routes.delete("/users/{user_id:path}")
def erase(user_id: Annotated[Id, PathParameter()], service: Here) -> ErasedAnswer:
    """Remove a user everywhere; from now on they are a stranger, and events of this id are not taken."""
    done = erase_user(service.settings.workspace, user_id)
    return ErasedAnswer(rows=sum(done.rows.values()), online=sum(done.online.values()), kept=done.kept)


@routes.get("/why")
def why(user_id: Annotated[Id, Query()], item_id: Annotated[Id, Query()], service: Here) -> WhyAnswer:
    """Which stage kept or dropped an item for a user."""
    return WhyAnswer.of(service.rollout.why(service.recommender, user_id, item_id))


@routes.get("/releases")
def releases(service: Here) -> ReleasesAnswer:
    """All releases, which one is the champion, and which one answers here."""
    from registry.store import ReleaseStore

    store = ReleaseStore(service.settings.registry_url, service.settings.releases)
    try:
        champion, known, history = store.champion().name, store.list(), changes(store)
    finally:
        store.close()
    rows = tuple(
        ReleaseAnswer(
            name=each.name, content_hash=each.content_hash, created_at=each.created_at.isoformat(), live=each.name == champion
        )
        for each in known
    )
    return ReleasesAnswer(serving=service.recommender.release, champion=champion, releases=rows, history=history)


@routes.get("/metrics", response_class=Response)
def metrics(service: Here) -> Response:
    """Prometheus text."""
    as_of = service.features_as_of
    if as_of is not None:
        service.metrics.features_age.set((datetime.now(UTC) - as_of).total_seconds())
        service.metrics.features_old.set(service.features_are_old)
    service.count_dropped()
    return Response(generate_latest(service.metrics.registry), media_type=CONTENT_TYPE_LATEST)


def create_app(settings: Settings, recommender: Recommender | None = None, *, follow: bool = False) -> FastAPI:
    """The application. Without a `recommender` it opens the champion at start, and closes it at the end.

    With `follow` a promotion or rollback takes effect every `service.follow_seconds`, between two requests.

    Raises InputError when a key is not a SHA-256 hash, or when there are no keys and `service.host` is not a loopback address.
    """
    from tandem.service import item_routes, rank_routes, retrieve_routes  # they share this module's dependencies

    check_keys(settings)
    app = FastAPI(title="Tandem", version="1", lifespan=_life, docs_url=None, redoc_url=None, dependencies=[Depends(known_host)])
    app.state.service = service = Service(settings, recommender, follow and settings.service.follow_seconds > 0)
    app.include_router(open_routes)
    app.include_router(routes)
    app.include_router(retrieve_routes.routes)
    app.include_router(rank_routes.routes)
    app.include_router(item_routes.routes)
    app.add_api_route("/metrics", metrics, include_in_schema=False, dependencies=[Depends(key_given)], response_class=Response)
    install(app)
    app.add_middleware(Crowd, most=settings.service.max_in_flight)
    app.add_middleware(Guard, limit=settings.service.max_body_bytes, seen=service.metrics.request)
    return app


def is_loopback(host: str) -> bool:
    """Does `host` name this machine only?"""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def check_keys(settings: Settings) -> None:
    """Raise InputError unless the keys are hashes and, beyond a loopback address, there is one."""
    for key in settings.service.keys:
        if not _SHA256.fullmatch(key.lower()):
            raise InputError(
                'service.keys holds something that is not a SHA-256 hash; write 64 hex digits: printf %s "$KEY" | sha256sum'
            )
    if not settings.service.keys and not is_loopback(settings.service.host):
        raise InputError(
            f"service.host = {settings.service.host!r} is open to others and service.keys is empty; "
            "add the hash of an API key, or bind to 127.0.0.1"
        )


def allowed_hosts(settings: Settings) -> tuple[str, ...]:
    """Host names answered to. Without keys, and unless settings name others, only this machine's own."""
    hosts = settings.service.allowed_hosts
    return _LOCAL_NAMES if not settings.service.keys and "*" in hosts else hosts


@asynccontextmanager
async def _life(app: FastAPI) -> AsyncIterator[None]:
    service: Service = app.state.service
    await run_in_threadpool(service.open)
    with _unready_at_sigterm(service):
        yield
    await run_in_threadpool(service.close)


@contextmanager
def _unready_at_sigterm(service: Service) -> Iterator[None]:
    """Stand before the server's own handler: readiness off now, its turn `DRAIN_SECONDS` later, or at a second signal."""
    stop = signal.getsignal(signal.SIGTERM)
    if threading.current_thread() is not threading.main_thread() or not callable(stop):
        yield
        return

    def drain(number: int, frame: FrameType | None) -> None:
        if service.phase == "draining":
            stop(number, frame)
            return
        service.turn("draining")
        threading.Timer(DRAIN_SECONDS, stop, (number, None)).start()

    signal.signal(signal.SIGTERM, drain)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, stop)
