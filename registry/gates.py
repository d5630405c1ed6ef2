"""May the challenger replace the champion? Paired tests over the same users, and a verdict that says why.

In: two frames with one row per test user (or request) and the same columns: `user_id`, metrics, and slices. Out: a `Verdict`:
a table row and a sentence per gate; `policy.py` adds the guardrails. Every gate must pass, so several gates never make a false
promotion likelier than one of them (an intersection-union test: Berger 1982). The same rows and seed give the same verdict, in
whatever order the rows come.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Final, Literal

import numpy as np
import polars as pl
from numpy.typing import NDArray

from registry.guardrails import GuardrailResult
from tandem.core.errors import InputError

Kind = Literal["non_inferiority", "superiority"]
Method = Literal["percentile", "bca", "cautious"]

_CHUNK_DRAWS: Final = 1_000_000
"""Draws made at once: keeps a bootstrap of any size in some 12 MB."""


@dataclass(frozen=True)
class Interval:
    """Means of `a` and `b` over `n` users, and `difference` = mean_b - mean_a with its confidence bounds."""

    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Gate:
    """One demand on a metric, on all users or on those of one slice.

    non_inferiority: the challenger is worse by less than `margin`; superiority: it is better by more than `margin`, in the
    metric's own unit. `where` is a boolean column ("cold_user"), "column=value", or "column=*": a gate for every value that has
    `minimum_users` users. With fewer than these the gate refuses instead of guessing.
    """

    metric: str
    margin: float = 0.0
    kind: Kind = "non_inferiority"
    minimum_users: int = 100
    where: str | None = None
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not self.margin >= 0 or self.minimum_users < 2:
            raise InputError(
                f"gate on {self.metric}: margin {self.margin} must be 0 or more, minimum_users {self.minimum_users} 2 or more"
            )

    @property
    def title(self) -> str:
        return f"{self.metric} on {self.where}" if self.where else self.metric


@dataclass(frozen=True)
class GateResult:
    """What one gate found. `interval` is None where nothing could be compared, `users` where none could be counted."""

    gate: Gate
    interval: Interval | None
    passed: bool
    sentence: str
    users: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What all gates and guardrails together say: `passed` only when every one did."""

    passed: bool
    results: tuple[GateResult, ...]
    level: float
    resamples: int
    seed: int
    guardrails: tuple[GuardrailResult, ...] = ()

    def guarded(self, guardrails: tuple[GuardrailResult, ...]) -> Verdict:
        """This verdict with the guardrails' results in it."""
        return replace(self, passed=self.passed and all(each.passed for each in guardrails), guardrails=guardrails)

    @property
    def sentences(self) -> tuple[str, ...]:
        return tuple(sentence for sentence, _ in self._said())

    @property
    def refusals(self) -> tuple[str, ...]:
        """The sentences of what did not pass."""
        return tuple(sentence for sentence, passed in self._said() if not passed)

    def _said(self) -> list[tuple[str, bool]]:
        gates = [(result.sentence, result.passed) for result in self.results]
        return gates + [(result.sentence, result.passed) for result in self.guardrails]

    def table(self) -> pl.DataFrame:
        """One row per gate and guardrail: what was asked, of how many users, both means, the interval, and whether it passed."""
        rows = [_table_row(result) for result in self.results] + [_guardrail_row(result) for result in self.guardrails]
        return pl.DataFrame(rows, schema=_TABLE)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for the registry's tables and for JSON."""
        parts = {name: [asdict(result) for result in getattr(self, name)] for name in ("results", "guardrails")}
        return {**asdict(self), **parts, "sentences": list(self.sentences), "refusals": list(self.refusals)}


_TABLE: Final[dict[str, pl.DataType]] = {
    "metric": pl.String(),
    "where": pl.String(),
    "kind": pl.String(),
    "margin": pl.Float64(),
    "users": pl.Int64(),
    "champion": pl.Float64(),
    "challenger": pl.Float64(),
    "difference": pl.Float64(),
    "low": pl.Float64(),
    "high": pl.Float64(),
    "passed": pl.Boolean(),
}


