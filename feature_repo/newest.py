"""What our online stores have in common: the newest event wins, the future stays out, and whole columns are written at once.

In: a frame [key, event_timestamp, features...] of a view. Out: `NewestRows`, one row per entity in Feast's encoding, for the
store to keep unless it holds a newer one. The three stores are `sqlite_store.py`, `redis_store.py` and `postgres_store.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import polars as pl
from feast.feature_view import FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import extract_text_and_num
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig

from feature_repo.value_bytes import key_column, value_column
from feature_repo.views import MAX_AHEAD

KEY_VERSION: Final = 3
CONNECT_TIMEOUT_S: Final = 0.05
"""How long serving waits for a connection."""
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
RowWise = Sequence[tuple[EntityKey, dict[str, Value], datetime, Any]]
"""Rows as Feast's own commands hand them over: key, values by feature, event time, creation time."""

Answer = tuple[datetime | None, dict[str, Value] | None]
"""What a read gives for one entity: its event time and values by feature; (None, None) where it is unknown."""


@dataclass(frozen=True)
class Written:
    """What became of the entities of one write: stored, older than what was there, or further ahead than clocks may differ."""

    written: int = 0
    late: int = 0
    ahead: int = 0

    def __add__(self, other: Written) -> Written:
        return Written(self.written + other.written, self.late + other.late, self.ahead + other.ahead)


@dataclass(frozen=True)
class NewestRows:
    """N entities in the order of their keys: `keys` (Binary), `times` (Int64, UTC µs), and by feature `values` (Binary).

    A null value leaves what is stored. `texts` (String), of some features, are for SQL. `ahead` rows lay too far ahead.
    """

    keys: pl.Series
    times: pl.Series
    values: dict[str, pl.Series]
    texts: dict[str, pl.Series]
    ahead: int

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: pl.Series) -> NewestRows:
        """The rows that a boolean series marks."""
        values = {name: column.filter(chosen) for name, column in self.values.items()}
        texts = {name: column.filter(chosen) for name, column in self.texts.items()}
        return NewestRows(self.keys.filter(chosen), self.times.filter(chosen), values, texts, self.ahead)


class NewestOnlineStore(ABC):
    """What the engine, `push`, `forget` and erasure ask of an online store beyond Feast's interface.

    It stands before Feast's own store among the bases, so that Feast's commands write through the guards too.
    """

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: RowWise, progress: Callable[[int], Any] | None
    ) -> None:
        """Feast's row-wise write, with the guards; what is late or ahead is skipped."""
        self.store_newest(config, table, rows_of_messages(data, datetime.now(UTC)))
        if progress:
            progress(len(data))

    def write_newest(self, config: RepoConfig, view: FeatureView, frame: pl.DataFrame, now: datetime) -> Written:
        """`store_newest` of a frame [key, event_timestamp, features...]; of several rows of one entity the newest counts."""
        return self.store_newest(config, view, rows_of_frame(view, frame, now))

    @abstractmethod
    def store_newest(self, config: RepoConfig, view: FeatureView, rows: NewestRows) -> Written:
        """Store each entity's row, unless the store holds a newer one.

        Raises IntegrityError when the store does not hold afterwards what was written.
        """

    @abstractmethod
    def clear(self, config: RepoConfig, view: FeatureView) -> int:
        """Forget every entity of a view; returns how many there were."""

    @abstractmethod
    def erase(self, config: RepoConfig, view: FeatureView, ids: Sequence[str]) -> int:
        """Forget these entities of a view; returns how many there were."""

    def claim(self, config: RepoConfig, owner: str) -> str | None:
        """Leave a workspace's mark where there is none; returns the one that stands, None where the store needs none."""
        return None

    def scrub(self, config: RepoConfig) -> None:
        """See to it that what was erased cannot be read from the store's files either, where those are ours."""
        return

    @abstractmethod
    def extent(self, config: RepoConfig, view: FeatureView) -> tuple[int, datetime | None]:
        """How many entities a view holds, and the newest event time among them."""


