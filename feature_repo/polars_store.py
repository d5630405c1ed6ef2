"""A Feast offline store on Polars: point-in-time joins that keep every entity row, in its order.

In: Feast's calls (`get_historical_features`, `pull_latest`, `pull_all`, `offline_write_batch`) on Parquet file sources.
Out: retrieval jobs that hand over Polars frames or Arrow tables of one chunk. The rule is Feast's: the newest feature row with
feature time <= entity time and, where the view has a ttl, entity time - feature time <= ttl. Of rows with one key and one
time the later created one wins, else the later in the file. Nothing here needs pandas, and nothing runs before it is asked for.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeAlias, cast

import pandas as pd
import polars as pl
import pyarrow as pa
from feast.data_source import DataSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_view import FeatureView
from feast.infra.offline_stores.file_source import FileSource, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.repo_config import FeastConfigBaseModel, RepoConfig

from tandem.core.errors import IncompatibleError, InputError, NotFoundError
from tandem.core.folders import held
from tandem.core.schema import TIME

EntityFrame: TypeAlias = pl.DataFrame | pl.LazyFrame | pd.DataFrame | pa.Table | None

_ROW = "__row"
_ASKED = "__asked"
_KNOWN = "__known"
_CREATED = "__created"


class PolarsOfflineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]
    """`offline_store` in `feature_store.yaml`; relative source paths start from `root` (default: the repository)."""

    type: Literal["feature_repo.polars_store.PolarsOfflineStore"] = "feature_repo.polars_store.PolarsOfflineStore"
    root: str | None = None


class PolarsRetrievalJob(RetrievalJob):  # type: ignore[misc]
    """A query that runs when its result is asked for; `to_polars` gives the frame without a detour."""

    def __init__(
        self, run: Callable[[], pl.DataFrame], full_feature_names: bool = False, metadata: RetrievalMetadata = None
    ) -> None:
        self._run = run
        self._full_feature_names = full_feature_names
        self._metadata = metadata

    def to_polars(self) -> pl.DataFrame:
        """The result, in one chunk."""
        return self._run().rechunk()

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return self.to_polars().to_arrow(compat_level=pl.CompatLevel.oldest()).combine_chunks()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return cast(pd.DataFrame, self._to_arrow_internal(timeout).to_pandas())

    def persist(self, storage: SavedDatasetFileStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result as one Parquet file; raises SavedDatasetLocationAlreadyExists rather than overwrite unasked."""
        path = Path(storage.file_options.uri)
        if path.exists() and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=str(path))
        _replace_parquet(path, self.to_polars())

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[Any]:
        """Always empty: Python stored in a registry is never run here."""
        return []

    @property
    def metadata(self) -> RetrievalMetadata:
        return self._metadata


class PolarsOfflineStore(OfflineStore):  # type: ignore[misc]
    """Feast's offline store interface over Parquet files and folders of them."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: EntityFrame | str,
        registry: Any,
        project: str,
        full_feature_names: bool = False,
        **options: Any,
    ) -> PolarsRetrievalJob:
        """Join the features named by `feature_refs` to each entity row as they were known at its timestamp.

        `entity_df` is a Polars, pandas or Arrow frame with the views' join keys and one timestamp column, or None with
        `start_date` and `end_date` in `options`: then each (key, time) that a view knows in that range is an entity row.
        Raises InputError for SQL text, missing keys or a timestamp that is not one.
        """
        if isinstance(entity_df, str):
            raise InputError("an entity frame is a table here, not SQL text; pass a Polars, pandas or Arrow frame")
        plans = [_ViewPlan.of(view, feature_refs, full_feature_names) for view in feature_views]
        _check_all_found(feature_refs, plans)

        def run() -> pl.DataFrame:
            entities = _known_entities(config, plans, **options) if entity_df is None else as_polars(entity_df)
            return _join(config, entities, plans)

        return PolarsRetrievalJob(run, full_feature_names, RetrievalMetadata(features=feature_refs, keys=_keys(plans)))

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime,
        end_date: datetime,
    ) -> PolarsRetrievalJob:
        """The newest row per entity with start_date <= time <= end_date."""
        order = [timestamp_field, *_named(created_timestamp_column)]
        rows = _between(scan(config, data_source), timestamp_field, start_date, end_date)
        return PolarsRetrievalJob(
            _newest(rows.select(*join_key_columns, *feature_name_columns, *order), join_key_columns, order).collect
        )

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> PolarsRetrievalJob:
        """Every row with start_date <= time <= end_date, oldest first; an end that is None is open."""
        order = [timestamp_field, *_named(created_timestamp_column)]
        rows = _between(scan(config, data_source), timestamp_field, start_date, end_date)
        columns = [*join_key_columns, *feature_name_columns, *order]
        return PolarsRetrievalJob(rows.select(columns).sort(*order, maintain_order=True).collect)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Append rows to the view's source, cast to its types: a new part in a folder, a rewritten file otherwise.

        Raises InputError when columns are missing or do not cast, and BusyError while another run writes the same source.
        """
        path = source_path(config, feature_view.batch_source)
        with held(path.with_name(f".{path.name}.lock"), "an offline write"):
            rows = _cast_to(scan(config, feature_view.batch_source).collect_schema(), as_polars(table), feature_view.name)
            if path.is_dir():
                _replace_parquet(path / f"pushed-{uuid.uuid4().hex}.parquet", rows)
            else:
                _replace_parquet(path, pl.concat([pl.read_parquet(path), rows]))
        if progress:
            progress(rows.height)

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """Names and Arrow types of a source's columns."""
        schema = scan(config, data_source).head(0).collect().to_arrow(compat_level=pl.CompatLevel.oldest()).schema
        return zip(schema.names, map(str, schema.types), strict=True)

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """Raise unless the source is there and holds its timestamp column."""
        columns = scan(config, data_source).collect_schema().names()
        if data_source.timestamp_field not in columns:
            raise InputError(f"source {data_source.name!r} has no column {data_source.timestamp_field!r}; it has {columns}")


