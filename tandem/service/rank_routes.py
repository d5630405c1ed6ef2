"""`POST /v1/rank`: the ranker alone, for whoever finds candidates by themselves."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from tandem.service.app import PROBLEMS, Here, within_rate
from tandem.service.body import MAX_LIST, Body, Id, Short, Text
from tandem.service.problems import deadline, request_id_of
from tandem.service.schemas import SlateAnswer

if TYPE_CHECKING:
    from tandem.service.slate import Ask

routes = APIRouter(prefix="/v1", dependencies=[Depends(within_rate)], responses=PROBLEMS)


class RankBody(Body):
    """Which of these items are the best for whom? The user, the session and the words as with `recommend`."""

    item_ids: tuple[Id, ...] = Field(min_length=1, max_length=MAX_LIST, description="the items to be ordered")
    user_id: Id | None = None
    session: tuple[Id, ...] = Field(default=(), max_length=MAX_LIST, description="item ids of this session, oldest first")
    query: Text | None = Field(default=None, description="what is wanted, in words")
    context: dict[Short, Short] = Field(default_factory=dict, max_length=32)
    request_id: Id | None = None

    def ask(self, request_id: str) -> Ask:
        """The question as the recommender takes it; `request_id` is used where the caller gave none."""
        from tandem.service.slate import Ask

        return Ask(
            user_id=self.user_id,
            session=self.session,
            query=self.query if self.query and self.query.strip() else None,
            context=self.context,
            request_id=self.request_id or request_id,
        )


class RankAnswer(SlateAnswer):
    """The items, best score first. `unknown` are those that the release does not hold, in the order they were sent."""

    unknown: tuple[str, ...]


@routes.post("/rank")
def rank(body: RankBody, request: Request, service: Here) -> RankAnswer:
    """The caller's own candidates in the ranker's order: what they had before may come, nothing is reranked or logged."""
    ask = replace(body.ask(request_id_of(request.scope)), deadline=deadline(request.scope, service.settings.service.budget_ms))
    slate = service.recommender.rank(ask, body.item_ids)
    service.metrics.slate(slate)
    known = {item.item_id for item in slate.items}
    unknown = tuple(each for each in dict.fromkeys(body.item_ids) if each not in known)
    return RankAnswer.model_validate({**SlateAnswer.of(slate).model_dump(), "unknown": unknown})
