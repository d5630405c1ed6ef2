"""Tiny random models with real tokenizers (a BERT over characters, a Qwen over bytes), and a small trained retriever."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import scipy.sparse as sp
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

from retrieval.baselines import ItemKNN
from retrieval.batches import cut_places
from retrieval.content import content_matrix
from retrieval.index import VectorIndex
from retrieval.retriever import Retriever
from retrieval.sequence import SequenceConfig
from retrieval.train import Catalogue, Histories, TowerConfig, train_towers

ITEMS = 60
LATE = datetime(2025, 6, 1, tzinfo=UTC)
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}


@pytest.fixture(scope="session")
def tiny_bert() -> Callable[[Path, str], Path]:
    """Writes a model and its tokenizer to a folder; the second argument holds the characters that it should know."""

    def make(folder: Path, text: str) -> Path:
        torch.manual_seed(0)
        tokenizer = word_pieces(sorted(set(text + "abcdefghijklmnopqrstuvwxyz0123456789")))
        BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **SIZES)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def tiny_qwen() -> Callable[[Path], Path]:
    """Writes a model and its tokenizer to a folder."""

    def make(folder: Path) -> Path:
        torch.manual_seed(0)
        tokenizer = byte_pieces()
        Qwen2Model(Qwen2Config(vocab_size=len(tokenizer), num_key_value_heads=2, **SIZES)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def word_pieces(characters: list[str]) -> PreTrainedTokenizerFast:
    """A BERT-like tokenizer over single characters."""
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *[letter for letter in characters if not letter.isspace()]]
    vocabulary = {piece: number for number, piece in enumerate([*names, *(f"##{name}" for name in names[4:])])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


def byte_pieces() -> PreTrainedTokenizerFast:
    """A GPT-like tokenizer over bytes, without a padding token and without special tokens around a text."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate([*letters, "<end>"])}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


@pytest.fixture(scope="session")
def retriever() -> Retriever:
    """60 items in three tastes, the last of which becomes available later."""
    random = np.random.default_rng(0)
    text = random.standard_normal((ITEMS, 12)).astype(np.float32)
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    sequences = [random.permutation(np.arange(user % 3, ITEMS, 3))[:9] for user in range(90)]
    histories = Histories(sequences, [np.ones(9, bool)] * 90, [cut_places(np.arange(9))] * 90, exclude_seen=True)
    config = TowerConfig(dimension=8, text_block=6, history=20, epochs=1, ridge=10.0, sequence=SequenceConfig(width=8, rounds=1))
    items = pl.DataFrame(
        {
            "item_id": [f"i{number:02}" for number in range(ITEMS)],
            "title": [f"Item {number}" for number in range(ITEMS)],
            "text": [f"Item {number}" for number in range(ITEMS)],
            "categories": [[f"c{number % 3}"] for number in range(ITEMS)],
            "available_from": [LATE if number == 59 else None for number in range(ITEMS)],
            "price": [float(number) for number in range(ITEMS)],
            "colour": [("red", "blue", None)[number % 3] for number in range(ITEMS)],
        },
        schema_overrides={"available_from": pl.Datetime("us", "UTC")},
    )
    towers = train_towers(Catalogue(content_matrix(items, text), text), histories, config, lambda _: None)
    matrix = sp.csr_matrix((np.ones(810, np.float32), (np.repeat(np.arange(90), 9), np.concatenate(sequences))), (90, ITEMS))
    counts = np.asarray(matrix.sum(axis=0), np.float32).ravel()
    return Retriever(items, towers, VectorIndex.build(towers.item_vectors), ItemKNN.fit(matrix, 20), counts, exclude_seen=True)
