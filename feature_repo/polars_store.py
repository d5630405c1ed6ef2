"""A Feast offline store on Polars: point-in-time joins that keep every entity row, in its order.

In: Feast's calls (`get_historical_features`, `pull_latest`, `pull_all`, `offline_write_batch`, logged features) on Parquet file
sources, see `parquet.py`. Out: retrieval jobs that hand over Polars frames or Arrow tables of one chunk. The rule is Feast's: the
newest feature row with feature time <= entity time and, where the view has a ttl, entity time - feature time <= ttl. Of rows with
one key and one time the later created one wins, else the later in the file. Nothing here needs pandas, and nothing runs before
it is asked for. The join itself is in `as_of.py`, the newest rows of large sources in `newest_rows.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final, Literal, cast

import pandas as pd
import polars as pl
import pyarrow as pa
from feast.data_source import DataSource
from feast.errors import SavedDatasetLocationAlreadyExists
from feast.feature_logging import LoggingConfig
from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL, FeatureView
from feast.infra.offline_stores.file_source import FileLoggingDestination, SavedDatasetFileStorage
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.labeling.conflict_policy import ConflictPolicy
from feast.on_demand_feature_view import OnDemandFeatureView
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from feast.utils import compute_non_entity_date_range

from feature_repo.as_of import ASKED, CREATED, KNOWN, ROW, Rule, newest_known
from feature_repo.frames import EntityFrame, as_polars, as_utc, between, mapped, named, plain_arrow, utc
from feature_repo.newest_rows import newest_of
from feature_repo.parquet import append, exists, is_folder, place, scan, write_file, write_parts
from tandem.core.errors import IncompatibleError, InputError
from tandem.core.folders import whole_folder
from tandem.core.schema import TIME

_FOR_EVER: Final = timedelta(days=365_000)
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_ROWS_PER_RANGE: Final = 5_000_000


class PolarsOfflineStoreConfig(FeastConfigBaseModel):  # type: ignore[misc]
    """`offline_store` in `feature_store.yaml`; relative source paths start from `root` (default: the repository).

    With `on_demand_views` training frames may ask for on-demand views: Python from the registry then runs in the asking process.
    """

    type: Literal["feature_repo.polars_store.PolarsOfflineStore"] = "feature_repo.polars_store.PolarsOfflineStore"
    root: str | None = None
    on_demand_views: bool = False


class PolarsRetrievalJob(RetrievalJob):  # type: ignore[misc]
    """A query that runs when its result is asked for; `to_polars` gives the frame without a detour."""

    def __init__(
        self,
        config: RepoConfig,
        run: Callable[[], pl.DataFrame],
        full_feature_names: bool = False,
        metadata: Callable[[], RetrievalMetadata] | None = None,
        on_demand_feature_views: Sequence[OnDemandFeatureView] = (),
    ) -> None:
        self._config = config
        self._run = run
        self._full_feature_names = full_feature_names
        self._metadata = metadata
        self._on_demand_feature_views = list(on_demand_feature_views)

    def to_polars(self) -> pl.DataFrame:
        """The result, in one chunk; without the features of on-demand views."""
        return self._run().rechunk()

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        return plain_arrow(self.to_polars())

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return cast(pd.DataFrame, self._to_arrow_internal(timeout).to_pandas())

    def persist(self, storage: SavedDatasetFileStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """Write the result as one Parquet file, or a folder where the path does not end in `.parquet`.

        Raises SavedDatasetLocationAlreadyExists rather than overwrite unasked.
        """
        where = place(self._config, storage.file_options.uri)
        if exists(where) and not allow_overwrite:
            raise SavedDatasetLocationAlreadyExists(location=str(where))
        frame = cast(pl.DataFrame, pl.from_arrow(self.to_arrow())) if self._on_demand_feature_views else self.to_polars()
        if isinstance(where, Path) and not where.name.endswith(".parquet"):
            with whole_folder(where) as folder:
                frame.write_parquet(folder / "part-0.parquet")
        else:
            write_file(f"{where}/part-0.parquet" if is_folder(where) and isinstance(where, str) else where, frame)

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        """Empty unless `on_demand_views` is set: Python stored in a registry is not run unasked."""
        return self._on_demand_feature_views

    @property
    def metadata(self) -> RetrievalMetadata | None:
        """Features, keys and the range of entity times; a lazy entity frame is collected for it."""
        return self._metadata() if self._metadata else None


class PolarsOfflineStore(OfflineStore):  # type: ignore[misc]
    """Feast's offline store interface over Parquet files and folders of them."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: EntityFrame | str,
        registry: Any,
        project: str,
        full_feature_names: bool = False,
        filter_by_created_timestamp: bool = False,
        **options: Any,
    ) -> PolarsRetrievalJob:
        """Join the features named by `feature_refs` to each entity row as they were known at its timestamp.

        `entity_df` is a Polars, pandas or Arrow frame with the views' join keys and one timestamp column, or None with
        `start_date` and `end_date` in `options`: then each (key, time) that a view knows in that range is an entity row.
        With `filter_by_created_timestamp` rows created after the entity time count as unknown.
        Raises InputError for SQL text, missing keys or a timestamp that is not one.
        """
        if isinstance(entity_df, str):
            raise InputError("an entity frame is a table here, not SQL text; pass a Polars, pandas or Arrow frame")
        plans = [_ViewPlan.of(view, feature_refs, full_feature_names) for view in feature_views]
        on_demand = _on_demand_views(config, feature_refs, registry, project)
        _check_all_found(feature_refs, plans, on_demand)

        def entities() -> pl.DataFrame:
            return _known_entities(config, feature_views, plans, **options) if entity_df is None else as_polars(entity_df)

        def run() -> pl.DataFrame:
            return _join(config, entities(), plans, filter_by_created_timestamp)

        return PolarsRetrievalJob(config, run, full_feature_names, lambda: _metadata(entities(), feature_refs), on_demand)

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> PolarsRetrievalJob:
        """The newest row per entity with start_date <= time <= end_date; columns go by the source's own names."""
        order = [timestamp_field, *named(created_timestamp_column)]
        rows = between(utc(scan(config, data_source), *order), timestamp_field, start_date, end_date)
        found = rows.select(*join_key_columns, *feature_name_columns, *order)

        def run() -> pl.DataFrame:
            if not join_key_columns:
                return found.sort(*order, maintain_order=True).tail(1).with_columns(_dummy()).collect()
            return pl.concat(list(newest_of(found, join_key_columns, order, _ROWS_PER_RANGE)))

        return PolarsRetrievalJob(config, run)

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
        order = [timestamp_field, *named(created_timestamp_column)]

        def run() -> pl.DataFrame:
            rows = between(utc(scan(config, data_source), *order), timestamp_field, start_date, end_date)
            columns = list(dict.fromkeys([*join_key_columns, *feature_name_columns, *order]))
            extra = [] if join_key_columns else [_dummy()]
            return rows.select(columns).sort(*order, maintain_order=True).with_columns(*extra).collect()

        return PolarsRetrievalJob(config, run)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Append rows to the view's source, cast to its types: a new part in a folder, a rewritten file otherwise.

        Columns go by the source's names or by those its field mapping gives them. Raises InputError when columns are missing or
        do not cast, and BusyError while another run writes the same source.
        """
        source = _source_of(feature_view)
        rows = as_polars(table)
        old_names = {new: old for old, new in source.field_mapping.items() if old not in rows.columns and new in rows.columns}
        written = append(config, source, lambda schema: _cast_to(schema, rows.rename(old_names), feature_view.name))
        if progress:
            progress(written)

    @staticmethod
    def write_logged_features(
        config: RepoConfig, data: pa.Table | Path, source: Any, logging_config: LoggingConfig, registry: Any
    ) -> None:
        """Add logged features to the destination's folder, below `name=value/` folders where it has `partition_by`."""
        destination = logging_config.destination
        if not isinstance(destination, FileLoggingDestination):
            raise IncompatibleError(f"logs go to files here, not to a {type(destination).__name__}; use FileLoggingDestination")
        rows = pl.read_parquet(data / "**/*.parquet" if data.is_dir() else data) if isinstance(data, Path) else as_polars(data)
        write_parts(place(config, destination.path), rows, destination.partition_by or [])

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """Names and Arrow types of a source's columns."""
        schema = plain_arrow(scan(config, data_source).head(0).collect()).schema
        return zip(schema.names, map(str, schema.types), strict=True)

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """Raise unless the source is there and holds its timestamp column."""
        columns = mapped(scan(config, data_source), data_source).collect_schema().names()
        if data_source.timestamp_field and data_source.timestamp_field not in columns:
            raise InputError(f"source {data_source.name!r} has no column {data_source.timestamp_field!r}; it has {columns}")


