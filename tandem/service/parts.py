"""What a recommender is built from: a release's models, and whoever reads users, items, words and changes for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from feature_repo.online import UserRow
from feature_repo.served import ServedLog
from ranking.ranker import Ranker
from retrieval.retriever import Retriever
from tandem.service.assemble import Assembler
from tandem.service.live_items import LiveItems
from tandem.service.settings import RerankSettings


class UserRows(Protocol):
    """Reads users' features; every value None for an unknown user."""

    def read(self, user_ids: Sequence[str]) -> list[UserRow]: ...


class ItemFeatures(Protocol):
    """Numeric features of the release's items, by row of the release; columns in the order of `names`."""

    @property
    def names(self) -> tuple[str, ...]: ...

    @property
    def as_of(self) -> datetime: ...

    def gather(self, items: NDArray[np.int64]) -> NDArray[np.float64]: ...


class Encode(Protocol):
    """The release's text encoder."""

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]: ...

    def truncates(self, text: str) -> bool: ...


class SeenItems(Protocol):
    """Everything that a user has already had, as item ids; the history that features carry is only its end."""

    def of(self, user_id: str) -> Sequence[str]: ...


@dataclass(frozen=True)
class Parts:
    """What a recommender is built from; `wiring.py` opens them."""

    release: str
    retriever: Retriever
    ranker: Ranker
    assembler: Assembler
    items: ItemFeatures | None
    users: UserRows | None
    seen: SeenItems | None
    encode: Encode | None
    log: ServedLog | None
    config: Any
    rerank: RerankSettings
    views: str
    clock: Callable[[], datetime]
    stale_after: timedelta | None = None
    """Item features older than this count as missing."""
    live: LiveItems | None = None
