"""The as-of join against a judge of six lines, and every kind of frame that Feast may pass on."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from feast import Entity, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_view import DUMMY_ENTITY_FIELD
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.labeling.conflict_policy import ConflictPolicy
from feast.labeling.label_view import LabelView
from feast.types import Int64, String
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_repo import as_of, newest_rows
from feature_repo.newest_rows import newest_by_range
from feature_repo.polars_store import PolarsOfflineStore, PolarsRetrievalJob
from tandem.core.errors import BusyError, IncompatibleError, InputError, NotFoundError
from tandem.core.folders import held
from tandem.core.schema import TIME

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)


def at(hours: float) -> datetime:
    return NOON + timedelta(hours=hours)


def features(rows: list[tuple[str | None, datetime, int]]) -> pl.DataFrame:
    return pl.DataFrame(rows, schema={"user_id": pl.String, "event_timestamp": TIME, "clicks": pl.Int64}, orient="row")


def entities(rows: list[tuple[str | None, datetime | None]], **more: Any) -> pl.DataFrame:
    frame = pl.DataFrame(rows, schema={"user_id": pl.String, "event_timestamp": TIME}, orient="row")
    return frame.with_columns(**{name: pl.Series(values) for name, values in more.items()})


def view(
    name: str = "stats", ttl: timedelta = timedelta(0), created: str = "", columns: tuple[str, ...] = ("clicks",)
) -> FeatureView:
    source = FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp", created_timestamp_column=created)
    schema = [Field(name="user_id", dtype=String), *(Field(name=column, dtype=Int64) for column in columns)]
    made = FeatureView(name=name, entities=[USER], ttl=ttl, schema=schema, source=source)
    made.entity_columns = [Field(name="user_id", dtype=String)]
    return made


class Store:
    """The offline store over one folder, asked as Feast asks it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = RepoConfig(
            project="test",
            provider="local",
            registry=str(folder / "registry.db"),
            offline_store={"type": "feature_repo.polars_store.PolarsOfflineStore", "root": str(folder)},
            online_store=None,
            repo_path=folder / "elsewhere",
        )

    def write(self, frame: pl.DataFrame, name: str = "stats.parquet") -> None:
        (self.folder / name).parent.mkdir(exist_ok=True)
        frame.write_parquet(self.folder / name)

    def ask(
        self, frame: Any, *views: FeatureView, refs: list[str] | None = None, full: bool = False, **options: Any
    ) -> PolarsRetrievalJob:
        asked = views or (view(),)
        names = refs or [f"{each.name}:{feature.name}" for each in asked for feature in each.features]
        return PolarsOfflineStore.get_historical_features(self.config, list(asked), names, frame, None, "test", full, **options)

    def clicks(self, frame: Any, *views: FeatureView) -> list[int | None]:
        return self.ask(frame, *views).to_polars()["clicks"].to_list()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path)


def test_takes_the_newest_row_at_or_before_each_entity_row_and_keeps_rows_and_order(store: Store) -> None:
    store.write(features([("a", at(5), 5), ("b", at(1), 100), ("a", at(1), 1), ("a", at(3), 3)]))
    asked = entities([("a", at(4)), ("b", at(0)), ("a", at(3)), ("c", at(9)), ("a", at(3)), ("a", at(0.5))], note=list("uvwxyz"))
    answer = store.ask(asked).to_polars()
    assert answer.drop("clicks").equals(asked)
    assert answer["clicks"].to_list() == [3, None, 3, None, 3, None]


def test_a_ttl_is_inclusive_and_counted_from_the_entity_row(store: Store) -> None:
    store.write(features([("a", at(0), 7)]))
    asked = entities([("a", at(2)), ("a", at(2) + timedelta(microseconds=1)), ("a", at(0))])
    assert store.clicks(asked, view(ttl=timedelta(hours=2))) == [7, None, 7]
    assert store.clicks(asked, view(ttl=timedelta(0))) == [7, 7, 7]


def test_equal_times_are_settled_by_the_created_column_else_by_the_later_row(store: Store) -> None:
    rows = features([("a", at(0), 1), ("a", at(0), 2)])
    store.write(rows)
    assert store.clicks(entities([("a", at(1))])) == [2]
    store.write(rows.with_columns(created=pl.Series([at(9), at(8)], dtype=TIME)))
    assert store.clicks(entities([("a", at(1))]), view(created="created")) == [1]


