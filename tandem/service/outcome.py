"""What a recipe hands back: one sentence, the figures, a table for people, and the next command."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tandem.core.errors import GateRefusedError

Cell = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Rows for a terminal; numbers are formatted by whoever prints."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


@dataclass(frozen=True)
class Outcome:
    """`made`: what was made, in a sentence. `data`: the same for programs (JSON-able). `next`: the command that follows.

    `more` tables come after the first one, then the sentences of `notes`. `refused`: the answer is no, and the command ends with
    the exit code of a refusal.
    """

    made: str
    data: dict[str, Any] = field(default_factory=dict)
    table: Table | None = None
    next: str = ""
    more: tuple[Table, ...] = ()
    refused: bool = False
    notes: tuple[str, ...] = ()


class RefusedError(GateRefusedError):
    """A gate said no; `outcome` shows to a person or a program what it found."""

    def __init__(self, message: str, outcome: Outcome) -> None:
        super().__init__(message)
        self.outcome = outcome
