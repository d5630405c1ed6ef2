"""What is asked of a recommender, and what it answers. Plain values; nothing here computes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retrieval.filters import Filters


@dataclass(frozen=True)
class Ask:
    """What is wanted: any mix of a person, a session (item ids, oldest first) and a sentence, with filters.

    `categories` (any of them) and `exclude` hold beside what `filters` say.
    `deadline`, on `time.perf_counter`, is when stages that have a fallback are no longer begun.
    `noted` are further columns that the served-log keeps with the slate.
    `context` is what is known of where the request comes from, such as {"device": "phone"}; what no training event had counts as
    missing.
    """

    user_id: str | None = None
    session: tuple[str, ...] = ()
    query: str | None = None
    k: int = 10
    categories: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    filters: Filters = field(default_factory=Filters)
    context: Mapping[str, str] = field(default_factory=dict)
    request_id: str | None = None
    deadline: float = math.inf
    noted: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SlateItem:
    """One answer: predictions are calibrated probabilities by task, `score` is what it was ranked by (higher is better)."""

    item_id: str
    title: str
    categories: tuple[str, ...]
    score: float
    predictions: dict[str, float]
    reason: str
    reason_code: str
    source: str
    position: int
    propensity: float


@dataclass(frozen=True)
class Slate:
    """The ordered answer. `degraded` names every fallback that was taken; `took_ms` has one entry per stage and `total`."""

    items: tuple[SlateItem, ...]
    release: str
    request_id: str
    degraded: tuple[str, ...]
    took_ms: dict[str, float]
    cold_start: bool = False
    truncated: bool = False


@dataclass(frozen=True)
class Why:
    """What became of one item for one user: `stages` are (stage, what happened, rank from 1, score).

    `features` are what the ranker knew of the two, by name, None where missing; empty for an item that did not come so far.
    """

    user_id: str
    item_id: str
    title: str
    verdict: str
    stages: tuple[tuple[str, str, int | None, float | None], ...]
    features: Mapping[str, float | None] = field(default_factory=dict)
