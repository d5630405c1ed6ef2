"""Builds everything from settings, once, at start: the champion's release, verified, with the stores that it reads from."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.erased import ErasedUsers
from feature_repo.live_snapshot import LiveSnapshot
from feature_repo.online import UserReader, UserRow
from feature_repo.pins import FEATURES_FILE, Pins
from feature_repo.served import ServedLog, view_versions
from feature_repo.store import load_events, load_source
from ranking.ranker import Ranker
from registry.artifacts import Artifacts
from registry.release import Manifest, release_folder, verify_release
from registry.store import ReleaseStore
from retrieval.retriever import Retriever
from retrieval.words import TextReader, Words, reader_fingerprint
from tandem.core.errors import IncompatibleError, NotFoundError, UnavailableError
from tandem.core.folders import read_json, write_json
from tandem.service.assemble import Assembler
from tandem.service.breaker import GuardedUsers
from tandem.service.clock import make_clock
from tandem.service.live_items import LiveItems
from tandem.service.parts import Parts, UserRows
from tandem.service.pinned import pinned_by
from tandem.service.problems import log_line
from tandem.service.recommend import Recommender
from tandem.service.settings import EncoderSettings, Settings
from tandem.service.texts import ADAPTER, text_encoder

SERVED_LOG: Final = "served"
SHADOW_LOG: Final = "shadow"
"""Folders of the workspace: what users saw, and what a shadow would have shown them."""

SERVING: Final = "serving.json"
"""In `state/`: which release answered here last."""

USER_READ_MS = 30
"""How long one read of an online server may take; there are as many as a user has feature views."""


def open_recommender(settings: Settings, release: str | None = None, served: str = SERVED_LOG) -> Recommender:
    """The champion (or a named release), verified by hash before anything is read; `served` is its served-log's folder.

    While the registry does not answer, the champion is the one that was last opened here. Raises NotFoundError when nothing is
    promoted, IntegrityError when the folder is damaged, IncompatibleError when it is mixed.
    """
    folder, content_hash = _which(settings, release)
    manifest = verify_release(folder, content_hash)
    retriever = Retriever.load(folder, sentence_weight=settings.service.sentence_weight)
    ranker = Ranker.load(folder / "ranker")
    log = ServedLog(settings.workspace / served, without=ErasedUsers(settings.data).drop_from)
    recommender = _in_workspace(settings, manifest.name, folder, retriever, ranker, pinned_by(settings, folder), log)
    if release is None:
        remember(settings, manifest)
    return recommender


def remember(settings: Settings, champion: Manifest) -> None:
    """Keep which release answers here, for a start while the registry does not answer."""
    kept = settings.state / SERVING
    facts = {"release": champion.name, "content_hash": champion.content_hash}
    if not kept.is_file() or read_json(kept) != facts:
        write_json(kept, facts)


def trained_recommender(settings: Settings, retriever: Retriever, ranker: Ranker) -> Recommender:
    """What was trained, before it is a release: it answers as a service would, and what it answers is not logged."""
    pins = pinned_by(settings, settings.models / "ranker")
    return _in_workspace(settings, "trained", settings.models / "retrieval", retriever, ranker, pins, None)


def _in_workspace(
    settings: Settings,
    name: str,
    folder: Path,
    retriever: Retriever,
    ranker: Ranker,
    pinned: Pins,
    log: ServedLog | None,
) -> Recommender:
    """A recommender over those features of the workspace that are pinned; `folder` has the text encoder's facts."""
    pins = pinned.limited_to(ranker.names)
    users = [view.name for view in pins.of_entity("user")]
    encoder = LazyReader(folder, settings)
    return Recommender(
        Parts(
            release=name,
            retriever=retriever,
            ranker=ranker,
            assembler=Assembler(retriever, pins, settings.features.history_length),
            items=LiveSnapshot(settings.workspace / "snapshot", retriever.item_ids, features=pins.item_columns),
            users=GuardedUsers(open_users(settings.workspace, users)),
            seen=SeenInEvents(settings.data),
            encode=encoder,
            log=log,
            config=replace(settings.candidates, k=settings.ranker.candidates),
            rerank=settings.rerank,
            views=view_versions({view.name: view.version for view in pins.views}),
            clock=make_clock(settings),
            stale_after=settings.checks.freshness.stale,
            live=LiveItems(settings.data, retriever, encoder),
        )
    )


def load_folder(folder: Path) -> Recommender:
    """A release folder alone, without a workspace: sessions and item histories are answered, user ids are strangers."""
    manifest = verify_release(folder)
    retriever = Retriever.load(folder)
    settings = Settings(workspace=folder)
    ranker = Ranker.load(folder / "ranker")
    pins = Pins.read(folder / FEATURES_FILE).limited_to(ranker.names)
    assembler = Assembler(retriever, pins, settings.features.history_length)
    return Recommender(
        Parts(
            manifest.name, retriever, ranker, assembler, None, None, None, LazyReader(folder, settings), None,
            replace(settings.candidates, k=settings.ranker.candidates), settings.rerank, "{}", lambda: datetime.now(UTC),
        )
    )  # fmt: skip


def champions_encoder(settings: Settings) -> LazyReader | None:
    """The text encoder of the release that is live; None where none is."""
    try:
        return LazyReader(_which(settings, None)[0], settings)
    except NotFoundError:
        return None