def test_a_null_id_or_time_knows_nothing_and_loses_no_row(store: Store) -> None:
    store.write(features([("a", at(0), 1), (None, at(0), 2)]))
    assert store.clicks(entities([(None, at(1)), ("a", None), ("a", at(1))])) == [None, None, 1]


@pytest.mark.parametrize(
    "convert",
    [
        pl.DataFrame.lazy,
        pl.DataFrame.to_pandas,
        pl.DataFrame.to_arrow,
        lambda frame: frame.with_columns(pl.col("event_timestamp").cast(pl.Datetime("ns", "UTC"))),
        lambda frame: frame.with_columns(pl.col("event_timestamp").dt.replace_time_zone(None)),
        lambda frame: frame.with_columns(
            pl.col("event_timestamp").dt.convert_time_zone("Asia/Tokyo").cast(pl.Datetime("ms", "Asia/Tokyo"))
        ),
        lambda frame: frame.rename({"event_timestamp": "when"}),
    ],
    ids=["lazy", "pandas", "arrow", "nanoseconds", "naive", "milliseconds in Tokyo", "another name"],
)
def test_any_frame_with_any_kind_of_timestamp_gets_the_same_answer(store: Store, convert: Callable[[pl.DataFrame], Any]) -> None:
    store.write(features([("a", at(1), 1), ("a", at(3), 3)]))
    assert store.clicks(convert(entities([("a", at(4)), ("b", at(4)), ("a", at(2))]))) == [3, None, 1]


def test_the_entity_frame_comes_back_as_it_was_given(store: Store) -> None:
    store.write(features([("a", at(1), 1)]))
    given = entities([("a", at(4))]).with_columns(pl.col("event_timestamp").dt.convert_time_zone("Asia/Tokyo"))
    assert store.ask(given).to_polars().drop("clicks").equals(given)


@pytest.mark.parametrize("empty", [entities([]), pd.DataFrame({"user_id": [], "event_timestamp": []}), entities([]).to_pandas()])
def test_an_empty_entity_frame_gives_an_empty_answer_with_the_features(store: Store, empty: Any) -> None:
    store.write(features([("a", at(1), 1)]))
    answer = store.ask(empty).to_polars()
    assert (answer.height, answer.columns) == (0, ["user_id", "event_timestamp", "clicks"])


def test_two_views_join_side_by_side_under_full_names(store: Store) -> None:
    store.write(features([("a", at(1), 1)]))
    store.write(features([("a", at(2), 2)]), "other.parquet")
    answer = store.ask(entities([("a", at(1)), ("a", at(2))]), view(), view("other"), full=True).to_polars()
    assert answer.select("stats__clicks", "other__clicks").rows() == [(1, None), (1, 2)]


def test_only_the_features_asked_for_come_back(store: Store) -> None:
    store.write(features([("a", at(1), 1)]).with_columns(likes=pl.lit(4)))
    both = view(columns=("clicks", "likes"))
    answer = store.ask(entities([("a", at(1))]), both, refs=["stats:likes"]).to_polars()
    assert answer.columns == ["user_id", "event_timestamp", "likes"]
    assert answer["likes"].to_list() == [4]


def test_a_key_may_go_by_another_name_in_the_entity_frame(store: Store) -> None:
    store.write(features([("a", at(1), 1)]))
    friend = view()
    friend.projection.join_key_map = {"user_id": "friend_id"}
    assert store.clicks(entities([("x", at(1))], friend_id=["a"]), friend) == [1]


def test_lists_survive_the_join(store: Store) -> None:
    rows = pl.DataFrame(
        {"user_id": ["a"], "event_timestamp": [at(1)], "clicks": [[3, 1]]}, schema_overrides={"event_timestamp": TIME}
    )
    store.write(rows)
    assert store.clicks(entities([("a", at(2)), ("b", at(2))])) == [[3, 1], None]


def test_a_source_may_be_a_folder_of_parts_whose_time_units_differ(store: Store) -> None:
    store.write(features([("a", at(1), 1)]), "stats.parquet/old.parquet")
    pushed = features([("a", at(2), 2)]).with_columns(pl.col("event_timestamp").cast(pl.Datetime("ns", "UTC")))
    store.write(pushed, "stats.parquet/pushed.parquet")
    assert store.clicks(entities([("a", at(1)), ("a", at(3))])) == [1, 2]


def test_without_an_entity_frame_every_known_row_of_the_range_is_asked_about(store: Store) -> None:
    store.write(features([("a", at(0), 0), ("a", at(1), 1), ("b", at(2), 2), ("a", at(3), 3)]))
    answer = store.ask(None, start_date=at(1), end_date=at(2).replace(tzinfo=None)).to_polars()
    assert answer.select("user_id", "clicks").rows() == [("a", 1), ("b", 2)]


