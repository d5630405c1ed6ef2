"""The table source: anybody's CSV, Parquet or JSON-lines through a mapping, and mappings that are wrong."""

import gzip
import os
import tomllib
import zipfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from feature_repo.sources import Raw, TableMapping, read_source
from feature_repo.sources.table import ONLINE_RETAIL
from feature_repo.sources.times import parse_times
from tandem.core.errors import InputError

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ROOT = Path(__file__).parents[3]
MINIMAL: dict[str, Any] = {"user_id": "user", "item_id": "item", "timestamp": "at", "action": "click"}
CSV = """user,item,at,name,price,tags,qty,country
ann,a/1 é,2024-01-01 10:00:00,Old name,9.5,red|big,2,PL
ann,b,2024-01-02T10:00:00Z,Bee,3,,-1,PL
bob,a/1 é,2024-01-03,New name,10.5,red|small,1,DE
"""


def _read(folder: Path, text: str, mapping: dict[str, Any], name: str = "events.csv") -> Raw:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return read_source("table", path, TableMapping.parse(mapping), 0, now=NOW)


def test_minimal_mapping_reads_ids_times_and_action(tmp_path: Path) -> None:
    raw = _read(tmp_path, CSV, MINIMAL)
    assert raw.events.select("user_id", "item_id", "action").rows() == [
        ("ann", "a/1 é", "click"),
        ("ann", "b", "click"),
        ("bob", "a/1 é", "click"),
    ]
    assert raw.events["timestamp"][1] == datetime(2024, 1, 2, 10, tzinfo=UTC)
    assert raw.source.positive == "click"
    assert raw.items["title"].to_list() == ["a/1 é", "b"]


def test_full_mapping_makes_items_users_and_actions(tmp_path: Path) -> None:
    mapping = {
        **MINIMAL,
        "title": "name",
        "text": ["name", "tags"],
        "categories": "tags",
        "category_separator": "|",
        "value": "qty",
        "context": ["country"],
        "actions": [{"name": "return", "column": "qty", "below": 0}],
        "item_attributes": [{"name": "price", "column": "price", "how": "median"}],
        "user_attributes": [{"name": "country", "column": "country"}],
    }
    raw = _read(tmp_path, CSV, mapping)
    assert raw.events["action"].to_list() == ["click", "return", "click"]
    assert raw.events["value"].to_list() == [2.0, -1.0, 1.0]
    assert raw.events["country"].to_list() == ["PL", "PL", "DE"]
    first, second = raw.items.to_dicts()
    assert (first["title"], first["text"], first["price"]) == ("New name", "New name. red|small", 10.0)
    assert first["categories"] == ["red", "small"]
    assert second["categories"] == []
    assert raw.users.rows() == [("ann", None, "PL"), ("bob", None, "DE")]
    assert [task.name for task in raw.source.tasks] == ["click", "return"]


def test_items_and_users_may_have_files_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "items.csv").write_text("item,name,since\nb,Bee,2023-05-01\nc,Never seen,\n")
    pl.DataFrame({"user": ["ann"], "about": ["likes bees"]}).write_parquet(tmp_path / "users.parquet")
    mapping = {**MINIMAL, "items": "items.csv", "users": "users.parquet", "title": "name", "user_text": "about"}
    raw = _read(tmp_path, CSV.replace("name", "label"), {**mapping, "available_from": "since"})
    assert raw.reasons == {"events: unknown item": 2}
    assert raw.items["item_id"].to_list() == ["b", "c"]
    assert raw.items["available_from"][0] == datetime(2023, 5, 1, tzinfo=UTC)
    assert raw.users.rows() == [("ann", "likes bees")]


def test_parquet_and_jsonl_give_the_same_events_as_csv(tmp_path: Path) -> None:
    whole = _read(tmp_path, CSV, MINIMAL)
    frame = pl.read_csv(tmp_path / "events.csv").with_columns(parse_times(pl.read_csv(tmp_path / "events.csv")["at"]).alias("at"))
    frame.write_parquet(tmp_path / "events.parquet")
    frame.with_columns(pl.col("at").dt.to_string("iso:strict")).write_ndjson(tmp_path / "events.jsonl")
    for name in ("events.parquet", "events.jsonl"):
        assert read_source("table", tmp_path / name, TableMapping.parse(MINIMAL), 0, now=NOW).events.equals(whole.events)


