"""Retrieval in process: load a folder, ask for candidates. The service and the offline pipeline use this same object.

In: a folder with `items.parquet`, `towers/`, `index/`, `covisit.safetensors` and `retriever.json` (a release is one). Out:
`Candidates` for any mix of history, session and sentence.

    retriever = Retriever.load(Path("workspace/releases/20261121-3f2a9c10"))
    for item_id, title, score in retriever.search(history=["318", "296"], k=5): ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from retrieval.baselines import ItemKNN
from retrieval.batches import PAD, pad_left
from retrieval.candidates import CandidateConfig, Candidates, Trace, retrieve, trace
from retrieval.exact import scan
from retrieval.filters import ALWAYS, NOT_YET, Filters, Kind, counted
from retrieval.fresh import FreshItems
from retrieval.index import VectorIndex
from retrieval.listing import Card, Listing, Stock
from retrieval.query_batch import QueryBatch
from retrieval.sources import (
    CandidateSource,
    HistorySource,
    LinearSource,
    RankedSource,
    TowerSource,
    category_source,
    covisit_source,
    new_source,
    popular_source,
)
from retrieval.towers import Towers
from tandem.core.errors import IncompatibleError, InputError, IntegrityError, NotFoundError
from tandem.core.folders import content_hash, read_json, write_json

ITEMS: Final = "items.parquet"
FACTS: Final = "retriever.json"
COVISIT: Final = "covisit.safetensors"
NEW_DAYS: Final = 30.0
_CANARIES: Final = 16


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
    """Towers, index and the other candidate sources over one catalogue; safe to share between threads.

    Its parts never change; single changes of items up to `items_until` (UTC microseconds) were in the data. Items put or deleted
    since lie over them (`fresh`), and `listing` shows both.
    """

    items: pl.DataFrame
    towers: Towers
    index: VectorIndex
    covisit: ItemKNN
    counts: NDArray[np.float32]
    exclude_seen: bool
    sentence_weight: float = 3.0
    items_until: int = 0
    fresh: FreshItems = field(init=False, repr=False)

    def __post_init__(self) -> None:
        stock = Stock(self.items, self.towers, self.index, self.counts)
        object.__setattr__(self, "fresh", FreshItems(stock))  # nothing is made before the first change

    @property
    def listing(self) -> Listing:
        """The catalogue of this moment: titles, categories, vectors by dense id, with what was put since."""
        return self.fresh.listing

    @property
    def item_ids(self) -> list[str]:
        """Outside id of every dense id that the release was trained on."""
        return self.listing.stock.item_ids

    @property
    def row_of(self) -> dict[str, int]:
        """Dense id of every outside id that the release was trained on."""
        return self.listing.stock.row_of

    @property
    def attributes(self) -> Mapping[str, Kind]:
        """What filters may ask of items beside categories, and what kind of values that has."""
        return self.listing.stock.columns.vocabulary.attributes

    @cached_property
    def _popular(self) -> RankedSource:
        return popular_source(self.counts)

    @cached_property
    def _covisit(self) -> LinearSource:
        return covisit_source(self.covisit)

    @cached_property
    def _category(self) -> LinearSource:
        columns = self.listing.stock.columns
        return category_source(columns.rows, columns.codes, self.counts)

    def put(self, cards: Sequence[Card], text: NDArray[np.float32]) -> None:
        """List new items, or list known ones as they are now, with their text vectors (n, T): from the next question on.

        In this process, until it ends; the service keeps such changes on disk. Raises InputError as `FreshItems.put` does.
        """
        self.fresh.put(cards, text)

    def delete(self, item_ids: Sequence[str]) -> None:
        """Take items out of every answer, from the next question on."""
        self.fresh.delete(item_ids)

    def available(self, now_us: int) -> NDArray[np.bool_]:
        """(N,) bool: items that exist at that moment."""
        return self.masks(Filters(), now_us)[NOT_YET]

    def check(self, filters: Filters) -> None:
        """Raise InputError for an attribute that items do not have, or values of another kind than its own."""
        self.listing.stock.columns.vocabulary.check(filters)

    def masks(self, filters: Filters, now_us: int) -> dict[str, NDArray[np.bool_]]:
        """(N,) bool by name for every filter asked for, but `exclude` and `seen`, which are lists per request.

        Raises InputError as `check` does.
        """
        return self.listing.masks(filters, now_us)

    def eligible(self, queries: Queries) -> tuple[int, dict[str, int]]:
        """How many items the first request may get, and how many each filter removed; "excluded" is what its own list did."""
        listing = self.listing
        left, removed = counted(_padded(queries.filters, listing.count), listing.listed)
        out = np.unique(queries.exclude[0])
        excluded = int(np.count_nonzero(left[out]))
        return int(np.count_nonzero(left)) - excluded, {**removed, "excluded": excluded}

    def rows(self, item_ids: Sequence[str]) -> NDArray[np.int64]:
        """Dense ids of those outside ids that the catalogue knows, deleted or not; the others are left out."""
        return self.listing.rows(item_ids)

    def vectors(self, queries: Queries) -> NDArray[np.float32]:
        """Query vectors (B, Q)."""
        put = self.listing.put_in(queries.histories)
        return self.towers.query(queries.histories, queries.sentences, self.sentence_weight, put)

    def candidates(self, queries: Queries, config: CandidateConfig) -> tuple[Candidates, NDArray[np.float32]]:
        """Merged candidates, and the towers' score (B, k) float32 of every one of them, found by the towers or not."""
        listing = self.listing
        batch = self._batch(queries, listing)
        found = retrieve(batch, self._sources(listing, queries.now_us), self._everything(listing), config)
        if listing.view is None:
            return found, tower_scores(batch.vectors, self.towers.item_vectors, found.ids)
        rows, places = np.unique(np.maximum(found.ids, 0), return_inverse=True)
        local = np.where(found.ids >= 0, places.reshape(found.ids.shape), -1)
        return found, tower_scores(batch.vectors, listing.item_vectors(rows), local)

    def nearest(self, queries: Queries, k: int) -> NDArray[np.int64]:
        """What the towers alone return: dense ids (B, k), -1 as padding."""
        return TowerSource(self.listing.index).candidates(self._batch(queries, self.listing), k)[1]

    def trace(self, queries: Queries, item: int, config: CandidateConfig) -> Trace:
        """What became of one dense item id in the first request."""
        listing = self.listing
        batch = self._batch(queries, listing)
        return trace(batch, 0, item, self._sources(listing, queries.now_us), self._everything(listing), config)

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
        listing, width = self.listing, self.towers.shape.dimension
        known = bool(listing.counts(np.array([item]))[0])
        columns = slice(0, width) if known else slice(width + 1, None)
        cosine = listing.cosines(item, columns)
        cosine[item] = -np.inf
        cosine[np.empty(0, np.int64) if exclude is None else exclude] = -np.inf
        cosine[~listing.listed] = -np.inf
        for mask in _padded(masks or {}, listing.count).values():
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
        order = np.argsort(-scores[0], kind="stable")
        rows = [(int(found.ids[0, at]), float(scores[0, at])) for at in order if found.ids[0, at] != PAD]
        return [(self.listing.item_id(row), self.listing.title(row), score) for row, score in rows]

    def _batch(self, queries: Queries, listing: Listing) -> QueryBatch:
        masks, listed = _padded(queries.filters, listing.count), None if listing.view is None else listing.listed
        return QueryBatch(self.vectors(queries), queries.histories, queries.exclude, listed, masks)

    def _sources(self, listing: Listing, now_us: int) -> list[CandidateSource]:
        """All but popular, over every dense id of the listing."""
        linear = [self._covisit, self._category] if len(listing.stock.columns.codes) else [self._covisit]
        sources: list[CandidateSource] = [TowerSource(listing.index), *(replace(each, items=listing.count) for each in linear)]
        if not self.exclude_seen:
            sources.append(HistorySource(listing.count))
        available = listing.available
        if (available > ALWAYS).any():
            sources.append(new_source(available, now_us, NEW_DAYS))
        return sources

    def _everything(self, listing: Listing) -> RankedSource:
        """Popular items; behind them, so that every item has a place, those that nobody could touch yet."""
        if listing.count == len(self.items):
            return self._popular
        new = np.arange(len(self.items), listing.count)
        order, values = np.append(self._popular.order, new), np.append(self._popular.values, np.zeros(len(new), np.float32))
        return RankedSource(self._popular.name, order, values, listing.count)

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
            "items_until": self.items_until,
        }
        write_json(folder / FACTS, facts)

    @classmethod
    def load(cls, folder: Path, *, sentence_weight: float = 3.0) -> Retriever:
        """Read what `save` wrote, and ask the index a few questions.

        Raises IncompatibleError, naming both fingerprints, when its parts are not of one training, IntegrityError when the index
        answers nonsense.
        """
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
        if index.dimension != towers.shape.query:
            raise IncompatibleError(
                f"{folder.name}: the index holds vectors of {index.dimension} numbers, its towers make {towers.shape.query}; "
                "use one release's parts"
            )
        _ask_canaries(index, towers.item_vectors, folder.name)
        covisit = ItemKNN.load(folder / COVISIT)
        counts, until = np.array(facts["counts"], np.float32), facts.get("items_until", 0)
        return cls(items, towers, index, covisit, counts, facts["exclude_seen"], sentence_weight, until)


def _ask_canaries(index: VectorIndex, vectors: NDArray[np.float32], name: str) -> None:
    """A few items' own vectors as queries, before anybody else asks: an index of other vectors of this width fits in every
    number, and answers nonsense.
    """
    if not index.count:
        return
    queries, k = vectors[np.linspace(0, index.count - 1, _CANARIES, dtype=np.int64)], min(10, index.count)
    best, _ = scan(vectors, queries, k)
    found = tower_scores(queries, vectors, index.search(queries, k)[1])
    share = float((found >= best[:, -1:] - 1e-3 * np.abs(best[:, -1:])).mean())
    if share < index.recall / 2:
        raise IntegrityError(
            f"{name}: the index finds {share:.0%} of what the towers' own vectors find, it was built to find {index.recall:.0%}; "
            "its vectors are not these towers': build the index again"
        )


def _padded(masks: Mapping[str, NDArray[np.bool_]], count: int) -> dict[str, NDArray[np.bool_]]:
    """Masks made a moment ago, over all items of now: what was not there then is not let in."""
    return {name: np.pad(mask, (0, count - len(mask))) for name, mask in masks.items()}


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
