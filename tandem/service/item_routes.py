"""`PUT` and `DELETE /v1/items/{id}`: on disk when they answer, in this worker's next answer, in every other's within a second."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends
from fastapi import Path as PathParameter

from tandem.core.errors import InputError
from tandem.service.app import PROBLEMS, Here, within_rate
from tandem.service.body import Id
from tandem.service.item_schemas import ItemBody, ItemChangeAnswer
from tandem.service.problems import INVALID, Refused
from tandem.service.schemas import FieldProblem

routes = APIRouter(prefix="/v1", dependencies=[Depends(within_rate)], responses=PROBLEMS)


@routes.put("/items/{item_id:path}")
def put(item_id: Annotated[Id, PathParameter()], body: ItemBody, service: Here) -> ItemChangeAnswer:
    """List an item, or list it as it is now, through restarts and promotions; the next training learns from it."""
    recommender = service.recommender
    try:
        created = recommender.live.put(body.draft(item_id))
    except InputError:
        known = ", ".join(f"{name} ({kind})" for name, kind in recommender.attributes.items()) or "none"
        message = f"A title has letters, and attributes fit what items have: {known}"
        raise Refused(INVALID, [FieldProblem(field="body.attributes", reason="attribute", message=message)]) from None
    return ItemChangeAnswer(item_id=item_id, created=created, deleted=False, release=recommender.release)


@routes.delete("/items/{item_id:path}")
def delete(item_id: Annotated[Id, PathParameter()], service: Here) -> ItemChangeAnswer:
    """Take an item out of every answer; it stays out through restarts and promotions, until somebody puts it again."""
    recommender = service.recommender
    recommender.live.delete(item_id)
    return ItemChangeAnswer(item_id=item_id, created=False, deleted=True, release=recommender.release)