def test_compressed_and_tab_separated_files_give_the_same_events(tmp_path: Path) -> None:
    whole = _read(tmp_path, CSV, MINIMAL).events
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(CSV.encode()))
    (tmp_path / "b.tsv").write_text(CSV.replace(",", "\t"))
    with zipfile.ZipFile(tmp_path / "c.csv.zip", "w") as archive:
        archive.writestr("deep/c.csv", CSV)
    for name in ("a.csv.gz", "b.tsv", "c.csv.zip"):
        assert read_source("table", tmp_path / name, TableMapping.parse(MINIMAL), 0, now=NOW).events.equals(whole)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv.gz", b"not gzip", "damaged gzip"),
        ("a.csv.zip", b"PK\x03\x04 not zip", "damaged zip"),
        ("a.parquet", b"not parquet", "cannot be read"),
        ("a.csv", b"user,item,at\n\xff\xfe,b,2024-01-01\n", "not a CSV in UTF-8"),
    ],
)
def test_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        read_source("table", tmp_path, TableMapping.parse(MINIMAL), 0, now=NOW)
    assert name in str(caught.value)


def test_folder_of_many_tables_asks_which(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(CSV)
    (tmp_path / "b.csv").write_text(CSV)
    with pytest.raises(InputError, match=r"name the one with the events"):
        read_source("table", tmp_path, TableMapping.parse(MINIMAL), 0, now=NOW)


def test_bad_rows_go_to_rejected_with_reasons(tmp_path: Path) -> None:
    bad = [
        ",b,2024-01-01,,,,1,",
        "ann,,2024-01-01,,,,1,",
        f"{'x' * 300},b,2024-01-01,,,,1,",
        "a\tb,b,2024-01-01,,,,1,",
        "ann,b,soon,,,,1,",
        "ann,b,,,,,1,",
        "ann,b,2999-01-01,,,,1,",
        "ann,b,2024-01-01,,,,many,",
        "ann,b,2024-01-01,,,,inf,",
    ]
    raw = _read(tmp_path, CSV + "\n".join(bad) + "\n", {**MINIMAL, "value": "qty"})
    assert raw.events.height == 3
    assert raw.rejected.sort("row")["reason"].to_list() == [
        "no user id",
        "no item id",
        "user id too long",
        "user id holds a control character",
        "timestamp cannot be read",
        "no timestamp",
        "timestamp in the future",
        "value is not a number",
        "value is not finite",
    ]


def test_ids_are_normalised_and_whole_floats_lose_their_point(tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [12346.0, None, 7.0], "item": ["e\u0301", "x", "é"], "at": [1.7e9, 1.7e9, 1.7e9]})
    frame.write_parquet(tmp_path / "events.parquet")
    raw = read_source("table", tmp_path / "events.parquet", TableMapping.parse(MINIMAL), 0, now=NOW)
    assert sorted(raw.events.select("user_id", "item_id").rows()) == [("12346", "é"), ("7", "é")]
    assert raw.reasons == {"events: no user id": 1}


