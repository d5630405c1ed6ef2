"""Masks against a loop over the items; what each filter removed; filters that no item can meet, and those that mean nothing."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.filters import ALWAYS, CATEGORY, NOT_YET, FilterColumns, Filters, Range, counted
from tandem.core.errors import InputError

NOISE = np.random.default_rng(0)
COUNT = 60
CATEGORIES = [sorted({"a", "b", "c", "d"} - set(NOISE.choice(list("abcd"), 2))) if row % 7 else [] for row in range(COUNT)]
BRANDS = [None if row % 11 == 0 else f"brand {row % 4}" for row in range(COUNT)]
PRICES = [None if row % 13 == 0 else float(row % 10) for row in range(COUNT)]
YEARS = [2000 + row % 5 for row in range(COUNT)]
FROM = [None if row % 3 else datetime(2026, 1, 1 + row % 20, tzinfo=UTC) for row in range(COUNT)]
ITEMS = pl.DataFrame(
    {
        "item_id": [f"i{row}" for row in range(COUNT)],
        "title": ["t"] * COUNT,
        "text": ["t"] * COUNT,
        "categories": CATEGORIES,
        "available_from": FROM,
        "brand": BRANDS,
        "price": PRICES,
        "year": YEARS,
    },
    schema_overrides={"available_from": pl.Datetime("us", "UTC")},
)
NOW = datetime(2026, 1, 9, tzinfo=UTC)
NOW_US = int(NOW.timestamp() * 1e6)


def passes(row: int, asked: Filters) -> bool:
    """The meaning of filters, item by item."""
    own = set(CATEGORIES[row])
    value = {"brand": BRANDS[row], "price": PRICES[row], "year": YEARS[row]}
    return (
        (not asked.available or FROM[row] is None or FROM[row] <= NOW)
        and (not asked.categories_any or bool(own & set(asked.categories_any)))
        and set(asked.categories_all) <= own
        and not own & set(asked.categories_none)
        and all(value[name] in wanted for name, wanted in asked.attributes.items())
        and all(
            value[name] is not None
            and (bounds.at_least is None or value[name] >= bounds.at_least)
            and (bounds.at_most is None or value[name] <= bounds.at_most)
            for name, bounds in asked.ranges.items()
        )
    )


some = st.lists(st.sampled_from(["a", "b", "c", "d", "nowhere"]), max_size=2, unique=True).map(tuple)
bounds = st.tuples(st.none() | st.integers(0, 9), st.none() | st.integers(0, 9)).filter(
    lambda pair: pair != (None, None) and (None in pair or pair[0] <= pair[1])
)
any_filters = st.builds(
    Filters,
    categories_any=some,
    categories_all=some,
    categories_none=some,
    attributes=st.fixed_dictionaries(
        {},
        optional={
            "brand": st.just(("brand 1", "brand 2", "unheard of")),
            "year": st.just((2001.0, 2003)),
            "price": st.just((3,)),
        },
    ),
    ranges=st.fixed_dictionaries(
        {}, optional={"price": bounds.map(lambda pair: Range(*pair)), "year": st.just(Range(2002, None))}
    ),
    available=st.booleans(),
)


@given(any_filters, st.booleans())
@settings(max_examples=150, deadline=None)
def test_masks_say_of_each_item_what_a_loop_says(asked: Filters, ascending: bool) -> None:
    columns = FilterColumns.of(ITEMS)
    if not ascending:  # as the fresh tier keeps them: codes in any order
        order = np.random.default_rng(1).permutation(len(columns.codes))
        columns = replace(columns, rows=columns.rows[order], codes=columns.codes[order], sorted=False)
    left, removed = counted(columns.masks(asked, NOW_US), np.ones(COUNT, bool))
    assert left.tolist() == [passes(row, asked) for row in range(COUNT)]
    assert sum(removed.values()) == COUNT - left.sum()


def test_each_filter_counts_what_those_before_it_left() -> None:
    masks = FilterColumns.of(ITEMS).masks(Filters(categories_any=("a",), ranges={"price": Range(at_most=5)}), NOW_US)
    assert list(masks) == [NOT_YET, "price", CATEGORY]
    late = sum(start is not None and start > NOW for start in FROM)
    left, removed = counted(masks, np.ones(COUNT, bool))
    assert removed[NOT_YET] == late > 0
    here = masks[NOT_YET]
    assert removed["price"] == np.count_nonzero(here & ~masks["price"]) > 0
    assert removed[CATEGORY] == np.count_nonzero(here & masks["price"] & ~masks[CATEGORY]) > 0
    gone = np.arange(COUNT) < 20
    assert counted(masks, ~gone)[0].tolist() == (left & ~gone).tolist()


def test_an_item_without_a_time_has_always_been_there() -> None:
    columns = FilterColumns.of(ITEMS)
    assert columns.available[1] == ALWAYS
    assert columns.masks(Filters(), -(2**60))[NOT_YET].sum() == sum(start is None for start in FROM)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Filters(attributes={"colour": ("red",)}), r"no attribute 'colour'.*'price', 'year', 'brand'"),
        (Filters(attributes={"brand": (3,)}), "holds texts"),
        (Filters(attributes={"price": ("dear",)}), "holds numbers"),
        (Filters(ranges={"brand": Range(at_least=1)}), "range of one of"),
    ],
)
def test_what_items_do_not_have_is_refused(asked: Filters, said: str) -> None:
    with pytest.raises(InputError, match=said):
        FilterColumns.of(ITEMS).vocabulary.check(asked)


@pytest.mark.parametrize("low_and_high", [(None, None), (2, 1)])
def test_a_range_that_means_nothing_is_refused(low_and_high: tuple[float | None, float | None]) -> None:
    with pytest.raises(InputError, match="at_least"):
        Range(*low_and_high)


def test_an_empty_catalogue_has_masks_too() -> None:
    columns = FilterColumns.of(ITEMS.clear())
    asked = Filters(categories_any=("a",), attributes={"brand": ("x",)}, ranges={"price": Range(1, 2)})
    assert all(mask.shape == (0,) for mask in columns.masks(asked, NOW_US).values())
