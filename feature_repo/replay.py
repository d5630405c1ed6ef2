"""What a slate read of its user and of its first item, kept with the slate; and whether the as-of join gives the same again.

In: the rows that serving read, later the served-log and the workspace's offline tables. Out: a text for the served-log's column
`features_read`, and one `CheckResult` for users and one for items. Numbers are kept as they are, text and lists as a checksum.

A user's row is replayed at the moment of the slate and at the event time that it was served with. An item's features are those
of the snapshot and of what was pushed over it, so every moment between the snapshot's and the slate's may have been read.
Tables go on changing: a row that was written after the slate proves nothing about it, and is counted apart.
"""

from __future__ import annotations

import json
import math
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import polars as pl

from feature_repo.checks import CLOCK_SKEW, CheckResult
from feature_repo.offline import JUST_BEFORE
from feature_repo.online import UserRow
from feature_repo.views import TIMESTAMP, ViewSchema
from tandem.core.schema import TIME, from_us, to_us

AsOf = Callable[[pl.DataFrame, str], pl.DataFrame]
"""Adds a view's features to rows [key, event_timestamp], as known 1 µs before each: `offline.historical` of a workspace."""

WITHIN: Final = timedelta(days=7)
"""How far back from the newest slate the sample reaches: an old incident must not fail the check for ever."""

ONLINE_LAG: Final = timedelta(hours=1)
"""How long the online store may lack a row that the offline table has, before serving without it counts as wrong."""

_TOLERANCE: Final = 1e-6
"""Relative to a number's size, at least 1: the ranker reads float32."""

_MOMENTS: Final = 50

Value = float | int | str | None

_text_of: Final = json.JSONEncoder(separators=(",", ":"), check_circular=False).encode
"""`json.dumps` would make an encoder at each call."""


def features_read(user: UserRow | None, items_as_of: datetime | None, item: Mapping[str, float] | None) -> str:
    """The text that a slate's first row keeps. `item` are the first item's features, None where none could be read."""
    read: dict[str, Any] = {}
    if user is not None:
        read["user"] = {
            view: {"at": _us(user.times.get(view)), "values": {name: shown(user.features.get(name)) for name in names}}
            for view, names in user.views.items()
        }
    if item is not None and items_as_of is not None:
        read["item"] = {"as_of": _us(items_as_of), "values": {name: shown(value) for name, value in item.items()}}
    return _text_of(read)


def shown(value: Any) -> Value:
    """A value as the served-log keeps it: numbers as they are, text and lists as "length:checksum", None for missing."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, int | float):
        return value
    return f"{len(value)}:{zlib.crc32(_text_of(value).encode()):08x}"


def replay_users(
    served: pl.DataFrame, views: Sequence[ViewSchema], workspace: Path, as_of: AsOf, slates: int = 200
) -> CheckResult:
    """Does the as-of join give what the users of sampled slates were served with?

    The result's table: request_id, user_id, view, feature, served, expected, kind. "differs" and "stale" (the offline table
    had a newer row for more than `ONLINE_LAG`) fail; "later" (written after the slate) does not. `skipped` counts user rows
    that cannot be replayed.
    """
    sample = _Sample.of(served, slates)
    tally = _Tally()
    for view in [each for each in views if each.entity == "user"]:
        reads = list(_user_reads(sample, view, tally))
        _replay_view(reads, view, workspace, as_of, tally, _judge_user)
    _skip_old_views(sample, "user", views, tally)
    return tally.result("served users", sample)


def replay_items(
    served: pl.DataFrame, views: Sequence[ViewSchema], workspace: Path, as_of: AsOf, slates: int = 200
) -> CheckResult:
    """Does the as-of join give the features of sampled slates' first items, at some moment that serving may have read?

    Those moments reach from the snapshot's to the slate's. The table is that of `replay_users`; nothing is "stale" here, as
    the age of the snapshot is a check of its own.
    """
    sample = _Sample.of(served, slates)
    tally = _Tally()
    for view in [each for each in views if each.entity == "item"]:
        reads = list(_item_reads(sample, view, tally))
        _replay_view(reads, view, workspace, as_of, tally, _judge_item)
    _skip_old_views(sample, "item", views, tally)
    return tally.result("served items", sample)


# --- the sample --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    """Slates of the served-log that hold what they read, newest week, seeded; `unread` slates do not hold it."""

    slates: list[dict[str, Any]]
    unread: int

    @classmethod
    def of(cls, served: pl.DataFrame, count: int) -> _Sample:
        newest = served["timestamp"].max()
        if "features_read" not in served.columns or not isinstance(newest, datetime):
            return cls([], served["request_id"].n_unique())
        week = served.filter(pl.col("timestamp") >= newest - WITHIN)
        read = week.filter(pl.col("features_read").is_not_null()).sort("timestamp", "request_id", "position")
        chosen = read.sample(min(count, read.height), seed=0, shuffle=False)
        parsed = [
            row | {"read": json.loads(row["features_read"]), "versions": json.loads(row["view_versions"] or "{}")}
            for row in chosen.iter_rows(named=True)
        ]
        return cls(parsed, week["request_id"].n_unique() - read["request_id"].n_unique())


@dataclass(frozen=True)
class _Read:
    """One view's values of one entity in one slate; `at` is the user row's event time, for items the snapshot's moment."""

    slate: Mapping[str, Any]
    entity: str
    at: datetime | None
    values: Mapping[str, Value]

    @property
    def when(self) -> datetime:
        moment: datetime = self.slate["timestamp"]
        return moment