def paired_interval(
    a: NDArray[np.floating[Any]],
    b: NDArray[np.floating[Any]],
    seed: int,
    resamples: int = 2000,
    level: float = 0.95,
    method: Method = "cautious",
) -> Interval:
    """Bootstrap interval of the mean of `b - a` over users; `a`, `b` (U,) hold the same users in the same order.

    "percentile", "bca" (bias-corrected and accelerated: Efron 1987, doi:10.1080/01621459.1987.10478410), or "cautious": at each
    end the wider of BCa and Student's t, since BCa alone is too narrow for few users (Hesterberg 2015,
    doi:10.1080/00031305.2015.1089789; with 30 users it lets 6% pass where 2.5% are promised: tests/benchmarks/LOG.md).
    Raises InputError unless shapes agree, U >= 2 and all values are finite.
    """
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1 or a.size < 2:
        raise InputError(
            f"paired rows must be two equally long lists of at least 2 users; these have shapes {a.shape} and {b.shape}"
        )
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise InputError("paired rows hold NaN or infinity; drop those users on both sides first")
    if resamples < 100 or not 0.5 <= level < 1:
        raise InputError(f"resamples = {resamples} must be at least 100, level = {level} in [0.5, 1)")
    difference = b - a
    means = _bootstrap_means(difference, resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, _quantiles(difference, means, level, method))
    if method == "cautious":
        reach = _student_reach(difference, level)
        low, high = min(low, difference.mean() - reach), max(high, difference.mean() + reach)
    return Interval(float(a.mean()), float(b.mean()), float(difference.mean()), float(low), float(high), a.size)


