"""From raw feature rows to what the network eats: examples, the declared input transform, thinning, batches of whole requests.

In: `Examples` (features with NaN for missing, labels, requests). Out: `InputTransform` (fitted on training rows; the same call
trains and serves) and index arrays of mini-batches. Everything here is NumPy; randomness is passed in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri

from tandem.core.errors import IncompatibleError, InputError

Floats = NDArray[np.float32]
Ints = NDArray[np.int64]
Mask = NDArray[np.bool_]

_FIT_ROWS: Final = 100_000
_ROWS_AT_ONCE: Final = 4_096
_CLIP: Final = 3.0
_CLIP_WITHIN: Final = 5.0


@dataclass(frozen=True)
class Examples:
    """Candidates of many requests with their labels.

    `features` (P, F) float32, NaN = missing; `names` the F column names; `labels` task → (P,) float32 of 0, 1 or NaN (not known);
    `request` (P,) int64, ascending, equal within a request; `missed` (P,) bool marks positives that the first stage did not
    find: they are learned from, and never part of validation, calibration or evaluation.
    """

    features: Floats
    names: tuple[str, ...]
    labels: Mapping[str, Floats]
    request: Ints
    missed: Mask

    def __post_init__(self) -> None:
        rows = len(self.features)
        if self.features.ndim != 2 or self.features.shape[1] != len(self.names):
            raise InputError(f"features have shape {self.features.shape} but there are {len(self.names)} names")
        if len(set(self.names)) != len(self.names):
            raise InputError(f"feature names repeat: {sorted({n for n in self.names if self.names.count(n) > 1})}")
        sizes = {"request": len(self.request), "missed": len(self.missed), **{k: len(v) for k, v in self.labels.items()}}
        wrong = {name: size for name, size in sizes.items() if size != rows}
        if wrong:
            raise InputError(f"features have {rows} rows but {wrong}; all must have as many rows")
        if rows and np.any(np.diff(self.request) < 0):
            raise InputError("request is not ascending; sort the examples by request")

    def __len__(self) -> int:
        return len(self.features)

    def take(self, rows: Ints | Mask) -> Examples:
        """The same examples at `rows` only (a mask, or ascending indices)."""
        labels = {name: values[rows] for name, values in self.labels.items()}
        return Examples(self.features[rows], self.names, labels, self.request[rows], self.missed[rows])

    def served(self) -> Examples:
        """Without the missed positives: what the first stage really returned."""
        return self.take(~self.missed) if np.any(self.missed) else self


@dataclass(frozen=True)
class Groups:
    """Rows that belong together: `starts` (R,) first row, `sizes` (R,), `index` (P,) which group each row is in (0..R-1)."""

    starts: Ints
    sizes: Ints
    index: Ints

    @classmethod
    def of(cls, request: Ints) -> Groups:
        """Groups of equal neighbours in `request` (P,)."""
        if not len(request):
            empty = np.zeros(0, np.int64)
            return cls(empty, empty, empty)
        first = np.concatenate([[True], request[1:] != request[:-1]])
        starts = np.flatnonzero(first).astype(np.int64)
        sizes = np.diff(np.append(starts, len(request)))
        return cls(starts, sizes, np.repeat(np.arange(len(starts), dtype=np.int64), sizes))

    @classmethod
    def single(cls, rows: int) -> Groups:
        """One request of `rows` candidates: what serving asks."""
        return cls.of(np.zeros(rows, np.int64))

    def sum(self, values: NDArray[np.float64]) -> NDArray[np.float64]:
        """(P,) or (P, C) → (R,) or (R, C): sum per group."""
        return np.add.reduceat(values, self.starts, axis=0) if len(self.starts) else np.zeros((0, *values.shape[1:]))


def z_within(values: NDArray[np.float64], groups: Groups, counted: Mask) -> NDArray[np.float64]:
    """(P,) → (P,): (value − mean) / deviation within each request; NaN stays NaN, a constant request gives 0.

    Mean and deviation are those of the `counted` rows (the served candidates), so that missed positives do not shift them.
    """
    use = counted & np.isfinite(values)
    clean = np.where(use, values, 0.0)
    n = np.maximum(groups.sum(use.astype(np.float64)), 1.0)
    mean = (groups.sum(clean) / n)[groups.index]
    spread = np.sqrt(groups.sum(np.where(use, (clean - mean) ** 2, 0.0)) / n)[groups.index]
    flat = spread <= 1e-12 * np.maximum(np.abs(mean), 1e-12)
    z = (np.where(np.isfinite(values), values, np.nan) - mean) / np.where(flat, 1.0, spread)
    return np.where(flat & np.isfinite(values), 0.0, z)


def normal_within(values: NDArray[np.float64], groups: Groups, counted: Mask) -> NDArray[np.float64]:
    """(P,) → (P,): van der Waerden normal score of each value's rank within its request; equal values get equal scores.

    The top of the list is spread out (rank 1 and 2 of 200 are 2.8 and 2.4), where order matters most. NaN stays NaN.
    """
    finite = np.isfinite(values)
    order = np.lexsort((np.where(finite, values, np.inf), groups.index))
    group, value, use = groups.index[order], values[order], (counted & finite)[order]
    fresh = np.ones(len(order), bool)
    fresh[1:] = (group[1:] != group[:-1]) | ~(value[1:] == value[:-1])
    first = np.flatnonzero(fresh)
    after = np.append(first[1:], len(order))
    before = np.concatenate([[0.0], np.cumsum(use, dtype=np.float64)])
    below = before[first] - before[groups.starts][group[first]]
    middle = (below + (before[after] - before[first]) / 2.0)[np.cumsum(fresh) - 1]
    n = np.maximum(groups.sum((counted & finite).astype(np.float64)), 1.0)[group]
    scores = np.empty(len(order))
    scores[order] = ndtri(np.clip(middle / n, 0.5 / n, 1.0 - 0.5 / n))
    return np.where(finite, scores, np.nan)


@dataclass(frozen=True)
class Quantiles:
    """One column's rank-gauss map: `values` ascending knots and their normal `levels`, straight between, flat beyond.

    Robust to outliers and to any monotone change of scale of a feature; ties (counts, flags) sit at their mid rank.
    """

    values: tuple[float, ...]
    levels: tuple[float, ...]

    @classmethod
    def fit(cls, column: Floats, knots: int) -> Quantiles:
        """Knots at the column's quantiles, NaN and infinities left out."""
        sample = np.sort(column[np.isfinite(column)].astype(np.float64))
        if not len(sample):
            return cls((0.0,), (0.0,))
        at = np.unique(np.quantile(sample, np.linspace(0.0, 1.0, knots), method="nearest"))
        middle = (np.searchsorted(sample, at, "left") + np.searchsorted(sample, at, "right")) / 2.0 / len(sample)
        levels = np.clip(ndtri(middle), -_CLIP, _CLIP)
        return cls(tuple(at.tolist()), tuple(levels.tolist()))

    @property
    def constant(self) -> bool:
        """Does the column say nothing?"""
        return len(self.values) < 2


