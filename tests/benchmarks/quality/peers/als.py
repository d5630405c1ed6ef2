"""implicit's ALS: factors, regularisation and alpha chosen on the validation events, then fitted on everything.

In: the folder of a case (`../data.py`). Out: `<out>.npy` (Q, K) int64 dense ids, and `<out>.json` with what it took; with
`--factors-out` also the factors `items` (N, F) and `users` (Q, F) float32 as npz. Needs `implicit` and `polars`.

    python als.py FOLDER OUT [--metric 10] [--factors-out FILE]
"""

import argparse
import json
import time
from itertools import product
from pathlib import Path

import implicit
import numpy as np
import polars as pl
from implicit.als import AlternatingLeastSquares
from scipy.sparse import csr_matrix

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--metric", type=int, default=100, help="the K of the NDCG@K that chooses the settings")
parser.add_argument("--factors-out", type=Path)
parser.add_argument("--factors", type=int, nargs="+", default=[64, 128])
parser.add_argument("--alpha", type=float, nargs="+", default=[1.0, 5.0, 20.0])
parser.add_argument("--regularization", type=float, nargs="+", default=[0.05, 5.0])
parser.add_argument("--k", type=int, default=100)
asked = parser.parse_args()
facts = json.loads((asked.folder / "facts.json").read_text())
tables = {name: pl.read_parquet(asked.folder / f"{name}.parquet") for name in ("train", "learn", "valid", "ask")}
users = int(tables["train"]["user"].max()) + 1


def matrix(name: str) -> csr_matrix:
    table = tables[name].select("user", "item").unique().sort("user", "item")
    cells = (table["user"].to_numpy(), table["item"].to_numpy())
    return csr_matrix((np.ones(len(table), np.float32), cells), shape=(users, facts["items"]))


def fitted(data: csr_matrix, settings: tuple[int, float, float]) -> AlternatingLeastSquares:
    factors, alpha, regularization = settings
    model = AlternatingLeastSquares(
        factors=factors, alpha=alpha, regularization=regularization, iterations=15, random_state=facts["seed"], num_threads=1
    )
    model.fit(data, show_progress=False)
    return model


def ndcg(model: AlternatingLeastSquares, data: csr_matrix, wanted: csr_matrix, rows: np.ndarray) -> float:
    found, _ = model.recommend(rows, data[rows], N=asked.metric, filter_already_liked_items=facts["exclude_seen"])
    discounts = 1 / np.log2(np.arange(2, asked.metric + 2))
    total = 0.0
    for row, ids in zip(rows, found, strict=True):
        truth = wanted[row].indices
        total += discounts[: len(ids)][np.isin(ids, truth)].sum() / discounts[: len(truth)].sum()
    return total / len(rows)


start = time.process_time()
learn, valid, train = matrix("learn"), matrix("valid"), matrix("train")
rows = np.flatnonzero((valid.getnnz(1) > 0) & (learn.getnnz(1) > 0))
rows = np.random.default_rng(facts["seed"]).permutation(rows)[:2000]
reached = {
    each: ndcg(fitted(learn, each), learn, valid, rows) for each in product(asked.factors, asked.alpha, asked.regularization)
}
best = max(reached, key=reached.__getitem__)
tuning = time.process_time() - start
start = time.process_time()
model = fitted(train, best)
seconds = time.process_time() - start
ask = tables["ask"]["user"].to_numpy()
found, _ = model.recommend(ask, train[ask], N=asked.k, filter_already_liked_items=facts["exclude_seen"])
np.save(asked.out.with_suffix(".npy"), found.astype(np.int64))
if asked.factors_out:
    np.savez(asked.factors_out, items=model.item_factors, users=model.user_factors[ask])
names = ("factors", "alpha", "regularization")
asked.out.with_suffix(".json").write_text(
    json.dumps(
        {
            "seconds": seconds,
            "tuning": tuning,
            "validation": reached[best],
            "settings": dict(zip(names, best, strict=True)),
            "version": f"implicit {implicit.__version__}",
        }
    )
)
