"""RecTools' SASRec and eSASRec (LiGR blocks), stopped by NDCG@10 of validation users' last training event.

`--negatives 256` takes the sampled softmax that eSASRec was published with; without it the full one, which a CPU does sooner.

In: the folder of a case (`../data.py`). Out: `<out>.npy` (Q, K) int64 dense ids, and `<out>.json` with what it took. Runs in a
virtual environment of its own: `pip install rectools[torch] polars`.

    python sequence.py FOLDER OUT sasrec|esasrec [--factors 64] [--length 100] [--epochs 60] [--patience 5]
"""

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import rectools
import torch
from pytorch_lightning import LightningModule, Trainer, seed_everything
from pytorch_lightning.callbacks import Callback
from rectools import Columns
from rectools.dataset import Dataset
from rectools.models import SASRecModel
from rectools.models.nn.item_net import IdEmbeddingsItemNet
from rectools.models.nn.transformers.ligr import LiGRLayers

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("out", type=Path)
parser.add_argument("kind", choices=("sasrec", "esasrec"))
parser.add_argument("--factors", type=int, default=64)
parser.add_argument("--length", type=int, default=100)
parser.add_argument("--epochs", type=int, default=60)
parser.add_argument("--patience", type=int, default=5)
parser.add_argument("--batch", type=int, default=128)
parser.add_argument("--negatives", type=int, default=0, help="0: the full softmax")
parser.add_argument("--dropout", type=float, default=0.2)
parser.add_argument("--minutes", type=float, default=1e9, help="stop after the epoch that passes this processor time")
parser.add_argument("--k", type=int, default=100)
asked = parser.parse_args()
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
facts = json.loads((asked.folder / "facts.json").read_text())
seed_everything(facts["seed"], verbose=False)


def interactions(name: str) -> pd.DataFrame:
    """Rows as RecTools wants them; the time is the row's number, so that ties keep the order that everybody gets."""
    table = pl.read_parquet(asked.folder / f"{name}.parquet")
    day = pd.Timestamp("2000-01-01")
    when = day + pd.to_timedelta(np.arange(len(table)), unit="s")
    return pd.DataFrame(
        {
            Columns.User: table["user"].to_numpy(),
            Columns.Item: table["item"].to_numpy(),
            Columns.Weight: 1.0,
            Columns.Datetime: when,
        }
    )


train, learn = interactions("train"), interactions("learn")
valid = pl.read_parquet(asked.folder / "valid.parquet")
dataset, learning = Dataset.construct(train), Dataset.construct(learn)


def ndcg(model: SASRecModel) -> float:
    """NDCG@10 of the last training event, at most 1,000 users, against the whole catalogue."""
    wanted = valid.filter(
        pl.col("user").is_in(learn[Columns.User].unique()) & pl.col("item").is_in(learn[Columns.Item].unique())
    ).head(1000)
    found = model.recommend(wanted["user"].to_numpy(), learning, k=10, filter_viewed=facts["exclude_seen"])
    hit = found.merge(pd.DataFrame({Columns.User: wanted["user"].to_numpy(), Columns.Item: wanted["item"].to_numpy()}))
    return float((1 / np.log2(hit[Columns.Rank] + 1)).sum() / len(wanted))


class Stop(Callback):
    """Keeps the weights of the best epoch; stops after `patience` epochs without a better one. RecTools trains with a copy."""

    def __init__(self) -> None:
        self.best, self.state, self.bad, self.epoch, self.seconds, self.cut_short = -1.0, None, 0, 0, 0.0, False

    def on_train_epoch_end(self, trainer: Trainer, module: LightningModule) -> None:
        began = time.process_time()
        model.lightning_model = module
        model.is_fitted = True
        training = module.training
        value = ndcg(model)
        module.train(training)
        self.seconds += time.process_time() - began
        print(f"epoch {trainer.current_epoch} ndcg {value:.4f} {time.process_time() - start:.0f} s", flush=True)
        if value > self.best:
            self.best, self.bad, self.epoch = value, 0, trainer.current_epoch + 1
            self.state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
        else:
            self.bad += 1
        self.cut_short = time.process_time() - start > asked.minutes * 60
        trainer.should_stop = self.cut_short or self.bad >= asked.patience


def trainer() -> Trainer:
    return Trainer(
        max_epochs=asked.epochs, min_epochs=1, deterministic=True, accelerator="cpu", enable_progress_bar=False,
        enable_model_summary=False, logger=False, enable_checkpointing=False, callbacks=[Stop()],
    )  # fmt: skip


special = {"transformer_layers_type": LiGRLayers} if asked.kind == "esasrec" else {}
if asked.negatives:
    special |= {"loss": "sampled_softmax", "n_negatives": asked.negatives}
model = SASRecModel(
    n_factors=asked.factors, n_blocks=2, n_heads=2, session_max_len=asked.length, dropout_rate=asked.dropout,
    batch_size=asked.batch, lr=1e-3,
    item_net_block_types=(IdEmbeddingsItemNet,), get_trainer_func=trainer, deterministic=True, **special,
)  # fmt: skip
start = time.process_time()
model.fit(learning)
seconds = time.process_time() - start
stop = next(each for each in model.fit_trainer.callbacks if isinstance(each, Stop))
model.lightning_model.load_state_dict(stop.state)
users = pl.read_parquet(asked.folder / "ask.parquet")["user"].to_numpy()
known = users[np.isin(users, train[Columns.User].unique())]
found = model.recommend(known, dataset, k=asked.k, filter_viewed=facts["exclude_seen"])
place = {user: row for row, user in enumerate(users.tolist())}
out = np.full((len(users), asked.k), -1, np.int64)
out[[place[user] for user in found[Columns.User]], found[Columns.Rank].to_numpy() - 1] = found[Columns.Item].to_numpy()
np.save(asked.out.with_suffix(".npy"), out)
settings = {
    "factors": asked.factors,
    "length": asked.length,
    "best_epoch": stop.epoch,
    "cut_short": stop.cut_short,
    "negatives": asked.negatives,
    "dropout": asked.dropout,
    "batch": asked.batch,
}
asked.out.with_suffix(".json").write_text(
    json.dumps({"seconds": seconds, "validation": stop.best, "settings": settings, "version": f"RecTools {rectools.__version__}"})
)