def _user_reads(sample: _Sample, view: ViewSchema, tally: _Tally) -> Iterator[_Read]:
    for slate in sample.slates:
        if slate["user_id"] is None:
            continue
        if "user" not in slate["read"]:
            tally.skipped[f"{view.name}: the online store did not answer"] += 1
        elif view.name in slate["read"]["user"] and slate["versions"].get(view.name) == view.version:
            own = slate["read"]["user"][view.name]
            if set(own["values"]) == set(view.feature_names):
                yield _Read(slate, slate["user_id"], _moment(own["at"]), own["values"])
            else:
                tally.skipped[f"{view.name}: other features under the same version"] += 1


def _item_reads(sample: _Sample, view: ViewSchema, tally: _Tally) -> Iterator[_Read]:
    for slate in sample.slates:
        own = slate["read"].get("item")
        if own is None:
            tally.skipped[f"{view.name}: no item features were read"] += 1
        elif slate["versions"].get(view.name) == view.version:
            values = {name: value for name, value in own["values"].items() if name in view.feature_names}
            if values:
                yield _Read(slate, slate["item_id"], _moment(own["as_of"]), values)


def _skip_old_views(sample: _Sample, entity: str, views: Sequence[ViewSchema], tally: _Tally) -> None:
    """Count the rows of views that are built no more, or in another version. An item view is known by how its name begins."""
    built = {view.name: view.version for view in views}
    for slate in sample.slates:
        part = slate["read"].get(entity)
        names = [] if part is None else part if entity == "user" else [n for n in slate["versions"] if n.startswith("item")]
        for name in names:
            version = slate["versions"].get(name)
            if built.get(name) != version:
                tally.skipped[f"{name} version {version} is no longer built"] += 1


# --- replaying ---------------------------------------------------------------------------------------------------------


@dataclass
class _Tally:
    """What became of the rows: compared, by kind, skipped by reason; and every wrong value."""

    compared: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    rows: list[tuple[Any, ...]] = field(default_factory=list)

    def result(self, name: str, sample: _Sample) -> CheckResult:
        wrong = self.kinds["differs"] + self.kinds["stale"]
        said = [f"{self.compared} rows of {len(sample.slates)} slates replayed"]
        said += [f"{self.kinds[kind]} {text}" for kind, text in _KINDS.items() if self.kinds[kind]] or ["all equal"]
        skipped = self.skipped + Counter({"no values were kept with the slate": sample.unread})
        said += [f"{count} skipped: {reason}" for reason, count in sorted(skipped.items()) if count]
        if not sample.slates and not sample.unread:
            said = ["nothing was served yet"]
        table = pl.DataFrame(self.rows, schema=_TABLE, orient="row").sort("view", "feature", "request_id")
        return CheckResult(name, wrong == 0, self.compared, "; ".join(said), table, skipped.total())


_KINDS: Final = {
    "differs": "differ from the as-of join",
    "stale": f"were older than what was known for {ONLINE_LAG.total_seconds() / 3600:g} h",
    "later": "cannot be judged, their rows were written after the slate",
}
_TABLE: Final = {name: pl.String() for name in ("request_id", "entity", "view", "feature", "served", "expected", "kind")}

Known = Mapping[str, Sequence[tuple[datetime, datetime]]]
"""Per entity its rows as (event time, when the file that holds it was written), oldest first."""

Judge = Callable[[_Read, "_Table"], tuple[str, Mapping[str, Value]]]


@dataclass(frozen=True)
class _Table:
    """One view's offline rows: `known` by entity, `built`: when the table was last written whole, `values` at moments."""

    known: Known
    built: datetime
    values: Mapping[tuple[str, datetime], Mapping[str, Value]]

    def at(self, entity: str, moment: datetime) -> Mapping[str, Value]:
        return self.values[entity, moment]

    def written(self, entity: str, moment: datetime) -> datetime:
        """When the row that counts at `moment` came into the table; without one, when the table was last written whole."""
        rows = self.known.get(entity, ())
        place = bisect_right(rows, moment, key=lambda row: row[0])
        return rows[place - 1][1] if place else self.built

    def moments(self, entity: str, start: datetime, end: datetime) -> list[datetime]:
        """`end`, `start`, and the newest event times between: when the values may have been others."""
        between = [when for when, _ in self.known.get(entity, ()) if start < when < end]
        return [end, start, *between[-_MOMENTS:]]