def judge(
    champion_rows: pl.DataFrame | None,
    challenger_rows: pl.DataFrame,
    gates: Sequence[Gate],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> Verdict:
    """Hold the challenger against the champion, gate by gate. Without a champion (None) there is nothing to lose: it passes.

    Several rows of one user are averaged. A gate on "column=*" becomes one for each value that enough users of the challenger's
    rows have; a sentence counts the others, and none at all is a refusal. Users that only one side has, a metric that only one
    side could compute for a user, and slices that differ are refusals: a comparison on other users is none. Raises InputError
    for no gates or no `user_id`.
    """
    if not gates:
        raise InputError("no gates to judge by; name at least one in the settings")
    if champion_rows is None:
        results = [GateResult(gate, None, True, f"{gate.title}: no champion to compare with") for gate in gates]
    else:
        every, results = _expanded(gates, challenger_rows)
        results += [_judge_one(champion_rows, challenger_rows, gate, seed, resamples, level) for gate in every]
        results.sort(key=lambda result: _place(gates, result.gate))
    return Verdict(all(result.passed for result in results), tuple(results), level, resamples, seed)


_EVERY: Final = "=*"


def _expanded(gates: Sequence[Gate], rows: pl.DataFrame) -> tuple[list[Gate], list[GateResult]]:
    """Gates with every "column=*" replaced by one per value of enough users, and what is to be said of the values left out."""
    found: list[Gate] = []
    said: list[GateResult] = []
    for gate in gates:
        column = (gate.where or "").removesuffix(_EVERY)
        if not (gate.where or "").endswith(_EVERY) or column not in rows.columns or "user_id" not in rows.columns:
            found.append(gate)  # a column that is not there is refused by name when the gate is judged
            continue
        users = rows.select("user_id", pl.col(column).cast(pl.String)).drop_nulls().unique().group_by(column).len()
        large = users.filter(pl.col("len") >= gate.minimum_users).sort(["len", column], descending=[True, False])
        found += [replace(gate, where=f"{column}={value}") for value in large[column]]
        counted = f"{large.height} of {users.height} values have {gate.minimum_users} users or more"
        refused = "" if large.height else "refused, "
        said.append(GateResult(gate, None, bool(large.height), f"{gate.title}: {refused}{counted}"))
    return found, said


def _place(gates: Sequence[Gate], gate: Gate) -> int:
    """Where a gate was asked for; those made from "column=*" stand with it."""
    if gate in gates:
        return gates.index(gate)
    return gates.index(replace(gate, where=f"{(gate.where or '').partition('=')[0]}{_EVERY}"))


def _judge_one(
    champion: pl.DataFrame, challenger: pl.DataFrame, gate: Gate, seed: int, resamples: int, level: float
) -> GateResult:
    try:
        a, b = _pairs(_user_values(champion, gate, "champion"), _user_values(challenger, gate, "challenger"))
    except _RefusalError as refusal:
        return GateResult(gate, None, False, f"{gate.title}: refused, {refusal}")
    if a.size < gate.minimum_users:
        few = f"{gate.title}: refused, {a.size} users are fewer than the {gate.minimum_users} asked for"
        return GateResult(gate, None, False, few, a.size)
    interval = paired_interval(a, b, seed, resamples, level)
    passed = _passes(interval, gate)
    return GateResult(gate, interval, passed, _sentence(gate, interval, passed, level), a.size)


class _RefusalError(Exception):
    """The rows cannot be compared."""


def _user_values(rows: pl.DataFrame, gate: Gate, side: str) -> pl.DataFrame:
    """[user_id, value] sorted by user, null where the metric is undefined for the user."""
    column, _, value = (gate.where or "").partition("=")
    missing = [name for name in ("user_id", gate.metric, *([column] if column else [])) if name not in rows.columns]
    if missing:
        raise _RefusalError(f"the {side}'s rows have no column {missing[0]!r}; they have {rows.columns}")
    if column:
        rows = rows.filter(pl.col(column).cast(pl.String) == value if value else pl.col(column).cast(pl.Boolean))
    finite = pl.col(gate.metric).cast(pl.Float64)
    metric = pl.when(finite.is_finite()).then(finite)
    return rows.group_by("user_id").agg(metric.mean().alias("value")).sort("user_id")


def _pairs(champion: pl.DataFrame, challenger: pl.DataFrame) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The two sides' values of the users where the metric is defined; refuses sides that do not cover the same users."""
    both = champion.join(challenger, on="user_id", how="full", coalesce=True, maintain_order="left", suffix="_b")
    if both.height != champion.height or both.height != challenger.height:
        raise _RefusalError(
            f"they were evaluated on different users: {champion.height} of the champion, {challenger.height} of the challenger, "
            f"{both.height} together; evaluate both on the same requests"
        )
    odd = both.filter(pl.col("value").is_null() != pl.col("value_b").is_null()).height
    if odd:
        raise _RefusalError(f"for {odd} users only one of the two has a value")
    both = both.drop_nulls("value").sort("user_id")
    return both["value"].to_numpy(), both["value_b"].to_numpy()


def _passes(interval: Interval, gate: Gate) -> bool:
    worst = interval.low if gate.higher_is_better else -interval.high
    return worst > (gate.margin if gate.kind == "superiority" else -gate.margin)


def _sentence(gate: Gate, interval: Interval, passed: bool, level: float) -> str:
    demand = "better by more than" if gate.kind == "superiority" else "worse by less than"
    return (
        f"{gate.title}: challenger {interval.mean_b:.4f}, champion {interval.mean_a:.4f}, difference {interval.difference:+.4f} "
        f"({level:.0%} interval {interval.low:+.4f} to {interval.high:+.4f}, {interval.n:,} users); "
        f"{'shown' if passed else 'not shown'} to be {demand} {gate.margin:g}"
    )


def _table_row(result: GateResult) -> dict[str, Any]:
    gate, interval = result.gate, result.interval
    return {
        "metric": gate.metric,
        "where": gate.where,
        "kind": gate.kind,
        "margin": gate.margin,
        "users": result.users,
        "champion": interval.mean_a if interval else None,
        "challenger": interval.mean_b if interval else None,
        "difference": interval.difference if interval else None,
        "low": interval.low if interval else None,
        "high": interval.high if interval else None,
        "passed": result.passed,
    }


def _guardrail_row(result: GuardrailResult) -> dict[str, Any]:
    old, new = result.champion, result.challenger
    return {
        "metric": result.figure,
        "kind": "guardrail",
        "champion": old,
        "challenger": new,
        "difference": None if old is None or new is None else new - old,
        "passed": result.passed,
    }


def _bootstrap_means(values: NDArray[np.float64], resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """Means of `resamples` resamples of `values` (U,), drawn with replacement."""
    means = np.empty(resamples)
    step = max(1, _CHUNK_DRAWS // values.size)
    for start in range(0, resamples, step):
        count = min(step, resamples - start)
        draws = rng.integers(0, values.size, (count, values.size), dtype=np.int32)
        means[start : start + count] = values[draws].mean(axis=1)
    return means


def _quantiles(values: NDArray[np.float64], means: NDArray[np.float64], level: float, method: Method) -> NDArray[np.float64]:
    """Which quantiles of the bootstrap means bound the interval."""
    from scipy.special import ndtr, ndtri  # here, since the settings of every command import this module

    ends = np.array([(1 - level) / 2, (1 + level) / 2])
    centred = values - values.mean()
    spread = float((centred**2).sum())
    if method == "percentile" or spread == 0.0:
        return ends
    acceleration = float((centred**3).sum()) / (6 * spread**1.5)
    mean = values.mean()
    below = float((means < mean).mean() + (means == mean).mean() / 2)
    bias = ndtri(np.clip(below, 0.5 / means.size, 1 - 0.5 / means.size))
    shifted = bias + ndtri(ends)
    return np.asarray(ndtr(bias + shifted / (1 - acceleration * shifted)), dtype=np.float64)


def _student_reach(values: NDArray[np.float64], level: float) -> float:
    """Half the width of Student's interval for the mean of `values` (U,)."""
    from scipy.special import stdtrit

    error = values.std(ddof=1) / np.sqrt(values.size)
    return float(stdtrit(values.size - 1, (1 + level) / 2) * error)
