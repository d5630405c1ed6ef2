"""Feast's Redis online store, with our two rules, whole columns at once, and event times to the microsecond.

In: rows from Feast's own commands (`online_write_batch`) and columns from our engine (`write_newest`). Out: hashes in the stock
layout (https://docs.feast.dev/reference/online-stores/redis), which stock readers of any language understand. Commands are put
together in Arrow and sent as one stream of bytes. The times that are there are read first; between that and the write no other
writer may come, which our own commands see to (`state/materialize.lock`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any, Literal, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from feast.feature_view import FeatureView
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import _mmh3, _redis_key_prefix, compute_versioned_name
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import RepoConfig
from google.protobuf.timestamp_pb2 import Timestamp
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from feature_repo.newest import (
    CONNECT_TIMEOUT_S,
    KEY_VERSION,
    Answer,
    NewestOnlineStore,
    NewestRows,
    RowWise,
    Written,
    keys_of,
    moment_of,
    rows_of_frame,
    rows_of_messages,
)
from tandem.core.errors import IncompatibleError, IntegrityError

_PER_BURST = 2_000
"""Commands sent before their replies are read: few enough that neither side's buffer fills up."""
_PER_SCAN = 1_000


class NewestRedisOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc]
    """`online_store` in `feature_store.yaml`; `connection_string` as Feast has it: `host:port,db=1,password=…`."""

    type: Literal["feature_repo.redis_store.NewestRedisOnlineStore"] = "feature_repo.redis_store.NewestRedisOnlineStore"
    read_timeout_ms: int | None = None
    """For serving: how long one call may take. There is no second try, since whoever asks has a fallback."""


