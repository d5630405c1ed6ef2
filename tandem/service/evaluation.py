"""The funnel report: baselines, towers, towers + ranker and the slate, on the same test requests with the same history.

Baselines learn from the towers' training events and see each user's whole history; candidates are always the whole catalogue.
On the built-in world, expected clicks are also given as a share of the best possible.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import polars as pl
import scipy.sparse as sp
from numpy.typing import NDArray

from feature_repo.sources.world import Truth as WorldTruth
from ranking.ranker import Ranker
from ranking.rerank import mmr
from retrieval.baselines import EASE, ItemKNN, Popularity, top_k
from retrieval.retriever import Queries, Retriever
from retrieval.warm_start import DENSE_LIMIT
from tandem.core.metrics import auc, expected_calibration_error
from tandem.service.assemble import CatalogueColumns, pairs
from tandem.service.funnel import Report, Truth, compare, main_categories, measure, summarise
from tandem.service.learn import Answered, Dataset, Offline, Progress, label
from tandem.service.pinned import pinned_by
from tandem.service.settings import Settings

DEPTH: Final = 100
BASELINES: Final = ("popularity", "item-kNN", "EASE")
TOWERS: Final = "towers"
RANKED: Final = "towers + ranker"
SLATE: Final = "slate"
CHAMPION: Final = "champion"
"""The live release on the same requests: what a gate compares with, since its own rows may be those of other requests."""
_ROWS_AT_ONCE: Final = 500


@dataclass(frozen=True)
class Evaluation:
    """The report, and on the world the expected clicks at 10 by system."""

    report: Report
    world: dict[str, float]


@dataclass(frozen=True)
class Rival:
    """A release to compare with: `offline` asks its retriever, in the order of its own items."""

    offline: Offline
    ranker: Ranker

    @classmethod
    def open(cls, settings: Settings, data: Dataset, folder: Path, store: Any) -> Rival:
        """Load a verified release folder."""
        retriever = Retriever.load(folder)
        ranker = Ranker.load(folder / "ranker")
        pins = pinned_by(settings, folder).limited_to(ranker.names)
        return cls(Offline(settings, replace(data, items=retriever.items), retriever, store, pins), ranker)

    def ranking(self, requests: pl.DataFrame, items: pl.DataFrame) -> NDArray[np.int64]:
        """Its order for the requests as rows of `items`, (R, DEPTH); an item that is gone is -1."""
        answered = self.offline.answer(requests)
        ranked = _ranked(answered, self.ranker.score(answered.features, answered.names, pairs(answered.candidates)[0]))
        known = items.select("item_id").with_row_index("row")
        rows = self.offline.retriever.items.select("item_id").join(known, on="item_id", how="left", maintain_order="left")["row"]
        here = rows.cast(pl.Int64).fill_null(-1).to_numpy()
        return np.where(ranked >= 0, here[ranked], -1)


def evaluate_funnel(
    settings: Settings, data: Dataset, offline: Offline, ranker: Ranker, progress: Progress, rival: Rival | None = None
) -> Evaluation:
    """Every system on the test requests (at most `evaluation.requests` of them), the live release too if it is given."""
    requests = data.requests("test", settings.evaluation.requests, settings.evaluation.seed)
    progress("evaluate", 0, 4)
    answered = offline.answer(requests)
    truth = _truth(data, requests, answered, offline.assembler.catalogue)
    barred = offline.barred(answered.seen, requests["timestamp"].dt.epoch("us").to_numpy())
    progress("evaluate", 1, 4)
    systems = baseline_rankings(data, answered.seen, barred)
    progress("evaluate", 2, 4)
    systems[TOWERS] = _towers(offline.retriever, offline, answered, barred)
    scores = ranker.score(answered.features, answered.names, pairs(answered.candidates)[0])
    systems[RANKED] = _ranked(answered, scores)
    systems[SLATE] = _slates(settings, offline, answered, scores)
    if rival is not None:
        systems[CHAMPION] = rival.ranking(requests, data.items)
    progress("evaluate", 3, 4)
    users = measure(truth, systems)
    own = settings.evaluation
    intervals = compare(users, (TOWERS, RANKED, SLATE), (*BASELINES, TOWERS), own.resamples, own.seed)
    report = Report(summarise(truth, systems, users), users, intervals, _tasks(ranker, label(answered, data)))
    world = expected_clicks(settings.data / "truth", data, requests, systems, barred)
    progress("evaluate", 4, 4)
    return Evaluation(report, world)


def baseline_rankings(
    data: Dataset, seen: list[NDArray[np.int64]], barred: list[NDArray[np.int64]]
) -> dict[str, NDArray[np.int64]]:
    """Baseline name -> ranked dense ids (R, DEPTH). EASE is left out where the catalogue is too large to invert."""
    matrix = data.training_matrix()
    models: dict[str, Popularity | ItemKNN | EASE] = {"popularity": Popularity.fit(matrix), "item-kNN": ItemKNN.fit(matrix)}
    if matrix.shape[1] <= DENSE_LIMIT:
        models["EASE"] = EASE.fit(matrix)
    history, excluded = (_csr(rows, matrix.shape[1]) for rows in (seen, barred))
    ranked: dict[str, NDArray[np.int64]] = {}
    for name, model in models.items():
        blocks = [
            top_k(model.scores(history[start : start + _ROWS_AT_ONCE]), DEPTH, excluded[start : start + _ROWS_AT_ONCE])
            for start in range(0, history.shape[0], _ROWS_AT_ONCE)
        ]
        ranked[name] = np.concatenate(blocks)
    return ranked


def expected_clicks(
    folder: Path, data: Dataset, requests: pl.DataFrame, systems: Mapping[str, NDArray[np.int64]], barred: list[NDArray[np.int64]]
) -> dict[str, float]:
    """Mean expected clicks of each system's first ten, and of the best possible ten; empty where no truth is known.

    People who came into the world later, by a push or an import, have no truth and are left out; items that did count as never
    clicked, and those that are gone are not in the best ten.
    """
    if not folder.is_dir():
        return {}
    world = WorldTruth.load(folder)
    ids, in_world = data.items["item_id"].to_numpy(), set(world.item_ids)
    gone = sorted(in_world - set(ids))
    known = requests["user_id"].is_in(list(world.user_ids)).to_numpy()
    requests, barred = requests.filter(known), [out for out, own in zip(barred, known, strict=True) if own]
    if requests.is_empty():
        return {}
    systems = {name: ranked[known] for name, ranked in systems.items()}
    asked = list(zip(requests["user_id"].to_list(), requests["timestamp"].to_list(), strict=True))
    means = {
        name: float(
            np.mean(
                [
                    world.expected_clicks(user, time, [ids[item] for item in row[:10] if item >= 0 and ids[item] in in_world])
                    for (user, time), row in zip(asked, ranked, strict=True)
                ]
            )
        )
        for name, ranked in systems.items()
    }
    best = [
        world.expected_clicks(user, time, world.best_slate(user, time, 10, exclude=[*gone, *in_world.intersection(ids[out])]))
        for (user, time), out in zip(asked, barred, strict=True)
    ]
    return means | {"best possible": float(np.mean(best))}


def _truth(data: Dataset, requests: pl.DataFrame, answered: Answered, catalogue: CatalogueColumns) -> Truth:
    trained = np.asarray(data.training_matrix().sum(axis=0)).ravel()
    categories = catalogue.items.categories
    return Truth(
        request_ids=tuple(requests["request_id"].to_list()),
        user_ids=tuple(requests["user_id"].to_list()),
        history_sizes=np.array([len(rows) for rows in answered.seen], np.int64),
        items=tuple(data.truth_of(requests, data.source.positive)),
        cold_items=trained == 0,
        categories=categories,
        main_categories=main_categories(answered.seen, categories, list(catalogue.category_code)),
    )


def _towers(retriever: Retriever, offline: Offline, answered: Answered, barred: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    """The towers alone, from the same capped histories that serving sees."""
    width = retriever.towers.shape.history
    from retrieval.batches import pad_left

    histories = pad_left(answered.seen, width)
    blocks = [
        retriever.nearest(Queries(histories[start : start + _ROWS_AT_ONCE], barred[start : start + _ROWS_AT_ONCE], 0), DEPTH)
        for start in range(0, len(histories), _ROWS_AT_ONCE)
    ]
    return np.concatenate(blocks)


def _ranked(answered: Answered, scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """Candidates in the ranker's order, (R, DEPTH) padded with -1."""
    ids = answered.candidates.ids
    table = np.full(ids.shape, -np.inf, np.float32)
    table[ids >= 0] = scores
    order = np.argsort(-table, axis=1, kind="stable")[:, :DEPTH]
    return np.take_along_axis(ids, order, axis=1)