def test_arrow_comes_in_one_chunk(store: Store) -> None:
    for part in range(3):
        store.write(features([("a", at(part), part)]), f"stats.parquet/{part}.parquet")
    table = PolarsOfflineStore.pull_all_from_table_or_query(
        store.config, view().batch_source, ["user_id"], ["clicks"], "event_timestamp"
    ).to_arrow()
    assert table["clicks"].num_chunks == 1
    assert table["clicks"].to_pylist() == [0, 1, 2]


def test_pull_latest_keeps_one_row_per_entity_within_the_range(store: Store) -> None:
    store.write(features([("b", at(1), 1), ("a", at(4), 4), ("a", at(2), 2), ("a", at(3), 3), ("c", at(0), 0)]))
    job = PolarsOfflineStore.pull_latest_from_table_or_query(
        store.config, view().batch_source, ["user_id"], ["clicks"], "event_timestamp", None, at(1), at(3)
    )
    assert job.to_polars().select("user_id", "clicks").rows() == [("a", 3), ("b", 1)]


@pytest.mark.parametrize("part", ["stats.parquet", "stats.parquet/first.parquet"], ids=["file", "folder"])
def test_a_write_appends_in_the_sources_own_types(store: Store, part: str) -> None:
    store.write(features([("a", at(0), 0)]), part)
    pushed = pa.table(
        {"clicks": pa.array([5], pa.int32()), "user_id": ["a"], "event_timestamp": pa.array([at(1)], pa.timestamp("ns", "UTC"))}
    )
    PolarsOfflineStore.offline_write_batch(store.config, view(), pushed, None)
    assert store.clicks(entities([("a", at(0)), ("a", at(2))])) == [0, 5]
    files = list((store.folder / "stats.parquet").glob("*.parquet")) or [store.folder / "stats.parquet"]
    assert {pl.read_parquet_schema(path)["event_timestamp"] for path in files} == {TIME}


def test_a_write_that_does_not_fit_changes_nothing(store: Store) -> None:
    store.write(features([("a", at(0), 0)]))
    before = (store.folder / "stats.parquet").read_bytes()
    with pytest.raises(InputError, match="clicks"):
        PolarsOfflineStore.offline_write_batch(store.config, view(), features([("a", at(1), 1)]).drop("clicks").to_arrow(), None)
    bad = features([("a", at(1), 1)]).with_columns(clicks=pl.lit("many")).to_arrow()
    with pytest.raises(InputError, match="stats"):
        PolarsOfflineStore.offline_write_batch(store.config, view(), bad, None)
    assert (store.folder / "stats.parquet").read_bytes() == before


def test_two_writers_of_one_source_never_lose_a_row_in_silence(store: Store) -> None:
    store.write(features([("a", at(0), 0)]))
    with held(store.folder / ".stats.parquet.lock", "another"), pytest.raises(BusyError, match="another"):
        PolarsOfflineStore.offline_write_batch(store.config, view(), features([("a", at(1), 1)]).to_arrow(), None)


def test_a_result_is_persisted_once_and_never_overwritten_unasked(store: Store) -> None:
    store.write(features([("a", at(0), 3)]))
    storage = SavedDatasetFileStorage(path=str(store.folder / "saved.parquet"))
    job = store.ask(entities([("a", at(1))]))
    job.persist(storage)
    assert pl.read_parquet(store.folder / "saved.parquet")["clicks"].to_list() == [3]
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        job.persist(storage)
    job.persist(storage, allow_overwrite=True)


def test_bad_questions_are_refused_with_the_reason(store: Store) -> None:
    store.write(features([("a", at(0), 3)]))
    asked = entities([("a", at(1))])
    with pytest.raises(InputError, match="SQL"):
        store.ask("SELECT 1")
    with pytest.raises(InputError, match="user_id"):
        store.ask(asked.drop("user_id")).to_polars()
    with pytest.raises(InputError, match="not a timestamp"):
        store.ask(asked.with_columns(event_timestamp=pl.lit("soon"))).to_polars()
    with pytest.raises(InputError, match="event_timestamp"):
        store.ask(asked.rename({"event_timestamp": "t"}).with_columns(u=pl.col("t"))).to_polars()
    with pytest.raises(InputError, match="list"):
        store.ask(["a"]).to_polars()
    with pytest.raises(IncompatibleError, match="on_demand:x"):
        store.ask(asked, refs=["stats:clicks", "on_demand:x"])
    with pytest.raises(NotFoundError, match="absent"):
        store.ask(asked, view("absent")).to_polars()


