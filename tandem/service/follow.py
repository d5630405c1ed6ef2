"""A running service follows promotions: the new champion is loaded beside the old one, and takes its place between two requests.

In: which release answers now, and what to do with a new recommender. Out: nothing; a thread that looks every few seconds. What
cannot be loaded (damaged, incompatible, no memory for two) is said once and left alone: the old release goes on answering.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from tandem.core.errors import BusyError, TandemError, UnavailableError
from tandem.service.loop import Loop
from tandem.service.problems import log_line

if TYPE_CHECKING:
    from registry.store import ReleaseStore
    from tandem.service.recommend import Recommender
    from tandem.service.settings import Settings

_ROOM: Final = 4
"""A release needs this many times its size on disk in memory, with what is built from it."""
_MEMINFO: Final = Path("/proc/meminfo")


class Follower:
    """Looks at the registry every `every_s` seconds until it is stopped."""

    def __init__(
        self,
        settings: Settings,
        serving: Callable[[], str | None],
        swap: Callable[[Recommender], None],
        every_s: float,
        loaded: Callable[[str], Recommender | None] = lambda release: None,
    ) -> None:
        """`loaded` gives a release that is in memory already, since it answered as a challenger."""
        self._loaded = loaded
        self._settings, self._serving, self._swap = settings, serving, swap
        self._refused: tuple[str, int] | None = None
        self._store: ReleaseStore | None = None
        self._loop = Loop(self.look, every_s, "follow promotions")

    def start(self) -> None:
        """Begin to look."""
        self._loop.start()

    def stop(self) -> None:
        """Stop looking; returns when a release that is being loaded is loaded, or refused."""
        self._loop.stop()
        if self._store is not None:
            self._store.close()

    def look(self) -> bool:
        """Load and hand over the champion if it is not the one that answers; says whether it did. Keeps the old one otherwise."""
        from tandem.service.wiring import open_recommender, remember

        try:
            champion = self._opened().champion()
            promotion = (champion.name or "", champion.version)
            if champion.name in (None, self._serving()) or promotion == self._refused:
                return False
            self._refused = promotion  # until it is loaded
            recommender = self._loaded(promotion[0])
            if recommender is None:
                check_room(self._fetched(promotion[0]))
                recommender = open_recommender(self._settings, promotion[0])
                recommender.warm()
            remember(self._settings, self._opened().get(promotion[0]).manifest)
        except (UnavailableError, BusyError) as error:  # the registry, or where releases lie, is away: what answers goes on
            self._refused = None
            log_line("registry_unreachable", reason=type(error).__name__)
            return False
        except (TandemError, OSError, ValueError, RuntimeError) as error:
            log_line("release_refused", release=promotion[0], reason=f"{type(error).__name__}: {error}"[:300])
            return False
        self._refused = None
        self._swap(recommender)
        return True

    def _fetched(self, name: str) -> Path:
        """The folder of a release on this machine, fetched if it was made on another one."""
        from registry.artifacts import Artifacts

        return Artifacts(self._settings.registry.artifacts, self._settings.releases).here(self._opened().get(name)).folder

    def _opened(self) -> ReleaseStore:
        from registry.store import ReleaseStore

        if self._store is None:
            self._store = ReleaseStore(self._settings.registry_url, self._settings.releases)
        return self._store


def check_room(folder: Path, meminfo: Path = _MEMINFO) -> None:
    """Raise RuntimeError when there is no memory for this release beside the one that answers; where nobody says, there is."""
    needed = _ROOM * sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    lines = meminfo.read_text().splitlines() if meminfo.is_file() else []
    free = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
    if free is not None and free < needed:
        raise RuntimeError(
            f"{folder.name} needs some {needed >> 20:,} MiB beside the release that answers, {free >> 20:,} are free; "
            "restart the service to load it alone"
        )
