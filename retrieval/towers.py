"""The two towers: items and users as vectors of one space, whose inner product is the score (higher is better).

An item's vector has three blocks: taste (text and attributes through a linear map, plus an id vector that a new item
lacks), one popularity coordinate, and a compressed text block. A query fills the same three: a person the first two, a
sentence the third, a mix all of them. So one index answers a person, a sentence, a session or any mix.
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

from tandem.core.errors import IncompatibleError, InputError
from tandem.core.folders import content_hash, file_hash, read_json, write_json

_WEIGHTS: Final = "towers.safetensors"
_FACTS: Final = "towers.json"


@dataclass(frozen=True)
class TowerShape:
    """Sizes that a saved tower is rebuilt from: items N, content C, text T, taste D, text block S, history H."""

    items: int
    content: int
    text: int
    dimension: int
    text_block: int
    history: int
    sequence: int
    width: int
    layers: int

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

    def forward(self, base: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """`keep` (N,) in {0, 1} drops id vectors, so that the items are seen by their content alone, as new ones are."""
        identity = self.id if keep is None else self.id * keep[:, None]
        return torch.add(identity, base)


class SequenceEncoder(nn.Module):
    """A causal transformer over the last S item vectors of a history: (B, S, D) -> (B, D), zero at initialisation."""

    def __init__(self, dimension: int, width: int, layers: int, length: int) -> None:
        super().__init__()
        self.into = nn.Linear(dimension, width)
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.1, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.out = nn.Linear(width, dimension, bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, vectors: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        steps = vectors.shape[1]
        hidden = self.into(functional.layer_norm(vectors, vectors.shape[-1:])) + self.position[-steps:]
        causal = torch.ones(steps, steps, dtype=torch.bool).triu(1)
        # A padded query row may attend to itself only: an all-masked softmax row would be NaN.
        blocked = causal | (~present[:, None, :] & ~torch.eye(steps, dtype=torch.bool))
        heads = self.layers.layers[0].self_attn.num_heads
        hidden = self.layers(hidden, mask=blocked.repeat_interleave(heads, 0))
        taste: torch.Tensor = self.out(hidden[:, -1])
        return taste * present[:, -1:]


class UserTower(nn.Module):
    """History -> taste (B, D): recency-weighted pooling of the whole history plus a sequence model over its end."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.recency = nn.Parameter(torch.zeros(shape.history))
        self.log_scale = nn.Parameter(torch.tensor(float(np.log(15.0))))
        self.sequence_length = shape.sequence
        self.sequence = SequenceEncoder(shape.dimension, shape.width, shape.layers, shape.sequence) if shape.layers else None

    def forward(self, vectors: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """`vectors` (B, H, D) of the history's items, `present` (B, H) bool; an empty history gives zeros."""
        steps = vectors.shape[1]
        weights = torch.exp(self.recency[-steps:]) * present
        size = present.sum(1, keepdim=True).clamp(min=1)
        taste = torch.einsum("bh,bhd->bd", weights, vectors) / size.sqrt()
        if self.sequence is not None:
            tail = min(steps, self.sequence_length)
            taste = taste + self.sequence(vectors[:, -tail:], present[:, -tail:])
        return taste * self.log_scale.exp()


class TwoTowers(nn.Module):
    """What is trained: a user tower over `inner` item vectors, scored against `outer` item vectors."""

    def __init__(self, shape: TowerShape) -> None:
        super().__init__()
        self.inner = ItemTower(shape.items, shape.content, shape.dimension)
        self.outer = ItemTower(shape.items, shape.content, shape.dimension)
        self.popularity = nn.Parameter(torch.zeros(shape.items))
        self.user = UserTower(shape)

    def taste(self, histories: torch.Tensor, inner: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """Histories (B, H) int64 padded with -1 -> (B, D), looking items up in `inner` (N, D)."""
        return self.user(inner[histories.clamp(min=0)] * present[..., None], present)  # type: ignore[no-any-return]


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
        facts: dict[str, object],
    ) -> None:
        self.shape, self.facts = shape, facts
        self._network = network.eval()
        self._block = block
        with torch.inference_mode():
            inputs = torch.from_numpy(content)
            self._inner = network.inner(network.inner.base(inputs))
            outer = network.outer(network.outer.base(inputs)).numpy()
        self.item_vectors: np.ndarray = self._assemble(outer, network.popularity.detach().numpy(), block(text))
        self._content = content
        self._text = text

    @property
    def spread(self) -> float:
        """Standard deviation of a person's scores over the catalogue: how loud a sentence must speak to be heard."""
        return float(self.facts["spread"])  # type: ignore[arg-type]

    @property
    def text_vectors(self) -> np.ndarray:
        """(N, S) float32 unit rows: the text block of every item."""
        return self.item_vectors[:, self.shape.dimension + 1 :]

    def query(self, histories: np.ndarray, sentences: np.ndarray | None = None, sentence_weight: float = 3.0) -> np.ndarray:
        """Query vectors (B, Q) float32 for histories (B, H) int64 padded with -1 and optional text vectors (B, T).

        A row of `sentences` that is all zero means no sentence. Without a history the sentence speaks alone, and without
        either the query is popularity.
        """
        histories = self._fit(histories)
        indices = torch.from_numpy(histories)
        with torch.inference_mode():
            taste = self._network.taste(indices, self._inner, indices >= 0).numpy()
        words = np.zeros((len(histories), self.shape.text_block), np.float32)
        popular = np.ones(len(histories), np.float32)
        if sentences is not None:
            spoken = np.abs(sentences).sum(1) > 0
            if spoken.any():
                words[spoken] = self._block(sentences[spoken]) * (sentence_weight * self.spread)
            popular[spoken & (histories < 0).all(1)] = 0.1
        return self._assemble(taste, popular, words)

    def _fit(self, histories: np.ndarray) -> np.ndarray:
        if histories.ndim != 2:
            raise InputError(f"histories have shape {histories.shape}; give (B, H) dense item ids, padded on the left with -1")
        if histories.size and histories.max() >= self.shape.items:
            raise InputError(f"history holds item {histories.max()}, but the towers know {self.shape.items} items")
        return np.ascontiguousarray(histories[:, -self.shape.history :], np.int64)

    @staticmethod
    def _assemble(taste: np.ndarray, popularity: np.ndarray, text: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(np.concatenate([taste, popularity[:, None], text], axis=1), np.float32)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that decides the vectors."""
        return str(self.facts["fingerprint"])

    def save(self, folder: Path) -> None:
        """Write `towers.safetensors` and `towers.json` into an existing folder."""
        tensors = {name: value.detach().contiguous() for name, value in self._network.state_dict().items()}
        tensors["block.mean"] = torch.from_numpy(self._block.mean)
        tensors["block.components"] = torch.from_numpy(self._block.components)
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
        shape = TowerShape(**raw["shape"])
        tensors = load_file(folder / _WEIGHTS)
        content, text = tensors.pop("content").numpy(), tensors.pop("text").numpy()
        block = TextBlock(tensors.pop("block.mean").numpy(), tensors.pop("block.components").numpy())
        network = TwoTowers(shape)
        network.load_state_dict(tensors)
        return cls(shape, network, content, text, block, raw["facts"] | {"fingerprint": content_hash(raw)})
