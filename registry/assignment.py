"""Who is in which arm: a stable hash of the experiment's name and a person, the same in every process and for ever.

In: the experiment's name, a unit (a user id; for people without one, their session's or request's), a percentage. Out: an arm. A
larger percentage only adds units, since each keeps its place; another name shuffles all of them, so that two experiments do not
hit the same people (Kohavi, Tang and Xu 2020, chapter 4).
"""

from __future__ import annotations

import hashlib
from typing import Final, Literal

Arm = Literal["champion", "challenger"]
CHAMPION: Final = "champion"
CHALLENGER: Final = "challenger"


def digest(experiment: str, unit: str) -> bytes:
    """32 bytes that stand for a unit in one experiment only: nobody is followed from one experiment to the next by them."""
    return hashlib.sha256(f"{experiment}\x00{unit}".encode()).digest()  # no name holds a zero byte, so no two pairs meet


def place(hashed: bytes) -> float:
    """Where a unit stands, evenly in [0, 100)."""
    return int.from_bytes(hashed[:8]) / 2**64 * 100


def arm_of(hashed: bytes, percent: float) -> Arm:
    """The challenger's for `percent` of all units, the champion's for the rest."""
    return CHALLENGER if place(hashed) < percent else CHAMPION
