"""Mult-VAE (Liang et al. 2018, arXiv:1802.05814) in plain torch: items -> 200 -> items, stopped by validation NDCG@100.

In: the folder of a case (`../data.py`). Out: `<out>.npy` (Q, K) int64 dense ids, and `<out>.json` with what it took. Needs
torch and polars.

    python vae.py FOLDER OUT [--minutes M]
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import polars as pl
import torch
from torch import nn
from torch.nn import functional

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("--width", type=int, default=200)
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--patience", type=int, default=4)
parser.add_argument("--minutes", type=float, default=1e9)
parser.add_argument("--k", type=int, default=100)
asked = parser.parse_args()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
facts = json.loads((asked.folder / "facts.json").read_text())
torch.manual_seed(facts["seed"])
random = np.random.default_rng(facts["seed"])
N = facts["items"]


def lists(name: str) -> dict[int, np.ndarray]:
    table = pl.read_parquet(asked.folder / f"{name}.parquet").group_by("user").agg("item")
    return {user: np.unique(items) for user, items in table.iter_rows()}


class VAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.empty(N, 2 * asked.width))
        nn.init.xavier_normal_(self.into)
        self.bias = nn.Parameter(torch.zeros(2 * asked.width))
        self.out = nn.Linear(asked.width, N)
        nn.init.xavier_normal_(self.out.weight)

    def forward(self, items: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """Sets of item ids -> scores (B, N) and the mean KL divergence."""
        sizes = np.array([len(each) for each in items])
        flat = torch.from_numpy(np.concatenate(items))
        weight = torch.from_numpy(np.repeat(1 / np.sqrt(np.maximum(sizes, 1)), sizes).astype(np.float32))
        if self.training:
            weight = functional.dropout(weight, 0.5)
        starts = torch.from_numpy(np.cumsum(sizes) - sizes)
        hidden = functional.embedding_bag(flat, self.into, starts, mode="sum", per_sample_weights=weight) + self.bias
        mean, log_variance = hidden.chunk(2, dim=1)
        divergence = 0.5 * (log_variance.exp() + mean**2 - 1 - log_variance).sum(1).mean()
        if self.training:
            mean = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
        return self.out(mean), divergence


def best(model: VAE, items: list[np.ndarray], k: int) -> np.ndarray:
    model.eval()
    found = []
    with torch.inference_mode():
        for at in range(0, len(items), 500):
            part = items[at : at + 500]
            scores = model(part)[0]
            if facts["exclude_seen"]:
                rows = np.repeat(np.arange(len(part)), [len(each) for each in part])
                scores[torch.from_numpy(rows), torch.from_numpy(np.concatenate(part))] = -torch.inf
            found.append(scores.topk(k).indices.numpy())
    return np.concatenate(found)


def ndcg(found: np.ndarray, wanted: list[np.ndarray]) -> float:
    discounts = 1 / np.log2(np.arange(2, found.shape[1] + 2))
    each = [
        discounts[np.isin(ids, truth)].sum() / discounts[: len(truth)].sum() for ids, truth in zip(found, wanted, strict=True)
    ]
    return float(np.mean(each))


learn, valid, train = lists("learn"), lists("valid"), lists("train")
judged = random.permutation([user for user in valid if user in learn])[:2000]
users = np.array(sorted(learn))
model = VAE()
optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
start, reached, best_epoch, state, step = time.process_time(), -1.0, 0, None, 0
for epoch in range(1, asked.epochs + 1):
    model.train()
    for batch in np.array_split(random.permutation(users), max(1, len(users) // 500)):
        items = [learn[user] for user in batch]
        scores, divergence = model(items)
        log_likelihood = functional.log_softmax(scores, 1)
        rows = np.repeat(np.arange(len(items)), [len(each) for each in items])
        picked = log_likelihood[torch.from_numpy(rows), torch.from_numpy(np.concatenate(items))]
        step += 1
        loss = -picked.sum() / len(items) + min(0.2, 0.2 * step / 1000) * divergence
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    value = ndcg(best(model, [learn[user] for user in judged], 100), [valid[user] for user in judged])
    print(f"epoch {epoch} ndcg@100 {value:.4f} {time.process_time() - start:.0f} s", flush=True)
    if value > reached:
        reached, best_epoch, state = value, epoch, {name: tensor.clone() for name, tensor in model.state_dict().items()}
    cut_short = time.process_time() - start > asked.minutes * 60
    if cut_short or epoch - best_epoch >= asked.patience:
        break
seconds = time.process_time() - start
model.load_state_dict(state)
ask = pl.read_parquet(asked.folder / "ask.parquet")["user"].to_list()
np.save(asked.out.with_suffix(".npy"), best(model, [train[user] for user in ask], asked.k).astype(np.int64))
settings = {"width": asked.width, "best_epoch": best_epoch, "cut_short": cut_short}
asked.out.with_suffix(".json").write_text(
    json.dumps({"seconds": seconds, "validation": reached, "settings": settings, "version": f"torch {torch.__version__}"})
)