@dataclass(frozen=True)
class QuantileMaps:
    """Many columns' `Quantiles` as tables, applied at once: half the time of one np.interp per column at 300 rows.

    `columns` (U,) places of the columns that vary; `knots` (K, U) ascending, padded with inf; `origin`, `level` and `slope`
    (U · (K+1),): the straight piece that holds after j knots have been passed.
    """

    columns: Ints
    knots: Floats
    origin: Floats
    level: Floats
    slope: Floats

    @classmethod
    def of(cls, quantiles: Sequence[Quantiles]) -> QuantileMaps:
        """Tables of all columns that are not constant."""
        varied = [place for place, one in enumerate(quantiles) if not one.constant]
        size = max((len(quantiles[place].values) for place in varied), default=0)
        knots = np.full((size, len(varied)), np.inf)
        origin, level, slope = np.zeros((3, len(varied), size + 1))
        for row, place in enumerate(varied):
            x, y = np.array(quantiles[place].values), np.array(quantiles[place].levels)
            knots[: len(x), row] = x
            origin[row], level[row] = x[-1], y[-1]
            origin[row, : len(x)], level[row, : len(x)] = [x[0], *x[:-1]], [y[0], *y[:-1]]
            slope[row, 1 : len(x)] = np.minimum(np.diff(y) / np.diff(x), 1e30)
        tables = (table.astype(np.float32).ravel() for table in (origin, level, slope))
        return cls(np.array(varied, np.int64), knots.astype(np.float32), *tables)

    def __call__(self, features: Floats) -> Floats:
        """(P, F) → (P, U) float32 levels; NaN and infinities give NaN."""
        out = np.empty((len(features), len(self.columns)), np.float32)
        for at in range(0, len(features), _ROWS_AT_ONCE):
            out[at : at + _ROWS_AT_ONCE] = self._levels(np.take(features[at : at + _ROWS_AT_ONCE], self.columns, axis=1))
        return out

    def _levels(self, values: Floats) -> Floats:
        passed = np.zeros(values.shape, np.uint8)
        above = np.empty(values.shape, bool)
        for knots in self.knots:
            np.greater_equal(values, knots, out=above)
            passed += above.view(np.uint8)
        place = passed + np.arange(len(self.columns)) * (len(self.knots) + 1)
        with np.errstate(invalid="ignore"):
            levels: Floats = self.level[place] + self.slope[place] * (values - self.origin[place])
        return levels


