"""What every search is given, checked once and named when it is wrong: rows of numbers, widths, k and masks of items."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from tandem.core.errors import IncompatibleError, InputError

Floats = NDArray[np.float32]
Mask = NDArray[np.bool_]

MAX_K: Final = 100_000
_NAMED_ROWS: Final = 10
_LARGEST: Final = 1e17


def checked_rows(rows: Floats, what: str) -> Floats:
    """`rows` as contiguous float32 (n, D): no NaN, no infinity and nothing so large that an inner product overflows.

    Raises InputError that names the shape, or the first rows at fault.
    """
    array = np.ascontiguousarray(rows, np.float32)
    if array.ndim != 2 or not array.shape[1]:
        raise InputError(f"{what} have shape {array.shape}; give (rows, numbers per row)")
    if array.size and not -_LARGEST <= array.min() <= array.max() <= _LARGEST:  # NaN is within no bounds
        bad = np.flatnonzero(~(np.abs(array) <= _LARGEST).all(axis=1))
        more = f" and {len(bad) - _NAMED_ROWS} more" if len(bad) > _NAMED_ROWS else ""
        named = f"{bad[:_NAMED_ROWS].tolist()}{more}"
        raise InputError(f"{what} hold NaN, infinity or numbers beyond {_LARGEST:g} in rows {named}; leave those rows out")
    return array


def check_width(queries: Floats, dimension: int) -> None:
    if queries.shape[1] != dimension:
        raise IncompatibleError(
            f"queries have {queries.shape[1]} numbers but the index holds {dimension}; use the towers that filled it"
        )


def check_k(k: int) -> None:
    if isinstance(k, bool) or not isinstance(k, int | np.integer) or not 1 <= k <= MAX_K:
        raise InputError(f"k = {k!r} is outside 1..{MAX_K:,}; ask for a whole number in that range")


def checked_mask(allowed: Mask | None, count: int) -> Mask | None:
    if allowed is None:
        return None
    mask = np.asarray(allowed)
    if mask.dtype != np.bool_ or mask.shape != (count,):
        raise IncompatibleError(
            f"allowed has shape {mask.shape} of {mask.dtype}, the index holds {count} items; give ({count},) bool"
        )
    return None if mask.all() else mask