# --- point in time ----------------------------------------------------------------------------------------------------------


class _ViewPlan:
    """What one view contributes: its source, its keys (view's column -> entity column) and features (view's name -> result's)."""

    def __init__(self, view: FeatureView, keys: Mapping[str, str], features: Mapping[str, str]) -> None:
        self.name: str = view.projection.name_to_use()
        self.source: DataSource = _source_of(view)
        self.ttl: timedelta | None = view.ttl if view.ttl and view.ttl < _FOR_EVER else None
        self.keys = keys
        self.features = features

    @classmethod
    def of(cls, view: FeatureView, refs: Sequence[str], full_names: bool) -> _ViewPlan:
        _check_policy(view)
        name = view.projection.name_to_use()
        prefix = view.projection.name_alias or view.projection.name
        wanted = dict.fromkeys(ref.split(":", 1)[1] for ref in refs if ref.split(":", 1)[0] == name)
        renamed = view.projection.join_key_map or {}
        columns = [column.name for column in view.entity_columns if column.name != DUMMY_ENTITY_ID]
        keys = {column: renamed.get(column, column) for column in columns}
        return cls(view, keys, {feature: f"{prefix}__{feature}" if full_names else feature for feature in wanted})

    def rows(self, config: RepoConfig) -> pl.LazyFrame:
        """Feature rows under the result's names, with keys and times under the names of the join."""
        field, created = self.source.timestamp_field, named(self.source.created_timestamp_column)
        rows = utc(mapped(scan(config, self.source), self.source), field, *created)
        keys = [pl.col(key).alias(joined) for key, joined in zip(self.keys, self.joined, strict=True)]
        times = [pl.col(field).alias(KNOWN), *(pl.col(each).alias(CREATED) for each in created)]
        return rows.select(*keys, *times, *(pl.col(feature).alias(result) for feature, result in self.features.items()))

    @property
    def joined(self) -> list[str]:
        """Names of the key columns during the join; the entity frame's own are left as they are."""
        return [f"__key_{key}" for key in self.keys]


