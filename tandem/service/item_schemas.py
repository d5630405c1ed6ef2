"""Single items over HTTP: what may be put, and what is answered."""

from __future__ import annotations

from typing import Any

import polars as pl
from pydantic import AwareDatetime, BaseModel, Field, FiniteFloat, StrictInt, field_validator
from pydantic_core import PydanticCustomError

from tandem.core.schema import ITEMS, MAX_CATEGORIES
from tandem.service.body import Body, Short, Text

_ATTRIBUTES = 64


class ItemBody(Body):
    """The whole item, in the place of what it was: what is left out is missing from now on."""

    title: Text = Field(min_length=1)
    text: Text | None = Field(default=None, description="what the encoder reads beside the title")
    categories: tuple[Short, ...] = Field(default=(), max_length=MAX_CATEGORIES)
    available_from: AwareDatetime | None = Field(default=None, description="null: always")
    attributes: dict[Short, Short | StrictInt | FiniteFloat | None] = Field(default_factory=dict, max_length=_ATTRIBUTES)

    @field_validator("attributes")
    @classmethod
    def _are_attributes(cls, value: dict[str, Any]) -> dict[str, Any]:
        if value.keys() & ITEMS.keys():
            raise PydanticCustomError("not_an_attribute", "Attributes lie beside an item's own columns, not over them")
        return value

    def draft(self, item_id: str) -> pl.DataFrame:
        """One row of the items table."""
        row = {
            "item_id": item_id,
            "title": self.title,
            "text": self.text,
            "categories": list(self.categories),
            "available_from": self.available_from,
        }
        own = pl.DataFrame([row], schema=ITEMS)
        return own.with_columns(pl.lit(value).alias(name) for name, value in self.attributes.items())


class ItemChangeAnswer(BaseModel):
    """What became of the item: `created` when the release that answers did not list it before."""

    item_id: str
    created: bool
    deleted: bool
    release: str
