"""An encoder tuned on a workspace's events: the adapter goes into the release, answers sentences there, and is not made twice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from retrieval.encoder import ADAPTER_FILES
from tandem.core.errors import IncompatibleError
from tandem.core.folders import read_json
from tandem.service import recipes
from tandem.service.settings import Settings, load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender

TUNED = """
[encoder]
model = "{model}"

[tuning]
steps = 120
batch = 32
learning_rate = 1e-2
judge_every = 20
"""


@pytest.fixture(scope="module")
def settings(tiny_workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    """A copy of the small world, trained and released with a small random encoder that was tuned."""
    folder = tmp_path_factory.mktemp("tuned")
    home = Path(shutil.copytree(tiny_workspace, folder / "workspace"))
    toml = home / "tandem.toml"
    toml.write_text(toml.read_text() + TUNED.format(model=small_bert(folder / "model")))
    settings = load_settings(home, {})
    recipes.train(settings)
    recipes.evaluate(settings)
    return settings


def small_bert(folder: Path) -> Path:
    """A random model of 32 units with MiniLM's own words."""
    from retrieval.model_folder import find_model

    tokenizer = AutoTokenizer.from_pretrained(find_model("minilm"))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=128, **sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_release_brings_its_adapter_and_answers_sentences_with_it(settings: Settings) -> None:
    name = recipes.release_create(settings).data["release"]
    folder = settings.releases / name
    assert sorted(path.name for path in (folder / "encoder").iterdir()) == sorted(ADAPTER_FILES)
    recommender = open_recommender(settings, name)
    slate = recommender.recommend(Ask(query="something new", k=5))
    assert (slate.degraded, len(slate.items)) == ((), 5)
    recommender.close()
    shutil.rmtree(folder / "encoder")  # as if the adapter had been lost on the way: without it the words mean something else
    from tandem.service.wiring import LazyReader

    with pytest.raises(IncompatibleError, match="towers were trained with"):
        LazyReader(folder, settings)(["something new"])


def test_what_was_tuned_is_not_tuned_again(settings: Settings) -> None:
    (made,) = (settings.workspace / "cache" / "adapters").iterdir()
    before = (made / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns
    towers = read_json(settings.models / "retrieval" / "retriever.json")["towers"]
    recipes.train(settings, "towers")
    assert [path.name for path in (settings.workspace / "cache" / "adapters").iterdir()] == [made.name]
    assert (made / "adapter" / "adapter_model.safetensors").stat().st_mtime_ns == before
    assert read_json(settings.models / "retrieval" / "retriever.json")["towers"] == towers