def test_a_source_is_checked_before_it_is_applied(store: Store) -> None:
    checked = PolarsOfflineStore()
    store.write(features([("a", at(0), 3)]))
    checked.validate_data_source(store.config, view().batch_source)
    found = dict(checked.get_table_column_names_and_types_from_data_source(store.config, view().batch_source))
    assert found["clicks"] == "int64"
    wrong = FileSource(name="wrong", path="stats.parquet", timestamp_field="moment")
    with pytest.raises(InputError, match="moment"):
        checked.validate_data_source(store.config, wrong)
    with pytest.raises(IncompatibleError, match="FileSource"):
        checked.validate_data_source(store.config, SimpleNamespace(name="table", timestamp_field="t"))


def test_a_feature_named_like_an_entity_column_is_refused_unless_its_full_name_is_asked_for(store: Store) -> None:
    store.write(features([("a", at(0), 3)]))
    asked = entities([("a", at(1))], clicks=[9])
    with pytest.raises(InputError, match="full_feature_names"):
        store.ask(asked).to_polars()
    assert store.ask(asked, full=True).to_polars().select("clicks", "stats__clicks").rows() == [(9, 3)]


def test_several_keys_are_matched_together(store: Store) -> None:
    rows = features([("a", at(0), 1), ("a", at(1), 2), ("b", at(0), 3)]).with_columns(item_id=pl.Series([10, 20, 10]))
    store.write(rows)
    both = view()
    both.entity_columns = [Field(name="user_id", dtype=String), Field(name="item_id", dtype=Int64)]
    asked = entities([("a", at(2)), ("a", at(2)), ("b", at(2)), ("b", at(2))], item_id=[10, 20, 10, 20])
    assert store.clicks(asked, both) == [1, 2, 3, None]


def test_a_view_without_entities_says_the_same_about_everybody(store: Store) -> None:
    store.write(features([("x", at(3), 3), ("x", at(1), 1)]).drop("user_id"))
    world = view()
    world.entity_columns = [DUMMY_ENTITY_FIELD]
    assert store.clicks(entities([("a", at(4)), ("b", at(2)), ("a", at(0))]), world) == [3, 1, None]


def test_fields_that_the_source_maps_go_by_their_new_names(store: Store) -> None:
    renamed = {"user_id": "uid", "event_timestamp": "moment", "clicks": "n"}
    store.write(features([("a", at(1), 1), ("a", at(3), 3)]).rename(renamed))
    mapped = view()
    mapped.batch_source.field_mapping = {old: new for new, old in renamed.items()}
    assert store.clicks(entities([("a", at(2)), ("a", at(3))]), mapped) == [1, 3]
    found = newest_by_range(store.config, mapped.batch_source, ["user_id"], ["clicks"], "event_timestamp", None, at(0), at(2), 10)
    assert [part.select("user_id", "clicks").rows() for part in found] == [[("a", 1)]]
    raw = PolarsOfflineStore.pull_latest_from_table_or_query(
        store.config, mapped.batch_source, ["uid"], ["n"], "moment", None, at(0), at(9)
    )
    assert raw.to_polars().select("uid", "n").rows() == [("a", 3)]


@pytest.mark.parametrize("names", [("user_id", "clicks"), ("uid", "n")], ids=["new names", "old names"])
def test_a_write_takes_the_names_on_both_sides_of_the_mapping(store: Store, names: tuple[str, str]) -> None:
    store.write(features([("a", at(1), 1)]).rename({"user_id": "uid", "clicks": "n"}))
    mapped = view()
    mapped.batch_source.field_mapping = {"uid": "user_id", "n": "clicks"}
    pushed = features([("a", at(2), 2)]).rename(dict(zip(("user_id", "clicks"), names, strict=True)))
    PolarsOfflineStore.offline_write_batch(store.config, mapped, pushed.to_arrow(), None)
    assert store.clicks(entities([("a", at(2))]), mapped) == [2]


def test_rows_created_after_the_question_can_count_as_unknown(store: Store) -> None:
    rows = features([("a", at(1), 1), ("a", at(1), 11), ("a", at(2), 2), ("a", at(0), 0)])
    store.write(rows.with_columns(created=pl.Series([at(1), at(5), at(4), at(9)], dtype=TIME)))
    asked = entities([("a", at(hour)) for hour in (1, 3, 4, 6, 10)])
    created = view(created="created")
    assert store.clicks(asked, created) == [11, 2, 2, 2, 2]
    assert store.ask(asked, created, filter_by_created_timestamp=True).to_polars()["clicks"].to_list() == [1, 1, 2, 2, 2]


