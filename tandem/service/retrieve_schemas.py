"""`POST /v1/retrieve` over HTTP: the question and its answer."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from tandem.service.body import MAX_LIST, Body, Count, Id, Text
from tandem.service.filter_schemas import FiltersBody

if TYPE_CHECKING:
    from tandem.service.retrieve import Retrieved
    from tandem.service.slate import Ask


class RetrieveBody(Body):
    """Any mix of who asks, what they did just now, and what they want in their own words; all empty: what is popular."""

    user_id: Id | None = None
    session: tuple[Id, ...] = Field(default=(), max_length=MAX_LIST, description="item ids of this session, oldest first")
    query: Text | None = Field(default=None, description="what is wanted, in words")
    k: Count = 100
    filters: FiltersBody = Field(default_factory=FiltersBody)
    request_id: Id | None = None

    def ask(self, request_id: str) -> Ask:
        """The question as the recommender takes it; `request_id` is used where the caller gave none."""
        from tandem.service.slate import Ask

        return Ask(
            user_id=self.user_id,
            session=self.session,
            query=self.query if self.query and self.query.strip() else None,
            k=self.k,
            filters=self.filters.filters(),
            request_id=self.request_id or request_id,
        )


class NamedAnswer(BaseModel):
    """At which rank (from 1) and with which score a source named the item; scores are the source's own, higher is better."""

    rank: int
    score: float


class CandidateAnswer(BaseModel):
    """One candidate: `score` is the towers' inner product with the request, `sources` all that named the item."""

    item_id: str
    title: str
    score: float
    sources: dict[str, NamedAnswer]


class RetrieveAnswer(BaseModel):
    """Candidates before any ranking, best score first. `index` is the kind of index that was asked.

    `eligible` items of the catalogue could be returned; `removed` counts what each filter left out after those before it.
    """

    items: tuple[CandidateAnswer, ...]
    returned: int
    index: str
    eligible: int
    removed: dict[str, int]
    release: str
    request_id: str
    degraded: tuple[str, ...]
    took_ms: dict[str, float]
    cold_start: bool
    truncated: bool

    @classmethod
    def of(cls, found: Retrieved) -> RetrieveAnswer:
        return cls.model_validate({**asdict(found), "returned": len(found.items)})
