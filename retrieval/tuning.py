"""Tuning the text encoder on what people did: a LoRA adapter, taught by several tasks at once. The only file that knows peft.

In: an encoder, item texts, and histories with their tasks. Out: a folder with the adapter, or nothing where tuning did not help.

What is learned from pairs (a, b) of items that stand near each other in one person's history:
  - softmax cross-entropy of b's vector against the other b's of the batch, corrected by how often each is drawn (logQ, Yi et al.
    2019, "Sampling-Bias-Corrected Neural Modeling"), with items that the same person also had left out of the negatives;
  - for each task (click, like, …) whether it came true of b, for the pair and for a pair by chance;
  - the categories of b, from a alone: what somebody who had a is interested in.
The tasks' heads are thrown away afterwards: they only teach the encoder that all share (Caruana 1997, "Multitask Learning").
A tenth of the people decides when to stop; the encoder as it was is a contestant like any other.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from retrieval.encoder import ADAPTER_FILES, TextEncoder
from retrieval.tuning_config import TuningConfig
from tandem.core.errors import InputError, UnavailableError
from tandem.core.folders import whole_folder

Log = Callable[[dict[str, float]], None]
Ints = NDArray[np.int64]
_HELD_OUT: Final = 0.1
_JUDGED_PAIRS: Final = 512
_MOST_CATEGORIES: Final = 32


@dataclass(frozen=True)
class Lessons:
    """What people did: `histories`, one array of item rows per person, oldest first; `tasks`, task → one bool array per person,
    did it come true of that event; `categories`, the names of each item."""

    histories: Sequence[Ints]
    tasks: Mapping[str, Sequence[NDArray[np.bool_]]]
    categories: Sequence[Sequence[str]]


def tune(encoder: TextEncoder, texts: Sequence[str], lessons: Lessons, config: TuningConfig, log: Log, folder: Path) -> bool:
    """Train an adapter and write it to `folder`; False, and no folder, when the untouched encoder was not beaten.

    `texts`: one per item row. `log` gets {step, recall@10, best} (held-out pairs, b among all judged b's) and each loss.
    Deterministic on the CPU for a seed and a number of threads. Raises InputError where no two items share a history,
    UnavailableError without peft.
    """
    pairs, judged = _split(_pairs(lessons, config), lessons, config)
    tokenizer, network = encoder.open_network()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = _with_adapter(network, config)
        classroom = _Classroom(encoder, tokenizer, network, texts, lessons, config)
        better = _train(classroom, pairs, judged, config, log)
    if better:
        _save(network, encoder.model, folder)
    return better


@dataclass(frozen=True)
class _Pairs:
    """P pairs: rows `first` and `second`, the `person` who had both, `came` (T, P) the tasks of the second's event."""

    first: Ints
    second: Ints
    person: Ints
    came: NDArray[np.float32]

    def take(self, places: NDArray[Any]) -> _Pairs:
        return _Pairs(self.first[places], self.second[places], self.person[places], self.came[:, places])

    def __len__(self) -> int:
        return len(self.first)


class _Classroom:
    """The network with its heads, and the loss of one batch."""

    def __init__(
        self, encoder: TextEncoder, tokenizer: Any, network: Any, texts: Sequence[str], lessons: Lessons, config: TuningConfig
    ) -> None:
        self._encoder, self._tokenizer, self._texts = encoder, tokenizer, texts
        self.network, self._config = network, config
        self._had = [np.unique(history) for history in lessons.histories]
        counts = np.bincount(np.concatenate(list(lessons.histories)), minlength=len(texts)).astype(np.float64)
        self._log_share = torch.from_numpy(np.log(np.maximum(counts, 1.0) / counts.sum())).float()
        self._categories = torch.from_numpy(_category_matrix(lessons.categories))
        self.task_head = nn.Linear(encoder.dimension, len(lessons.tasks))
        self.category_head = nn.Linear(encoder.dimension, self._categories.shape[1])
        self._scale = math.sqrt(encoder.dimension)

    def _embed(self, rows: Ints) -> Tensor:
        """(n,) item rows → (n, D) unit rows."""
        vectors: Tensor = self._encoder.embed(self._tokenizer, self.network, [self._texts[row] for row in rows]).cpu()
        return vectors

    def parameters(self) -> list[nn.Parameter]:
        own = [each for each in self.network.parameters() if each.requires_grad]
        return [*own, *self.task_head.parameters(), *self.category_head.parameters()]

    def losses(self, pairs: _Pairs) -> dict[str, Tensor]:
        """What a batch of B pairs teaches, each a number."""
        rows, place = np.unique(np.concatenate([pairs.first, pairs.second]), return_inverse=True)
        vectors = self._embed(rows)[torch.from_numpy(place)]
        a, b = vectors[: len(pairs)], vectors[len(pairs) :]
        found = {"softmax": self._softmax(a, b, pairs)}
        if len(pairs.came):
            found["tasks"] = self._config.task_weight * self._tasks(a, b, pairs)
        if self._categories.shape[1]:
            found["interest"] = self._config.task_weight * self._interest(a, pairs)
        return found

    def _softmax(self, a: Tensor, b: Tensor, pairs: _Pairs) -> Tensor:
        logits = a @ b.t() / self._config.temperature - self._log_share[torch.from_numpy(pairs.second)]
        known = np.stack([np.isin(pairs.second, self._had[person]) for person in pairs.person])
        np.fill_diagonal(known, False)
        return F.cross_entropy(logits.masked_fill(torch.from_numpy(known), -torch.inf), torch.arange(len(pairs)))

    def _tasks(self, a: Tensor, b: Tensor, pairs: _Pairs) -> Tensor:
        """The pair's own tasks, and all false for a with the next pair's b."""
        both = torch.cat([a * b, a * b.roll(1, 0)]) * self._scale
        came = torch.from_numpy(pairs.came.T)
        return F.binary_cross_entropy_with_logits(self.task_head(both), torch.cat([came, torch.zeros_like(came)]))

    def _interest(self, a: Tensor, pairs: _Pairs) -> Tensor:
        wanted = self._categories[torch.from_numpy(pairs.second)]
        return F.binary_cross_entropy_with_logits(self.category_head(a * self._scale), wanted)

    def recall(self, judged: _Pairs, k: int = 10) -> float:
        """Share of held-out pairs whose b is among the k nearest to a of all judged b's that the person did not have besides."""
        rows = np.unique(np.concatenate([judged.first, judged.second]))
        with torch.inference_mode():
            vectors = torch.cat([self._embed(part) for part in np.array_split(rows, math.ceil(len(rows) / 128))])
        pool = np.unique(judged.second)
        scores = vectors[np.searchsorted(rows, judged.first)] @ vectors[np.searchsorted(rows, pool)].t()
        own = torch.from_numpy(np.searchsorted(pool, judged.second))
        other = np.stack([np.isin(pool, self._had[person]) for person in judged.person])
        other[np.arange(len(judged)), own.numpy()] = False
        scores = scores.masked_fill(torch.from_numpy(other), -torch.inf)
        rank = (scores > scores.gather(1, own[:, None])).sum(1)
        return float((rank < k).float().mean())


def _train(room: _Classroom, pairs: _Pairs, judged: _Pairs, config: TuningConfig, log: Log) -> bool:
    """The training loop; leaves the best adapter in the network, and says whether it beat the encoder as it was."""
    optimizer = torch.optim.AdamW(room.parameters(), lr=config.learning_rate, weight_decay=0.01)
    rng = np.random.default_rng(config.seed)
    start = best = room.recall(judged)
    best_step, kept = 0, _adapter_state(room.network)
    log({"step": 0.0, "recall@10": start, "best": best})
    seen: list[dict[str, float]] = []
    for step in range(1, config.steps + 1):
        losses = room.losses(pairs.take(rng.integers(0, len(pairs), config.batch)))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seen.append({name: float(value.detach()) for name, value in losses.items()})
        if step % config.judge_every and step != config.steps:
            continue
        now = room.recall(judged)
        if now > best:
            best, best_step, kept = now, step, _adapter_state(room.network)
        means = {f"loss/{name}": float(np.mean([each[name] for each in seen])) for name in losses}
        log({"step": float(step), "recall@10": now, "best": best} | means)
        seen = []
        if step - best_step >= config.patience * config.judge_every:
            break
    room.network.load_state_dict(kept, strict=False)
    return best > start


def _pairs(lessons: Lessons, config: TuningConfig) -> _Pairs:
    """Every two different items within `window` events of each other in one history, the earlier one first."""
    first, second, person, place = [], [], [], []
    for number, history in enumerate(lessons.histories):
        for gap in range(1, min(config.window, len(history) - 1) + 1):
            later = np.flatnonzero(history[gap:] != history[:-gap]) + gap
            first.append(history[later - gap])
            second.append(history[later])
            person.append(np.full(len(later), number))
            place.append(later)
    if not sum(map(len, first)):
        raise InputError("no two items share a history, so that there is nothing to tune the encoder on; set tuning.steps = 0")
    who, where = np.concatenate(person), np.concatenate(place)
    starts = np.cumsum([0, *map(len, lessons.histories)])[who]
    came = [np.concatenate(list(flags))[starts + where] for flags in lessons.tasks.values()]
    stacked = np.array(came, np.float32).reshape(len(came), len(who))
    return _Pairs(np.concatenate(first), np.concatenate(second), who, stacked)


def _split(pairs: _Pairs, lessons: Lessons, config: TuningConfig) -> tuple[_Pairs, _Pairs]:
    """Pairs to learn from, and some of other people to judge by."""
    rng = np.random.default_rng(config.seed)
    held = rng.permutation(len(lessons.histories))[: max(1, int(len(lessons.histories) * _HELD_OUT))]
    is_held = np.isin(pairs.person, held)
    if is_held.all() or not is_held.any():
        raise InputError("too few people have two items in their history to tune the encoder on; set tuning.steps = 0")
    places = np.flatnonzero(is_held)
    chosen = np.sort(rng.permutation(places)[:_JUDGED_PAIRS])
    return pairs.take(~is_held), pairs.take(chosen)


def _category_matrix(categories: Sequence[Sequence[str]]) -> NDArray[np.float32]:
    """(N, C) 0/1 of the most frequent categories."""
    counts: dict[str, int] = {}
    for own in categories:
        for name in own:
            counts[name] = counts.get(name, 0) + 1
    names = sorted(counts, key=lambda name: (-counts[name], name))[:_MOST_CATEGORIES]
    column = {name: place for place, name in enumerate(names)}
    matrix = np.zeros((len(categories), len(names)), np.float32)
    for row, own in enumerate(categories):
        matrix[row, [column[name] for name in own if name in column]] = 1.0
    return matrix


def _with_adapter(network: Any, config: TuningConfig) -> Any:
    """The network with a LoRA adapter in every linear layer; only the adapter learns. Without dropout: runs can be repeated."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UnavailableError('tuning needs peft; pip install "tandem-recommender[tuning]", or set tuning.steps = 0') from None
    adapter = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules="all-linear")
    return get_peft_model(network, adapter).eval()


def _adapter_state(network: Any) -> dict[str, Tensor]:
    return {name: copy.deepcopy(value.detach()) for name, value in network.named_parameters() if value.requires_grad}


def _save(network: Any, model: str, folder: Path) -> None:
    """The adapter's two files, without the path of the model that it was made on."""
    network.peft_config["default"].base_model_name_or_path = Path(model).name
    with whole_folder(folder) as partial:
        network.save_pretrained(partial, safe_serialization=True, save_embedding_layers=False)  # "auto" asks the hub
        for path in partial.iterdir():
            if path.name not in ADAPTER_FILES:
                path.unlink()