def test_a_large_view_joined_in_parts_gives_the_same_answer(store: Store) -> None:
    store.write(features([(f"u{number % 7}", at(number % 5), number) for number in range(50)]))
    asked = entities([(f"u{number % 9}", at(number % 6)) for number in range(40)])
    left, rows, rule = question_of(store, asked)
    parts = [part for part, _ in as_of._parts(left, rows, rule, 10)]
    assert len(parts) == 5
    assert sum(part.height for part in parts) == asked.height
    assert as_of.newest_known(left, rows, rule, rows_per_part=10)["clicks"].to_list() == store.clicks(asked)


def question_of(store: Store, asked: pl.DataFrame) -> tuple[pl.DataFrame, pl.LazyFrame, as_of.Rule]:
    rows = pl.scan_parquet(store.folder / "stats.parquet").rename({"event_timestamp": as_of.KNOWN})
    left = asked.rename({"event_timestamp": as_of.ASKED}).with_row_index(as_of.ROW)
    return left, rows, as_of.Rule(("user_id",), None, False, False)


def test_a_label_view_is_joined_by_its_newest_label_and_refused_when_labelers_vote(store: Store) -> None:
    store.write(features([("a", at(1), 1), ("a", at(3), 0)]))
    source = view().batch_source
    schema = [Field(name="user_id", dtype=String), Field(name="clicks", dtype=Int64)]
    newest = LabelView(name="stats", source=source, entities=[USER], schema=schema)
    assert store.clicks(entities([("a", at(2)), ("a", at(3)), ("b", at(3))]), newest) == [1, 0, None]
    vote = LabelView(name="stats", source=source, entities=[USER], schema=schema, conflict_policy=ConflictPolicy.MAJORITY_VOTE)
    with pytest.raises(IncompatibleError, match="majority_vote"):
        store.clicks(entities([("a", at(2))]), vote)


def test_metadata_names_the_keys_and_the_range_of_times(store: Store) -> None:
    store.write(features([("a", at(0), 3)]))
    found = store.ask(entities([("a", at(2)), ("a", at(1))], label=[0, 1]).lazy()).metadata
    assert (found.keys, found.min_event_timestamp, found.max_event_timestamp) == (["user_id", "label"], at(1), at(2))
    assert store.ask(entities([])).metadata.min_event_timestamp.year == 1970


HOURS = st.integers(0, 8)
KNOWN = st.lists(st.tuples(st.sampled_from("abc"), HOURS, st.integers(0, 99)), max_size=25)
ASKED = st.lists(st.tuples(st.sampled_from("abcd"), HOURS), max_size=25)


@settings(max_examples=60, deadline=None)
@given(KNOWN, ASKED, st.sampled_from([0, 1, 3]), st.sampled_from([[], [1], [0, 1]]))
def test_agrees_with_a_judge_that_looks_at_every_row(
    tmp_path_factory: pytest.TempPathFactory,
    known: list[tuple[str, int, int]],
    asked: list[tuple[str, int]],
    ttl: int,
    layout: list[int],
) -> None:
    """In files of any order, by time, and by key and time: the two that need no sorting."""
    known = sorted(known, key=lambda row: [row[at] for at in layout])

    def judge(user: str, hour: int) -> int | None:
        seen = [(when, order, clicks) for order, (who, when, clicks) in enumerate(known) if who == user and when <= hour]
        in_time = [row for row in seen if not ttl or hour - row[0] <= ttl]
        return max(in_time)[2] if in_time else None

    store = Store(tmp_path_factory.mktemp("judge"))
    store.write(features([(who, at(when), clicks) for who, when, clicks in known]))
    frame = entities([(who, at(hour)) for who, hour in asked])
    answer = store.ask(frame, view(ttl=timedelta(hours=ttl))).to_polars()
    assert answer["clicks"].to_list() == [judge(who, hour) for who, hour in asked]
    assert answer.drop("clicks").equals(frame)


CREATIONS = st.lists(st.tuples(st.sampled_from("ab"), HOURS, st.none() | HOURS), max_size=25)


