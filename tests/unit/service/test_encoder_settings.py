"""What is set about the encoder reaches items, sentences and the release."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrieval.encoder import TextEncoder
from retrieval.words import LOUDNESS, Words, reader_fingerprint
from tandem.core.errors import IncompatibleError
from tandem.core.folders import write_json
from tandem.service.recipes.models import encoder_facts
from tandem.service.settings import load_settings
from tandem.service.texts import open_encoder
from tandem.service.wiring import LazyReader

SET = '[encoder]\ndimension = 96\npooling = "cls"\nprefix = "passage: "\nquery_prefix = "query: "\ndtype = "float32"\n'


def test_items_and_sentences_are_read_as_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "tandem.toml").write_text(SET)
    settings = load_settings(tmp_path, {})
    bare = TextEncoder("minilm", dtype="float32", max_tokens=64, pooling="cls")
    items = open_encoder(settings).encode(["a red kettle"])
    assert items.shape == (1, 96)
    np.testing.assert_allclose(items, cut(bare.encode(["passage: a red kettle"])), atol=2e-3)
    write_json(tmp_path / "encoder.json", encoder_facts(settings, open_encoder(settings)))
    Words.fit([], 0).save(tmp_path)
    sentences = LazyReader(tmp_path, load_settings(tmp_path / "elsewhere", {}))
    np.testing.assert_allclose(sentences(["a red kettle"]), cut(bare.encode(["query: a red kettle"])), atol=2e-3)


def test_a_release_from_before_these_settings_is_read_with_their_defaults(tmp_path: Path) -> None:
    encoder = TextEncoder("minilm", dtype="float32", max_tokens=64)
    facts = {"model": "minilm", "dtype": "float32", "max_tokens": 64}
    Words.fit([], 0).save(tmp_path)
    write_json(tmp_path / "encoder.json", facts | {"fingerprint": encoder.fingerprint})
    vector = LazyReader(tmp_path, load_settings(tmp_path, {}))(["a red kettle"])
    np.testing.assert_allclose(vector, encoder.encode(["a red kettle"]), atol=2e-3)
    write_json(tmp_path / "encoder.json", facts | {"fingerprint": "0" * 64})
    with pytest.raises(IncompatibleError, match="000000000000"):
        LazyReader(tmp_path, load_settings(tmp_path, {}))(["a red kettle"])


def test_sentences_are_read_with_the_words_of_the_release(tmp_path: Path) -> None:
    settings, words = load_settings(tmp_path, {}), Words.fit(["a red kettle", "a blue kettle", "a red bowl"], 2)
    encoder = open_encoder(settings)
    write_json(tmp_path / "encoder.json", encoder_facts(settings, encoder))
    words.save(tmp_path)
    reader = LazyReader(tmp_path, settings)
    assert reader.fingerprint == reader_fingerprint(encoder.fingerprint, words)
    np.testing.assert_array_equal(reader(["my kettle"])[:, encoder.dimension :], words(["my kettle"]) * LOUDNESS)
    np.testing.assert_array_equal(reader.items(["my kettle"])[:, encoder.dimension :], words(["my kettle"]) * LOUDNESS)


def cut(vectors: np.ndarray) -> np.ndarray:
    short = vectors[:, :96]
    return np.asarray(short / np.linalg.norm(short, axis=1, keepdims=True))
