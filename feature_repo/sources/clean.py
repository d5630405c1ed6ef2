"""Drafts to clean tables: every row of a draft ends in the table or in `rejected` with its reason.

In: drafts, loosely typed frames with the columns of the schema (any may be text) and `row`, the row's number in its file.
Out: events, items and users as in `tandem.core.schema`, and `rejected` frames. The first reason that applies is the one given.

Ids become NFC strings; a number column of whole floats (what a CSV with gaps gives) loses its ".0".
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Final

import numpy as np
import polars as pl

from feature_repo.sources.raw import REJECTED, no_rejections
from feature_repo.sources.times import Unit, parse_times
from tandem.core.schema import EVENTS, ITEMS, TIME, USERS, id_problem

CLOCK_SKEW: Final = timedelta(minutes=5)
"""How far ahead of now a timestamp may lie before it counts as being in the future."""

EARLIEST: Final = datetime(1900, 1, 1, tzinfo=UTC)
"""Older times are mistakes of the sender (year 1 for "unknown"), and item features cannot hold what lies centuries back."""

LARGEST_VALUE: Final = 1e12
"""One value near the largest float would make sums, and the features made from them, infinite."""

_OPTIONAL_TEXT: Final = ("request_id", "split")
_CONTENT: Final = ("user_id", "item_id", "action", "request_id", "split")


def clean_events(
    draft: pl.DataFrame,
    *,
    known_items: pl.Series | None,
    now: datetime | None,
    context: Sequence[str] = (),
    unit: Unit | None = None,
    pattern: str | None = None,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Check a draft of events; returns (events without event_id but with `row`, rejected).

    `known_items` None accepts any item. `now` None says that these rows carry no time: timestamps stay null for a synthetic
    clock. `context` names further columns to keep. `unit` and `pattern` as in `times.parse_times`.
    """
    parsed = _parse_events(draft, context, unit, pattern)
    checks = _identity_checks(parsed, "user_id") + _identity_checks(parsed, "item_id")
    if known_items is not None:
        checks.append((~pl.col("item_id").is_in(known_items.implode()), "unknown item"))
    checks.append((pl.col("action").fill_null("") == "", "no action"))
    checks += _number_checks(draft)
    if now is not None:
        checks += _time_checks(draft, now)
    return _divide("events", draft, parsed, checks)


def clean_items(draft: pl.DataFrame) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Check a draft of items; returns (items, rejected). Of rows with one id the last is kept.

    A missing title is the id and a missing text the title; NaN in an attribute is a missing value.
    """
    extra = [name for name in draft.columns if name not in ITEMS and name != "row"]
    parsed = draft.with_columns(
        _id_text(draft["item_id"]),
        _optional(draft, "title"),
        _optional(draft, "text"),
        _categories(draft),
        _available(draft),
    )
    parsed = parsed.with_columns(_words("title"), _words("text"), *[_attribute(draft, name) for name in extra])
    parsed = parsed.with_columns(pl.coalesce("title", "item_id").alias("title"))
    parsed = parsed.with_columns(pl.coalesce("text", "title").alias("text")).select("row", *ITEMS, *extra)
    checks = _identity_checks(parsed, "item_id")
    checks.append((_too_early("available_from"), f"available_from before {EARLIEST.year}"))
    checks.append((~pl.col("item_id").is_last_distinct(), "duplicate item (the last one is kept)"))
    items, rejected = _divide("items", draft, parsed, checks)
    return items.drop("row").sort("item_id"), rejected


def clean_users(draft: pl.DataFrame | None, event_users: pl.Series) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Check a draft of users and add those who only appear in events; returns (users, rejected).

    Of rows with one id the last is kept.
    """
    seen = pl.DataFrame({"user_id": event_users.unique()}, schema={"user_id": pl.String()})
    if draft is None:
        return seen.with_columns(pl.lit(None, dtype=pl.String).alias("text")).sort("user_id"), no_rejections()
    extra = [name for name in draft.columns if name not in USERS and name != "row"]
    parsed = draft.with_columns(_id_text(draft["user_id"]), _optional(draft, "text"))
    parsed = parsed.with_columns(_words("text"), *[_attribute(draft, name) for name in extra]).select("row", *USERS, *extra)
    checks = _identity_checks(parsed, "user_id")
    checks.append((~pl.col("user_id").is_last_distinct(), "duplicate user (the last one is kept)"))
    users, rejected = _divide("users", draft, parsed, checks)
    missing = seen.join(users, on="user_id", how="anti")
    return pl.concat([users.drop("row"), missing], how="diagonal").sort("user_id"), rejected


def finish_events(events: pl.DataFrame) -> pl.DataFrame:
    """Cleaned events with their ids, in the order (timestamp, event_id)."""
    return with_event_ids(events).sort("timestamp", "event_id")


