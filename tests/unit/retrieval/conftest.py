"""Tiny random models with real tokenizers, made here: a BERT over characters and a Qwen over bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2Model

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