def newest_by_range(
    config: RepoConfig,
    source: DataSource,
    join_key_columns: Sequence[str],
    feature_name_columns: Sequence[str],
    timestamp_field: str,
    created_timestamp_column: str | None,
    start: datetime,
    end: datetime,
    rows: int,
) -> Iterator[pl.DataFrame]:
    """The newest row per entity with start <= time <= end, range by range of the keys, about `rows` source rows at a time.

    Ranges and rows come in the order of the first key's length, then of the key: the order of Feast's serialized keys.
    """
    order = [timestamp_field, *_named(created_timestamp_column)]
    found = _between(scan(config, source), timestamp_field, start, end)
    found = found.select(*join_key_columns, *feature_name_columns, *order).drop_nulls(list(join_key_columns))
    key = pl.col(join_key_columns[0]).cast(pl.String)
    for part in _key_ranges(found, key, rows):
        newest = _newest(found.filter(part) if part is not None else found, join_key_columns, order).collect()
        yield newest.sort(key.str.len_bytes(), key)


def _newest(rows: pl.LazyFrame, keys: Sequence[str], order: Sequence[str]) -> pl.LazyFrame:
    ordered = rows.sort(*keys, *order, maintain_order=True)
    return ordered.unique(keys, keep="last", maintain_order=True)


