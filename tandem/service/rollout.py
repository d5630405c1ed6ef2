"""Which release answers whom while an experiment is open: arms, the champion's answer where the challenger fails, and shadows.

In: the champion and an `Ask`. Out: a slate, and the experiment and arm that it belongs to. `watcher.py` opens and closes what
runs here. The served-log gets the columns `experiment`, `stage`, `arm` and `unit` (a hash of whom the arm was drawn for).
"""

from __future__ import annotations

import math
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, TypeVar

from registry.assignment import CHALLENGER, CHAMPION, Arm, arm_of, digest
from registry.experiments import Stage
from registry.traffic import Counts
from tandem.core.errors import InputError, NotFoundError
from tandem.service.live_traffic import LiveTraffic
from tandem.service.problems import log_failure
from tandem.service.recommend import Recommender
from tandem.service.shadow import Shadow
from tandem.service.slate import Ask, Slate, Why

Answer = TypeVar("Answer")

SESSION: Final = "session_id"
"""The key of an ask's context that names the session of somebody without a user id."""

FELL_BACK: Final = "challenger_failed"
"""What an answer is degraded by when the challenger failed and the champion answered in its place."""

Heard = Callable[[str, Arm, str], None]
"""Told of every request in an arm: experiment, arm, and "answered", "degraded" or "failed"."""


@dataclass(frozen=True)
class Placed:
    """A slate with the experiment and arm that the caller may know of; None where there is none, or it is a shadow."""

    slate: Slate
    experiment: str | None = None
    arm: Arm | None = None


@dataclass(frozen=True)
class _Running:
    """The open experiment, and its challenger loaded beside the champion."""

    stage: Stage
    challenger: Recommender
    shadow: Shadow | None

    def place(self, ask: Ask) -> tuple[Ask, Arm]:
        """The ask with what the served-log is to keep, and its arm: by user, else by session, else by request."""
        name = self.stage.experiment.name
        unit = digest(name, ask.user_id or ask.context.get(SESSION) or ask.request_id or "")
        arm = arm_of(unit, self.stage.percent)
        kept = {"experiment": name, "stage": self.stage.number, "arm": arm, "unit": unit.hex()[:32]}
        return replace(ask, noted={**ask.noted, **kept}), arm


class Rollout:
    """Answers from the champion, or from the challenger for those in its arm. Any thread may ask; one opens."""

    def __init__(self, traffic: LiveTraffic, heard: Heard) -> None:
        self._traffic, self._heard = traffic, heard
        self._running: _Running | None = None
        self._changing = threading.Lock()

    @property
    def stage(self) -> Stage | None:
        """The stage of the experiment that runs here."""
        running = self._running
        return running.stage if running else None

    @property
    def challenger(self) -> Recommender | None:
        """The challenger that answers, or shadows, here."""
        running = self._running
        return running.challenger if running else None

    def open(self, stage: Stage, challenger: Recommender, waiting: int) -> None:
        """Let a loaded challenger take part from the next request on; `waiting`: how many requests may wait for a shadow."""

        def note(counts: Counts) -> None:
            self._note(stage, CHALLENGER, counts)

        shadow = Shadow(challenger, waiting, note) if stage.experiment.kind == "shadow" else None
        self._running = _Running(stage, challenger, shadow)

    def change(self, stage: Stage) -> None:
        """Another percentage for the same experiment."""
        with self._changing:
            if self._running is not None:
                self._running = replace(self._running, stage=stage)

    def close(self) -> Recommender | None:
        """Let the champion answer everybody from the next request on; gives the challenger back, which may still be answering."""
        with self._changing:
            running, self._running = self._running, None
        if running is not None and running.shadow is not None:
            running.shadow.close()
        return running.challenger if running else None

    def adopt(self, release: str) -> Recommender | None:
        """The challenger called `release`, loaded as it is, for it is the champion now; None where none answers users here."""
        running = self._running
        if running is None or running.shadow is not None or running.challenger.release != release:
            return None
        return self.close()

    def recommend(self, champion: Recommender, ask: Ask) -> Placed:
        """A slate. Raises what the champion raises; whatever the challenger raises, the champion answers instead."""
        ask = replace(ask, request_id=ask.request_id or uuid.uuid4().hex)
        running = self._running
        if running is None:
            return Placed(self._champions(champion, ask, None))
        placed, arm = running.place(ask)
        if running.shadow is not None:
            return Placed(self._shadowed(running, running.shadow, champion, ask, placed, arm))
        slate = (
            self._challenged(running, champion, placed) if arm == CHALLENGER else self._champions(champion, placed, running.stage)
        )
        return Placed(slate, running.stage.experiment.name, arm)

    def why(self, champion: Recommender, user_id: str, item_id: str) -> Why:
        """What became of an item for a user, told by the release that answers this user."""
        running = self._running
        if running is None or running.shadow is not None or running.place(Ask(user_id=user_id))[1] == CHAMPION:
            return champion.why(user_id, item_id)
        return _either(lambda release: release.why(user_id, item_id), running.challenger, champion, "")[0]

    def _shadowed(self, running: _Running, shadow: Shadow, champion: Recommender, ask: Ask, placed: Ask, arm: Arm) -> Slate:
        """The champion's slate; the challenger gets the same ask if its unit is in the share that is shadowed."""
        if arm == CHAMPION:
            return self._champions(champion, ask, None)
        slate = self._champions(champion, replace(placed, noted={**placed.noted, "arm": CHAMPION}), running.stage)
        shadow.offer(replace(placed, deadline=math.inf))  # it has the time that it takes: nobody waits
        return slate

    def _champions(self, champion: Recommender, ask: Ask, stage: Stage | None) -> Slate:
        start = time.perf_counter()
        try:
            slate = champion.recommend(ask)
        except (InputError, NotFoundError):
            raise
        except Exception:
            self._note(stage, CHAMPION, Counts.one(_since(start), failed=True))
            raise
        self._note(stage, CHAMPION, Counts.one(_since(start), degraded=bool(slate.degraded)))
        return slate

    def _challenged(self, running: _Running, champion: Recommender, ask: Ask) -> Slate:
        start = time.perf_counter()
        try:
            slate, failed = _either(lambda release: release.recommend(ask), running.challenger, champion, ask.request_id or "")
        except (InputError, NotFoundError):
            raise
        except Exception:
            self._note(running.stage, CHALLENGER, Counts.one(_since(start), failed=True))
            raise
        degraded = bool(slate.degraded) and not failed
        self._note(running.stage, CHALLENGER, Counts.one(_since(start), failed=failed, degraded=degraded))
        return replace(slate, degraded=(*slate.degraded, FELL_BACK)) if failed else slate

    def _note(self, stage: Stage | None, arm: Arm, counts: Counts) -> None:
        self._traffic.note(stage.experiment.number if stage else 0, arm, counts)
        if stage is not None:
            self._heard(stage.experiment.name, arm, _spoken(counts))


def _either(
    asked: Callable[[Recommender], Answer], challenger: Recommender, champion: Recommender, request_id: str
) -> tuple[Answer, bool]:
    """The challenger's answer, else the champion's; and whether the challenger failed. What is the caller's fault is raised."""
    try:
        return asked(challenger), False
    except InputError:
        raise
    except Exception as error:  # an item that only the champion holds is no fault of the caller's
        if not isinstance(error, NotFoundError):
            log_failure(error, request_id)
        return asked(champion), True


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1000


def _spoken(counts: Counts) -> str:
    if counts.dropped:
        return "dropped"
    return "failed" if counts.failed else "degraded" if counts.degraded else "answered"
