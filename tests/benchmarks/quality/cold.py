"""Items that nobody has touched, found by their text: the towers beside MiniLM's neighbours and a linear map to ALS's factors.

Two questions per user, after the same history of known items: which of the new items (among the new ones, and among all), and
which of the known ones that were held out. The towers learn from known items only; the new
ones are in their catalogue as content.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from data import Case, cold, lists
from judge import Ids, best_ids
from ours import Catalogue, TowerConfig, histories, tower_scores, train_towers

from retrieval.baselines import Csr
from tandem.core.metrics import hit_matrix, recall_at_k, truth_sizes

Score = Callable[[Sequence[Ids], Csr], np.ndarray]
RIDGES = (1.0, 10.0, 100.0, 1000.0)


def report(name: str, scratch: Path, factors: Callable[[Case], Path | None]) -> None:
    """`factors` runs ALS on the case and returns where its item and user factors lie, or None without peers."""
    case = cold(name, scratch)
    new = np.zeros(case.items, bool)
    new[np.load(case.folder / "new.npy")] = True
    asked = case.frame("cold")["user"].unique().sort().sample(fraction=1.0, shuffle=True, seed=0).head(10_000).to_list()
    past, wanted = lists(case.frame("train"), asked), lists(case.frame("cold"), asked)
    print(f"\n| {name}, {len(asked):,} users, {int(new.sum()):,} new items | new, among new | new, among all | known |")
    print("|---|---|---|---|")

    def line(label: str, score: Score | None, known: Score | None = None) -> None:
        cells = []
        for scorer, allowed in ((score, new), (score, None)):
            cells.append("" if scorer is None else _recall(best_ids(scorer, case, past, allowed), wanted))
        cells.append("" if known is None else _recall(best_ids(known, case, case.histories()), case.truth()))
        print(f"| {label} | {' | '.join(cells)} |", flush=True)

    line("MiniLM, mean of the history's cosines", lambda parts, _: _near(case.meaning, parts, np.mean))
    line("MiniLM, greatest of them", lambda parts, _: _near(case.meaning, parts, np.max))
    path = factors(case)
    if path is not None:
        items = np.load(path)["items"]
        settings = json.loads(path.with_suffix(".json").read_text())["settings"]
        for ridge in RIDGES:
            line(f"linear map to ALS's factors, ridge {ridge:g}", _mapped(case, case.meaning, items, new, ridge, settings))
        for ridge in RIDGES:
            line(f"the same from text and words, ridge {ridge:g}", _mapped(case, case.text, items, new, ridge, settings))
    trained = train_towers(Catalogue(case.content, case.text), histories(case), TowerConfig(), lambda _: None)
    line("towers", tower_scores(trained), tower_scores(trained))
    known = best_ids(tower_scores(trained), case, case.histories(), ~new)
    print(f"| towers, were there no new items | | | {_recall(known, case.truth())} |", flush=True)


def _recall(found: Ids, wanted: Sequence[Ids]) -> str:
    return f"{np.nanmean(recall_at_k(hit_matrix(found, wanted), truth_sizes(wanted), 50)):.4f}"[1:]


def _near(text: np.ndarray, parts: Sequence[Ids], how: Callable[..., np.ndarray]) -> np.ndarray:
    return np.stack([how(text[part] @ text.T, axis=0) if len(part) else np.zeros(len(text), np.float32) for part in parts])


def _mapped(case: Case, text: np.ndarray, items: np.ndarray, new: Ids, ridge: float, settings: dict[str, float]) -> Score:
    """New items' factors by ridge regression from their text (N, T); users folded into ALS's space by its own least squares."""
    known = np.flatnonzero(~new & (np.abs(items).sum(1) > 0))
    own = text[known]
    weights = np.linalg.solve(own.T @ own + ridge * np.eye(own.shape[1]), own.T @ items[known])
    vectors = np.where(new[:, None], text @ weights, items).astype(np.float32)
    gram = items[known].T @ items[known] + settings["regularization"] * np.eye(items.shape[1])

    def score(parts: Sequence[Ids], _: Csr) -> np.ndarray:
        users = np.stack([_folded(items[part], gram, settings["alpha"]) for part in parts])
        return np.asarray(users @ vectors.T, np.float32)

    return score


def _folded(own: np.ndarray, gram: np.ndarray, alpha: float) -> np.ndarray:
    """Hu, Koren & Volinsky 2008, with confidence 1 + alpha for what was touched (implicit's `alpha` counts as confidence)."""
    confidence = max(alpha, 1.0)
    return np.asarray(np.linalg.solve(gram + (confidence - 1) * own.T @ own, confidence * own.sum(0)))
