"""How a command runs: settings are read, work is done, what it made is printed; errors become one line and an exit code.

In: work on a workspace. Out: text or JSON on standard output, progress and errors on standard error.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from tandem.core.errors import GateRefusedError, InputError, TandemError

if TYPE_CHECKING:
    from tandem.service.outcome import Outcome
    from tandem.service.settings import Settings

Progress = Callable[[str, int, int], None]
Work = Callable[["Settings", Progress], "Outcome"]

FAILED: Final = 1
USAGE: Final = 2
REFUSED: Final = 3
DEBUG: Final = "TANDEM_DEBUG"

Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs on standard output.")]
Because = Annotated[str, typer.Option("--because", help="The reason that history keeps.")]


def recipe(call: Callable[[Settings, Any], Outcome]) -> Work:
    """A recipe that reports no progress, as work. `call` gets the settings and the module of recipes, imported at that moment."""

    def work(settings: Settings, progress: Progress) -> Outcome:
        from tandem.service import recipes

        return call(settings, recipes)

    return work


def run(context: typer.Context, as_json: bool, work: Work) -> None:
    """Do the work, print what it made, how long it took and what comes next."""
    started = time.perf_counter()
    with failures(), stdout_kept(as_json) as out:
        from tandem.service.terminal import print_outcome, watched

        settings = settings_of(context)
        with watched(sys.stderr) as progress:
            outcome = _answer(work, settings, progress)
        print_outcome(outcome, time.perf_counter() - started, as_json, out)
        if outcome.refused:
            raise typer.Exit(REFUSED)


def _answer(work: Work, settings: Settings, progress: Any) -> Outcome:
    """What the work made, or what a gate that refused it has to show."""
    from tandem.service.outcome import RefusedError

    try:
        return work(settings, progress)
    except RefusedError as refusal:
        return refusal.outcome


def moment(text: str) -> datetime:
    """A time as ISO 8601 writes it; without a zone it is UTC's."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise InputError(f"{text!r} is no time; write it like 2026-11-17T12:00 or 2026-11-17T12:00+01:00") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def settings_of(context: typer.Context) -> Settings:
    from tandem.service.settings import load_settings

    return load_settings(context.obj)


@contextmanager
def stdout_kept(as_json: bool) -> Iterator[Any]:
    """Give standard output for the answer; what libraries print meanwhile goes to standard error."""
    out = sys.stdout
    _quiet_libraries()
    with redirect_stdout(sys.stderr) if as_json else redirect_stdout(out):
        yield out


def _quiet_libraries() -> None:
    """Warnings of libraries are for developers."""
    import logging
    import warnings

    if not os.environ.get(DEBUG):
        warnings.simplefilter("ignore")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
        logging.getLogger().setLevel(logging.ERROR)


@contextmanager
def failures() -> Iterator[None]:
    """Errors as one clear line and an exit code; the traceback only on request."""
    try:
        yield
    except (typer.Exit, SystemExit):
        raise
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - whoever read the answer has gone
        raise typer.Exit(FAILED) from None
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        print(_one_line(error), file=sys.stderr)
        raise typer.Exit(_code(error)) from None


def _one_line(error: Exception) -> str:
    if isinstance(error, TandemError):
        return "error: " + " ".join(str(error).split())
    said = " ".join(str(error).split())[:300]
    return f"error: unexpected {type(error).__name__}: {said}; this is a fault of Tandem: report what {DEBUG}=1 shows"


def _code(error: Exception) -> int:
    if isinstance(error, GateRefusedError):
        return REFUSED
    return USAGE if isinstance(error, InputError) else FAILED
