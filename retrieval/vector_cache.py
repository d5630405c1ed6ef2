"""Vectors of texts that were encoded before, by the text's content: one append-only folder per encoder fingerprint.

In: keys (sha256 digests) and vectors (n, D) float16. Out: the vectors of known keys. A part is one safetensors file named by
the hash of its bytes, so that a damaged part is noticed and passed over: its texts are simply encoded again.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

_MOST_PARTS: Final = 64
_KEY_BYTES: Final = 32


def text_key(text: str, fingerprint: str) -> bytes:
    """SHA-256 of the text and of the encoder that reads it."""
    return hashlib.sha256(f"{fingerprint}\0{text}".encode("utf-8", "surrogatepass")).digest()


class VectorCache:
    """Key -> vector (D,) float16, in memory; `folder=None` keeps nothing on disk."""

    def __init__(self, folder: Path | None, dimension: int) -> None:
        self._folder = folder
        self._dimension = dimension
        self._vectors: dict[bytes, NDArray[np.float16]] = {}
        self._seen: set[str] = set()

    def refresh(self) -> None:
        """Read the parts that other runs have written since."""
        for path in self._parts():
            if path.name not in self._seen:
                self._seen.add(path.name)
                self._vectors.update(self._read(path))

    def missing(self, keys: Sequence[bytes]) -> list[int]:
        """Positions of the keys without a vector, each key once."""
        first = {key: position for position, key in reversed(list(enumerate(keys)))}
        return sorted(position for key, position in first.items() if key not in self._vectors)

    def gather(self, keys: Sequence[bytes]) -> NDArray[np.float16]:
        """(len(keys), D) float16; every key must be there."""
        found = np.empty((len(keys), self._dimension), np.float16)
        for row, key in enumerate(keys):
            found[row] = self._vectors[key]
        return found

    def add(self, keys: Sequence[bytes], vectors: NDArray[np.float16]) -> None:
        """Remember vectors and, where there is a folder, write them as one part before returning."""
        self._vectors.update(zip(keys, vectors, strict=True))
        if self._folder is not None and keys:
            self._write(keys, vectors)
            if len(self._parts()) > _MOST_PARTS:
                self._merge()

    def forget(self) -> None:
        """Drop what is in memory; only for a cache without a folder, which would grow for ever."""
        self._vectors.clear()

    @property
    def on_disk(self) -> bool:
        return self._folder is not None

    def _parts(self) -> list[Path]:
        return sorted(self._folder.glob("part-*.safetensors")) if self._folder is not None else []

    def _read(self, path: Path) -> dict[bytes, NDArray[np.float16]]:
        try:
            data = path.read_bytes()
            tensors = load(data) if path.name == _part_name(data) else {}
        except (OSError, SafetensorError):
            return {}
        keys, vectors = tensors.get("keys"), tensors.get("vectors")
        if keys is None or vectors is None or vectors.shape != (len(keys), self._dimension):
            return {}
        return {key.tobytes(): vector for key, vector in zip(keys, vectors, strict=True)}

    def _write(self, keys: Sequence[bytes], vectors: NDArray[np.float16]) -> Path:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        packed = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), _KEY_BYTES)
        data = save({"keys": packed, "vectors": np.ascontiguousarray(vectors)})
        path = self._folder / _part_name(data)
        beside = self._folder / f".partial-{uuid.uuid4().hex}"
        with beside.open("wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)
        self._seen.add(path.name)
        return path

    def _merge(self) -> None:
        """One part instead of many. A second run that merges at the same time writes the same vectors: nothing is lost."""
        self.refresh()
        old = self._parts()
        keys = sorted(self._vectors)
        kept = self._write(keys, self.gather(keys))
        for path in old:
            if path != kept:
                path.unlink(missing_ok=True)


def _part_name(data: bytes) -> str:
    return f"part-{hashlib.sha256(data).hexdigest()[:32]}.safetensors"