@settings(max_examples=60, deadline=None)
@given(CREATIONS, ASKED, st.sampled_from([0, 2]))
def test_what_was_not_created_yet_agrees_with_a_judge_too(
    tmp_path_factory: pytest.TempPathFactory, known: list[tuple[str, int, int | None]], asked: list[tuple[str, int]], ttl: int
) -> None:
    def judge(user: str, hour: int) -> int | None:
        rows = [(when, made, order) for order, (who, when, made) in enumerate(known) if who == user and made is not None]
        seen = [row for row in rows if max(row[:2]) <= hour and (not ttl or hour - row[0] <= ttl)]
        return max(seen)[2] if seen else None

    store = Store(tmp_path_factory.mktemp("judge"))
    created = pl.Series([None if made is None else at(made) for _, _, made in known], dtype=TIME)
    rows = features([(who, at(when), order) for order, (who, when, _) in enumerate(known)])
    store.write(rows.with_columns(created=created))
    frame = entities([(who, at(hour)) for who, hour in asked])
    stats = view(ttl=timedelta(hours=ttl), created="created")
    answer = store.ask(frame, stats, filter_by_created_timestamp=True).to_polars()
    assert answer["clicks"].to_list() == [judge(who, hour) for who, hour in asked]


def test_ids_of_another_type_are_read_as_the_sources(store: Store) -> None:
    store.write(features([("7", at(0), 3)]))
    asked = entities([("x", at(1)), ("x", at(1))]).with_columns(user_id=pl.Series([7, 8]))
    assert store.clicks(asked) == [3, None]
    assert store.clicks(asked.with_columns(pl.col("user_id").cast(pl.String).cast(pl.Categorical))) == [3, None]


# --- the newest rows, piece by piece ------------------------------------------------------------------------------------------


@pytest.fixture
def histories(tmp_path: Path) -> tuple[RepoConfig, FileSource, pl.DataFrame]:
    """A source in no order, with keys of many lengths, some rows without a key, ties in time, and lists."""
    random = np.random.default_rng(0)
    ids = [None if number % 50 == 7 else f"{'u' * (number % 5)}{number % 90}" for number in range(2000)]
    table = pl.DataFrame(
        {
            "user_id": ids,
            "event_timestamp": pl.Series(random.integers(0, 40, 2000) * 1_000_000).cast(pl.Datetime("us", "UTC")),
            "items": [[number, -number] for number in range(2000)],
        }
    )
    table.write_parquet(tmp_path / "table.parquet", row_group_size=97)
    config = RepoConfig(
        project="pieces", provider="local", registry=str(tmp_path / "r.db"), repo_path=tmp_path,
        entity_key_serialization_version=3,
        offline_store={"type": "feature_repo.polars_store.PolarsOfflineStore"}, online_store={"type": "sqlite"},
    )  # fmt: skip
    return config, FileSource(name="table", path="table.parquet", timestamp_field="event_timestamp"), table


@pytest.mark.parametrize("rows", [1, 7, 64, 100_000])
def test_newest_rows_come_whole_in_pieces_of_any_size(histories: tuple[RepoConfig, FileSource, pl.DataFrame], rows: int) -> None:
    config, source, table = histories
    start, end = (datetime.fromtimestamp(second, UTC) for second in (0, 30))
    pieces = list(newest_by_range(config, source, ["user_id"], ["items"], "event_timestamp", None, start, end, rows))
    assert all(piece.height <= max(rows, 2000 // 32) for piece in pieces)
    found = pl.concat(pieces)
    known = table.drop_nulls("user_id").filter(pl.col("event_timestamp") <= end)
    expected = known.sort("event_timestamp", maintain_order=True).unique("user_id", keep="last", maintain_order=True)
    by_key = (pl.col("user_id").str.len_bytes(), pl.col("user_id"))
    assert found.equals(expected.sort(*by_key).select(found.columns))


def test_a_source_that_is_replaced_while_it_is_read_is_noticed(
    histories: tuple[RepoConfig, FileSource, pl.DataFrame], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Row numbers of one file mean nothing in another: what is fetched then belongs to somebody else."""
    config, source, table = histories
    other = table.reverse().with_row_index("__row").lazy()
    fetched = newest_rows._fetched
    monkeypatch.setattr(newest_rows, "_fetched", lambda _, chosen: fetched(other, chosen))
    start, end = (datetime.fromtimestamp(second, UTC) for second in (0, 30))
    with pytest.raises(BusyError, match="source 'table' was replaced"):
        next(newest_by_range(config, source, ["user_id"], ["items"], "event_timestamp", None, start, end, 10))
