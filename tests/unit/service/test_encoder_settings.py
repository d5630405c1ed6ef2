"""What is set about the encoder reaches items, sentences and the release."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from retrieval.encoder import TextEncoder
from tandem.core.errors import IncompatibleError
from tandem.core.folders import write_json
from tandem.service.recipes.models import encoder_facts
from tandem.service.settings import load_settings
from tandem.service.texts import open_encoder
from tandem.service.wiring import LazyEncoder

SET = '[encoder]\ndimension = 96\npooling = "cls"\nprefix = "passage: "\nquery_prefix = "query: "\ndtype = "float32"\n'


def test_items_and_sentences_are_read_as_the_settings_say(tmp_path: Path) -> None:
    (tmp_path / "tandem.toml").write_text(SET)
    settings = load_settings(tmp_path, {})
    bare = TextEncoder("minilm", dtype="float32", max_tokens=64, pooling="cls")
    items = open_encoder(settings).encode(["a red kettle"])
    assert items.shape == (1, 96)
    np.testing.assert_allclose(items, cut(bare.encode(["passage: a red kettle"])), atol=2e-3)
    write_json(tmp_path / "encoder.json", encoder_facts(settings, open_encoder(settings)))
    sentences = LazyEncoder(tmp_path, load_settings(tmp_path / "elsewhere", {}))
    np.testing.assert_allclose(sentences(["a red kettle"]), cut(bare.encode(["query: a red kettle"])), atol=2e-3)


def test_a_release_from_before_these_settings_is_read_with_their_defaults(tmp_path: Path) -> None:
    encoder = TextEncoder("minilm", dtype="float32", max_tokens=64)
    facts = {"model": "minilm", "dtype": "float32", "max_tokens": 64}
    write_json(tmp_path / "encoder.json", facts | {"fingerprint": encoder.fingerprint})
    vector = LazyEncoder(tmp_path, load_settings(tmp_path, {}))(["a red kettle"])
    np.testing.assert_allclose(vector, encoder.encode(["a red kettle"]), atol=2e-3)
    write_json(tmp_path / "encoder.json", facts | {"fingerprint": "0" * 64})
    with pytest.raises(IncompatibleError, match="000000000000"):
        LazyEncoder(tmp_path, load_settings(tmp_path, {}))(["a red kettle"])


def cut(vectors: np.ndarray) -> np.ndarray:
    short = vectors[:, :96]
    return np.asarray(short / np.linalg.norm(short, axis=1, keepdims=True))
