"""Named numpy arrays in one safetensors file, written whole or not at all, read back with every name checked."""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tandem.core.errors import IntegrityError, NotFoundError


def save_tensors(path: Path, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Replace `path` atomically: after a crash it holds the old arrays or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".partial-{uuid.uuid4().hex}")
    with beside.open("wb") as handle:
        handle.write(save({name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}))
        handle.flush()
        os.fsync(handle.fileno())
    beside.replace(path)


def load_tensors(path: Path, *names: str) -> dict[str, NDArray[Any]]:
    """The arrays of `path`. NotFoundError when there is no file, IntegrityError when it is damaged or lacks a name."""
    if not path.is_file():
        raise NotFoundError(f"no file {path.name} in {path.parent}; train or fetch it again")
    try:
        tensors: dict[str, NDArray[Any]] = load(path.read_bytes())
    except (SafetensorError, ValueError, KeyError) as error:
        raise IntegrityError(f"{path.name} is not a whole safetensors file ({error}); train or fetch it again") from error
    missing = [name for name in names if name not in tensors]
    if missing:
        raise IntegrityError(f"{path.name} lacks {missing}, it has {sorted(tensors)}; train or fetch it again")
    return tensors
