"""The two towers: items and users as vectors of one space, whose inner product is the score (higher is better).

An item's vector has three blocks: taste (text and attributes through a linear map, plus an id vector; beside it the vector of the
sequence tower, where validation kept one), one popularity coordinate, and a compressed text block. Of an item that nobody has
touched, `cold_start.py` says taste and popularity. A query fills the same three: a person the first two, and the third with what
their history's texts speak of; a sentence the third; a mix all of them. So one index answers a person, a sentence, a session or
any mix.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

from retrieval.cold_start import ColdStart
from retrieval.sequence import SequenceTower
from tandem.core.errors import IncompatibleError, InputError
from tandem.core.folders import content_hash, file_hash, read_json, write_json

_WEIGHTS: Final = "towers.safetensors"
_FACTS: Final = "towers.json"
_COLD: Final = tuple(ColdStart.__dataclass_fields__)


@dataclass(frozen=True)
class TowerShape:
    """Sizes that a saved tower is rebuilt from: items N, content C, text T, pooled taste, text block S, history H.

    `width` 0: without a sequence tower; otherwise it reads the last `sequence` events with `layers` blocks of `heads` heads.
    """

    items: int
    content: int
    text: int
    linear: int
    text_block: int
    history: int
    sequence: int = 0
    width: int = 0
    layers: int = 0
    heads: int = 0

    @property
    def dimension(self) -> int:
        """Length D of the taste block: pooled, then sequence."""
        return self.linear + self.width

    @property
    def query(self) -> int:
        """Length of item and query vectors: taste, popularity, text block."""
        return self.dimension + 1 + self.text_block


class ItemTower(nn.Module):
    """Content (N, C) float32 and an id vector -> taste vectors (N, D). An item without an id vector works by its content."""

    def __init__(self, items: int, content: int, dimension: int) -> None:
        super().__init__()
        self.id = nn.Parameter(torch.zeros(items, dimension))
        self.content = nn.Parameter(torch.zeros(content, dimension), requires_grad=False)

    def base(self, content: torch.Tensor) -> torch.Tensor:
        """What content (N, C) says of the taste, (N, D). The map is not trained further, so one call serves a whole training."""
        return content @ self.content

    def forward(self, base: torch.Tensor) -> torch.Tensor:
        """All taste vectors (N, D)."""
        return torch.add(self.id, base)

    def rows(self, base: torch.Tensor, items: torch.Tensor) -> torch.Tensor:
        """The taste vectors (R, D) of some items only; their gradient is sparse, so that a step costs no more than they do."""
        return base[items] + functional.embedding(items, self.id, sparse=True)


class UserTower(nn.Module):
    """History -> taste (B, D): recency-weighted pooling of the whole history."""

    def __init__(self, history: int) -> None:
        super().__init__()
        self.recency = nn.Parameter(torch.zeros(history))
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(15.0))))

    def forward(self, vectors: torch.Tensor, places: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`vectors` (R, D), `places` (B, H) rows of it, `present` (B, H) bool; an empty history gives zeros."""
        steps, sizes = places.shape[1], present.sum(1)
        weights = torch.exp(self.recency[-steps:]).expand(len(places), -1)[present]
        starts = torch.cumsum(sizes, 0) - sizes
        pooled = functional.embedding_bag(places[present], vectors, starts, mode="sum", per_sample_weights=weights)
        return pooled * (self.log_scale.exp() / sizes.clamp(min=1).sqrt())[:, None]