def _join(config: RepoConfig, entities: pl.DataFrame, plans: Sequence[_ViewPlan], as_created: bool) -> pl.DataFrame:
    """Entity columns as given, then each view's features; same rows, same order."""
    _check_columns(entities, plans)
    asked = entities.with_row_index(ROW).with_columns(_asked(entities))
    answers = [_answer(config, asked, plan, as_created) for plan in plans if plan.features]
    return pl.concat([entities, *answers], how="horizontal")


def _answer(config: RepoConfig, asked: pl.DataFrame, plan: _ViewPlan, as_created: bool) -> pl.DataFrame:
    rows = plan.rows(config)
    types = rows.collect_schema()
    keys = zip(plan.keys.values(), plan.joined, strict=True)
    keyed = asked.select(ROW, ASKED, *(pl.col(column).cast(types[joined], strict=False).alias(joined) for column, joined in keys))
    return newest_known(keyed, rows, Rule(tuple(plan.joined), plan.ttl, CREATED in types, as_created))


def _asked(entities: pl.DataFrame) -> pl.Expr:
    """The entity frame's time, whatever its unit and zone; an empty frame may have no types at all."""
    if entities.is_empty():
        return pl.lit(None, TIME).alias(ASKED)
    return as_utc(entities.schema, _time_column(entities)).alias(ASKED)


def _time_column(entities: pl.DataFrame) -> str:
    if "event_timestamp" in entities.columns:
        return "event_timestamp"
    times = [column for column, dtype in entities.schema.items() if isinstance(dtype, pl.Datetime)]
    if len(times) != 1:
        raise InputError(f"the entity frame needs a column event_timestamp; its timestamps are {times}")
    return times[0]


def _metadata(entities: pl.DataFrame, refs: list[str]) -> RetrievalMetadata:
    """What a saved dataset is read back by: keys and the range of times; that of an empty frame is the epoch."""
    if entities.is_empty():
        return RetrievalMetadata(refs, [each for each in entities.columns if each != "event_timestamp"], _EPOCH, _EPOCH)
    column = _time_column(entities)
    times = entities.select(_asked(entities))[ASKED].drop_nulls()
    first, last = (times.min(), times.max()) if len(times) else (_EPOCH, _EPOCH)
    return RetrievalMetadata(refs, [each for each in entities.columns if each != column], first, last)