@dataclass(frozen=True)
class InputTransform:
    """Raw features → (base (P,), inputs (P, D)): standardised columns, missing flags, within-request copies.

    `names` are the raw columns in order; `base` is the residual's column (or None); columns of `within_request` are given twice
    more, as z-score and as normal score of their rank within the request, because a first-stage score only means something beside
    its neighbours. Columns that were constant in training are left out; missing is 0 (the middle) beside a flag of 1.
    """

    names: tuple[str, ...]
    base: str | None
    within_request: tuple[str, ...]
    quantiles: tuple[Quantiles, ...]
    flagged: tuple[str, ...]

    @classmethod
    def fit(
        cls, examples: Examples, base: str | None, within_request: tuple[str, ...], knots: int, rng: np.random.Generator
    ) -> InputTransform:
        """Learn the maps from the served rows of `examples` (a sample of them when there are many).

        Raises IncompatibleError when `base` or a column of `within_request` is not among the features.
        """
        check_columns(([base] if base else []) + list(within_request), examples.names)
        rows = np.flatnonzero(~examples.missed)
        if len(rows) > _FIT_ROWS:
            rows = np.sort(rng.choice(rows, _FIT_ROWS, replace=False))
        sample = examples.features[rows]
        quantiles = tuple(Quantiles.fit(column, knots) for column in sample.T)
        share = (~np.isfinite(sample)).mean(axis=0) if len(rows) else np.zeros(len(examples.names))
        flagged = tuple(name for name, part in zip(examples.names, share, strict=True) if 0.001 < part < 0.999)
        return cls(examples.names, base, within_request, quantiles, flagged)

    @cached_property
    def sources(self) -> tuple[str, ...]:
        """Raw column that each of the D inputs comes from."""
        used = [name for name, q in zip(self.names, self.quantiles, strict=True) if not q.constant]
        return (*used, *self.flagged, *(name for name in self.within_request for _ in range(2)))

    def __call__(
        self, features: Floats, groups: Groups, counted: Mask | None = None, rows: Ints | None = None
    ) -> tuple[Floats, Floats]:
        """(P, F) → base (Q,) float32 and inputs (Q, D) float32 at `rows` (Q,), default all of them.

        Statistics within a request are always those of its `counted` (P,) rows (the served ones; default all), whatever `rows`
        picks: a thinned training set sees the same numbers as serving.
        """
        counted = np.ones(len(features), bool) if counted is None else counted
        picked = features if rows is None else features[rows]
        within = {name: self._within(features, name, groups, counted, rows) for name in self.within_request}
        return self._base(features, groups, counted, rows), self._inputs(picked, within)

    def _base(self, features: Floats, groups: Groups, counted: Mask, rows: Ints | None) -> Floats:
        """z-score of the base within the request; a candidate without one stands with the request's lowest."""
        if self.base is None or not len(features):
            return np.zeros(len(features) if rows is None else len(rows), np.float32)
        z = z_within(self._column(features, self.base), groups, counted)
        lowest = np.minimum.reduceat(np.where(np.isnan(z), 0.0, z), groups.starts)[groups.index]
        base = np.where(np.isnan(z), lowest, z).astype(np.float32)
        return base if rows is None else base[rows]

    def _within(
        self, features: Floats, name: str, groups: Groups, counted: Mask, rows: Ints | None
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        values = self._column(features, name)
        z = np.clip(z_within(values, groups, counted), -_CLIP_WITHIN, _CLIP_WITHIN)
        normal = normal_within(values, groups, counted)
        return (z, normal) if rows is None else (z[rows], normal[rows])

    def _inputs(self, features: Floats, within: Mapping[str, tuple[NDArray[np.float64], NDArray[np.float64]]]) -> Floats:
        out = np.empty((len(features), len(self.sources)), np.float32)
        used = len(self._maps.columns)
        out[:, :used] = self._maps(features)
        flags = [~np.isfinite(self._column(features, name)) for name in self.flagged]
        copies = [copy for name in self.within_request for copy in within[name]]
        for place, column in enumerate([*flags, *copies], start=used):
            out[:, place] = column
        out[np.isnan(out)] = 0.0
        return out

    @cached_property
    def _maps(self) -> QuantileMaps:
        return QuantileMaps.of(self.quantiles)

    def _column(self, features: Floats, name: str) -> NDArray[np.float64]:
        return features[:, self.names.index(name)].astype(np.float64)

    def to_json(self) -> dict[str, Any]:
        """JSON-able form; `from_json` gives an equal transform back."""
        return {
            "names": list(self.names),
            "base": self.base,
            "within_request": list(self.within_request),
            "flagged": list(self.flagged),
            "quantiles": [{"values": list(q.values), "levels": list(q.levels)} for q in self.quantiles],
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> InputTransform:
        quantiles = tuple(Quantiles(tuple(q["values"]), tuple(q["levels"])) for q in raw["quantiles"])
        return cls(tuple(raw["names"]), raw["base"], tuple(raw["within_request"]), quantiles, tuple(raw["flagged"]))


def check_columns(wanted: Sequence[str], names: Sequence[str]) -> None:
    """Raise IncompatibleError when a configured column is not among the features."""
    missing = sorted(set(wanted) - set(names))
    if missing:
        raise IncompatibleError(f"the ranker's settings name columns {missing} that the features lack; features: {list(names)}")


def aligned(features: Floats, names: Sequence[str], expected: tuple[str, ...]) -> Floats:
    """Columns of `features` in the order `expected`.

    Raises IncompatibleError naming the missing and the extra columns, or the shape when it does not fit the names.
    """
    if features.ndim != 2 or features.shape[1] != len(names):
        raise IncompatibleError(f"features have shape {features.shape} but {len(names)} names were given")
    if tuple(names) == expected:
        return features
    missing, extra = sorted(set(expected) - set(names)), sorted(set(names) - set(expected))
    if missing or extra or len(names) != len(expected):
        raise IncompatibleError(
            f"the ranker was trained on other features: missing {missing}, extra {extra}; "
            "build the features with the views of the ranker's release, or train the ranker again"
        )
    place = {name: i for i, name in enumerate(names)}
    return features[:, [place[name] for name in expected]]


@dataclass(frozen=True)
class Thinned:
    """`rows` (Q,) kept, ascending, and how many rows each stands for: `weight` (Q,)."""

    rows: Ints
    weight: Floats


def thin(positive: Mask, groups: Groups, negatives: int, rng: np.random.Generator) -> Thinned:
    """Keep each request's `positive` (P,) rows and at most `negatives` others, drawn evenly.

    A kept negative weighs (negatives of the request / kept ones): losses over the kept rows estimate those over all without bias.
    """
    n_positive = groups.sum(positive.astype(np.float64)).astype(np.int64)
    n_negative = groups.sizes - n_positive
    if not len(positive) or negatives >= n_negative.max():
        return Thinned(np.arange(len(positive)), np.ones(len(positive), np.float32))
    order = np.lexsort((np.where(positive, -1.0, rng.random(len(positive))), groups.index))
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order)) - np.repeat(groups.starts + n_positive, groups.sizes)
    rows = np.flatnonzero(positive | (place < negatives))
    stands_for = (n_negative / np.clip(n_negative, 1, negatives))[groups.index]
    return Thinned(rows, np.where(positive, 1.0, stands_for)[rows].astype(np.float32))


def negatives_for(positive: Mask, requests: int, rows: int, at_least: int = 8) -> int:
    """Negatives per request such that about `rows` rows are kept in all, `at_least` of them in any case."""
    return max(at_least, (rows - int(positive.sum())) // max(requests, 1))


def request_batches(groups: Groups, per_batch: int, rng: np.random.Generator) -> Iterator[tuple[Ints, Ints]]:
    """One epoch of mini-batches of `per_batch` whole requests in random order: (rows (Q,), sizes (R,) of each request in it)."""
    order = rng.permutation(len(groups.starts))
    for at in range(0, len(order), per_batch):
        chosen = order[at : at + per_batch]
        sizes = groups.sizes[chosen]
        ends = np.cumsum(sizes)
        rows = np.arange(ends[-1]) + np.repeat(groups.starts[chosen] - (ends - sizes), sizes)
        yield rows.astype(np.int64), sizes
