"""Which words a text holds, as a vector: names, series and model numbers, which a text encoder blurs.

In: texts. Out: (n, W) float32 unit rows: TF-IDF of words and of pairs of neighbours, brought down to the W leading directions
of the catalogue (latent semantic analysis, Deerwester et al. 1990). A run of Chinese, Japanese or Korean letters counts as its
letters and their pairs. A text without any known word is a row of zeros.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
import scipy.sparse as sp
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd

from retrieval.encoder import Progress, TextEncoder
from tandem.core.folders import content_hash

WORDS: Final = "words.parquet"
MOST_WORDS: Final = 30_000
LOUDNESS: Final = 0.5
"""Length of a row of words beside the encoder's of length 1: louder, and sentences find what shares words, not what is meant."""

_MOST_TEXTS: Final = 100_000
_CJK: Final = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af"
_TOKEN: Final = re.compile(rf"[{_CJK}]+|[^\W{_CJK}]+")


class Words:
    """The words of one catalogue: `table` [word, idf, vector (W,)]; immutable."""

    def __init__(self, table: pl.DataFrame) -> None:
        self._table = table
        self._place = {word: row for row, word in enumerate(table["word"])}
        self._idf = table["idf"].to_numpy()
        self._vectors = table["vector"].to_numpy().reshape(len(table), -1) if len(table) else np.zeros((0, 0), np.float32)

    @classmethod
    def fit(cls, texts: Sequence[str], dimension: int, seed: int = 0) -> Words:
        """Of a catalogue's texts; words of a single text tell nothing. Fewer directions where there are fewer words or texts."""
        step = max(1, len(texts) // _MOST_TEXTS)
        counter = TfidfVectorizer(analyzer=_terms, min_df=2, max_features=MOST_WORDS, sublinear_tf=True, dtype=np.float32)
        try:
            weights = counter.fit_transform(texts[::step])
        except ValueError:  # scikit-learn's word for: no term stands in two texts
            return cls(_table([], np.zeros(0), np.zeros((0, 0))))
        rank = min(dimension, min(weights.shape) - 1)
        if rank < 1:
            return cls(_table([], np.zeros(0), np.zeros((0, 0))))
        _, _, directions = randomized_svd(weights, rank, n_iter=4, random_state=seed)
        return cls(_table(list(counter.get_feature_names_out()), counter.idf_, directions.T))

    @property
    def dimension(self) -> int:
        """W."""
        return int(self._vectors.shape[1])

    @cached_property
    def fingerprint(self) -> str:
        """Hash of everything that decides a vector."""
        return content_hash([list(self._place), self._idf.tobytes().hex(), self._vectors.tobytes().hex()])

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """(n, W) float32."""
        reduced = np.asarray(self._weights(texts) @ self._vectors, np.float32)
        norms = np.linalg.norm(reduced, axis=1, keepdims=True)
        return np.asarray(reduced / np.maximum(norms, 1e-6), np.float32)

    def _weights(self, texts: Sequence[str]) -> sp.csr_matrix:
        """(n, words) TF-IDF rows; their length is left, as the result is brought to length 1 anyway."""
        ends, columns, values = [0], [], []
        for text in texts:
            counts: dict[int, int] = {}
            for term in _terms(text):
                place = self._place.get(term)
                if place is not None:
                    counts[place] = counts.get(place, 0) + 1
            columns += list(counts)
            values += list(counts.values())
            ends.append(len(columns))
        places = np.array(columns, np.int64)
        weights = (1.0 + np.log(np.array(values, np.float64))) * self._idf[places]
        return sp.csr_matrix((weights.astype(np.float32), places, ends), (len(texts), len(self._idf)))

    def save(self, folder: Path) -> None:
        """Write `words.parquet` into an existing folder."""
        self._table.write_parquet(folder / WORDS)

    @classmethod
    def load(cls, folder: Path) -> Words:
        """Read what `save` wrote."""
        return cls(pl.read_parquet(folder / WORDS))


def reader_fingerprint(encoder: str, words: Words) -> str:
    """Hash of everything that decides what a `TextReader` says: the encoder's own fingerprint, and the words."""
    return content_hash([encoder, words.fingerprint])


class TextReader:
    """Texts read twice, side by side: by the encoder (what they mean) and by their words (whom and what they name).

    As an encoder: (n, T) float32, T the dimensions of both, the words `LOUDNESS` long. `fingerprint`: of everything that
    decides a vector.
    """

    def __init__(self, encoder: TextEncoder, words: Words) -> None:
        self.encoder, self.words = encoder, words
        self.fingerprint = reader_fingerprint(encoder.fingerprint, words)

    def encode(self, texts: Sequence[str], progress: Progress | None = None, *, as_query: bool = False) -> NDArray[np.float32]:
        """Vectors (n, T) of texts, in the order given; `progress` and `as_query` as `TextEncoder.encode` takes them."""
        meaning = self.encoder.encode(texts, progress, as_query=as_query)
        return np.concatenate([meaning, self.words(texts) * np.float32(LOUDNESS)], axis=1)

    def truncates(self, text: str, *, as_query: bool = False) -> bool:
        """Is the text longer than the encoder reads?"""
        return self.encoder.truncates(text, as_query=as_query)


def _table(words: list[str], idf: NDArray[np.floating], vectors: NDArray[np.floating]) -> pl.DataFrame:
    width = vectors.shape[1]
    rows = pl.Series("vector", vectors.astype(np.float32).tolist(), pl.Array(pl.Float32, width))
    return pl.DataFrame({"word": pl.Series(words, dtype=pl.String), "idf": pl.Series(idf, dtype=pl.Float64), "vector": rows})


def _terms(text: str) -> Iterator[str]:
    """Words and pairs of neighbouring ones, in one spelling."""
    tokens = list(_tokens(unicodedata.normalize("NFKC", text).casefold()))
    yield from tokens
    for one, other in itertools.pairwise(tokens):
        yield f"{one} {other}"


def _tokens(text: str) -> Iterator[str]:
    for found in _TOKEN.finditer(text):
        token = found.group()
        if "\u3040" <= token[0] <= "\ud7af":
            yield from token
        elif len(token) > 1 or token.isdigit():
            yield token
