"""`POST /v1/retrieve` over HTTP: the question and its answer."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from tandem.service.asking import AskBody
from tandem.service.body import Count
from tandem.service.filter_schemas import FiltersBody

if TYPE_CHECKING:
    from tandem.service.retrieve import Retrieved
    from tandem.service.slate import Ask


class RetrieveBody(AskBody):
    """Candidates for whoever asks."""

    k: Count = 100
    filters: FiltersBody = Field(default_factory=FiltersBody)

    def ask(self, request_id: str) -> Ask:
        """With how many, and filters."""
        return replace(super().ask(request_id), k=self.k, filters=self.filters.filters())


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
