"""Retrieval in process: load a folder, ask for candidates. The service and the offline pipeline use this same object.

In: a folder with `items.parquet`, `towers/`, `index/`, `covisit.safetensors` and `retriever.json` (a release is one). Out:
`Candidates` for any mix of history, session and sentence.

    retriever = Retriever.load(Path("workspace/releases/20261121-3f2a9c10"))
    for item_id, title, score in retriever.search(history=["318", "296"], k=5): ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from retrieval.baselines import ItemKNN
from retrieval.batches import PAD, pad_left
from retrieval.candidates import CandidateConfig, Candidates, Trace, retrieve, trace
from retrieval.filters import NOT_INCLUDED, FilterColumns, Filters, Kind, counted
from retrieval.index import VectorIndex
from retrieval.query_batch import QueryBatch
from retrieval.sources import (
    CandidateSource,
    HistorySource,
    RankedSource,
    TowerSource,
    covisit_source,
    new_source,
    popular_source,
)
from retrieval.towers import Towers
from tandem.core.errors import IncompatibleError, InputError, NotFoundError
from tandem.core.folders import content_hash, read_json, write_json

ITEMS: Final = "items.parquet"
FACTS: Final = "retriever.json"
COVISIT: Final = "covisit.safetensors"
NEW_DAYS: Final = 30.0


@dataclass(frozen=True, eq=False)
class Queries:
    """B requests: `histories` (B, H) int64 dense ids padded with -1 on the left, optional `sentences` (B, T) text vectors,
    per request the dense ids to leave out, masks over the catalogue by name, and the moment (UTC microseconds) that is now.
    """

    histories: NDArray[np.int64]
    exclude: Sequence[NDArray[np.int64]]
    now_us: int
    sentences: NDArray[np.float32] | None = None
    filters: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.histories)


@dataclass(frozen=True, eq=False)
class Retriever:
    """Towers, index and the other candidate sources over one catalogue; immutable and safe to share between threads."""

    items: pl.DataFrame
    towers: Towers
    index: VectorIndex
    covisit: ItemKNN
    counts: NDArray[np.float32]
    exclude_seen: bool
    sentence_weight: float = 3.0

    @cached_property
    def item_ids(self) -> list[str]:
        """Outside id of every dense id."""
        return self.items["item_id"].to_list()

    @cached_property
    def row_of(self) -> dict[str, int]:
        """Dense id of every outside id."""
        return {item_id: row for row, item_id in enumerate(self.item_ids)}

    @cached_property
    def _columns(self) -> FilterColumns:
        return FilterColumns.of(self.items)

    @property
    def attributes(self) -> Mapping[str, Kind]:
        """What filters may ask of items beside categories, and what kind of values that has."""
        return self._columns.vocabulary.attributes

    @cached_property
    def _popular(self) -> RankedSource:
        return popular_source(self.counts)

    @cached_property
    def _covisit(self) -> CandidateSource:
        return covisit_source(self.covisit)

    def available(self, now_us: int) -> NDArray[np.bool_]:
        """(N,) bool: items that exist at that moment."""
        return self._columns.available <= now_us

    def check(self, filters: Filters) -> None:
        """Raise InputError for an attribute that items do not have, or values of another kind than its own."""
        self._columns.vocabulary.check(filters)

    def masks(self, filters: Filters, now_us: int) -> dict[str, NDArray[np.bool_]]:
        """(N,) bool by name for every filter asked for, but `exclude` and `seen`, which are lists per request.

        Raises InputError as `check` does.
        """
        self.check(filters)
        masks = self._columns.masks(filters, now_us)
        if filters.include is not None:
            masks[NOT_INCLUDED] = np.zeros(len(self.items), np.bool_)
            masks[NOT_INCLUDED][self.rows(filters.include)] = True
        return masks

    def eligible(self, queries: Queries) -> tuple[int, dict[str, int]]:
        """How many items the first request may get, and how many each filter removed; "excluded" is what its own list did."""
        left, removed = counted(queries.filters, np.ones(len(self.items), np.bool_))
        out = np.unique(queries.exclude[0])
        excluded = int(np.count_nonzero(left[out]))
        return int(np.count_nonzero(left)) - excluded, {**removed, "excluded": excluded}

    def rows(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Dense ids of those outside ids that the catalogue knows; the others are left out."""
        return np.array([self.row_of[item_id] for item_id in item_ids if item_id in self.row_of], np.int64)

    def vectors(self, queries: Queries) -> NDArray[np.float32]:
        """Query vectors (B, Q)."""
        return self.towers.query(queries.histories, queries.sentences, self.sentence_weight)

    def candidates(self, queries: Queries, config: CandidateConfig) -> tuple[Candidates, NDArray[np.float32]]:
        """Merged candidates, and the towers' score (B, k) float32 of every one of them, found by the towers or not."""
        batch = self._batch(queries)
        found = retrieve(batch, self._sources(queries.now_us), self._popular, config)
        return found, tower_scores(batch.vectors, self.towers.item_vectors, found.ids)

    def nearest(self, queries: Queries, k: int) -> NDArray[np.int64]:
        """What the towers alone return: dense ids (B, k), -1 as padding."""
        return TowerSource(self.index).candidates(self._batch(queries), k)[1]

    def trace(self, queries: Queries, item: int, config: CandidateConfig) -> Trace:
        """What became of one dense item id in the first request."""
        return trace(self._batch(queries), 0, item, self._sources(queries.now_us), self._popular, config)

    def similar(
        self,
        item: int,
        k: int,
        masks: Mapping[str, NDArray[np.bool_]] | None = None,
        exclude: NDArray[np.int64] | None = None,
    ) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """The k items nearest to one, best first: dense ids and cosines of taste, or of text for an item nobody has touched.

        Only what passes all `masks` and is not among `exclude` (dense ids).
        """
        width = self.towers.shape.dimension
        vectors = self.towers.item_vectors
        block = vectors[:, :width] if self.counts[item] else vectors[:, width + 1 :]
        norms = np.linalg.norm(block, axis=1) + 1e-9
        cosine = (block @ block[item]) / (norms * norms[item])
        cosine[item] = -np.inf
        cosine[np.empty(0, np.int64) if exclude is None else exclude] = -np.inf
        for mask in (masks or {}).values():
            cosine[~mask] = -np.inf
        order = np.argsort(-cosine, kind="stable")[:k]
        order = order[np.isfinite(cosine[order])]
        return order, cosine[order].astype(np.float32)

    def search(
        self,
        history: Sequence[str] = (),
        sentence: NDArray[np.float32] | None = None,
        k: int = 10,
        now_us: int = 2**62,
        filters: Filters | None = None,
    ) -> list[tuple[str, str, float]]:
        """(item_id, title, tower score) of the k best candidates for a history of item ids and/or a text vector (T,)."""
        filters = filters or Filters()
        seen, out = self.rows(history), self.rows(filters.exclude)
        again = not self.exclude_seen if filters.seen is None else filters.seen
        exclude = [out if again else np.union1d(seen, out)]
        sentences = None if sentence is None else sentence[None, :]
        queries = Queries(pad_left([seen], 100), exclude, now_us, sentences, self.masks(filters, now_us))
        found, scores = self.candidates(queries, CandidateConfig(k=k))
        titles = self.items["title"]
        order = np.argsort(-scores[0], kind="stable")
        return [
            (self.item_ids[int(found.ids[0, at])], titles[int(found.ids[0, at])], float(scores[0, at]))
            for at in order
            if found.ids[0, at] != PAD
        ]

    def _batch(self, queries: Queries) -> QueryBatch:
        return QueryBatch(self.vectors(queries), queries.histories, queries.exclude, None, queries.filters)

    def _sources(self, now_us: int) -> list[CandidateSource]:
        sources: list[CandidateSource] = [TowerSource(self.index), self._covisit]
        if not self.exclude_seen:
            sources.append(HistorySource(len(self.item_ids)))
        if self.items["available_from"].null_count() < len(self.items):
            sources.append(new_source(self._columns.available, now_us, NEW_DAYS))
        return sources

    def save(self, folder: Path) -> None:
        """Write every part into an existing folder, and say in `retriever.json` what belongs together."""
        self.items.write_parquet(folder / ITEMS)
        (folder / "towers").mkdir()
        self.towers.save(folder / "towers")
        self.index.save(folder / "index")
        self.covisit.save(folder / COVISIT)
        facts = {
            "items": items_fingerprint(self.items),
            "towers": self.towers.fingerprint,
            "counts": self.counts.astype(float).tolist(),
            "exclude_seen": self.exclude_seen,
        }
        write_json(folder / FACTS, facts)

    @classmethod
    def load(cls, folder: Path, *, sentence_weight: float = 3.0) -> Retriever:
        """Read what `save` wrote. Raises IncompatibleError, naming both fingerprints, when its parts are not of one training."""
        if not (folder / FACTS).is_file():
            raise NotFoundError(f"no retriever in {folder}; run `tandem train towers` or name a release's folder")
        facts: dict[str, Any] = read_json(folder / FACTS)
        items = pl.read_parquet(folder / ITEMS)
        towers = Towers.load(folder / "towers")
        for name, found in (("items", items_fingerprint(items)), ("towers", towers.fingerprint)):
            if found != facts[name]:
                raise IncompatibleError(
                    f"{folder.name}: {name} are {found[:12]}, but the index was filled for {facts[name][:12]}; "
                    "use one release's parts"
                )
        index = VectorIndex.load(folder / "index")
        if index.count != len(items):
            raise IncompatibleError(f"{folder.name}: the index holds {index.count} vectors, but there are {len(items)} items")
        covisit = ItemKNN.load(folder / COVISIT)
        return cls(items, towers, index, covisit, np.array(facts["counts"], np.float32), facts["exclude_seen"], sentence_weight)


def tower_scores(queries: NDArray[np.float32], items: NDArray[np.float32], ids: NDArray[np.int64]) -> NDArray[np.float32]:
    """Inner products (B, k) of queries (B, Q) with the items (N, Q) that `ids` (B, k) name; NaN where an id is -1."""
    if queries.shape[1] != items.shape[1]:
        raise InputError(f"queries have {queries.shape[1]} coordinates, items {items.shape[1]}; use one release's towers")
    scores = np.empty(ids.shape, np.float32)
    for start in range(0, len(ids), 256):
        part = slice(start, start + 256)
        scores[part] = np.einsum("bq,bkq->bk", queries[part], items[np.maximum(ids[part], 0)], optimize=True)
    return np.where(ids >= 0, scores, np.nan).astype(np.float32)


def items_fingerprint(items: pl.DataFrame) -> str:
    """Hash of the item order: what ties a dense id to an item."""
    return content_hash(items["item_id"].to_list())
