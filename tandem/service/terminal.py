"""How outcomes and progress look: tables and bars for people, JSON for programs.

In: `Outcome`s and progress calls. Out: text on the streams that are handed in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table as RichTable
from rich.text import Text

from tandem.service.outcome import Cell, Outcome, Table

_PIPED_WIDTH: Final = 160
_MANY: Final = 1000


def print_outcome(outcome: Outcome, seconds: float, as_json: bool, out: TextIO) -> None:
    """What was made, how long it took, the next command; JSON has the figures beside them."""
    if as_json:
        answer = {**outcome.data, "made": outcome.made, "took_s": round(seconds, 3), "next": outcome.next}
        print(json.dumps(plain(answer), ensure_ascii=False, allow_nan=False), file=out)
        return
    console = console_on(out)
    for table in ((outcome.table,) if outcome.table else ()) + outcome.more:
        print_table(table, console)
    for note in outcome.notes:
        console.print(f"- {note}")
    console.print(f"{outcome.made} ({spoken(seconds)})")
    if outcome.next:
        console.print(f"next: {outcome.next}")


def console_on(out: TextIO) -> Console:
    """A console that prints text as it is: titles may hold brackets and colons."""
    width = None if out.isatty() else _PIPED_WIDTH
    return Console(file=out, markup=False, highlight=False, emoji=False, width=width, soft_wrap=False)


def print_table(table: Table, console: Console) -> None:
    """Numbers to the right, the rest to the left."""
    shown = RichTable(title=table.title, title_justify="left", title_style="bold", header_style="bold")
    for place, name in enumerate(table.columns):
        numeric = any(isinstance(row[place], int | float) for row in table.rows)
        shown.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(cell, row))
    console.print(shown)


def cell(value: Cell) -> str:
    """One value for a person: four decimals below 10, none where there are none."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def spoken(seconds: float) -> str:
    """A duration for a person."""
    return f"{seconds:.1f} s" if seconds < 90 else f"{int(seconds) // 60} min {int(seconds) % 60} s"


def plain(value: Any) -> Any:
    """`value` as JSON has it: NaN and infinities become null, tuples lists, times ISO text, arrays' scalars numbers."""
    if isinstance(value, dict):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(each) for each in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, datetime):
        return value.isoformat()
    return str(value) if isinstance(value, Path) else value


@contextmanager
def watched(err: TextIO) -> Iterator[Callable[[str, int, int], None]]:
    """A progress callable (what, done, total): bars on a terminal, elsewhere one line when something begins."""
    if not err.isatty():
        yield _Lines(err)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=Console(file=err, markup=False), transient=True) as bars:
        yield _Bars(bars)


class _Rate(ProgressColumn):
    """How many a second, where there are many."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.0f}/s" if speed and (task.total or 0) >= _MANY else "")


class _Lines:
    def __init__(self, err: TextIO) -> None:
        self._err = err
        self._begun: set[str] = set()

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._begun:
            self._begun.add(what)
            print(f"{what} …", file=self._err, flush=True)


class _Bars:
    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._tasks: dict[str, Any] = {}

    def __call__(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(what, total=total or None)
        self._bars.update(self._tasks[what], completed=done, total=total or None)