def test_unmapped_column_is_named_with_its_neighbour(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no column 'quantity'.*did you mean 'quantity_sold'"):
        _read(tmp_path, CSV.replace("qty", "quantity_sold"), {**MINIMAL, "value": "quantity"})


@pytest.mark.parametrize(
    ("text", "message"), [("", "is empty"), ("user,item,at\n", "no usable events"), ("user,item,at\na,b,c,d\n", "not a CSV")]
)
def test_empty_and_ragged_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _read(tmp_path, text, MINIMAL)


def test_rows_that_no_rule_claims_have_no_action(tmp_path: Path) -> None:
    mapping = {**MINIMAL, "action": None, "value": "qty", "actions": [{"name": "buy", "column": "qty", "at_least": 1}]}
    assert _read(tmp_path, CSV, mapping).reasons == {"events: no action": 1}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"usr_id": "x"}, "unknown setting table.usr_id; the nearest known one is 'user_id'"),
        ({"tasks": [{"name": "a", "acton": "b"}]}, "unknown setting table.tasks.0.acton; the nearest known one is 'action'"),
        ({"user_id": 7}, "table.user_id is wrong"),
        ({"split": "random"}, "table.split is wrong"),
        ({"action": None}, "nothing says what the rows are"),
        ({"item_attributes": [{"name": "title", "column": "x"}]}, "an attribute cannot be called 'title'"),
        ({"actions": [{"name": "x", "column": "y"}]}, "needs at_least, below or equals"),
        ({"positive": "sale"}, "positive = 'sale' is not one of the tasks"),
    ],
)
def test_wrong_mappings_are_refused_by_name(change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TableMapping.parse({**MINIMAL, **change})


def test_missing_mapping_points_to_the_example(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"add a \[table\] section"):
        read_source("table", tmp_path, None, 0)


def test_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="movielens, goodbooks, metarank, table"):
        read_source("netflix", tmp_path, None, 0)
    with pytest.raises(InputError, match="tandem simulate"):
        read_source("world", tmp_path, None, 0)


@pytest.mark.parametrize(
    ("values", "unit"),
    [
        ([1_700_000_000], None),
        ([1_700_000_000_000], None),
        ([1_700_000_000.0], "s"),
        (["1700000000"], None),
        ([1_700_000_000_000_000], None),
    ],
)
def test_epoch_numbers_are_read_by_their_size(values: list[Any], unit: Any) -> None:
    assert parse_times(pl.Series("t", values), unit).to_list() == [datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)]


def test_time_patterns_zones_and_dates() -> None:
    assert parse_times(pl.Series(["12/1/2010 8:26"]), pattern="%m/%d/%Y %H:%M").to_list() == [
        datetime(2010, 12, 1, 8, 26, tzinfo=UTC)
    ]
    assert parse_times(pl.Series(["2024-06-01T12:00:00+02:00"])).to_list() == [datetime(2024, 6, 1, 10, tzinfo=UTC)]
    assert parse_times(pl.Series([datetime(2024, 6, 1)]).dt.replace_time_zone("Europe/Warsaw"))[0] == datetime(
        2024, 5, 31, 22, tzinfo=UTC
    )
    assert parse_times(pl.Series([datetime(2024, 6, 1).date()])).to_list() == [datetime(2024, 6, 1, tzinfo=UTC)]
    with pytest.raises(InputError, match="holds no times"):
        parse_times(pl.Series([[1]]))


def test_documented_example_is_the_one_in_the_code() -> None:
    assert (ROOT / "docs" / "examples" / "online-retail.toml").read_text() == ONLINE_RETAIL


@pytest.mark.real
def test_real_online_retail_through_the_documented_example(tmp_path: Path) -> None:
    shared = Path(os.environ.get("TANDEM_SHARED_DATA", Path(__file__).parents[4] / "shared" / "data"))
    path = shared / "online-retail" / "online_retail.parquet"
    if not path.is_file():
        pytest.skip("online-retail is not there")
    whole = pl.read_parquet(path)
    kept = whole["ItemKey"].unique().sort().head(500)
    cut = whole.filter(pl.col("ItemKey").is_in(kept.implode()))
    cut.write_parquet(tmp_path / "online_retail.parquet")
    mapping = TableMapping.parse(tomllib.loads(ONLINE_RETAIL)["table"])
    raw = read_source("table", tmp_path, mapping, 0, now=NOW)
    assert raw.events.height == cut.height
    assert raw.rejected.is_empty()
    returned = raw.events.filter(pl.col("action") == "return")
    assert returned.height == cut.filter(pl.col("Quantity") < 0).height
    assert returned["value"].max() < 0
    assert raw.items["price"].null_count() == 0
    assert raw.users["country"].null_count() == 0
    assert raw.source.exclude_seen is False
