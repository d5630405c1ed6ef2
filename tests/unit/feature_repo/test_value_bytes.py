"""Column-wise encoding against Feast's own row-wise one, byte for byte."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.type_map import python_values_to_proto_values
from feast.types import Array, Bool, FeastType, Float32, Float64, Int32, Int64, String
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given
from hypothesis import strategies as st

from feature_repo.newest import entity_key
from feature_repo.value_bytes import key_column, timestamp_column, value_column
from tandem.core.errors import InputError

INTS = st.integers(-(2**63), 2**63 - 1)
FLOATS = st.floats(allow_nan=False)
TEXTS = st.text(max_size=300)
KINDS: list[tuple[FeastType, pl.DataType, st.SearchStrategy[Any]]] = [
    (Int64, pl.Int64(), INTS),
    (Float64, pl.Float64(), FLOATS),
    (String, pl.String(), TEXTS),
    (Array(Int64), pl.List(pl.Int64()), st.lists(INTS, max_size=5)),
    (Array(Float64), pl.List(pl.Float64()), st.lists(FLOATS, max_size=5)),
    (Array(String), pl.List(pl.String()), st.lists(TEXTS, max_size=5)),
    (Int32, pl.Int32(), st.integers(-(2**31), 2**31 - 1)),
    (Bool, pl.Boolean(), st.booleans()),
]


@pytest.mark.parametrize(("kind", "dtype", "values"), KINDS, ids=lambda each: str(each))
def test_columns_are_what_feast_makes_of_their_values(
    kind: FeastType, dtype: pl.DataType, values: st.SearchStrategy[Any]
) -> None:
    @given(st.lists(st.none() | values, max_size=20))
    def check(column: list[Any]) -> None:
        expected = [each.SerializeToString() for each in python_values_to_proto_values(column, kind.to_value_type())]
        assert value_column(pl.Series("feature", column, dtype), kind).to_pylist() == expected

    check()


@pytest.mark.parametrize("number", [0, 1, 127, 128, 16_383, 16_384, 2**35 - 1, 2**35, 2**62, 2**63 - 1, -1, -(2**63)])
def test_whole_numbers_around_every_length_of_a_varint(number: int) -> None:
    expected = python_values_to_proto_values([number], Int64.to_value_type())[0].SerializeToString()
    assert value_column(pl.Series([number]), Int64).to_pylist() == [expected]


def test_a_text_longer_than_a_byte_counts() -> None:
    text = "中" * 20_000
    expected = python_values_to_proto_values([text], String.to_value_type())[0].SerializeToString()
    assert value_column(pl.Series([text]), String).to_pylist() == [expected]


def test_nan_is_a_missing_value_and_infinity_is_not() -> None:
    nan, infinite = value_column(pl.Series([math.nan, math.inf]), Float64).to_pylist()
    assert (nan, infinite) == (b"", python_values_to_proto_values([math.inf], Float64.to_value_type())[0].SerializeToString())


def test_numbers_are_widened_to_what_the_view_says() -> None:
    assert value_column(pl.Series([7], dtype=pl.Int8), Int64).equals(value_column(pl.Series([7]), Int64))
    assert value_column(pl.Series([0.5], dtype=pl.Float64), Float32).to_pylist() == [
        python_values_to_proto_values([0.5], Float32.to_value_type())[0].SerializeToString()
    ]


def test_null_inside_a_list_is_an_empty_text_and_refused_among_whole_numbers() -> None:
    texts = value_column(pl.Series([["a", None]], dtype=pl.List(pl.String)), Array(String))
    assert texts.equals(value_column(pl.Series([["a", ""]]), Array(String)))
    with pytest.raises(InputError, match="'history_times' holds null inside a list of whole numbers"):
        value_column(pl.Series("history_times", [[1, None]]), Array(Int64))


@given(st.lists(st.integers(0, 2**52), max_size=20))
def test_times_are_protobuf_timestamps(times: list[int]) -> None:
    expected = [Timestamp(seconds=each // 10**6, nanos=each % 10**6 * 1000).SerializeToString() for each in times]
    assert timestamp_column(np.array(times, np.int64)).to_pylist() == expected


@given(st.lists(st.text(min_size=1, max_size=80), max_size=20))
def test_keys_are_what_feast_makes_of_them(ids: list[str]) -> None:
    expected = [serialize_entity_key(entity_key("user_id", each), 3) for each in ids]
    assert key_column("user_id", pl.Series(ids, dtype=pl.String)).to_pylist() == expected


def test_a_slice_of_a_column_is_encoded_as_that_slice() -> None:
    column = pl.Series([["a"], ["b", "c"], [], ["d"]])
    assert value_column(column[1:3], Array(String)).to_pylist() == value_column(column, Array(String)).to_pylist()[1:3]