def with_event_ids(events: pl.DataFrame) -> pl.DataFrame:
    """Give cleaned events their `event_id` and the schema's column order, context last; rows come in the order of `row`.

    Call it before a synthetic clock sets times, so that ids come from content alone.
    """
    ordered = events.sort("row", maintain_order=True)
    named = ordered.drop("row").with_columns(event_ids(ordered))
    context = [name for name in named.columns if name not in EVENTS]
    return named.select(*EVENTS, *context)


def event_ids(events: pl.DataFrame) -> pl.Series:
    """(N,) stable ids: 96 bits of BLAKE2b over a row's content and its ordinal among rows of equal content, in hex.

    Values and times enter as their bits, so that ids do not hang on how a library prints numbers.
    """
    frame = events.with_columns(
        pl.Series("value", _bits(events["value"])),
        pl.Series("propensity", _bits(events["propensity"])),
        pl.col("timestamp").cast(pl.Int64),
    )
    fields = [*_CONTENT, "value", "timestamp", "position", "propensity"]
    texts = [pl.col(name).cast(pl.String).fill_null("\x00") for name in fields]
    content = frame.select(pl.concat_str(texts, separator="\x1f")).to_series()
    keys = content + "\x1f" + _ordinals(content).cast(pl.String)
    blake2b = hashlib.blake2b
    return pl.Series("event_id", [blake2b(key.encode(), digest_size=12).hexdigest() for key in keys.to_list()], dtype=pl.String)


def _ordinals(content: pl.Series) -> pl.Series:
    """(N,) how many equal texts stand before each; counted only where the (fast, unstable) hash says that there may be any."""
    rows = pl.DataFrame({"content": content}).with_row_index("place")
    repeated = rows.filter(pl.col("content").hash().is_duplicated())
    counted = repeated.select("place", pl.int_range(pl.len()).over("content").alias("ordinal"))
    ordinals = np.zeros(len(content), dtype=np.int64)
    ordinals[counted["place"].to_numpy()] = counted["ordinal"].to_numpy()
    return pl.Series("ordinal", ordinals)


def reject(table: str, draft: pl.DataFrame, reasons: pl.Series) -> pl.DataFrame:
    """`rejected` rows for the rows of `draft` whose reason (N,) is not null."""
    bad = draft.with_columns(reasons.alias("__reason")).filter(pl.col("__reason").is_not_null())
    content = pl.struct(pl.exclude("row", "__reason")).struct.json_encode()
    return bad.select(
        pl.lit(table).alias("table"),
        pl.col("row").cast(pl.Int64),
        pl.col("__reason").alias("reason"),
        content.alias("content"),
    ).cast(dict(REJECTED))  # type: ignore[arg-type]


Check = tuple[pl.Expr, str]
"""A condition that makes a row bad, over the parsed frame (draft columns under "draft:<name>"), and its reason."""


def _divide(table: str, draft: pl.DataFrame, parsed: pl.DataFrame, checks: Sequence[Check]) -> tuple[pl.DataFrame, pl.DataFrame]:
    beside = parsed.hstack(draft.select(pl.all().name.prefix("draft:")))
    first = pl.coalesce(*[pl.when(bad).then(pl.lit(reason)) for bad, reason in checks])
    reasons = beside.select(first.alias("reason")).to_series()
    return parsed.filter(reasons.is_null()), reject(table, draft, reasons)


def _parse_events(draft: pl.DataFrame, context: Sequence[str], unit: Unit | None, pattern: str | None) -> pl.DataFrame:
    times = parse_times(draft["timestamp"], unit, pattern) if "timestamp" in draft.columns else None
    columns = [
        draft["row"].cast(pl.Int64),
        _id_text(draft["user_id"]),
        _id_text(draft["item_id"]),
        _optional(draft, "action"),
        # Adding zero makes -0.0 and 0.0 one value, with one event id.
        _number(draft, "value", pl.Float64()) + 0.0,
        pl.Series("timestamp", [None] * draft.height, dtype=TIME) if times is None else times.alias("timestamp"),
        _number(draft, "position", pl.Int32()),
        _number(draft, "propensity", pl.Float64()),
        *[_optional(draft, name) for name in _OPTIONAL_TEXT],
        *[_context(draft, name) for name in context],
    ]
    return pl.DataFrame(columns)


def _identity_checks(parsed: pl.DataFrame, column: str) -> list[Check]:
    """Null, then whatever `schema.id_problem` finds; asked once per distinct id."""
    what = column.removesuffix("_id")
    found = {value: id_problem(value) for value in parsed[column].drop_nulls().unique().to_list()}
    problems: dict[str, list[str]] = {}
    for value, problem in found.items():
        if problem is not None:
            problems.setdefault("too long" if "bytes" in problem else problem, []).append(value)
    checks: list[Check] = [(pl.col(column).is_null(), f"no {what} id")]
    checks += [(pl.col(column).is_in(values), f"{what} id {problem}") for problem, values in sorted(problems.items())]
    return checks