def _key_ranges(rows: pl.LazyFrame, key: pl.Expr, size: int) -> list[pl.Expr | None]:
    """Conditions that cut the rows into ranges of (length of key, key) of about `size` rows each; [None] for one range."""
    count = rows.select(pl.len()).collect().item()
    ranges = -(-count // size)
    if ranges < 2:
        return [None]
    step = max(1, count // (1000 * ranges))
    sample = rows.select(key.alias("key")).gather_every(step).sort(pl.col("key").str.len_bytes(), "key").collect()["key"]
    borders = [sample[len(sample) * at // ranges] for at in range(1, ranges)]
    above = [pl.lit(True), *(_reaches(key, border) for border in borders)]
    below = [*(~_reaches(key, border) for border in borders), pl.lit(True)]
    return [one & other for one, other in zip(above, below, strict=True)]


def _reaches(key: pl.Expr, border: str) -> pl.Expr:
    """Is (length of key, key) at or above that of the border?"""
    length = key.str.len_bytes()
    size = len(border.encode())
    return (length > size) | ((length == size) & (key >= border))


def source_path(config: RepoConfig, source: DataSource) -> Path:
    """Where a file source lies: absolute, or below the store's `root`."""
    if not isinstance(source, FileSource):
        raise IncompatibleError(f"source {source.name!r} is a {type(source).__name__}; this store reads FileSource only")
    root = getattr(config.offline_store, "root", None) or config.repo_path or "."
    return Path(root, source.path)


def scan(config: RepoConfig, source: DataSource) -> pl.LazyFrame:
    """Lazy rows of a source, with its timestamp in UTC microseconds (a push may have left nanoseconds)."""
    path = source_path(config, source)
    if not path.exists():
        raise NotFoundError(f"source {source.name!r}: {path} does not exist; run `tandem features build` first")
    pattern = str(path / "*.parquet") if path.is_dir() else str(path)
    rows = pl.scan_parquet(pattern, glob=path.is_dir(), cast_options=_LENIENT)
    return rows.with_columns(as_utc(rows.collect_schema(), source.timestamp_field))


_LENIENT = pl.ScanCastOptions(datetime_cast=["nanosecond-downcast", "convert-timezone"])


def as_utc(schema: pl.Schema, column: str) -> pl.Expr:
    """Expression: `column` as UTC microseconds; times without a zone are read as UTC. Raises InputError for other types."""
    dtype = schema.get(column)
    if dtype is None:
        raise InputError(f"no timestamp column {column!r}; there are {schema.names()}")
    if dtype == pl.Date or (isinstance(dtype, pl.Datetime) and dtype.time_zone is None):
        return pl.col(column).cast(pl.Datetime("us")).dt.replace_time_zone("UTC")
    if isinstance(dtype, pl.Datetime):
        return pl.col(column).cast(pl.Datetime("us", dtype.time_zone)).dt.convert_time_zone("UTC")
    raise InputError(f"column {column!r} has type {dtype}, not a timestamp; convert it before asking")


def as_polars(frame: EntityFrame) -> pl.DataFrame:
    """Any of the frames that Feast passes on, as a Polars DataFrame of the same rows in the same order."""
    if isinstance(frame, pl.LazyFrame):
        return frame.collect()
    if isinstance(frame, pd.DataFrame):
        return pl.from_pandas(frame)
    if isinstance(frame, pa.Table):
        return cast(pl.DataFrame, pl.from_arrow(frame))
    if isinstance(frame, pl.DataFrame):
        return frame
    raise InputError(f"an entity frame cannot be a {type(frame).__name__}; pass a Polars, pandas or Arrow frame")


class _ViewPlan:
    """What one view contributes: its source, its keys (source column -> entity column) and features (source -> result)."""

    def __init__(self, view: FeatureView, keys: dict[str, str], features: dict[str, str]) -> None:
        self.name: str = view.projection.name_to_use()
        self.source: DataSource = view.batch_source
        self.ttl: timedelta | None = view.ttl or None
        self.keys = keys
        self.features = features

    @classmethod
    def of(cls, view: FeatureView, refs: Sequence[str], full_names: bool) -> _ViewPlan:
        name = view.projection.name_to_use()
        wanted = [ref.split(":", 1)[1] for ref in refs if ref.split(":", 1)[0] == name]
        renamed = view.projection.join_key_map or {}
        keys = {column.name: renamed.get(column.name, column.name) for column in view.entity_columns}
        return cls(view, keys, {feature: f"{name}__{feature}" if full_names else feature for feature in wanted})

    def rows(self, config: RepoConfig) -> pl.LazyFrame:
        """Feature rows under the result's names, with their keys under `self.joined` names, oldest first."""
        created = self.source.created_timestamp_column or None
        rows = scan(config, self.source).filter(pl.col(key).is_not_null() for key in self.keys)
        keys = [pl.col(key).alias(joined) for key, joined in zip(self.keys, self.joined, strict=True)]
        order = [pl.col(self.source.timestamp_field).alias(_KNOWN), *(pl.col(each).alias(_CREATED) for each in _named(created))]
        features = [pl.col(feature).alias(result) for feature, result in self.features.items()]
        ordered = rows.select(*keys, *order, *features).sort(_KNOWN, *([_CREATED] if created else []), maintain_order=True)
        return ordered.drop(_CREATED, strict=False)

    @property
    def joined(self) -> list[str]:
        """Names of the key columns during the join; the entity frame's own are left as they are."""
        return [f"__key_{key}" for key in self.keys]


def _join(config: RepoConfig, entities: pl.DataFrame, plans: Sequence[_ViewPlan]) -> pl.DataFrame:
    """Entity columns as given, then each view's features; same rows, same order."""
    _check_keys(entities, plans)
    asked = _asked(entities)
    timeline = entities.lazy().with_row_index(_ROW).with_columns(asked).sort(_ASKED, maintain_order=True)
    for plan in plans:
        timeline = _as_of(timeline, plan.rows(config), plan)
    return timeline.sort(_ROW).drop(_ROW, _ASKED).collect()


def _as_of(timeline: pl.LazyFrame, rows: pl.LazyFrame, plan: _ViewPlan) -> pl.LazyFrame:
    types = rows.collect_schema()
    keys = zip(plan.keys.values(), plan.joined, strict=True)
    keyed = timeline.with_columns(pl.col(column).cast(types[joined], strict=False).alias(joined) for column, joined in keys)
    answered = keyed.join_asof(
        rows,
        left_on=_ASKED,
        right_on=_KNOWN,
        by=plan.joined,
        strategy="backward",
        tolerance=plan.ttl,
        check_sortedness=False,
    )
    return answered.drop(_KNOWN, *plan.joined, strict=False)


def _asked(entities: pl.DataFrame) -> pl.Expr:
    """The entity frame's time, whatever its unit and zone; an empty frame may have no types at all."""
    if entities.is_empty():
        return pl.lit(None, TIME).alias(_ASKED)
    times = [column for column, dtype in entities.schema.items() if isinstance(dtype, pl.Datetime)]
    if "event_timestamp" not in entities.columns and len(times) != 1:
        raise InputError(f"the entity frame needs a column event_timestamp; its timestamps are {times}")
    return as_utc(entities.schema, "event_timestamp" if "event_timestamp" in entities.columns else times[0]).alias(_ASKED)


def _known_entities(
    config: RepoConfig, plans: Sequence[_ViewPlan], start_date: datetime | None = None, end_date: datetime | None = None, **_: Any
) -> pl.DataFrame:
    """Every (key, time) that any of the views holds in the range; the views must share their keys."""
    keys = [tuple(plan.keys.items()) for plan in plans]
    if len(set(keys)) != 1:
        raise InputError(f"without an entity frame all views need the same keys, not {sorted({str(each) for each in keys})}")
    known = []
    for plan in plans:
        field = plan.source.timestamp_field
        rows = _between(scan(config, plan.source), field, start_date, end_date)
        known.append(rows.select(*(pl.col(k).alias(c) for k, c in plan.keys.items()), pl.col(field).alias("event_timestamp")))
    return pl.concat(known).unique().sort("event_timestamp", *plans[0].keys.values()).collect()


def _between(rows: pl.LazyFrame, field: str, start: datetime | None, end: datetime | None) -> pl.LazyFrame:
    if start is not None:
        rows = rows.filter(pl.col(field) >= _utc(start))
    if end is not None:
        rows = rows.filter(pl.col(field) <= _utc(end))
    return rows


def _utc(moment: datetime) -> pl.Expr:
    naive = moment.tzinfo is None
    literal = pl.lit(moment)
    return (literal.dt.replace_time_zone("UTC") if naive else literal.dt.convert_time_zone("UTC")).cast(TIME)


def _check_keys(entities: pl.DataFrame, plans: Sequence[_ViewPlan]) -> None:
    missing = [key for key in _keys(plans) if key not in entities.columns]
    if missing:
        raise InputError(f"the entity frame lacks {missing}; it has {entities.columns}")


def _check_all_found(refs: Sequence[str], plans: Sequence[_ViewPlan]) -> None:
    names = {plan.name for plan in plans}
    stray = [ref for ref in refs if ref.split(":", 1)[0] not in names]
    if stray:
        raise IncompatibleError(f"{stray} are not features of plain feature views; this store runs no on-demand views")


def _keys(plans: Sequence[_ViewPlan]) -> list[str]:
    return sorted({column for plan in plans for column in plan.keys.values()})


def _named(column: str | None) -> list[str]:
    return [column] if column else []


def _cast_to(schema: pl.Schema, rows: pl.DataFrame, name: str) -> pl.DataFrame:
    missing = [column for column in schema if column not in rows.columns]
    if missing:
        raise InputError(f"rows for view {name!r} lack {missing}; they have {rows.columns}")
    times = [as_utc(rows.schema, column) for column, dtype in schema.items() if isinstance(dtype, pl.Datetime)]
    try:
        return rows.with_columns(times).select(pl.col(column).cast(dtype) for column, dtype in schema.items())
    except pl.exceptions.PolarsError as error:
        raise InputError(f"rows for view {name!r} do not fit its columns {dict(schema)}: {error}") from None


def _replace_parquet(path: Path, frame: pl.DataFrame) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".partial-{uuid.uuid4().hex}")
    try:
        with beside.open("wb") as handle:
            frame.write_parquet(handle)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
