"""Which index to build: the settings, and the faiss index_factory string that a name stands for at a given size.

| name | what it is | when |
|---|---|---|
| flat | exact | small catalogues; the judge |
| int8 | exact, by way of whole numbers (`int8.py`) | larger ones, on processors that multiply int8 |
| hnsw | graph | the fewest milliseconds for one query; slow to build |
| ivf | lists around centres | large catalogues; quick to build |
| ivfpq | ivf of 4-bit codes, re-scored in float32 | large catalogues searched in batches |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from tandem.core.errors import InputError

Storage = Literal["float32", "float16", "int8"]

INT8: Final = "Int8"
FLAT_BELOW: Final = 50_000
_LINKS: Final = 32
_STORED: Final = {"float32": "Flat", "float16": "SQfp16", "int8": "SQ8"}
NAMES: Final = ("auto", "flat", "int8", "hnsw", "ivf", "ivfpq")


@dataclass(frozen=True)
class IndexConfig:
    """`kind`: "auto", "flat", "int8", "hnsw", "ivf", "ivfpq" or a faiss index_factory string.

    Auto is exact (flat) below 50,000 vectors and IVF from there on. `storage` is what flat, hnsw and ivf keep of a number:
    float16 halves the memory, int8 quarters it, and recall says what that costs (int8 alone may miss a high target).

    The index is tuned to the narrowest search whose recall@`k` on real queries reaches `target_recall`; `tuning_queries` bounds
    how many of them are asked. With `budget_ms` (0: none) auto tries the kinds and takes the fastest that reaches the target, if
    one query takes it no longer than that (`tune.py`). `device`: "auto" uses a GPU when faiss and the machine have one,
    and goes on without it when it fails; "gpu" refuses to work without; "cpu" never uses one.
    """

    kind: str = "auto"
    target_recall: float = 0.98
    k: int = 100
    construction: int = 100
    tuning_queries: int = 256
    allow_empty: bool = False
    device: Literal["auto", "cpu", "gpu"] = "auto"
    storage: Storage = "float32"
    budget_ms: float = 0.0

    def __post_init__(self) -> None:
        if not 0 < self.target_recall <= 1:
            raise InputError(f"target_recall = {self.target_recall} is not a share in (0, 1]; 0.98 is the default")
        if min(self.k, self.construction, self.tuning_queries) < 1:
            raise InputError("index: k, construction and tuning_queries must each be 1 or more")
        if not 0 <= self.budget_ms < float("inf"):
            raise InputError(f"index: budget_ms = {self.budget_ms} is no time; use milliseconds, or 0 for no budget")
        if self.storage not in _STORED:
            raise InputError(f"index: storage = {self.storage!r} is none of {list(_STORED)}; choose one of them")
        if self.storage != "float32" and self.kind.lower() not in ("auto", "flat", "hnsw", "ivf"):
            raise InputError(f"index: storage = {self.storage!r} has no say in kind {self.kind!r}; use flat, hnsw or ivf with it")


def resolve_kind(kind: str, count: int, dimension: int = 64, storage: Storage = "float32") -> str:
    """The index_factory string for `kind` over `count` vectors of `dimension` numbers; "Int8" for the kind that faiss lacks."""
    if not count:
        return "Flat"
    if "IDMap" in kind:
        raise InputError(f"index kind {kind!r} renames ids; rows are ids here: leave IDMap out")
    if kind == "auto":
        kind = "flat" if count < FLAT_BELOW else "ivf"
    kept, lists = _STORED[storage], _lists(count)
    named = {"flat": kept, "int8": INT8, "hnsw": f"HNSW{_LINKS},{kept}", "ivf": f"IVF{lists},{kept}"}
    if kind.lower() == "ivfpq":
        return _product_quantised(count, dimension, lists)
    return named.get(kind.lower(), kind)


def _lists(count: int) -> int:
    """A power of two near 4 sqrt(N), with 39 vectors a list or more to learn its centre from."""
    wanted = max(min(4 * count**0.5, count / 39), 1)
    return 1 << (int(wanted).bit_length() - 1)


def _product_quantised(count: int, dimension: int, lists: int) -> str:
    """Two coordinates in 4 bits, in blocks that are looked up in registers; an odd width is turned to an even one."""
    even = dimension + dimension % 2
    turned = f"RR{even}," if dimension % 2 else ""
    return f"{turned}IVF{lists},PQ{even // 2}x4fs,RFlat"