def _slates(settings: Settings, offline: Offline, answered: Answered, scores: NDArray[np.float32]) -> NDArray[np.int64]:
    """What would be shown: the ranker's first ten after the diversity rerank, and its order behind them."""
    ranked = _ranked(answered, scores)
    table = np.full(answered.candidates.ids.shape, -np.inf, np.float32)
    table[answered.candidates.ids >= 0] = scores
    values = -np.sort(-table, axis=1, kind="stable")[:, :DEPTH]
    categories = offline.assembler.catalogue.items.categories
    for row in range(len(ranked)):
        real = int((ranked[row] >= 0).sum())
        chosen = mmr(values[row, :real], categories[ranked[row, :real]], settings.rerank.diversity, 10)
        rest = np.setdiff1d(np.arange(real), chosen, assume_unique=True)
        ranked[row, :real] = ranked[row, np.concatenate([chosen, rest])]
    return ranked


def _tasks(ranker: Ranker, examples: Any) -> pl.DataFrame:
    """[task, auc, ece, positives, candidates] over the candidates of the test requests, relative to what was retrieved."""
    predictions = ranker.predict(examples.features, examples.names, examples.request)
    rows = [
        {
            "task": name,
            "auc": auc(predictions[name], labels),
            "ece": expected_calibration_error(predictions[name], labels),
            "positives": int(labels.sum()),
            "candidates": len(labels),
        }
        for name, labels in examples.labels.items()
    ]
    return pl.DataFrame(rows)


def _csr(rows: list[NDArray[np.int64]], items: int) -> sp.csr_matrix:
    """(R, N) binary."""
    where = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    columns = np.concatenate([np.empty(0, np.int64), *rows])
    matrix = sp.csr_matrix((np.ones(len(where), np.float32), (where, columns)), (len(rows), items))
    matrix.data[:] = 1.0
    return matrix
