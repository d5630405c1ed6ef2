"""Feast's Redis online store, with our two rules, whole columns at once, and event times to the microsecond.

In: rows from Feast's own commands (`online_write_batch`) and columns from our engine (`write_newest`). Out: hashes in the stock
layout (https://docs.feast.dev/reference/online-stores/redis), which stock readers of any language understand. A script there
compares times and stores, some hundred entities at once, so that no other writer can come between; its commands are put together
in Arrow. Redis Cluster is not for it: one script would touch keys of several nodes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import datetime
from functools import cache
from typing import Any, Final, Literal

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
    Written,
    keys_of,
    moment_of,
)
from feature_repo.owner import TABLE
from feature_repo.value_bytes import content_of, joined, timestamp_column
from tandem.core.errors import IncompatibleError, IntegrityError

_PER_SCRIPT: Final = 200
"""Entities that one script stores: Redis does nothing else meanwhile, some 2 ms."""
_UNDER_WAY: Final = 4
_PER_SCAN: Final = 1_000


class NewestRedisOnlineStoreConfig(RedisOnlineStoreConfig):  # type: ignore[misc]
    """`online_store` in `feature_store.yaml`; `connection_string` as Feast has it: `host:port,db=1,password=…`."""

    type: Literal["feature_repo.redis_store.NewestRedisOnlineStore"] = "feature_repo.redis_store.NewestRedisOnlineStore"
    read_timeout_ms: int | None = None
    """For serving: how long one call may take. There is no second try, since whoever asks has a fallback."""


class NewestRedisOnlineStore(NewestOnlineStore, RedisOnlineStore):  # type: ignore[misc]
    """Redis online store in which a late event never replaces a newer one, and none from the future stays."""

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

    def claim(self, config: RepoConfig, owner: str) -> str | None:
        """The mark is a key of the database, for one database holds one workspace."""
        client, key = self._redis(config), f"{TABLE}:{config.project}"
        client.set(key, owner, nx=True)
        found: Any = client.get(key)
        return None if found is None else bytes(found).decode()

    def store_newest(self, config: RepoConfig, view: FeatureView, rows: NewestRows) -> Written:
        """What was stored before an error stays, and is the same after the next run."""
        name, suffix, ttl = _view_name(config, view), config.project.encode(), config.online_store.key_ttl_seconds
        done = Written(ahead=rows.ahead)
        for stored, late in self._send(config, self._commands(config, name, suffix, rows, ttl)):
            done += Written(written=stored, late=late)
        if done.written + done.late != len(rows):
            raise IntegrityError(f"Redis, view {view.name}: {len(rows)} entities were sent and {done} counted; run it again")
        return done

    def _commands(self, config: RepoConfig, name: str, suffix: bytes, rows: NewestRows, ttl: int | None) -> Iterator[bytes]:
        for part in _of_one_shape(rows):
            sha = self._redis(config).script_load(_newest_wins(len(part.values)))
            yield from _scripts(sha, name, suffix, part, ttl)

    def _times(self, config: RepoConfig, view: FeatureView, keys: Sequence[bytes]) -> list[int | None]:
        """Event time in µs of each Redis key, None where the view does not hold it."""
        field = _time_field(_view_name(config, view))
        with self._redis(config).pipeline(transaction=False) as pipe:
            for key in keys:
                pipe.hget(key, field)
            return [None if raw is None else _time_of(raw) for raw in pipe.execute()]

    def _send(self, config: RepoConfig, commands: Iterable[bytes]) -> Iterator[Any]:
        """The replies to commands in Redis's own encoding, in order; a few are always under way. Raises the server's errors."""
        pool = self._redis(config).connection_pool
        connection = pool.get_connection()
        waiting = 0
        try:
            for command in commands:
                connection.send_packed_command([command])  # type: ignore[no-untyped-call]
                waiting += 1
                if waiting == _UNDER_WAY:
                    yield connection.read_response()
                    waiting -= 1
            for _ in range(waiting):
                yield connection.read_response()
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


def _of_one_shape(rows: NewestRows) -> Iterator[NewestRows]:
    """The rows in parts whose entities have the same features, so that no part holds nulls."""
    has = pl.DataFrame({name: column.is_not_null() for name, column in rows.values.items()})
    for shape in has.unique(maintain_order=True).iter_rows(named=True):
        part = rows.take(has.select(pl.all_horizontal(pl.col(name) == there for name, there in shape.items())).to_series())
        yield replace(part, values={name: column for name, column in part.values.items() if shape[name]})


# --- Redis's wire encoding (https://redis.io/docs/latest/develop/reference/protocol-spec), a column at a time -----------------

_CELLS_PER_CALL: Final = 100
"""Lua takes some 250 words in one call."""


@cache
def _newest_wins(features: int) -> bytes:
    """The script that stores `features` values of each key, unless what is stored is newer.

    Keys; seconds to live (0: for ever), the time's field, the features' fields; then per key its time in µs, the time as it is
    stored, and a value per feature. Gives how many were stored and how many were late. Every cell is named in the text: a table
    of them made in a loop takes the server a fifth longer.
    """
    cells = [f"A[{2 + cell}], A[at + {2 + cell}]" for cell in range(features + 1)]
    calls = [cells[start : start + _CELLS_PER_CALL] for start in range(0, len(cells), _CELLS_PER_CALL)]
    stores = "\n".join(f"call('HSET', key, {', '.join(part)})" for part in calls)
    return f"""