def _known_entities(
    config: RepoConfig,
    views: list[FeatureView],
    plans: Sequence[_ViewPlan],
    start_date: datetime | None = None,
    end_date: datetime | None = None,
    **_: Any,
) -> pl.DataFrame:
    """Every (key, time) that any of the views holds in the range; the views must share their keys.

    Without a start it lies the longest ttl before the end, or 30 days where there is none: Feast's rule.
    """
    keys = [tuple(plan.keys.items()) for plan in plans]
    if len(set(keys)) != 1:
        raise InputError(f"without an entity frame all views need the same keys, not {sorted({str(each) for each in keys})}")
    first, last = compute_non_entity_date_range(views, start_date, end_date)
    known = []
    for plan in plans:
        columns = [*(pl.col(joined).alias(c) for joined, c in zip(plan.joined, plan.keys.values(), strict=True))]
        rows = between(plan.rows(config), KNOWN, first, last)
        known.append(rows.select(*columns, pl.col(KNOWN).alias("event_timestamp")))
    return pl.concat(known).unique().sort("event_timestamp", *plans[0].keys.values()).collect()


def _source_of(view: FeatureView) -> DataSource:
    if view.batch_source is None:
        raise IncompatibleError(f"view {view.name!r} has no batch source; give it one before asking for its history")
    return view.batch_source


def _check_policy(view: FeatureView) -> None:
    """Label views: the newest label is the as-of rule; a vote over labelers would need all labels at every moment."""
    policy = getattr(view, "conflict_policy", ConflictPolicy.LAST_WRITE_WINS)
    if policy != ConflictPolicy.LAST_WRITE_WINS:
        raise IncompatibleError(
            f"label view {view.name!r} resolves by {policy.value}; training frames take the newest label only"
        )


def _check_columns(entities: pl.DataFrame, plans: Sequence[_ViewPlan]) -> None:
    missing = sorted({key for plan in plans for key in plan.keys.values() if key not in entities.columns})
    if missing:
        raise InputError(f"the entity frame lacks {missing}; it has {entities.columns}")
    twice = [name for plan in plans for name in plan.features.values() if name in entities.columns]
    if twice:
        raise InputError(f"features {twice} are columns of the entity frame already; ask with full_feature_names=True or rename")


def _on_demand_views(config: RepoConfig, refs: Sequence[str], registry: Any, project: str) -> list[OnDemandFeatureView]:
    allowed = getattr(config.offline_store, "on_demand_views", False)
    return cast(list[OnDemandFeatureView], OnDemandFeatureView.get_requested_odfvs(refs, project, registry)) if allowed else []


def _check_all_found(refs: Sequence[str], plans: Sequence[_ViewPlan], on_demand: Sequence[OnDemandFeatureView]) -> None:
    names = {plan.name for plan in plans} | {view.projection.name_to_use() for view in on_demand}
    stray = [ref for ref in refs if ref.split(":", 1)[0] not in names]
    if stray:
        raise IncompatibleError(
            f"{stray} are not features of plain feature views; on-demand views run only with offline_store.on_demand_views: true"
        )


def _dummy() -> pl.Expr:
    """The key that Feast gives to rows about nobody in particular."""
    return pl.lit(DUMMY_ENTITY_VAL).alias(DUMMY_ENTITY_ID)


def _cast_to(schema: pl.Schema, rows: pl.DataFrame, name: str) -> pl.DataFrame:
    missing = [column for column in schema if column not in rows.columns]
    if missing:
        raise InputError(f"rows for view {name!r} lack {missing}; they have {rows.columns}")
    try:
        return rows.select(_as_stored(rows.schema, column, dtype) for column, dtype in schema.items())
    except pl.exceptions.PolarsError as error:
        raise InputError(f"rows for view {name!r} do not fit its columns {dict(schema)}: {error}") from None


def _as_stored(schema: pl.Schema, column: str, dtype: pl.DataType) -> pl.Expr:
    if not isinstance(dtype, pl.Datetime):
        return pl.col(column).cast(dtype)
    moment = as_utc(schema, column) if schema[column] != pl.Null else pl.col(column).cast(TIME)
    zoned = moment.dt.convert_time_zone(dtype.time_zone) if dtype.time_zone else moment.dt.replace_time_zone(None)
    return zoned.cast(dtype)
