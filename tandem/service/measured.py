"""What is measured of a release on the machine that evaluates it: time to a slate by stage, and whether its features are right.

In: trained parts and some users. Out: plain numbers for `measured.json`, which no content hash covers, since they differ from run
to run. Guardrails see each of them as "measured/<key>/<key>", for example "measured/latency_ms/total/p95".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from ranking.ranker import Ranker
from retrieval.retriever import Retriever
from tandem.core.errors import TandemError
from tandem.service.health import release_checks, wrong_values
from tandem.service.recommend import Recommender
from tandem.service.settings import Settings
from tandem.service.slate import Ask
from tandem.service.wiring import trained_recommender

MEASURED: Final = "measured.json"
_WARM: Final = 20
_ASKED: Final = 200
"""So many slates cost a second or two; their 95th percentile still has ten slower ones behind it."""


def measure(settings: Settings, retriever: Retriever, ranker: Ranker, users: Sequence[str]) -> dict[str, Any]:
    """{latency_ms: {stage: {p50, p95}}, slates: {asked, degraded}, checks: {check: {rows, skipped, wrong}}}.

    A part that this workspace cannot measure (nothing is materialised yet) is left out; `not_measured` says why.
    """
    found: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "slates": lambda: _slates(settings, retriever, ranker, users),
        "checks": lambda: {"checks": _checks(settings)},
    }
    for name, part in parts.items():
        try:
            found |= part()
        except (TandemError, OSError) as error:
            reasons[name] = f"{type(error).__name__}: {error}"[:300]
    return found | ({"not_measured": reasons} if reasons else {})


def _slates(settings: Settings, retriever: Retriever, ranker: Ranker, users: Sequence[str]) -> dict[str, Any]:
    recommender = trained_recommender(settings, retriever, ranker)
    try:
        return latency(recommender, users)
    finally:
        recommender.close()


def latency(recommender: Recommender, users: Sequence[str]) -> dict[str, Any]:
    """{latency_ms: {stage: {p50, p95}}, slates: {asked, degraded}} of one slate of ten after the other, warmed up, one thread."""
    asked = [users[place % len(users)] for place in range(_WARM + _ASKED)] if len(users) else []
    slates = [recommender.recommend(Ask(user_id=user)) for user in asked][_WARM:]
    stages = slates[0].took_ms if slates else {}
    took = {stage: [slate.took_ms.get(stage, 0.0) for slate in slates] for stage in stages}
    return {
        "latency_ms": {stage: _percentiles(values) for stage, values in took.items()},
        "slates": {"asked": len(slates), "degraded": sum(bool(slate.degraded) for slate in slates)},
    }


def _percentiles(values: list[float]) -> dict[str, float]:
    return {"p50": round(float(np.percentile(values, 50)), 3), "p95": round(float(np.percentile(values, 95)), 3)}


def _checks(settings: Settings) -> dict[str, dict[str, int]]:
    return {
        name: {"rows": result.rows, "skipped": result.skipped, "wrong": wrong_values(result)}
        for name, result in release_checks(settings).items()
    }