class NewestRedisOnlineStore(RedisOnlineStore, NewestOnlineStore):  # type: ignore[misc]
    """Redis online store in which a late event never replaces a newer one, and none from the future stays."""

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: RowWise, progress: Callable[[int], Any] | None
    ) -> None:
        """Feast's row-wise write, with the guards; what is late or ahead is skipped."""
        self._store(config, table, rows_of_messages(data, datetime.now(UTC)))
        if progress:
            progress(len(data))

    def write_newest(self, config: RepoConfig, view: FeatureView, frame: pl.DataFrame, now: datetime) -> Written:
        """As `NewestOnlineStore` has it; what was sent before an error stays, and is the same after the next run."""
        return self._store(config, view, rows_of_frame(view, frame, now))

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: Sequence[EntityKey],
        requested_features: Sequence[str] | None = None,
    ) -> list[Answer]:
        """Per entity its event time (µs, UTC) and values by feature; (None, None) where it is unknown."""
        name = _view_name(config, table)
        features = list(requested_features or [each.name for each in table.features])
        fields = [*(_mmh3(f"{name}:{feature}") for feature in features), _time_field(name)]
        suffix = config.project.encode()
        with self._redis(config).pipeline(transaction=False) as pipe:
            for key in entity_keys:
                pipe.hmget(serialize_entity_key(key, KEY_VERSION) + suffix, fields)
            answers = pipe.execute()
        return [_row(features, cells) for cells in answers]

    def clear(self, config: RepoConfig, view: FeatureView) -> int:
        """Forget every entity of a view; returns how many there were."""
        return sum(self._drop(config, view, keys) for keys in self._scan(config, view))

    def erase(self, config: RepoConfig, view: FeatureView, ids: Sequence[str]) -> int:
        """Forget these entities of a view; returns how many there were."""
        suffix = config.project.encode()
        return self._drop(config, view, [key + suffix for key in keys_of(view, ids)])

    def extent(self, config: RepoConfig, view: FeatureView) -> tuple[int, datetime | None]:
        """How many entities a view holds, and the newest event time among them; looks at every key."""
        times = [when for keys in self._scan(config, view) for when in self._times(config, view, keys) if when is not None]
        return len(times), moment_of(max(times)) if times else None

    def _store(self, config: RepoConfig, view: FeatureView, rows: NewestRows) -> Written:
        suffix = config.project.encode()
        keys = [key + suffix for key in rows.keys]
        stored = pl.Series(self._times(config, view, keys), dtype=pl.Int64)
        fresh = (rows.times >= stored).fill_null(True)
        kept = rows.take(fresh)
        for part in _of_one_shape(kept):
            self._send(config, _hset_commands(_view_name(config, view), suffix, part, config.online_store.key_ttl_seconds))
        self._check_stored(config, view, [key for key, new in zip(keys, fresh, strict=True) if new], kept.times.to_list())
        return Written(written=len(kept), late=len(rows) - len(kept), ahead=rows.ahead)

    def _check_stored(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes], times: Sequence[int]) -> None:
        lost = sum(found != wanted for found, wanted in zip(self._times(config, view, keys), times, strict=True))
        if lost:
            raise IntegrityError(f"Redis, view {view.name}: {lost} of {len(keys)} entities were not stored; run it again")

    def _times(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> list[int | None]:
        """Event time in µs of each Redis key, None where the view does not hold it."""
        if not keys:
            return []
        field = _time_field(_view_name(config, view))
        commands = _commands([b"HGET", pa.array(keys, pa.large_binary()), field])
        return [None if raw is None else _time_of(cast(bytes, raw)) for raw in self._send(config, commands)]

    def _send(self, config: RepoConfig, commands: pa.LargeBinaryArray) -> list[Any]:
        """The replies to commands in Redis's own encoding, in order; raises the server's errors."""
        if not len(commands):
            return []
        client = self._redis(config)
        pool = client.connection_pool
        connection = pool.get_connection()
        try:
            return [reply for burst in _bursts(commands) for reply in _talk(connection, *burst)]
        except BaseException:
            connection.disconnect()  # type: ignore[no-untyped-call]  # replies that were not read would answer the next question
            raise
        finally:
            pool.release(connection)

    def _scan(self, config: RepoConfig, view: FeatureView) -> Iterator[list[bytes]]:
        """The Redis keys of the view's entities, whichever views hold them."""
        pattern = _escaped(_redis_key_prefix(view.join_keys)) + b"*" + _escaped(config.project.encode())
        batch: list[bytes] = []
        for key in self._redis(config).scan_iter(pattern, count=_PER_SCAN):
            batch.append(key)
            if len(batch) == _PER_SCAN:
                yield batch
                batch = []
        yield batch

    def _drop(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> int:
        name = _view_name(config, view)
        there = [key for key, when in zip(keys, self._times(config, view, keys), strict=True) if when is not None]
        fields = [*(_mmh3(f"{name}:{each.name}") for each in view.features), _time_field(name)]
        with self._redis(config).pipeline(transaction=False) as pipe:
            for key in there:
                pipe.hdel(key, *fields)  # Redis removes a hash with its last field
            pipe.execute()
        return len(there)

    _client: Any

    def _get_client(self, online_store_config: NewestRedisOnlineStoreConfig) -> Any:
        limit = online_store_config.read_timeout_ms
        if self._client is None and limit is not None:
            (address, *_), options = self._parse_connection_string(online_store_config.connection_string)
            settings: dict[str, Any] = {**address, **options, "retry": Retry(NoBackoff(), 0)}
            self._client = Redis(**settings, socket_timeout=limit / 1000, socket_connect_timeout=CONNECT_TIMEOUT_S)
        return super()._get_client(online_store_config)

    def _redis(self, config: RepoConfig) -> Redis:
        client = self._get_client(config.online_store)
        if not isinstance(client, Redis):
            raise IncompatibleError(
                f"redis_type {config.online_store.redis_type} is not written in columns; use redis_type: redis"
            )
        return client


def _view_name(config: RepoConfig, view: FeatureView) -> str:
    name: str = compute_versioned_name(view, config.registry.enable_online_feature_view_versioning)
    return name


def _time_field(view_name: str) -> bytes:
    return f"_ts:{view_name}".encode()


def _row(features: Sequence[str], cells: Sequence[bytes | None]) -> Answer:
    if cells[-1] is None:
        return None, None
    values = {name: Value.FromString(cell or b"") for name, cell in zip(features, cells[:-1], strict=True)}
    return moment_of(_time_of(cells[-1])), values


def _time_of(raw: bytes) -> int:
    stamp = Timestamp.FromString(raw)
    return int(stamp.seconds) * 1_000_000 + int(stamp.nanos) // 1000


def _time_bytes(when: int) -> bytes:
    raw: bytes = Timestamp(seconds=when // 1_000_000, nanos=when % 1_000_000 * 1000).SerializeToString()
    return raw


def _of_one_shape(rows: NewestRows) -> Iterator[NewestRows]:
    """The rows in parts whose entities have the same features, so that no part holds nulls."""
    has = pl.DataFrame({name: column.is_not_null() for name, column in rows.values.items()})
    for shape in has.unique(maintain_order=True).iter_rows(named=True):
        part = rows.take(has.select(pl.all_horizontal(pl.col(name) == there for name, there in shape.items())).to_series())
        yield replace(part, values={name: column for name, column in part.values.items() if shape[name]})


# --- Redis's wire encoding (https://redis.io/docs/latest/develop/reference/protocol-spec), a column at a time -----------------


def _hset_commands(view_name: str, suffix: bytes, rows: NewestRows, ttl_seconds: int | None) -> pa.LargeBinaryArray:
    """One HSET per entity, with an EXPIRE behind it where entities expire."""
    keys = pc.binary_join_element_wise(_arrow(rows.keys), _scalar(suffix), _scalar(b""))
    words: list[bytes | pa.LargeBinaryArray] = [b"HSET", keys]
    for name, column in rows.values.items():
        words += [_mmh3(f"{view_name}:{name}"), _arrow(column)]
    times, places = np.unique(rows.times.to_numpy(), return_inverse=True)
    stamps = pa.array([_time_bytes(int(when)) for when in times], pa.large_binary())
    words += [_time_field(view_name), stamps.take(pa.array(places))]
    commands = _commands(words)
    if ttl_seconds is None or not len(rows):
        return commands
    expiries = _commands([b"EXPIRE", keys, str(ttl_seconds).encode()])
    both = pa.chunked_array([commands, expiries]).combine_chunks()
    order = np.arange(2 * len(rows)).reshape(2, -1).T.reshape(-1)
    return both.take(pa.array(order))


def _commands(words: Sequence[bytes | pa.LargeBinaryArray]) -> pa.LargeBinaryArray:
    """Commands of the same words, some of them columns without nulls."""
    parts: list[Any] = []
    for word in words:
        parts += _bulk(word)
    return pc.binary_join_element_wise(_scalar(b"*%d\r\n" % len(words)), *parts, _scalar(b""))


def _bulk(word: bytes | pa.LargeBinaryArray) -> list[Any]:
    """`$length\\r\\nword\\r\\n`."""
    if isinstance(word, bytes):
        return [_scalar(b"$%d\r\n%s\r\n" % (len(word), word))]
    lengths = pc.binary_length(word).cast(pa.string()).cast(pa.large_binary())
    return [_scalar(b"$"), lengths, _scalar(b"\r\n"), word, _scalar(b"\r\n")]


def _bursts(commands: pa.LargeBinaryArray) -> Iterator[tuple[memoryview, int]]:
    """The commands' bytes as they lie in memory, some thousand commands at a time, with their number."""
    offsets = np.frombuffer(commands.buffers()[1], np.int64)[commands.offset : commands.offset + len(commands) + 1]
    content = memoryview(commands.buffers()[2])
    for start in range(0, len(commands), _PER_BURST):
        end = min(start + _PER_BURST, len(commands))
        yield content[offsets[start] : offsets[end]], end - start


def _talk(connection: Any, burst: memoryview, replies: int) -> list[Any]:
    connection.send_packed_command([burst])
    return [connection.read_response(disable_decoding=True) for _ in range(replies)]


def _arrow(column: pl.Series) -> pa.LargeBinaryArray:
    return column.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_binary())


def _scalar(word: bytes) -> pa.LargeBinaryScalar:
    return pa.scalar(word, pa.large_binary())


def _escaped(pattern: bytes) -> bytes:
    """Literal bytes of a SCAN pattern."""
    return b"".join(b"\\" + bytes([byte]) if byte in b"*?[]\\^" else bytes([byte]) for byte in pattern)