def rows_of_frame(view: FeatureView, frame: pl.DataFrame, now: datetime) -> NewestRows:
    """Encode a frame; of several rows of one entity the newest counts, of equally new ones the last."""
    join_key, column = view.entity_columns[0].name, view.batch_source.timestamp_field
    in_time = frame.filter(pl.col(column) <= now + MAX_AHEAD)
    newest = in_time.sort(column, maintain_order=True).unique(join_key, keep="last", maintain_order=True)
    keys = binary_series(key_column(join_key, newest[join_key]))
    order = keys.arg_sort()
    newest = newest[order].rechunk()
    return NewestRows(
        keys[order],
        newest[column].dt.timestamp("us"),
        {each.name: binary_series(value_column(newest[each.name], each.dtype)) for each in view.features},
        _texts(view, newest),
        frame.height - in_time.height,
    )


def rows_of_messages(data: RowWise, now: datetime) -> NewestRows:
    """Encode Feast's row-wise form; a feature that a row does not name is null, and so is left as it is stored."""
    limit = microseconds(now + MAX_AHEAD)
    newest: dict[bytes, tuple[int, dict[str, Value]]] = {}
    ahead = 0
    for entity, values, moment, _ in data:
        key, when = serialize_entity_key(entity, KEY_VERSION), microseconds(moment)
        if when > limit:
            ahead += 1
        elif key not in newest or when >= newest[key][0]:
            newest[key] = (when, values)
    keys = sorted(newest)
    names = sorted({name for _, values in newest.values() for name in values})
    cells = {name: [newest[key][1].get(name) for key in keys] for name in names}
    return NewestRows(
        pl.Series(keys, dtype=pl.Binary),
        pl.Series([newest[key][0] for key in keys], dtype=pl.Int64),
        {name: pl.Series([_bytes(cell) for cell in column], dtype=pl.Binary) for name, column in cells.items()},
        {name: pl.Series([_text(cell) for cell in column], dtype=pl.String) for name, column in cells.items()},
        ahead,
    )


def answers(keys: Sequence[bytes], cells: Iterable[tuple[bytes, str, bytes, int]]) -> list[Answer]:
    """Per key its newest event time and its values by feature, from stored cells (key, feature, value, µs) in any order."""
    found: dict[bytes, dict[str, Value]] = {}
    times: dict[bytes, int] = {}
    for key, name, value, when in cells:
        found.setdefault(key, {})[name] = Value.FromString(value)
        times[key] = max(when, times.get(key, when))
    return [(moment_of(times[key]), found[key]) if key in found else (None, None) for key in keys]


def entity_key(join_key: str, value: str) -> EntityKey:
    """Feast's key of one entity, such as ("user_id", "u1")."""
    return EntityKey(join_keys=[join_key], entity_values=[Value(string_val=value)])


def keys_of(view: FeatureView, ids: Sequence[str]) -> list[bytes]:
    """Serialized keys of entities of a view, in their order."""
    keys: list[bytes] = key_column(view.entity_columns[0].name, pl.Series(ids, dtype=pl.String)).to_pylist()
    return keys


def microseconds(moment: datetime) -> int:
    """UTC microseconds since 1970; a time without a zone is read as UTC."""
    aware = moment if moment.tzinfo else moment.replace(tzinfo=UTC)
    since = aware - EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000 + since.microseconds


def moment_of(when: int) -> datetime:
    """The UTC time of `microseconds`."""
    return EPOCH + timedelta(microseconds=when)


def binary_series(array: Any) -> pl.Series:
    """An Arrow binary array as a Polars column."""
    found = pl.from_arrow(array)
    return found if isinstance(found, pl.Series) else found.to_series()


def _texts(view: FeatureView, frame: pl.DataFrame) -> dict[str, pl.Series]:
    """What Feast's SQL stores keep beside a text for searching; numbers, whose text nobody searches, have none here."""
    return {each.name: frame[each.name] for each in view.features if frame.schema[each.name] == pl.String}


def _bytes(value: Value | None) -> bytes | None:
    return None if value is None else value.SerializeToString()


def _text(value: Value | None) -> str | None:
    return None if value is None else extract_text_and_num(value, False)[0]
