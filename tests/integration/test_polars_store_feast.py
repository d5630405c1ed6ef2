"""The offline store under real Feast: definitions applied to a SQL registry, questions asked through FeatureStore."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import polars as pl
import pytest
from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    RepoConfig,
    RequestSource,
    ValueType,
)
from feast.data_source import PushMode
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.infra.offline_stores.file_source import SavedDatasetFileStorage
from feast.labeling.label_view import LabelView
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Float64, Int64, String

from tandem.core.errors import IncompatibleError
from tandem.core.schema import TIME

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
ITEM = Entity(name="item", join_keys=["item_id"], value_type=ValueType.INT64)


def at(hours: float) -> datetime:
    return NOON + timedelta(hours=hours)


def table(columns: dict[str, list[Any]], **types: Any) -> pl.DataFrame:
    return pl.DataFrame(columns, schema_overrides={"event_timestamp": TIME, "moment": TIME, **types})


def open_store(home: Path, **offline: Any) -> FeatureStore:
    return FeatureStore(
        config=RepoConfig(
            project="shop",
            provider="local",
            registry={"registry_type": "sql", "path": f"sqlite:///{home / 'registry.db'}"},
            offline_store={"type": "feature_repo.polars_store.PolarsOfflineStore", **offline},
            online_store={"type": "sqlite", "path": str(home / "online.db")},
            batch_engine={"type": "feature_repo.engine.PolarsComputeEngine"},
            entity_key_serialization_version=3,
            repo_path=home,
        )
    )


def user_view(**more: Any) -> FeatureView:
    source = FileSource(name="users", path="users.parquet", timestamp_field="event_timestamp", **more)
    return FeatureView(name="users", entities=[USER], source=source, schema=[Field(name="age", dtype=Int64)])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    rows = {"user_id": ["ann", "bob", "ann"], "event_timestamp": [at(0), at(1), at(2)], "age": [30, 40, 31]}
    table(rows).write_parquet(tmp_path / "users.parquet")
    return tmp_path


ASKED = table({"user_id": ["bob", "ann", "ann", "eve"], "event_timestamp": [at(3), at(3), at(1), at(3)], "label": [1, 0, 1, 0]})


@pytest.mark.parametrize("convert", [lambda frame: frame, pl.DataFrame.to_pandas, pl.DataFrame.to_arrow, pl.DataFrame.lazy])
def test_any_entity_frame_keeps_its_rows_and_their_order(home: Path, convert: Any) -> None:
    store = open_store(home)
    store.apply([USER, user_view()])
    answer = store.get_historical_features(entity_df=convert(ASKED), features=["users:age"]).to_polars()
    assert answer.select("user_id", "label", "age").rows() == [("bob", 1, 40), ("ann", 0, 31), ("ann", 1, 30), ("eve", 0, None)]


def test_types_of_features_that_no_schema_names_are_inferred_from_the_table(home: Path) -> None:
    columns = {"words": [["a"], None, ["b", "c"]], "share": [0.5, 1.0, None], "name": ["x", "y", None]}
    pl.read_parquet(home / "users.parquet").with_columns(**{k: pl.Series(v) for k, v in columns.items()}).write_parquet(
        home / "users.parquet"
    )
    store = open_store(home)
    view = user_view()
    store.apply([USER, FeatureView(name="users", entities=[USER], source=view.batch_source)])
    found = {field.name: str(field.dtype) for field in store.get_feature_view("users").features}
    assert found == {"age": "Int64", "words": "Array(String)", "share": "Float64", "name": "String"}


def test_a_mapped_source_goes_offline_online_and_back_under_its_new_names(home: Path) -> None:
    old = pl.read_parquet(home / "users.parquet").rename({"user_id": "uid", "age": "years", "event_timestamp": "moment"})
    old.write_parquet(home / "users.parquet")
    store = open_store(home)
    store.apply([USER, user_view(field_mapping={"uid": "user_id", "years": "age", "moment": "event_timestamp"})])
    offline = store.get_historical_features(entity_df=ASKED, features=["users:age"]).to_polars()
    assert offline["age"].to_list() == [40, 31, 30, None]
    store.materialize(at(-1), at(9), disable_event_timestamp=False)
    online = store.get_online_features(features=["users:age"], entity_rows=[{"user_id": "ann"}, {"user_id": "bob"}])
    assert online.to_dict()["age"] == [31, 40]
    store.write_to_offline_store("users", pd.DataFrame({"uid": ["eve"], "moment": [at(3)], "years": [50]}))
    offline = store.get_historical_features(entity_df=ASKED, features=["users:age"]).to_polars()
    assert offline["age"].to_list() == [40, 31, 30, 50]


def test_one_view_is_joined_twice_under_other_keys_and_names(home: Path) -> None:
    store = open_store(home)
    view = user_view()
    store.apply([USER, view])
    pair = FeatureService(
        name="pair",
        features=[
            view.with_name("giver").with_join_key_map({"user_id": "from"}),
            view.with_name("taker").with_join_key_map({"user_id": "to"}),
        ],
    )
    store.apply([pair])
    asked = table({"from": ["ann", "bob"], "to": ["bob", "nobody"], "event_timestamp": [at(3), at(3)]})
    answer = store.get_historical_features(entity_df=asked, features=pair, full_feature_names=True).to_polars()
    assert answer.select("giver__age", "taker__age").rows() == [(31, 40), (40, None)]


def test_a_view_of_two_keys_and_one_of_none(home: Path) -> None:
    crossed = {"user_id": ["ann", "ann"], "item_id": [1, 2], "event_timestamp": [at(0), at(0)], "seen": [3, 4]}
    table(crossed).write_parquet(home / "crossed.parquet")
    table({"event_timestamp": [at(0), at(2)], "rides": [10, 12]}).write_parquet(home / "world.parquet")
    sources = {
        name: FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp") for name in ("crossed", "world")
    }
    seen = FeatureView(name="crossed", entities=[USER, ITEM], source=sources["crossed"], schema=[Field(name="seen", dtype=Int64)])
    world = FeatureView(name="world", entities=[], source=sources["world"], schema=[Field(name="rides", dtype=Int64)])
    store = open_store(home)
    store.apply([USER, ITEM, seen, world])
    asked = table({"item_id": [2, 1, 3], "user_id": ["ann"] * 3, "event_timestamp": [at(1), at(3), at(-1)]})
    answer = store.get_historical_features(entity_df=asked, features=["crossed:seen", "world:rides"]).to_polars()
    assert answer.select("seen", "rides").rows() == [(4, 10), (3, 12), (None, None)]


@pytest.mark.parametrize("path", ["saved", "saved.parquet"], ids=["folder", "file"])
@pytest.mark.parametrize("full", [False, True], ids=["short", "full"])
def test_a_saved_dataset_is_read_back_and_not_overwritten_unasked(home: Path, path: str, full: bool) -> None:
    store = open_store(home)
    store.apply([USER, user_view()])
    job = store.get_historical_features(entity_df=ASKED, features=["users:age"], full_feature_names=full)
    storage = SavedDatasetFileStorage(path=path)
    store.create_saved_dataset(from_=job, name="march", storage=storage)
    found = store.get_saved_dataset("march").to_df()
    name = "users__age" if full else "age"
    assert sorted(found[name].dropna()) == [30, 31, 40]
    assert len(found) == ASKED.height
    assert (home / path).exists()
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        store.create_saved_dataset(from_=job, name="march", storage=storage)


def test_a_pushed_label_counts_from_its_time_on(home: Path) -> None:
    (home / "labels").mkdir()
    schema = {"user_id": pl.String, "event_timestamp": TIME, "churned": pl.Int64, "labeler": pl.String}
    pl.DataFrame([("ann", at(0), 0, "model")], schema=schema, orient="row").write_parquet(home / "labels" / "part-0.parquet")
    source = FileSource(name="labels", path="labels", timestamp_field="event_timestamp")
    fields = [Field(name="user_id", dtype=String), Field(name="churned", dtype=Int64), Field(name="labeler", dtype=String)]
    labels = LabelView(name="labels", entities=[USER], source=PushSource(name="push", batch_source=source), schema=fields)
    store = open_store(home)
    store.apply([USER, user_view(), labels])
    for hours, churned in ((2, 0), (2, 1)):
        row = pd.DataFrame({"user_id": ["ann"], "event_timestamp": [at(hours)], "churned": [churned], "labeler": ["person"]})
        store.push("push", row, to=PushMode.OFFLINE)
    answer = store.get_historical_features(entity_df=ASKED, features=["users:age", "labels:churned"]).to_polars()
    assert answer["churned"].to_list() == [None, 1, 0, None]


def test_creation_times_can_hide_what_was_backfilled_later(home: Path) -> None:
    rows = {"user_id": ["ann"] * 2, "event_timestamp": [at(0)] * 2, "age": [30, 99], "made": [at(0), at(5)]}
    table(rows, made=TIME).write_parquet(home / "users.parquet")
    store = open_store(home)
    store.apply([USER, user_view(created_timestamp_column="made")])
    asked = table({"user_id": ["ann", "ann"], "event_timestamp": [at(1), at(6)]})
    ask = store.get_historical_features
    assert ask(entity_df=asked, features=["users:age"]).to_polars()["age"].to_list() == [99, 99]
    hidden = ask(entity_df=asked, features=["users:age"], filter_by_created_timestamp=True)
    assert hidden.to_polars()["age"].to_list() == [30, 99]


def test_without_an_entity_frame_each_known_row_is_asked_about(home: Path) -> None:
    store = open_store(home)
    store.apply([USER, user_view()])
    answer = store.get_historical_features(features=["users:age"], start_date=at(1), end_date=at(2)).to_polars()
    assert answer.select("user_id", "age").rows() == [("bob", 40), ("ann", 31)]


def test_stored_python_runs_in_training_frames_only_when_it_is_allowed(home: Path) -> None:
    years = RequestSource(name="years", schema=[Field(name="more", dtype=Int64)])
    view = user_view()

    @on_demand_feature_view(sources=[view, years], schema=[Field(name="later", dtype=Float64)], mode="pandas")
    def older(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"later": (inputs["age"] + inputs["more"]).astype("float64")})

    open_store(home).apply([USER, view, older])
    asked = ASKED.select("user_id", "event_timestamp", more=pl.lit(10))
    with pytest.raises(IncompatibleError, match="on_demand_views: true"):
        open_store(home).get_historical_features(entity_df=asked, features=["users:age", "older:later"])
    allowed = open_store(home, on_demand_views=True)
    answer = allowed.get_historical_features(entity_df=asked, features=["users:age", "older:later"]).to_df()
    assert answer["later"].tolist()[:3] == [50.0, 41.0, 40.0]