class TwoTowers(nn.Module):
    """What is trained: a user tower over `inner` item vectors, scored against `outer` ones; a sequence tower beside it.

    `profile`: how loud the texts of a history speak in its query.
    """

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.inner = ItemTower(shape.items, shape.content, shape.linear)
        self.outer = ItemTower(shape.items, shape.content, shape.linear)
        self.popularity = nn.Parameter(torch.zeros(shape.items))
        self.profile = nn.Parameter(torch.zeros(()), requires_grad=False)
        self.user = UserTower(shape.history)
        self.sequence: SequenceTower | None = None
        if shape.width:
            self.sequence = SequenceTower(shape.items, shape.width, shape.layers, shape.heads, shape.sequence)

    @property
    def loudness(self) -> float:
        """What the sequence tower's scores are multiplied with; 0 without one."""
        return 0.0 if self.sequence is None else float(self.sequence.weight)

    def taste(self, histories: torch.Tensor, inner: torch.Tensor) -> torch.Tensor:
        """Histories (B, H) int64 padded with -1 -> (B, W), looking items up in `inner` (N, W)."""
        return self.user(inner, histories.clamp(min=0), histories >= 0)  # type: ignore[no-any-return]

    def whole_taste(
        self, histories: torch.Tensor, inner: torch.Tensor, places: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, D): the pooled taste, and beside it what the sequence tower expects next; and (B, S): the pooled text blocks.

        `inner` (R, linear + S): taste and text block. `places` (B, H): rows of `inner`, where these are not the histories.
        """
        pooled = self.taste(histories if places is None else places, inner)
        taste, profile = pooled[:, : self.inner.id.shape[1]], pooled[:, self.inner.id.shape[1] :] * self.profile
        if self.sequence is not None:
            taste = torch.cat([taste, self.sequence.last(histories)], dim=1)
        return taste, profile

    def whole_items(self, outer: torch.Tensor) -> torch.Tensor:
        """(N, D): what `whole_taste` is multiplied with; `outer` (N, linear)."""
        if self.sequence is None:
            return outer
        return torch.cat([outer, self.sequence.items * self.sequence.weight], dim=1)


@dataclass(frozen=True)
class TextBlock:
    """Compresses text vectors (N, T) to S coordinates by their principal components, as unit rows."""

    mean: np.ndarray
    components: np.ndarray

    @classmethod
    def fit(cls, text: np.ndarray, size: int) -> TextBlock:
        mean = text.mean(0)
        _, _, components = np.linalg.svd(text - mean, full_matrices=False)
        components = components[:size]
        signs = np.sign(components[np.arange(len(components)), np.abs(components).argmax(1)])
        return cls(mean.astype(np.float32), np.ascontiguousarray((components * signs[:, None]).astype(np.float32)))

    def __call__(self, text: np.ndarray) -> np.ndarray:
        reduced = (text - self.mean) @ self.components.T
        norms = np.linalg.norm(reduced, axis=1, keepdims=True)
        return np.asarray(reduced / np.maximum(norms, 1e-9), np.float32)


class Towers:
    """Trained towers, ready to answer; immutable. Loaded from a folder or returned by `train_towers`."""

    def __init__(
        self,
        shape: TowerShape,
        network: TwoTowers,
        content: np.ndarray,
        text: np.ndarray,
        block: TextBlock,
        cold: ColdStart,
        facts: dict[str, object],
    ) -> None:
        self.shape, self.facts = shape, facts
        self._network = network.eval()
        self._block, self._cold = block, cold
        with torch.inference_mode():
            inputs = torch.from_numpy(content)
            inner = network.inner(network.inner.base(inputs)).numpy()
            outer = network.whole_items(network.outer(network.outer.base(inputs))).numpy()
        taste = np.concatenate([outer, network.popularity.detach().numpy()[:, None]], axis=1)
        words = block(text)
        self.item_vectors: np.ndarray = _beside(cold.instead(taste, content, cold.touched), words)
        self._inner = torch.from_numpy(_beside(inner, words))
        self._content = content
        self._text = text

    def with_cold_start(self, cold: ColdStart) -> Towers:
        """The same towers with another word for items that nobody has touched."""
        return Towers(self.shape, self._network, self._content, self._text, self._block, cold, self.facts)

    def text_of(self, rows: np.ndarray) -> np.ndarray:
        """Text vectors (n, T) of items by dense id, as the encoder gave them."""
        return np.asarray(self._text[rows])

    @property
    def inner_vectors(self) -> np.ndarray:
        """(N, linear + S) float32: what stands for each item in a history that is pooled: taste and text block."""
        return np.asarray(self._inner.numpy())

    def items(self, content: np.ndarray, text: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Item vectors (n, Q) and inner vectors (n, linear + S) of items put now: contents (n, C), text vectors (n, T).

        `rows` (n,) int64: the dense id of an item that was trained on, which keeps what was learned of it beside its content; -1
        for a new one. InputError for contents or texts of another width.
        """
        if content.shape[1:] != (self.shape.content,) or text.shape[1:] != (self.shape.text,):
            raise InputError(
                f"items have contents of {content.shape[1:]} and texts of {text.shape[1:]} numbers, these towers read "
                f"{self.shape.content} and {self.shape.text}; use the release's own encoder"
            )
        places = np.maximum(rows, 0)
        touched = (rows >= 0) & self._cold.touched[places]
        known, at = torch.from_numpy(rows >= 0)[:, None], torch.from_numpy(places)
        with torch.inference_mode():
            inputs = torch.from_numpy(content)
            network = self._network
            inner, outer = (tower.base(inputs) + tower.id[at] * known for tower in (network.inner, network.outer))
            if network.sequence is not None:
                outer = torch.cat([outer, network.sequence.items[at] * network.sequence.weight], dim=1)
            taste = torch.cat([outer, network.popularity[at][:, None]], dim=1).numpy()
        words = self._block(text)
        return _beside(self._cold.instead(taste, content, touched), words), _beside(inner.numpy(), words)

    @property
    def spread(self) -> float:
        """Standard deviation of a person's scores over the catalogue: how loud a sentence must speak to be heard."""
        return float(self.facts["spread"])  # type: ignore[arg-type]

    @property
    def text_vectors(self) -> np.ndarray:
        """(N, S) float32 unit rows: the text block of every item."""
        return self.item_vectors[:, self.shape.dimension + 1 :]

    def query(
        self,
        histories: np.ndarray,
        sentences: np.ndarray | None = None,
        sentence_weight: float = 3.0,
        put: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> np.ndarray:
        """Query vectors (B, Q) float32 for histories (B, H) int64 padded with -1 and optional text vectors (B, T).

        With `put`, histories may hold items that were put since, ids N and above: (rows (B, H), inner vectors (M, linear + S))
        that they are pooled by; the sequence tower passes over items that it was not trained on. A row of `sentences` that is all
        zero means no sentence. Without a history the sentence speaks alone, and without either the query is popularity.
        """
        if put is None:
            histories, table = self._fit(histories, self.shape.items), self._inner
            known, places = torch.from_numpy(histories), None
        else:
            table, known = torch.from_numpy(put[1]), self._known(histories)
            places = torch.from_numpy(self._fit(put[0], len(put[1])))
        with torch.inference_mode():
            taste, words = (part.numpy().copy() for part in self._network.whole_taste(known, table, places))
        popular = np.ones(len(histories), np.float32)
        if sentences is not None:
            spoken = np.abs(sentences).sum(1) > 0
            if spoken.any():
                words[spoken] += self._block(sentences[spoken]) * (sentence_weight * self.spread)
            popular[spoken & (histories < 0).all(1)] = 0.1
        return _beside(taste, popular[:, None], words)

    def _known(self, histories: np.ndarray) -> torch.Tensor:
        """Histories without what was put since the training, moved up to the right."""
        kept = np.where(histories < self.shape.items, histories, -1)
        order = np.argsort(kept >= 0, axis=1, kind="stable")
        return torch.from_numpy(np.ascontiguousarray(np.take_along_axis(kept, order, axis=1)[:, -self.shape.history :]))

    def _fit(self, histories: np.ndarray, items: int) -> np.ndarray:
        if histories.ndim != 2:
            raise InputError(f"histories have shape {histories.shape}; give (B, H) dense item ids, padded on the left with -1")
        if histories.size and histories.max() >= items:
            raise InputError(f"history holds item {histories.max()}, but the towers know {items} items")
        return np.ascontiguousarray(histories[:, -self.shape.history :], np.int64)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the vectors."""
        return str(self.facts["fingerprint"])

    def save(self, folder: Path) -> None:
        """Write `towers.safetensors` and `towers.json` into an existing folder."""
        tensors = {name: value.detach().contiguous() for name, value in self._network.state_dict().items()}
        tensors["block.mean"] = torch.from_numpy(self._block.mean)
        tensors["block.components"] = torch.from_numpy(self._block.components)
        tensors |= {f"cold.{name}": torch.from_numpy(getattr(self._cold, name)) for name in _COLD}
        tensors["content"] = torch.from_numpy(self._content)
        tensors["text"] = torch.from_numpy(self._text).clone()  # safetensors refuses tensors that share memory
        save_file(tensors, folder / _WEIGHTS)
        facts = {key: value for key, value in self.facts.items() if key != "fingerprint"}
        write_json(folder / _FACTS, {"shape": asdict(self.shape), "facts": facts, "weights": file_hash(folder / _WEIGHTS)})
        self.facts["fingerprint"] = content_hash(read_json(folder / _FACTS))

    @classmethod
    def load(cls, folder: Path) -> Towers:
        """Read what `save` wrote; raises IncompatibleError when weights and description are not of one training."""
        raw = read_json(folder / _FACTS)
        if file_hash(folder / _WEIGHTS) != raw["weights"]:
            raise IncompatibleError(
                f"{folder}: {_WEIGHTS} is not the file that {_FACTS} describes; train again or fetch the folder again"
            )
        tensors = load_file(folder / _WEIGHTS)
        if set(raw["shape"]) != set(TowerShape.__dataclass_fields__) or not {f"cold.{name}" for name in _COLD} <= set(tensors):
            raise IncompatibleError(f"{folder}: towers of another version of Tandem; run `tandem train towers` again")
        shape = TowerShape(**raw["shape"])
        content, text = tensors.pop("content").numpy(), tensors.pop("text").numpy()
        block = TextBlock(tensors.pop("block.mean").numpy(), tensors.pop("block.components").numpy())
        cold = ColdStart(*(tensors.pop(f"cold.{name}").numpy() for name in _COLD))
        network = TwoTowers(shape)
        network.load_state_dict(tensors)
        return cls(shape, network, content, text, block, cold, raw["facts"] | {"fingerprint": content_hash(raw)})


def _beside(*blocks: np.ndarray) -> np.ndarray:
    """Blocks of coordinates side by side."""
    return np.ascontiguousarray(np.concatenate(blocks, axis=1), np.float32)
