"""`POST /v1/retrieve`: what retrieval knows, for whoever ranks by themselves."""

from __future__ import annotations

from fastapi import APIRouter, Depends, Request

from tandem.service.app import PROBLEMS, Here, within_rate
from tandem.service.retrieve_schemas import RetrieveAnswer, RetrieveBody

routes = APIRouter(prefix="/v1", dependencies=[Depends(within_rate)], responses=PROBLEMS)


@routes.post("/retrieve")
def retrieve(body: RetrieveBody, request: Request, service: Here) -> RetrieveAnswer:
    """Candidates for any mix of user, session and sentence, with where each of them came from."""
    service.checked(body.k, body.filters)
    found = service.recommender.retrieve(service.asked(body, request.scope))
    service.metrics.slate(found)
    return RetrieveAnswer.of(found)