local function microseconds(stamp)
  local part, at = {{[8] = 0, [16] = 0}}, 1
  while at <= #stamp do
    local tag, number, scale, byte = string.byte(stamp, at), 0, 1, nil
    repeat
      at = at + 1
      byte = string.byte(stamp, at)
      number, scale = number + byte % 128 * scale, scale * 128
    until byte < 128
    at = at + 1
    part[tag] = number
  end
  return part[8] * 1000000 + math.floor(part[16] / 1000)
end

local call, A, ttl = redis.call, ARGV, tonumber(ARGV[1])
local late, at = 0, {2 + features}
for _, key in ipairs(KEYS) do
  local stored = call('HGET', key, A[2])
  if stored and microseconds(stored) > tonumber(A[at + 1]) then
    late = late + 1
  else
    {stores}
    if ttl > 0 then call('EXPIRE', key, ttl) end
  end
  at = at + {2 + features}
end
return {{#KEYS - late, late}}
""".encode()


def _scripts(sha: str, view_name: str, suffix: bytes, rows: NewestRows, ttl_seconds: int | None) -> Iterator[bytes]:
    """EVALSHA commands that store the rows, some hundred entities each."""
    fields = [_mmh3(f"{view_name}:{name}") for name in rows.values]
    borders, keys = content_of(_bulk(joined(_arrow(rows.keys), suffix)))
    times = rows.times.to_numpy()
    words = [_bulk(_arrow(rows.times.cast(pl.String).cast(pl.Binary))), _bulk(timestamp_column(times))]
    edges, cells = content_of(joined(*words, *(_bulk(_arrow(column)) for column in rows.values.values())))
    shared = b"".join(map(_word, [b"%d" % (ttl_seconds or 0), _time_field(view_name), *fields]))
    for start in range(0, len(rows), _PER_SCRIPT):
        end = min(start + _PER_SCRIPT, len(rows))
        count = end - start
        head = b"*%d\r\n" % (3 + count + 2 + len(fields) + count * (2 + len(fields)))
        head += _word(b"EVALSHA") + _word(sha.encode()) + _word(b"%d" % count)
        yield b"".join((head, keys[borders[start] : borders[end]], shared, cells[edges[start] : edges[end]]))


def _word(word: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(word), word)


def _bulk(words: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """`$length\\r\\nword\\r\\n`, row by row."""
    lengths = pc.binary_length(words).cast(pa.string()).cast(pa.large_binary())
    return joined(b"$", lengths, b"\r\n", words, b"\r\n")


def _arrow(column: pl.Series) -> pa.LargeBinaryArray:
    return column.rechunk().to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.large_binary())


def _escaped(pattern: bytes) -> bytes:
    """Literal bytes of a SCAN pattern."""
    return b"".join(b"\\" + bytes([byte]) if byte in b"*?[]\\^" else bytes([byte]) for byte in pattern)
