"""What is computed in this process: popularity, EASE, and the towers, all from a case's `train.parquet`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import polars as pl
from data import Case, lists
from judge import Ids, Line, best_ids, matrix

from retrieval.baselines import EASE, Csr, Popularity
from retrieval.batches import cut_places, pad_left
from retrieval.towers import Towers
from retrieval.train import Catalogue, Histories, TowerConfig, train_towers
from tandem.core.metrics import hit_matrix, ndcg_at_k, truth_sizes

L2 = (100.0, 300.0, 1000.0)


def popularity(case: Case) -> Line:
    model = Popularity.fit(_training_matrix(case))
    return Line("popularity", best_ids(lambda _, seen: model.scores(seen), case, case.histories()), 0.0)


def ease(case: Case, metric: int) -> Line:
    """L2 by NDCG@`metric` of the validation events; then fitted on everything."""
    valid = case.frame("valid")
    asked = valid["user"].unique().sort().to_list()
    past, wanted = lists(case.frame("learn"), asked), lists(valid, asked)
    learn = _matrix(case.frame("learn"), case.items)
    reached = {}
    for l2 in L2:
        found = best_ids(_ease_scores(EASE.fit(learn, l2)), case, past)
        reached[l2] = float(np.nanmean(ndcg_at_k(hit_matrix(found, wanted), truth_sizes(wanted), metric)))
    best = max(reached, key=reached.__getitem__)
    began = time.process_time()
    model = EASE.fit(_training_matrix(case), best)
    seconds = time.process_time() - began
    return Line("EASE", best_ids(_ease_scores(model), case, case.histories()), seconds, f"L2 {best:.0f}")


def _ease_scores(model: EASE):
    return lambda _, seen: model.scores(seen)


def towers(case: Case, config: TowerConfig, name: str = "towers") -> Line:
    """The towers as they are served: query vector times item vectors."""
    began = time.process_time()
    trained = train_towers(Catalogue(case.content, case.text), histories(case), config, lambda _: None)
    seconds = time.process_time() - began
    facts = trained.facts
    note = (
        f"{trained.shape.query} coordinates, epoch {facts['best_epoch']}, sequence tower x {facts.get('sequence_weight', 0):.2g}"
    )
    return Line(name, best_ids(tower_scores(trained), case, case.histories()), seconds, note)


def tower_scores(trained: Towers):
    """The inner products that an index would find."""

    def score(past: Sequence[Ids], _: Csr) -> np.ndarray:
        return trained.query(pad_left(list(past), trained.shape.history)) @ trained.item_vectors.T

    return score


def histories(case: Case) -> Histories:
    """`train.parquet` as the towers take it; every event is one that retrieval should find.

    Where the order means nothing it is drawn: validation must ask what the test asks, not what was shown next.
    """
    events = case.frame("train") if case.ordered else case.frame("train").sample(fraction=1.0, shuffle=True, seed=0)
    users = events.sort("user", maintain_order=True).group_by("user", maintain_order=True).agg("item", "time")
    sequences = [np.array(row, np.int64) for row in users["item"].to_list()]
    if case.ordered:
        cuts = [cut_places(np.array(row, np.int64)) for row in users["time"].to_list()]
    else:
        cuts = [np.arange(1, len(sequence)) for sequence in sequences]
    return Histories(sequences, [np.ones(len(sequence), bool) for sequence in sequences], cuts, case.exclude_seen)


def _training_matrix(case: Case) -> Csr:
    return _matrix(case.frame("train"), case.items)


def _matrix(events: pl.DataFrame, items: int) -> Csr:
    return matrix(lists(events, events["user"].unique().sort().to_list()), items)
