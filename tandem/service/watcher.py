"""A running service follows the open experiment, and ends what breaks: a canary by its guardrails, a promotion by a rollback.

In: the registry, and what this process and the others counted. Out: nothing; a thread that looks every few seconds. Whoever ends
an experiment or rolls back does so by compare-and-set: of several processes exactly one does, and all see it at their next look.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final

from registry.experiments import Stage
from registry.traffic import Counts, slot_at
from registry.watch import broken
from tandem.core.errors import BusyError, ConflictError, IntegrityError, NotFoundError, TandemError, UnavailableError
from tandem.service.follow import check_room
from tandem.service.live_traffic import LiveTraffic
from tandem.service.loop import Loop
from tandem.service.problems import log_line
from tandem.service.rollout import Rollout

if TYPE_CHECKING:
    from registry.store import ReleaseStore
    from registry.work import Champion, Promotion
    from tandem.service.recommend import Recommender
    from tandem.service.settings import Settings

_IDLE_WRITE_S: Final = 10.0
"""How often counts are written while nothing is judged by them."""


class Watcher:
    """Looks at the registry every `service.follow_seconds` until it is stopped; `retire` takes a challenger that is done."""

    def __init__(
        self,
        settings: Settings,
        rollout: Rollout,
        traffic: LiveTraffic,
        serving: Callable[[], str | None],
        retire: Callable[[Recommender], None],
    ) -> None:
        self._settings, self._rollout, self._traffic = settings, rollout, traffic
        self._serving, self._retire = serving, retire
        self._config = settings.rollout
        self._store: ReleaseStore | None = None
        self._answering = 0
        self._written = 0.0
        self._said = ""
        self._refused: int | None = None
        self._given_up: set[int] = set()
        self._broken: tuple[int, str] | None = None
        self._looking = threading.Lock()
        self._loop = Loop(self.look, settings.service.follow_seconds, "watch rollout")

    def start(self) -> None:
        """Begin to look, once at once: a service that starts in the middle of an experiment takes part in it."""
        self.look()
        self._loop.start()

    def stop(self) -> None:
        """Stop looking; returns when the look that is under way is over."""
        self._loop.stop()
        if self._store is not None:
            self._store.close()

    def look(self) -> None:
        """One look: count, follow the open experiment, and end what is broken. Never raises: what answers goes on answering."""
        with self._looking:
            self._guarded_look()

    def _guarded_look(self) -> None:
        try:
            self._look(self._opened())
        except (UnavailableError, BusyError) as error:
            self._say("registry_unreachable", type(error).__name__)
            self._judge_alone()
        except Exception as error:  # a watcher that died would guard nobody
            self._say("rollout_failed", f"{type(error).__name__}: {error}"[:300])
        else:
            self._said = ""

    def _look(self, store: ReleaseStore) -> None:
        with store.look() as work:
            champion, stage = work.champion(), work.experiments.open()
            promotion = work.change_after(champion.version - 1)
        if champion.name == self._serving():
            self._answering = champion.version
        if not self._has_won(champion):
            self._follow(store, stage)
        watched = promotion is not None and self._is_watched(promotion)
        if stage is not None or watched or time.monotonic() - self._written > _IDLE_WRITE_S:
            self._traffic.flush(store, self._answering, self._keep_seconds())
            self._written = time.monotonic()
        if stage is not None and stage.experiment.kind != "shadow":
            self._judge_experiment(store, stage)
        if promotion is not None and watched:
            self._judge_promotion(store, champion, promotion)

    # ------------------------------------------------------------------------------------------------------ the experiment

    def _follow(self, store: ReleaseStore, stage: Stage | None) -> None:
        """Let this process do what the registry says: open, change or close."""
        here = self._rollout.stage
        if here is not None and (stage is None or stage.experiment != here.experiment):
            self._close(here)
        if stage is None or stage == here or stage.number == self._refused or self._is_broken(stage):
            return
        if here is not None and stage.experiment == here.experiment:
            self._rollout.change(stage)
            log_line("experiment_changed", experiment=stage.experiment.name, percent=stage.percent)
        else:
            self._open(store, stage)

    def _has_won(self, champion: Champion) -> bool:
        """Is the challenger that answers here the champion now? Then it goes on until `follow.py` takes it over."""
        here = self._rollout.stage
        return here is not None and here.experiment.kind != "shadow" and here.experiment.challenger == champion.name

    def _open(self, store: ReleaseStore, stage: Stage) -> None:
        """Load the challenger beside the champion. What cannot be loaded is said once, and the champion answers everybody."""
        from tandem.service.recipes.workspace import release_here
        from tandem.service.wiring import SERVED_LOG, SHADOW_LOG, open_recommender

        own = stage.experiment
        try:
            check_room(release_here(self._settings, store, own.challenger).folder)
            log = SHADOW_LOG if own.kind == "shadow" else SERVED_LOG
            challenger = open_recommender(self._settings, own.challenger, log)
            challenger.warm()
        except (UnavailableError, BusyError):  # the registry, or where releases lie, is away: the next look tries again
            raise
        except (TandemError, OSError, ValueError, RuntimeError) as error:
            self._refused = stage.number
            log_line("challenger_refused", release=own.challenger, reason=f"{type(error).__name__}: {error}"[:300])
            return
        self._rollout.open(stage, challenger, self._config.shadow_queue)
        log_line("experiment_opened", experiment=own.name, kind=own.kind, release=own.challenger, percent=stage.percent)

    def _close(self, here: Stage) -> None:
        challenger = self._rollout.close()
        if challenger is not None:
            self._retire(challenger)
        log_line("experiment_closed", experiment=here.experiment.name)

    def _judge_experiment(self, store: ReleaseStore, stage: Stage) -> None:
        """End the experiment when a guardrail is broken over all processes, or was here while the registry was away."""
        with store.look() as work:
            arms = work.traffic.of_experiment(stage.experiment.number, self._window())
        why = self._broken[1] if self._broken and self._is_broken(stage) else self._why(arms)
        if why is None:
            return
        self._broken = (stage.experiment.number, why)
        self._close_if_open(stage)
        try:
            with store.work() as work:
                work.experiments.end(stage.experiment.number, "guardrail", who_we_are(), f"automatic: {why}")
                work.commit()
            log_line("experiment_ended", experiment=stage.experiment.name, reason=why)
        except ConflictError:
            log_line("experiment_ended_elsewhere", experiment=stage.experiment.name)

    def _judge_alone(self) -> None:
        """Without the registry: what broke here ends here at once, and everywhere when the registry is back."""
        stage = self._rollout.stage
        if stage is None or stage.experiment.kind == "shadow":
            return
        why = self._why(self._traffic.of_experiment(stage.experiment.number, self._window()))
        if why is not None:
            self._broken = (stage.experiment.number, why)
            self._close(stage)

    def _close_if_open(self, stage: Stage) -> None:
        here = self._rollout.stage
        if here is not None and here.experiment == stage.experiment:
            self._close(here)

    def _is_broken(self, stage: Stage) -> bool:
        return self._broken is not None and self._broken[0] == stage.experiment.number

    def _why(self, arms: dict[str, Counts]) -> str | None:
        return broken(self._config, arms.get("champion", Counts()), arms.get("challenger", Counts()))

    # ------------------------------------------------------------------------------------------------------- the promotion

    def _judge_promotion(self, store: ReleaseStore, champion: Champion, promotion: Promotion) -> None:
        """Roll a fresh promotion back when its guardrails break against what the release before showed."""
        from tandem.service.recipes.releases import release_rollback

        with store.look() as work:
            new = work.traffic.of_champion(promotion.version, self._window())
            old = work.traffic.of_champion(promotion.version - 1)
        why = broken(self._config, old, new)
        if why is None:
            return
        try:
            reason = f"automatic: {why}"
            done = release_rollback(self._settings, promotion.previous, reason, who=who_we_are(), expected=champion)
            log_line("rolled_back", release=promotion.name, to=done.data["champion"], reason=why)
        except ConflictError:
            log_line("rolled_back_elsewhere", release=promotion.name)
        except (NotFoundError, IntegrityError) as error:  # one try: what cannot be undone is a matter for people
            self._given_up.add(promotion.version)
            log_line("rollback_failed", release=promotion.name, reason=str(error)[:300])

    def _is_watched(self, promotion: Promotion) -> bool:
        fresh = datetime.now(UTC) - promotion.at < timedelta(minutes=self._config.watch_minutes)
        undoable = promotion.kind != "rollback" and promotion.previous is not None
        return fresh and undoable and promotion.version not in self._given_up

    # ----------------------------------------------------------------------------------------------------------- the thread

    def _window(self) -> int:
        """The first slot that is judged."""
        return slot_at(time.time() - self._config.window_minutes * 60)

    def _keep_seconds(self) -> float:
        """How long slots are kept: a promotion is compared with what came before it until its watch ends."""
        return (self._config.window_minutes + self._config.watch_minutes) * 60

    def _say(self, event: str, reason: str) -> None:
        """What goes wrong at every look is said once, until a look goes well."""
        if self._said != reason:
            log_line(event, reason=reason)
        self._said = reason

    def _opened(self) -> ReleaseStore:
        from registry.store import ReleaseStore

        if self._store is None:
            self._store = ReleaseStore(self._settings.registry_url, self._settings.releases)
        return self._store


def who_we_are() -> str:
    """This process, as the registry's history names it."""
    return f"tandem serve, process {os.getpid()} on {socket.gethostname()}"
