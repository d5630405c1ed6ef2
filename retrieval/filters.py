"""Which items may be returned: what a caller asks for, as named masks over the catalogue.

In: `Filters` and the `FilterColumns` of n items by dense id. Out: one (n,) bool mask per filter that was asked for, by the name
under which an answer counts what it removed. Masks go into the search (`QueryBatch.filters`); nothing is struck out afterwards,
so a filter never leaves fewer than k items while k are eligible. An item without a value passes no condition on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

import numpy as np
import polars as pl
from numpy.typing import NDArray

from tandem.core.errors import InputError
from tandem.core.schema import ITEMS

Mask: TypeAlias = NDArray[np.bool_]
Value: TypeAlias = str | float
Kind: TypeAlias = Literal["number", "text"]

NOT_YET: Final = "not available yet"
CATEGORY: Final = "category"
NOT_INCLUDED: Final = "not included"
ALWAYS: Final = np.iinfo(np.int64).min // 4
"""`available` of an item that has always been there."""


@dataclass(frozen=True)
class Range:
    """Numbers from `at_least` to `at_most`, both included; None is no bound."""

    at_least: float | None = None
    at_most: float | None = None

    def __post_init__(self) -> None:
        low, high = self.at_least, self.at_most
        if low is None and high is None:
            raise InputError("a range has neither at_least nor at_most; give one of them, or leave the range out")
        if low is not None and high is not None and low > high:
            raise InputError(f"a range from {low:g} to {high:g} is empty; at_least must not be above at_most")


@dataclass(frozen=True)
class Filters:
    """What an item must be: one of `categories_any`, all of `categories_all`, none of `categories_none`; per attribute one of
    the values, and per numeric attribute within a range; among `include`, if given, and not among `exclude` (outside ids).

    `available`: leave out what becomes available later. `seen`: may what the user has had come again? None: as the source says.
    """

    categories_any: tuple[str, ...] = ()
    categories_all: tuple[str, ...] = ()
    categories_none: tuple[str, ...] = ()
    attributes: Mapping[str, tuple[Value, ...]] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    include: tuple[str, ...] | None = None
    exclude: tuple[str, ...] = ()
    available: bool = True
    seen: bool | None = None


@dataclass
class Vocabulary:
    """Numbers for category names and for the texts of each attribute; grows, and never gives a number a second meaning."""

    categories: dict[str, int] = field(default_factory=dict)
    texts: dict[str, dict[str, int]] = field(default_factory=dict)
    numeric: frozenset[str] = frozenset()

    @classmethod
    def of(cls, items: pl.DataFrame) -> Vocabulary:
        """Of an items table: its attributes are the columns that `ITEMS` does not name."""
        kinds = {name: kind for name, kind in items.schema.items() if name not in ITEMS}
        numeric = frozenset(name for name, kind in kinds.items() if kind.is_numeric() or kind == pl.Boolean)
        names = items["categories"].explode().drop_nulls().unique().sort().to_list()
        words = [name for name, kind in kinds.items() if kind in (pl.String, pl.Categorical, pl.Enum)]
        texts = {name: _numbered(items[name].cast(pl.String).drop_nulls().unique().sort().to_list()) for name in words}
        return cls(_numbered(names), texts, numeric)

    @property
    def attributes(self) -> dict[str, Kind]:
        """What attributes there are, and what their values are."""
        kinds: dict[str, Kind] = dict.fromkeys(sorted(self.numeric), "number")
        return kinds | dict.fromkeys(sorted(self.texts), "text")

    def category(self, name: str) -> int:
        """The category's number; a new name gets the next one."""
        return self.categories.setdefault(name, len(self.categories))

    def text(self, attribute: str, value: str) -> int:
        """The number of a text attribute's value; a new value gets the next one."""
        known = self.texts[attribute]
        return known.setdefault(value, len(known))

    def check(self, filters: Filters) -> None:
        """Raise InputError for an attribute that no item can have, and for a value or range that does not fit its kind."""
        kinds = self.attributes
        for name in (*filters.attributes, *filters.ranges):
            if name not in kinds:
                raise InputError(f"items have no attribute {name[:40]!r}; they have {list(kinds)}")
        for name, values in filters.attributes.items():
            wanted = str if kinds[name] == "text" else float
            if not all(isinstance(value, str) == (wanted is str) for value in values):
                raise InputError(f"attribute {name!r} holds {kinds[name]}s; ask for {kinds[name]}s")
        for name in filters.ranges:
            if kinds[name] == "text":
                raise InputError(f"attribute {name!r} holds texts; ask for a range of one of {sorted(self.numeric)}")


