"""The as-of join: for each entity row, which feature row was the newest one known at its time.

In: entity rows [__row, __asked, keys...] and lazy feature rows [keys..., __known, (__created), features...]. Out: the features,
one row per entity row and in the order of `__row`; null where nothing was known. The join moves row numbers only: it sorts keys
and times, and the features are picked by number at the end. A large view is taken part by part of its keys, so that its memory
does not grow with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

import polars as pl

from tandem.core.schema import TIME

ROW: Final = "__row"
ASKED: Final = "__asked"
KNOWN: Final = "__known"
CREATED: Final = "__created"

ROWS_PER_PART: Final = 20_000_000
"""A view with more rows than this is joined in parts of about this size."""

_AT: Final = "__at"
_USABLE: Final = "__usable"


@dataclass(frozen=True)
class Rule:
    """What a view's rows are matched by.

    `keys` are columns of both sides and may be none (then every row is about everything). A row counts until `ttl` after its
    time, for ever without one. With `as_created` it counts from its creation only, where that is later than its own time.
    """

    keys: tuple[str, ...]
    ttl: timedelta | None
    has_created: bool
    as_created: bool


def newest_known(asked: pl.DataFrame, rows: pl.LazyFrame, rule: Rule, rows_per_part: int = ROWS_PER_PART) -> pl.DataFrame:
    """The features that were known to each entity row, in the order of `__row`."""
    within = rows.filter(*_limits(asked, rule))
    parts = _parts(asked, rows, rule, rows_per_part)
    answers = [_answer(part, within.filter(*share), rule) for part, share in parts]
    return answers[0].drop(ROW) if len(answers) == 1 else pl.concat(answers).sort(ROW).drop(ROW)


def _limits(asked: pl.DataFrame, rule: Rule) -> list[pl.Expr]:
    """Rows outside of these can answer nobody; Parquet's statistics skip most of them unread."""
    first, last = asked[ASKED].min(), asked[ASKED].max()
    known = [pl.col(key).is_not_null() for key in rule.keys]
    if last is None:
        return [*known, pl.lit(False)]
    oldest = [pl.col(KNOWN) >= pl.lit(first, TIME) - pl.lit(rule.ttl)] if rule.ttl else []
    return [*known, pl.col(KNOWN) <= pl.lit(last, TIME), *oldest]


def _parts(
    asked: pl.DataFrame, rows: pl.LazyFrame, rule: Rule, rows_per_part: int
) -> Iterator[tuple[pl.DataFrame, list[pl.Expr]]]:
    """(entity rows, condition on feature rows): the same share of the keys on both sides."""
    count = rows.select(pl.len()).collect().item() if rule.keys else 0
    shares = max(1, -(-count // rows_per_part))
    if shares == 1:
        yield asked, []
        return
    share = pl.struct(rule.keys).hash(seed=0) % shares
    for number in range(shares):
        yield asked.filter(share == number), [share == number]


def _answer(asked: pl.DataFrame, rows: pl.LazyFrame, rule: Rule) -> pl.DataFrame:
    """`__row` and the features, in the order of `__row`."""
    known = rows.collect()
    index = _index(known, rule)
    left = asked.select(ROW, ASKED, *rule.keys).sort(ASKED)
    joined = left.join_asof(
        index, left_on=ASKED, right_on=_USABLE, by=list(rule.keys) or None, strategy="backward", check_sortedness=False
    )
    at = joined.sort(ROW)[_AT]
    features = [name for name in known.columns if name not in (*rule.keys, KNOWN, CREATED)]
    found = known.select(pl.col(KNOWN, *features).gather(at)).with_columns(asked.sort(ROW).select(ROW, ASKED))
    if rule.ttl:
        fresh = pl.col(ASKED) - pl.col(KNOWN) <= pl.lit(rule.ttl)
        found = found.with_columns(pl.when(fresh).then(pl.col(features)).name.keep()) if features else found
    return found.select(ROW, *features)


def _index(known: pl.DataFrame, rule: Rule) -> pl.DataFrame:
    """[keys, __usable, __at]: from when on which row answers, oldest first within each key."""
    order = [KNOWN, CREATED] if rule.has_created else [KNOWN]
    slim = known.select(*rule.keys, *order).with_row_index(_AT)
    if not _is_ordered(slim, rule.keys, order):
        slim = slim.sort(order, maintain_order=True)
    if rule.as_created and rule.has_created:
        return _from_creation(slim, rule.keys)
    return slim.select(*rule.keys, pl.col(KNOWN).alias(_USABLE), _AT)


def _from_creation(slim: pl.DataFrame, keys: Sequence[str]) -> pl.DataFrame:
    """Rows count from their creation on; one that comes after a newer row of its key was known answers nobody."""
    usable = pl.max_horizontal(KNOWN, CREATED).alias(_USABLE)
    rank = slim.filter(pl.col(CREATED).is_not_null()).sort(KNOWN, CREATED, maintain_order=True).with_row_index("__rank")
    arrived = rank.with_columns(usable).sort(_USABLE, "__rank")
    best = pl.col("__rank").cum_max()
    return arrived.filter(pl.col("__rank") == (best.over(list(keys)) if keys else best)).select(*keys, _USABLE, _AT)


def _is_ordered(slim: pl.DataFrame, keys: Sequence[str], order: Sequence[str]) -> bool:
    """Are the rows of every key oldest first? Looks for the two usual layouts: by time, or by key and time."""
    if len(order) == 1 and slim[order[0]].is_sorted():
        return True
    return bool(keys) and _is_sorted(slim, [*keys, *order])


def _is_sorted(frame: pl.DataFrame, columns: Sequence[str]) -> bool:
    later = pl.lit(True)
    for column in reversed(columns):
        now, before = pl.col(column), pl.col(column).shift()
        later = (before < now) | ((before == now) & later)
    return bool(frame.lazy().select(later.slice(1).fill_null(False).all()).collect().item())
