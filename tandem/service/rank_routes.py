"""`POST /v1/rank`: the ranker alone, for whoever finds candidates by themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from tandem.service.app import PROBLEMS, Here, within_rate
from tandem.service.asking import AskBody
from tandem.service.body import MAX_LIST, Id, Short
from tandem.service.schemas import SlateAnswer

if TYPE_CHECKING:
    from tandem.service.slate import Ask

routes = APIRouter(prefix="/v1", dependencies=[Depends(within_rate)], responses=PROBLEMS)


class RankBody(AskBody):
    """Which of these items are the best for whoever asks?"""

    item_ids: tuple[Id, ...] = Field(min_length=1, max_length=MAX_LIST, description="the items to be ordered")
    context: dict[Short, Short] = Field(default_factory=dict, max_length=32)

    def ask(self, request_id: str) -> Ask:
        """With the context."""
        return replace(super().ask(request_id), context=self.context)


class RankAnswer(SlateAnswer):
    """The items, best score first. `unknown` are those that the release does not hold, in the order they were sent."""

    unknown: tuple[str, ...]


@routes.post("/rank")
def rank(body: RankBody, request: Request, service: Here) -> RankAnswer:
    """The caller's own candidates in the ranker's order: what they had before may come, nothing is reranked or logged."""
    slate = service.recommender.rank(service.asked(body, request.scope), body.item_ids)
    service.metrics.slate(slate)
    known = {item.item_id for item in slate.items}
    unknown = tuple(each for each in dict.fromkeys(body.item_ids) if each not in known)
    return RankAnswer.model_validate({**SlateAnswer.of(slate).model_dump(), "unknown": unknown})
