"""Tuning a tiny encoder on worlds with known answers: tastes that stand in the texts and in what people did."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from retrieval.encoder import ADAPTER_FILES, TextEncoder
from retrieval.tuning import Lessons, tune
from retrieval.tuning_config import TuningConfig
from tandem.core.errors import InputError
from tandem.core.folders import file_hash

WORDS = (("sea", "ship", "wave", "salt", "gull"), ("moon", "star", "void", "comet", "orbit"))
FILLER = ("red", "old", "tall", "quick", "new", "blue", "soft")
CONFIG = TuningConfig(steps=120, batch=24, rank=4, learning_rate=1e-2, judge_every=30, patience=4)
ITEMS, UNSEEN = 40, 16


def texts(seed: int = 0) -> list[str]:
    """Items of two tastes in turn; the last `UNSEEN` are in nobody's history."""
    rng = np.random.default_rng(seed)
    return [
        " ".join([*rng.choice(WORDS[row % 2], 2, replace=False), *rng.choice(FILLER, 3)][:: 1 if row % 4 < 2 else -1])
        for row in range(ITEMS + UNSEEN)
    ]


def lessons(seed: int = 0) -> Lessons:
    """People have items of one taste only; they like those whose row can be divided by 4 or leaves 1."""
    rng = np.random.default_rng(seed)
    histories = [rng.choice(np.arange(person % 2, ITEMS, 2), 8, replace=False) for person in range(60)]
    liked = [history % 4 < 2 for history in histories]
    return Lessons(histories, {"like": liked}, [[("sea", "space")[row % 2]] for row in range(ITEMS + UNSEEN)])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_bert: Callable[[Path, str], Path]) -> Path:
    return tiny_bert(tmp_path_factory.mktemp("bert"), " ")


@pytest.fixture(scope="module")
def tuned(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, float]]]:
    folder, lines = tmp_path_factory.mktemp("tuned") / "adapter", list[dict[str, float]]()
    assert tune(plain(model), texts(), lessons(), CONFIG, lines.append, folder)
    return folder, lines


def plain(model: Path, adapter: Path | None = None) -> TextEncoder:
    return TextEncoder(str(model), dtype="float32", max_tokens=40, adapter=adapter)


def taste_gap(vectors: np.ndarray) -> float:
    """How much nearer items of one taste are to each other than to the other taste, by cosine."""
    same = np.add.outer(np.arange(len(vectors)), np.arange(len(vectors))) % 2 == 0
    cosine = vectors @ vectors.T
    off = ~np.eye(len(vectors), dtype=bool)
    return float(cosine[same & off].mean() - cosine[~same].mean())


def test_items_that_nobody_had_yet_move_towards_their_taste(model: Path, tuned: tuple[Path, list[dict[str, float]]]) -> None:
    before, after = plain(model).encode(texts()[ITEMS:]), plain(model, tuned[0]).encode(texts()[ITEMS:])
    assert taste_gap(before) < 0.1
    assert taste_gap(after) > 0.3


def test_every_task_is_learned(tuned: tuple[Path, list[dict[str, float]]]) -> None:
    first, last = tuned[1][1], tuned[1][-1]
    assert tuned[1][0]["recall@10"] < last["best"]
    assert last["loss/softmax"] < first["loss/softmax"]
    assert last["loss/tasks"] < first["loss/tasks"]
    assert last["loss/interest"] < 0.1 * CONFIG.task_weight < first["loss/interest"]


def test_the_adapter_is_two_files_that_know_no_folder(model: Path, tuned: tuple[Path, list[dict[str, float]]]) -> None:
    names = {path.name for path in tuned[0].iterdir()}
    assert set(ADAPTER_FILES) <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".md"))]
    assert str(model.parent) not in (tuned[0] / "adapter_config.json").read_text()
    assert json.loads((tuned[0] / "adapter_config.json").read_text())["base_model_name_or_path"] == model.name


def test_the_adapter_changes_the_fingerprint_and_the_model_stays(
    model: Path, tuned: tuple[Path, list[dict[str, float]]], tmp_path: Path
) -> None:
    weights = file_hash(model / "model.safetensors")
    with_adapter = plain(model, tuned[0])
    assert with_adapter.fingerprint != plain(model).fingerprint
    with_adapter.encode(["sea"])
    assert file_hash(model / "model.safetensors") == weights


def test_the_same_seed_gives_the_same_adapter(model: Path, tuned: tuple[Path, list[dict[str, float]]], tmp_path: Path) -> None:
    assert tune(plain(model), texts(), lessons(), CONFIG, lambda _: None, tmp_path / "again")
    for name in ADAPTER_FILES:
        assert file_hash(tmp_path / "again" / name) == file_hash(tuned[0] / name)


def test_what_does_not_help_is_not_kept(model: Path, tmp_path: Path) -> None:
    barely = replace(CONFIG, steps=2, learning_rate=1e-12)
    assert not tune(plain(model), texts(), lessons(), barely, lambda _: None, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_a_decoder_is_tuned_too(tmp_path: Path, tiny_qwen: Callable[[Path], Path]) -> None:
    model, config = tiny_qwen(tmp_path), replace(CONFIG, steps=120, rank=8)
    assert tune(plain(model), texts(), lessons(), config, lambda _: None, tmp_path / "adapter")
    before, after = plain(model).encode(texts()[:ITEMS]), plain(model, tmp_path / "adapter").encode(texts()[:ITEMS])
    assert taste_gap(before) < 0.1
    assert taste_gap(after) > 0.15  # how far it gets depends on the number of threads


def test_histories_without_pairs_are_refused(model: Path, tmp_path: Path) -> None:
    alone = Lessons([np.array([row]) for row in range(9)], {}, [[]] * ITEMS)
    with pytest.raises(InputError, match="no two items share a history"):
        tune(plain(model), texts(), alone, CONFIG, lambda _: None, tmp_path / "adapter")


def test_settings_that_mean_nothing_are_refused() -> None:
    with pytest.raises(InputError, match=r"tuning\.batch = 0"):
        TuningConfig(batch=0)
    with pytest.raises(InputError, match="above 0"):
        TuningConfig(temperature=0.0)


def test_an_adapter_that_is_not_whole_is_refused(model: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match=r"lacks \['adapter_model\.safetensors'\]"):
        plain(model, tmp_path)
