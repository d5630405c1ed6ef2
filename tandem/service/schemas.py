"""What goes over HTTP: bodies in, answers out. Unknown fields are refused; ids and texts are checked here, once.

In: JSON. Out: `recommend.Ask` for the recommender, and answers made from its `Slate` and `Why`. No message repeats what was sent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Literal

from pydantic import AwareDatetime, BaseModel, Field, FiniteFloat, StrictInt

from tandem.service.asking import AskBody
from tandem.service.body import MAX_LIST, Body, Count, Id, Short
from tandem.service.filter_schemas import FiltersBody

if TYPE_CHECKING:
    from tandem.service.slate import Ask, Slate, Why


class RecommendBody(AskBody):
    """A slate for whoever asks."""

    k: Count = 10
    categories: tuple[Short, ...] = Field(default=(), max_length=MAX_LIST, description="only items of one of these categories")
    exclude: tuple[Id, ...] = Field(default=(), max_length=MAX_LIST, description="item ids that must not come")
    filters: FiltersBody = Field(default_factory=FiltersBody, description="beside `categories` and `exclude`")
    context: dict[Short, Short] = Field(default_factory=dict, max_length=32)

    def ask(self, request_id: str) -> Ask:
        """With how many, filters and context."""
        return replace(
            super().ask(request_id),
            k=self.k,
            categories=self.categories,
            exclude=self.exclude,
            filters=self.filters.filters(),
            context=self.context,
        )


class SimilarBody(Body):
    """Which items are like this one?"""

    item_id: Id
    k: Count = 10
    filters: FiltersBody = Field(default_factory=FiltersBody)


class EventBody(Body):
    """What a user did to an item. An `event_id` makes sending it twice harmless; without a `timestamp` it happened now."""

    user_id: Id
    item_id: Id
    action: Short
    value: FiniteFloat | None = None
    timestamp: AwareDatetime | None = None
    event_id: Id | None = None
    request_id: Id | None = Field(default=None, description="the slate's, where the event answers one")
    position: StrictInt | None = None
    context: dict[Short, Short] = Field(
        default_factory=dict, max_length=32, description="where it came from; what `[features] context` names is kept"
    )


class EventsBody(Body):
    """Events as they happen, in any order."""

    events: tuple[EventBody, ...] = Field(min_length=1, max_length=MAX_LIST)


class ErasedAnswer(BaseModel):
    """How many rows and online rows went; `kept` names evaluation files of releases, which go with these."""

    rows: int
    online: int
    kept: tuple[str, ...]


class RefusedEvent(BaseModel):
    """Why one event of the request was not taken; `index` counts from 0."""

    index: int
    reason: str


class EventsAnswer(BaseModel):
    """What became of the events. `pending`: they are kept, and their features follow, since these are being rebuilt."""

    received: int
    appended: int
    duplicates: int
    refused: tuple[RefusedEvent, ...]
    users: int
    items: int
    pending: bool


class ItemAnswer(BaseModel):
    """One item of a slate. `predictions` are calibrated probabilities by task; `propensity` is that of showing it here."""

    item_id: str
    title: str
    categories: tuple[str, ...]
    score: float | None
    predictions: dict[str, float | None]
    reason: str
    reason_code: str
    source: str
    position: int
    propensity: float | None


class SlateAnswer(BaseModel):
    """The ordered answer. `degraded` names what fell back, `took_ms` the milliseconds of every stage and in total.

    `experiment` and `arm` say in which arm of an open experiment the answer is, if in any.
    """

    items: tuple[ItemAnswer, ...]
    returned: int
    release: str
    request_id: str
    degraded: tuple[str, ...]
    took_ms: dict[str, float]
    cold_start: bool
    truncated: bool
    experiment: str | None = None
    arm: Literal["champion", "challenger"] | None = None

    @classmethod
    def of(cls, slate: Slate, experiment: str | None = None, arm: str | None = None) -> SlateAnswer:
        return cls.model_validate({**asdict(slate), "returned": len(slate.items), "experiment": experiment, "arm": arm})


class StageAnswer(BaseModel):
    """What one stage did with the item."""

    stage: str
    what: str
    rank: int | None
    score: float | None


class WhyAnswer(BaseModel):
    """Which stage kept or dropped the item for this user, at what rank and score."""

    user_id: str
    item_id: str
    title: str
    verdict: str
    stages: tuple[StageAnswer, ...]
    features: dict[str, float | None] = Field(default_factory=dict, description="what the ranker knew, null where missing")

    @classmethod
    def of(cls, why: Why) -> WhyAnswer:
        stages = [dict(zip(("stage", "what", "rank", "score"), stage, strict=True)) for stage in why.stages]
        return cls.model_validate({**asdict(why), "stages": stages})


class ReleaseAnswer(BaseModel):
    """A release that the registry knows."""

    name: str
    content_hash: str
    created_at: str
    live: bool


class ChangeAnswer(BaseModel):
    """One change of champion: live from `at` to `until` (null: still), with what the gates said, the data and the figures."""

    at: str
    until: str | None
    kind: str
    name: str
    previous: str | None
    who: str
    why: str
    gate: tuple[str, ...]
    window: dict[str, str]
    figures: dict[str, float]


class ReleasesAnswer(BaseModel):
    """All releases and all changes of champion, oldest first; `serving` is the one that answers here."""

    serving: str
    champion: str | None
    releases: tuple[ReleaseAnswer, ...]
    history: tuple[ChangeAnswer, ...]


class HealthAnswer(BaseModel):
    """`ok`: the process runs. `ready`: it takes requests. `draining`: it finishes what it has and stops."""

    status: Literal["ok", "ready", "draining", "starting"]
    release: str | None = None


class FieldProblem(BaseModel):
    """Which field was refused, and why; never what it held."""

    field: str
    reason: str
    message: str


class ProblemAnswer(BaseModel):
    """An RFC 9457 problem. `code` is stable; programs may rely on it."""

    type: str = "about:blank"
    title: str
    status: int
    code: str
    detail: str
    request_id: str | None = None
    fields: tuple[FieldProblem, ...] | None = None


def known_fields() -> frozenset[str]:
    """Names that may appear in a problem's `field`: ours, never the caller's."""
    bodies = {name for body in _bodies(Body) for name in body.model_fields}
    return frozenset({"body", "query", "path", *bodies, *WhyAnswer.model_fields})


def _bodies(kind: type[Body]) -> Iterator[type[Body]]:
    for body in kind.__subclasses__():
        yield body
        yield from _bodies(body)


def field_problems(errors: Sequence[Any]) -> tuple[FieldProblem, ...]:
    """Pydantic's errors without input, context or unknown names."""
    known = known_fields()

    def named(part: Any) -> str:
        return str(part) if (isinstance(part, int) and part < MAX_LIST) or part in known else "?"

    return tuple(
        FieldProblem(field=".".join(map(named, error["loc"])), reason=error["type"], message=error["msg"])
        for error in errors[:20]
    )
