"""The story of the champion as people read it: from when to when, by whom and why, on which data, with which figures.

In: the registry's tables. Out: one answer per change, oldest first; deleted releases are still told of.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from registry.store import ReleaseStore
from registry.work import Promotion, Work
from tandem.service.schemas import ChangeAnswer

_FIGURES: Final = ("towers_ranker/ndcg@10", "towers_ranker/recall@100", "towers_ranker/coverage@10")


def changes(store: ReleaseStore) -> tuple[ChangeAnswer, ...]:
    """Every change of champion, as of one moment."""
    with store.look() as work:
        history = work.history()
        return tuple(_told(work, change, following) for change, following in pairwise([*history, None]) if change is not None)


def _told(work: Work, change: Promotion, following: Promotion | None) -> ChangeAnswer:
    release, _ = work.recall(change.name)
    verdict = work.gate(change.gate).verdict if change.gate is not None else {}
    metrics = release.manifest.metrics
    return ChangeAnswer(
        at=change.at.isoformat(),
        until=following.at.isoformat() if following else None,
        kind=change.kind,
        name=change.name,
        previous=change.previous,
        who=change.who,
        why=change.why,
        gate=tuple(verdict.get("sentences", ())),
        window={name: str(value) for name, value in release.manifest.window.items()},
        figures={name.rpartition("/")[2]: figure for name in _FIGURES if (figure := metrics.get(name)) is not None},
    )