def _replay_view(reads: Sequence[_Read], view: ViewSchema, workspace: Path, as_of: AsOf, tally: _Tally, judge: Judge) -> None:
    if not reads:
        return
    table = _table_of(reads, view, workspace, as_of)
    for read in reads:
        kind, expected = judge(read, table)
        tally.compared += 1
        tally.kinds[kind] += 1
        if kind != "equal":
            named = (read.slate["request_id"], read.entity, view.name)
            wrong = [name for name in read.values if not _same(read.values[name], expected[name])]
            tally.rows += [(*named, name, _text(read.values[name]), _text(expected[name]), kind) for name in wrong]


def _judge_user(read: _Read, table: _Table) -> tuple[str, Mapping[str, Value]]:
    """What the moment of the slate gives; else what the served row's own event time gives, an older row."""
    now = table.at(read.entity, read.when)
    if _all_same(read.values, now):
        return "equal", now
    if read.at is None or all(value is None for value in read.values.values()):
        return _stale_or_later(read, table), now
    then = table.at(read.entity, read.at)
    if _all_same(read.values, then) and read.at <= read.when + CLOCK_SKEW:
        return ("equal", then) if read.at > read.when else (_stale_or_later(read, table), now)
    return ("later" if table.written(read.entity, read.at) > read.when else "differs"), then


def _stale_or_later(read: _Read, table: _Table) -> str:
    return "later" if table.written(read.entity, read.when) > read.when - ONLINE_LAG else "stale"


def _judge_item(read: _Read, table: _Table) -> tuple[str, Mapping[str, Value]]:
    """What any moment between the snapshot's and the slate's gives."""
    moments = table.moments(read.entity, read.at or read.when, read.when)
    for moment in moments:
        if _all_same(read.values, table.at(read.entity, moment)):
            return "equal", read.values
    later = any(table.written(read.entity, moment) > read.when for moment in moments)
    return ("later" if later else "differs"), table.at(read.entity, read.at or read.when)


def _table_of(reads: Sequence[_Read], view: ViewSchema, workspace: Path, as_of: AsOf) -> _Table:
    known, built = _known(workspace / view.path, view.key, sorted({read.entity for read in reads}))
    bare = _Table(known, built, {})
    asked = {(read.entity, moment) for read in reads for moment in _asked(read, view, bare)}
    frame = pl.DataFrame(sorted(asked), schema={view.key: pl.String(), TIMESTAMP: TIME}, orient="row")
    answers = as_of(frame.with_columns(pl.col(TIMESTAMP) + JUST_BEFORE), view.name).select(view.feature_names)
    values = [{name: shown(value) for name, value in row.items()} for row in answers.iter_rows(named=True)]
    return _Table(known, built, dict(zip(frame.iter_rows(), values, strict=True)))


def _asked(read: _Read, view: ViewSchema, table: _Table) -> list[datetime]:
    if view.entity == "item":
        return table.moments(read.entity, read.at or read.when, read.when)
    return [read.when, *([] if read.at is None else [read.at])]


def _known(path: Path, key: str, entities: Sequence[str]) -> tuple[Known, datetime]:
    """The entities' rows in the files of a view, and when the oldest of these was written: the last build."""
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    written = {str(file): datetime.fromtimestamp(file.stat().st_mtime, UTC) for file in files}
    rows = pl.scan_parquet(files, include_file_paths="file").filter(pl.col(key).is_in(entities))
    found = rows.select(key, pl.col(TIMESTAMP).cast(TIME), pl.col("file").replace_strict(written, return_dtype=TIME))
    newest = found.group_by(key, TIMESTAMP).agg(pl.col("file").max()).sort(key, TIMESTAMP).collect()
    known: dict[str, list[tuple[datetime, datetime]]] = {}
    for entity, moment, file in newest.iter_rows():
        known.setdefault(entity, []).append((moment, file))
    return known, min(written.values())


def _all_same(served: Mapping[str, Value], expected: Mapping[str, Value]) -> bool:
    return all(_same(value, expected[name]) for name, value in served.items())


def _same(served: Value, expected: Value) -> bool:
    """Equal, both missing, or numbers closer than float32 can tell."""
    if isinstance(served, int | float) and isinstance(expected, int | float):
        return abs(served - expected) <= _TOLERANCE * max(1.0, abs(served), abs(expected)) or served == expected
    return served == expected


def _text(value: Value) -> str | None:
    return None if value is None else str(value)


def _us(moment: datetime | None) -> int | None:
    return None if moment is None else to_us(moment)


def _moment(us: int | None) -> datetime | None:
    return None if us is None else from_us(us)
