"""Filters as they come over HTTP, the same in every body that has `filters`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, FiniteFloat, StrictInt, model_validator
from pydantic_core import PydanticCustomError

from tandem.service.body import MAX_LIST, Body, Id, Short

if TYPE_CHECKING:
    from retrieval.filters import Filters

_ATTRIBUTES = 32

Value = Short | StrictInt | FiniteFloat
Categories = Annotated[tuple[Short, ...], Field(max_length=MAX_LIST)]


class RangeBody(Body):
    """Numbers from `at_least` to `at_most`, both included; one of them may be missing."""

    at_least: FiniteFloat | None = None
    at_most: FiniteFloat | None = None

    @model_validator(mode="after")
    def _has_a_bound(self) -> RangeBody:
        if self.at_least is None and self.at_most is None:
            raise PydanticCustomError("no_bound", "A range needs at_least, at_most or both")
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise PydanticCustomError("empty_range", "at_least must not be above at_most")
        return self


class FiltersBody(Body):
    """What an item must be. Filters hold inside the search: k items come as long as k pass. A missing value passes none."""

    categories_any: Categories = Field(default=(), description="of one of these categories or more")
    categories_all: Categories = Field(default=(), description="of all these categories")
    categories_none: Categories = Field(default=(), description="of none of these categories")
    attributes: dict[Short, Value | Annotated[tuple[Value, ...], Field(min_length=1, max_length=MAX_LIST)]] = Field(
        default_factory=dict, max_length=_ATTRIBUTES, description="per attribute a value, or a list of which it must be one"
    )
    ranges: dict[Short, RangeBody] = Field(default_factory=dict, max_length=_ATTRIBUTES, description="per numeric attribute")
    include: tuple[Id, ...] | None = Field(default=None, max_length=MAX_LIST, description="only these items")
    exclude: tuple[Id, ...] = Field(default=(), max_length=MAX_LIST, description="none of these items")
    available: bool = Field(default=True, description="leave out items that become available later")
    seen: bool | None = Field(default=None, description="may come again what the user has had? null: as the data's source says")

    def filters(self) -> Filters:
        """The same for the retriever."""
        from retrieval.filters import Filters, Range

        return Filters(
            categories_any=self.categories_any,
            categories_all=self.categories_all,
            categories_none=self.categories_none,
            attributes={name: given if isinstance(given, tuple) else (given,) for name, given in self.attributes.items()},
            ranges={name: Range(each.at_least, each.at_most) for name, each in self.ranges.items()},
            include=self.include,
            exclude=self.exclude,
            available=self.available,
            seen=self.seen,
        )