@dataclass(frozen=True, eq=False)
class FilterColumns:
    """What filters read of n items by row: `available` (n,) UTC microseconds; `numbers` (n,) float64 by attribute, NaN where
    missing; `texts` (n,) int32 numbers of the vocabulary, -1 where missing; category `codes` (m,) of the items `rows` (m,).

    With `sorted` the codes ascend, and a category's items are found without a look at the others.
    """

    vocabulary: Vocabulary
    available: NDArray[np.int64]
    numbers: Mapping[str, NDArray[np.float64]]
    texts: Mapping[str, NDArray[np.int32]]
    rows: NDArray[np.int64]
    codes: NDArray[np.int64]
    sorted: bool = True

    @classmethod
    def of(cls, items: pl.DataFrame) -> FilterColumns:
        """Of an items table, rows in its order."""
        words = Vocabulary.of(items)
        missing = float("nan")
        numbers = {name: items[name].cast(pl.Float64).fill_null(missing).to_numpy() for name in words.numeric}
        texts = {name: _coded(items[name], known) for name, known in words.texts.items()}
        pairs = items.select(row=pl.int_range(pl.len(), dtype=pl.Int64), name="categories").explode("name").drop_nulls("name")
        codes = _coded(pairs["name"], words.categories).astype(np.int64)
        order = np.argsort(codes, kind="stable")
        available = items["available_from"].dt.epoch("us").fill_null(ALWAYS).to_numpy()
        return cls(words, available, numbers, texts, pairs["row"].to_numpy()[order], codes[order])

    def __len__(self) -> int:
        return len(self.available)

    def masks(self, filters: Filters, now_us: int) -> dict[str, Mask]:
        """(n,) bool by name, for every filter that depends on the item alone; ids are `Retriever`'s to know."""
        masks = {NOT_YET: self.available <= now_us} if filters.available else {}
        for name, values in filters.attributes.items():
            masks[name] = self._is_one_of(name, values)
        for name, wanted in filters.ranges.items():
            within = self._within(name, wanted)
            masks[name] = masks[name] & within if name in masks else within
        if filters.categories_any or filters.categories_all or filters.categories_none:
            masks[CATEGORY] = self._in_categories(filters)
        return masks

    def _in_categories(self, filters: Filters) -> Mask:
        mask = self._members(filters.categories_any) if filters.categories_any else np.ones(len(self), np.bool_)
        for name in filters.categories_all:
            mask &= self._members((name,))
        if filters.categories_none:
            mask &= ~self._members(filters.categories_none)
        return mask

    def _members(self, names: Iterable[str]) -> Mask:
        """(n,) bool: items of one of these categories or more."""
        wanted = [code for name in names if (code := self.vocabulary.categories.get(name)) is not None]
        mask = np.zeros(len(self), np.bool_)
        if not self.sorted:
            mask[self.rows[np.isin(self.codes, wanted)]] = True
            return mask
        for code in wanted:
            first, end = np.searchsorted(self.codes, (code, code + 1))
            mask[self.rows[first:end]] = True
        return mask

    def _is_one_of(self, name: str, values: tuple[Value, ...]) -> Mask:
        if name in self.numbers:
            return np.isin(self.numbers[name], np.array(values, np.float64))
        known = self.vocabulary.texts[name]
        return np.isin(self.texts[name], [known[value] for value in values if value in known])  # type: ignore[index]

    def _within(self, name: str, wanted: Range) -> Mask:
        numbers = self.numbers[name]  # a comparison with NaN is false
        mask = ~np.isnan(numbers) if wanted.at_least is None else numbers >= wanted.at_least
        return mask if wanted.at_most is None else mask & (numbers <= wanted.at_most)


def counted(masks: Mapping[str, Mask], listed: Mask) -> tuple[Mask, dict[str, int]]:
    """What passes every filter, (n,) bool, and how many of the `listed` items each removed that those before it had left."""
    left, removed = listed, {}
    for name, mask in masks.items():
        passed = left & mask
        removed[name] = int(np.count_nonzero(left)) - int(np.count_nonzero(passed))
        left = passed
    return left, removed


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(names)}


def _coded(values: pl.Series, known: Mapping[str, int]) -> NDArray[np.int32]:
    """(n,) the number of each value, -1 for null."""
    if not known:
        return np.full(len(values), -1, np.int32)
    table = pl.DataFrame({"value": list(known), "code": list(known.values())}, schema={"value": pl.String, "code": pl.Int32})
    coded = values.cast(pl.String).alias("value").to_frame().join(table, on="value", how="left", maintain_order="left")
    return coded["code"].fill_null(-1).to_numpy()