def _which(settings: Settings, release: str | None) -> tuple[Path, str | None]:
    """The folder to open, and the content hash that it must have."""
    if release is not None and not (settings.state / "tandem.db").exists() and not settings.registry.url:
        return release_folder(settings.releases, release), None
    try:
        return _registered(settings, release)
    except UnavailableError as error:
        kept = settings.state / SERVING
        if release is not None or not kept.is_file():
            raise
        facts = read_json(kept)
        log_line("registry_unreachable", release=facts["release"], reason=type(error).__name__)
        return release_folder(settings.releases, facts["release"]), facts["content_hash"]


def _registered(settings: Settings, release: str | None) -> tuple[Path, str]:
    store = ReleaseStore(settings.registry_url, settings.releases)
    try:
        name = release or store.champion().name
        if name is None:
            raise NotFoundError(f"no release is live in {settings.workspace}; run `tandem release promote NAME`")
        found = Artifacts(settings.registry.artifacts, settings.releases).here(store.get(name))
        return found.folder, found.content_hash
    finally:
        store.close()


def open_users(workspace: Path, views: Sequence[str]) -> UserRows:
    """Users' rows in these views; when Feast's registry does not answer now, those of nobody, until it does."""

    def opened() -> UserRows:
        return UserReader(workspace, read_timeout_ms=USER_READ_MS, views=views)

    try:
        return opened()
    except UnavailableError:
        return LateUsers(opened)


class LateUsers:
    """User rows that could not be opened at start. A read fails at once, and lets a thread try to open them."""

    def __init__(self, opened: Callable[[], UserRows]) -> None:
        self._opened = opened
        self._trying = threading.Lock()
        self._users: UserRows | None = None

    def read(self, user_ids: Sequence[str]) -> list[UserRow]:
        """Raises UnavailableError while the registry does not answer."""
        if self._users is not None:
            return self._users.read(user_ids)
        if self._trying.acquire(blocking=False):
            threading.Thread(target=self._try, name="open user features", daemon=True).start()
        raise UnavailableError("user features could not be opened at start; they are tried again")

    def _try(self) -> None:
        try:
            self._users = self._opened()
        except UnavailableError:
            return
        finally:
            self._trying.release()


class SeenInEvents:
    """All items of a user's history, from the workspace's events; read once, at the first question."""

    def __init__(self, data: Path) -> None:
        source = load_source(data)
        events = load_events(data).filter(source.is_history()).select("user_id", "item_id").unique().sort("user_id", "item_id")
        self._erased = ErasedUsers(data)
        self._items = events["item_id"]
        runs = events["user_id"].rle().struct.unnest()
        ends = runs["len"].cum_sum()
        self._spans = dict(
            zip(runs["value"].to_list(), zip((ends - runs["len"]).to_list(), ends.to_list(), strict=True), strict=True)
        )

    def of(self, user_id: str) -> Sequence[str]:
        start, end = (0, 0) if user_id in self._erased else self._spans.get(user_id, (0, 0))
        found: list[str] = self._items[start:end].to_list()
        return found


class LazyReader:
    """What reads the release's texts, loaded at the first sentence. Refuses another encoder than the one that the towers know."""

    def __init__(self, folder: Path, settings: Settings) -> None:
        self._facts = read_json(folder / "encoder.json")
        self._adapter = folder / ADAPTER if (folder / ADAPTER).is_dir() else None
        self._folder = folder
        self._device = settings.encoder.device
        self._reader: TextReader | None = None

    def __call__(self, texts: Sequence[str]) -> NDArray[np.float32]:
        return self._opened.encode(texts, as_query=True)

    @property
    def fingerprint(self) -> str:
        """Of the encoder and the words that the towers were trained with."""
        return reader_fingerprint(str(self._facts["fingerprint"]), self._words)

    @cached_property
    def _words(self) -> Words:
        return Words.load(self._folder)

    def items(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Vectors of items' texts (n, T), as in training."""
        return self._opened.encode(texts)

    def truncates(self, text: str) -> bool:
        return self._opened.truncates(text, as_query=True)

    @property
    def _opened(self) -> TextReader:
        if self._reader is None:
            self._reader = self._open()
        return self._reader

    def _open(self) -> TextReader:
        facts = {name: value for name, value in self._facts.items() if name != "fingerprint"}
        own = EncoderSettings(**facts, device=self._device)
        encoder = text_encoder(own, adapter=self._adapter)
        if encoder.fingerprint != self._facts["fingerprint"]:
            raise IncompatibleError(
                f"the encoder {own.model!r} is {encoder.fingerprint[:12]} here, but the towers were trained with "
                f"{self._facts['fingerprint'][:12]}; install the model that the release names"
            )
        return TextReader(encoder, self._words)


def users_with_history(data: Path, at_least: int, count: int) -> list[str]:
    """The first `count` user ids with so many history events, busiest middle first: people whose slates are worth a look."""
    source = load_source(data)
    counts = load_events(data).filter(source.is_history()).group_by("user_id").len().filter(pl.col("len") >= at_least)
    ordered = counts.sort("len", "user_id")
    middle = len(ordered) // 2
    return ordered["user_id"][middle : middle + count].to_list()