def _number_checks(draft: pl.DataFrame) -> list[Check]:
    checks: list[Check] = []
    for name in ("value", "position", "propensity"):
        if name in draft.columns and draft[name].dtype != pl.Null:
            given = pl.col(f"draft:{name}")
            blank = given.is_null() | (given.cast(pl.String).str.strip_chars() == "")
            checks.append((~blank & pl.col(name).is_null(), f"{name} is not a number"))
            checks.append((pl.col(name).cast(pl.Float64).is_finite().not_(), f"{name} is not finite"))
    checks.append((pl.col("value").abs() > LARGEST_VALUE, f"value beyond {LARGEST_VALUE:g}"))
    checks.append(((pl.col("propensity") <= 0) | (pl.col("propensity") > 1), "propensity outside (0, 1]"))
    return checks


def _time_checks(draft: pl.DataFrame, now: datetime) -> list[Check]:
    missing = pl.col("draft:timestamp").is_null() if "timestamp" in draft.columns else pl.lit(True)
    return [
        (missing, "no timestamp"),
        (pl.col("timestamp").is_null(), "timestamp cannot be read"),
        (_too_early("timestamp"), f"timestamp before {EARLIEST.year}"),
        (pl.col("timestamp") > pl.lit(now + CLOCK_SKEW).cast(TIME), "timestamp in the future"),
    ]


def _too_early(name: str) -> pl.Expr:
    return pl.col(name) < pl.lit(EARLIEST).cast(TIME)


def _id_text(column: pl.Series) -> pl.Series:
    if column.dtype.is_float():
        whole = column.is_null().all() or bool((column.drop_nulls() % 1 == 0).all())
        column = column.cast(pl.Int64, strict=False) if whole else column
    return column.cast(pl.String).str.normalize("NFC").replace("", None)


def _optional(draft: pl.DataFrame, name: str) -> pl.Series:
    if name not in draft.columns:
        return pl.Series(name, [None] * draft.height, dtype=pl.String)
    return _id_text(draft[name])


def _number(draft: pl.DataFrame, name: str, dtype: pl.DataType) -> pl.Series:
    if name not in draft.columns:
        return pl.Series(name, [None] * draft.height, dtype=dtype)
    column = draft[name]
    if column.dtype == pl.String:
        column = column.str.strip_chars().cast(pl.Float64, strict=False)
    return column.cast(dtype, strict=False)


def _context(draft: pl.DataFrame, name: str) -> pl.Series:
    column = draft[name]
    return column.fill_nan(None) if column.dtype.is_float() else column if column.dtype.is_integer() else column.cast(pl.String)


def _attribute(draft: pl.DataFrame, name: str) -> pl.Series:
    """Attributes are Int64, Float64 or String: what a feature may be."""
    column = draft[name]
    if column.dtype.is_float():
        column = column.cast(pl.Float64)
        return column.to_frame().select(pl.when(pl.col(name).is_finite()).then(pl.col(name)).alias(name)).to_series()
    if column.dtype.is_integer() or column.dtype == pl.Boolean:
        return column.cast(pl.Int64)
    return column.cast(pl.String).str.normalize("NFC")


def _categories(draft: pl.DataFrame) -> pl.Series:
    """Distinct non-empty categories in the order given; none is an empty list."""
    dtype = pl.List(pl.String())
    if "categories" not in draft.columns:
        return pl.Series("categories", [[]] * draft.height, dtype=dtype)
    cleaned = pl.col("categories").cast(dtype).fill_null(pl.lit([], dtype=dtype))
    cleaned = cleaned.list.eval(pl.element().str.strip_chars().str.normalize("NFC")).list.drop_nulls()
    cleaned = cleaned.list.filter(pl.element() != "").list.unique(maintain_order=True)
    return draft.select(cleaned).to_series()


def _available(draft: pl.DataFrame) -> pl.Series:
    if "available_from" not in draft.columns:
        return pl.Series("available_from", [None] * draft.height, dtype=TIME)
    return parse_times(draft["available_from"]).alias("available_from")


def _words(name: str) -> pl.Expr:
    """Text on one line: control characters and runs of white space become one space, and nothing becomes null."""
    return pl.col(name).str.replace_all(r"[\p{Cc}\s]+", " ").str.strip_chars().replace("", None)


def _bits(column: pl.Series) -> pl.Series:
    bits = column.fill_null(0.0).to_numpy().astype(np.float64).view(np.int64)
    return (
        pl.Series(column.name, bits)
        .to_frame()
        .select(pl.when(column.is_not_null()).then(pl.nth(0)).alias(column.name))
        .to_series()
    )
