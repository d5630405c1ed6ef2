"""From a workspace's tables to trained parts: the retriever, the ranker's examples, the ranker.

Who learns from what (so that nothing leaks): towers and baselines on the split's training events, the ranker on the candidates
that those towers return for the `ranker` requests, calibrators on the `calibrate` requests. Features are as of their request.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Final

import numpy as np
import polars as pl
from numpy.typing import NDArray

from feature_repo.pins import Pins, known_contexts
from feature_repo.splits import SplitConfig, SplitResult, make_requests
from feature_repo.store import load_events, load_items_until, load_source
from feature_repo.views import read_views
from ranking.batches import Examples
from ranking.calibrate import calibrate
from ranking.ranker import Ranker, RankerConfig
from ranking.tasks import RankingTask
from ranking.train import train_ranker
from retrieval.baselines import ItemKNN, interaction_matrix
from retrieval.batches import cut_places, pad_left
from retrieval.candidates import Candidates
from retrieval.content import content_matrix
from retrieval.retriever import Queries, Retriever
from retrieval.train import Catalogue, Histories, TowerConfig, train_towers
from retrieval.tune import build_index
from retrieval.words import TextReader
from tandem.core.errors import InputError
from tandem.core.schema import MICROSECONDS_PER_DAY, Source
from tandem.service.assemble import WITHIN_REQUEST, Assembler, pairs
from tandem.service.settings import Settings
from tandem.service.texts import item_texts, trained_reader

Log = Callable[[dict[str, float]], None]
Progress = Callable[[str, int, int], None]
_HIDDEN: Final = 4
_NEIGHBOURS: Final = 200
_VALIDATION: Final = 0.2
_REQUESTS_AT_ONCE: Final = 2000


@dataclass(frozen=True)
class Dataset:
    """A workspace's tables with their split."""

    events: pl.DataFrame
    items: pl.DataFrame
    source: Source
    split: SplitResult
    items_until: int = 0

    @classmethod
    def load(cls, settings: Settings) -> Dataset:
        """Items stand in the order of their ids: that order is the dense id of everything trained from here."""
        events, source = load_events(settings.data), load_source(settings.data)
        items, until = load_items_until(settings.data)
        split = make_requests(events, source, _split_config(settings, source))
        return cls(events, items.sort("item_id"), source, split, until)

    def over(self, retriever: Retriever) -> Dataset:
        """The same with the items that a retriever was trained on: single items may have been put or deleted since."""
        return replace(self, items=retriever.items)

    @cached_property
    def history_events(self) -> pl.DataFrame:
        """[user_id, row (dense item id), time (µs)] of every history event, by user, oldest first."""
        dense = self.items.select("item_id", row=pl.int_range(pl.len(), dtype=pl.Int64))
        return (
            self.events.filter(self.source.is_history())
            .sort("user_id", "timestamp", "event_id")
            .join(dense, on="item_id", how="inner", maintain_order="left")
            .select("user_id", "row", time=pl.col("timestamp").dt.epoch("us"))
        )

    def requests(self, part: str, limit: int | None = None, seed: int = 0) -> pl.DataFrame:
        """The requests of a part, at most `limit` of them, whole users first, oldest first."""
        chosen = self.split.requests.filter(pl.col("part") == part).sort("timestamp", "request_id")
        if limit is not None and len(chosen) > limit:
            order = chosen.select("user_id").unique().sort("user_id").sample(fraction=1.0, shuffle=True, seed=seed)
            ranked = chosen.join(order.with_row_index("place"), on="user_id").sort("place", "timestamp").head(limit)
            chosen = ranked.drop("place").sort("timestamp", "request_id")
        return chosen

    def seen_before(self, requests: pl.DataFrame) -> list[NDArray[np.int64]]:
        """Per request the dense ids of all the user's earlier history events, oldest first, repeats kept."""
        asked = requests.select("user_id", now=pl.col("timestamp").dt.epoch("us")).with_row_index("request")
        lists = (
            asked.join(self.history_events, on="user_id", how="inner", maintain_order="left_right")
            .filter(pl.col("time") < pl.col("now"))
            .group_by("request", maintain_order=True)
            .agg("row")
        )
        found = dict(zip(lists["request"].to_list(), lists["row"].to_list(), strict=True))
        return [np.array(found.get(place, []), np.int64) for place in range(len(requests))]

    def truth_of(self, requests: pl.DataFrame, task: str) -> list[NDArray[np.int64]]:
        """Per request the dense ids that `task` came true for."""
        dense = self.items.select("item_id", row=pl.int_range(pl.len(), dtype=pl.Int64))
        truth = self.split.truth.filter(pl.col("task") == task).join(dense, on="item_id", how="inner")
        lists = truth.group_by("request_id").agg(pl.col("row").sort())
        found = dict(zip(lists["request_id"].to_list(), lists["row"].to_list(), strict=True))
        return [np.array(found.get(request, []), np.int64) for request in requests["request_id"]]

    def contexts_of(self, requests: pl.DataFrame, columns: Sequence[str]) -> list[dict[str, str | None]]:
        """Per request what its user's events of that moment say about where they came from; of several the first."""
        known = [name for name in columns if name in self.events.columns]
        own = self.events.sort("event_id").group_by("user_id", "timestamp", maintain_order=True)
        first = own.agg(pl.col(name).cast(pl.String).drop_nulls().first() for name in known)
        found = requests.select("user_id", "timestamp").join(
            first, on=["user_id", "timestamp"], how="left", maintain_order="left"
        )
        return found.select(known).to_dicts() if known else [{} for _ in range(len(requests))]

    def training_matrix(self) -> Any:
        """Users x items (U, N) CSR of the training events' history actions."""
        return interaction_matrix(self.split.training_events.filter(self.source.is_history()), self.items["item_id"].to_list())


def _split_config(settings: Settings, source: Source) -> SplitConfig:
    own = settings.split
    return SplitConfig(own.kind or source.split, seed=own.seed, fold_in=own.fold_in, requests_per_user=own.requests_per_user)


def train_retriever(settings: Settings, data: Dataset, log: Log, progress: Progress) -> tuple[Retriever, TextReader]:
    """Tune the encoder where that is asked for, read the texts, train the towers, fill and tune the index, find co-visits."""
    texts = item_texts(data.items)
    reader = trained_reader(settings, data, texts, log, progress)
    text = reader.encode(texts, lambda done, total: progress("encode item texts", done, total))
    config = tower_config(settings)
    progress("train towers", 0, 1)
    histories = tower_histories(data)
    catalogue = Catalogue(content_matrix(data.items, text), text)
    towers = train_towers(catalogue, histories, config, log, settings.state / "towers")
    matrix = data.training_matrix()
    queries = towers.query(pad_left(list(histories.sequences[: settings.index.tuning_queries * 4]), config.history))
    index = build_index(towers.item_vectors, settings.index, queries)
    counts = np.asarray(matrix.sum(axis=0), np.float32).ravel()
    progress("train towers", 1, 1)
    covisit, until = ItemKNN.fit(matrix, _NEIGHBOURS), data.items_until
    return Retriever(data.items, towers, index, covisit, counts, data.source.exclude_seen, items_until=until), reader


def tower_config(settings: Settings) -> TowerConfig:
    """`[towers]` on top of the measured defaults."""
    own = dict(vars(settings.towers))
    default = TowerConfig()
    return replace(default, sequence=replace(default.sequence, rounds=own.pop("sequence_rounds")), **own)


def tower_histories(data: Dataset) -> Histories:
    """Training users' histories as dense ids, oldest first, with the events that retrieval should find marked."""
    dense = data.items.select("item_id", row=pl.int_range(pl.len(), dtype=pl.Int64))
    wanted = data.source.task(data.source.positive)
    users = (
        data.split.training_events.filter(data.source.is_history())
        .sort("user_id", "timestamp", "event_id")
        .join(dense, on="item_id", how="inner", maintain_order="left")
        .with_columns(positive=wanted.matches(), time=pl.col("timestamp").dt.epoch("us"))
        .group_by("user_id", maintain_order=True)
        .agg("row", "positive", "time")
    )
    if users.is_empty():
        raise InputError("no training event belongs to a history; import more events, or change [split] in tandem.toml")
    sequences = [np.array(row, np.int64) for row in users["row"].to_list()]
    positive = [np.array(row, bool) for row in users["positive"].to_list()]
    cuts = [cut_places(np.array(row, np.int64)) for row in users["time"].to_list()]
    return Histories(sequences, positive, cuts, data.source.exclude_seen)


@dataclass(frozen=True, eq=False)
class Answered:
    """Requests with the candidates they got: what the ranker learns from and is evaluated on."""

    requests: pl.DataFrame
    seen: list[NDArray[np.int64]]
    candidates: Candidates
    features: NDArray[np.float32]
    names: tuple[str, ...]


class Offline:
    """Asks a trained retriever the split's requests, with features as of each of them."""

    def __init__(self, settings: Settings, data: Dataset, retriever: Retriever, store: Any, pins: Pins | None = None) -> None:
        """`pins`: the features that a ranker was trained on; None takes those of the workspace, for one that is to be."""
        self.settings, self.data, self.retriever = settings, data, retriever
        self._store = store
        self.pins = pins or workspace_pins(settings, data.events)
        self.assembler = Assembler(retriever, self.pins, settings.features.history_length)

    def answer(self, requests: pl.DataFrame, extra: list[NDArray[np.int64]] | None = None) -> Answered:
        """Candidates and features of every request; `extra` are dense ids per request that are added where they are missing."""
        seen = self.data.seen_before(requests)
        parts = []
        for rows in self._batches(requests):
            own = requests[rows]
            parts.append(self._answer(own, [seen[row] for row in rows], None if extra is None else [extra[row] for row in rows]))
        return Answered(
            requests, seen, _stack([part[0] for part in parts]), np.concatenate([part[1] for part in parts]), parts[0][2]
        )

    def _answer(
        self, requests: pl.DataFrame, seen: list[NDArray[np.int64]], extra: list[NDArray[np.int64]] | None
    ) -> tuple[Candidates, NDArray[np.float32], tuple[str, ...]]:
        from feature_repo.offline import historical

        times = requests["timestamp"].dt.epoch("us").to_numpy()
        asked = requests.select("user_id", event_timestamp="timestamp")
        rows = historical(self._store, asked, [view.name for view in self.pins.of_entity("user")]).to_dicts()
        contexts = self.data.contexts_of(requests, tuple(self.pins.context))
        users = self.assembler.users(rows, times, contexts if extra is None else some_hidden(contexts))
        queries = Queries(users.histories, self.barred(seen, times), int(times.max()))
        found, tower = self.retriever.candidates(queries, replace(self.settings.candidates, k=self.settings.ranker.candidates))
        if extra is not None:
            found = _with_extra(found, extra)
            tower = self._tower_scores(queries, found)
        request, item = pairs(found)
        entities = pl.DataFrame(
            {"item_id": self.data.items["item_id"].gather(item), "event_timestamp": requests["timestamp"].gather(request)}
        )
        columns = historical(self._store, entities, [view.name for view in self.pins.of_entity("item")])
        numbers = {name: columns[name].cast(pl.Float64).fill_null(float("nan")).to_numpy() for name in _numeric(columns)}
        features, names = self.assembler.features(users, found, tower, numbers)
        return found, features, names

    def _tower_scores(self, queries: Queries, found: Candidates) -> NDArray[np.float32]:
        from retrieval.retriever import tower_scores

        return tower_scores(self.retriever.vectors(queries), self.retriever.towers.item_vectors, found.ids)

    def barred(self, seen: list[NDArray[np.int64]], times: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Per request what must not be shown: items seen (where the source says so), and items that did not exist yet."""
        starts = self.data.items["available_from"].dt.epoch("us").fill_null(-(2**62)).to_numpy()
        order = np.argsort(starts, kind="stable")
        first = np.searchsorted(starts[order], times, side="right")
        unborn = [order[place:] for place in first]
        if not self.data.source.exclude_seen:
            return unborn
        return [np.union1d(own, late) for own, late in zip(seen, unborn, strict=True)]

    def _batches(self, requests: pl.DataFrame) -> list[list[int]]:
        """Requests in batches that share a day where items arrive over time: "new" depends on when one asks."""
        if self.data.items["available_from"].null_count() == len(self.data.items):
            groups = [np.arange(len(requests))]
        else:
            days = requests["timestamp"].dt.epoch("us").to_numpy() // MICROSECONDS_PER_DAY
            groups = np.split(np.arange(len(requests)), np.flatnonzero(np.diff(days)) + 1)
        return [
            group[start : start + _REQUESTS_AT_ONCE].tolist()
            for group in groups
            for start in range(0, len(group), _REQUESTS_AT_ONCE)
        ]

    def examples(self, part: str, limit: int | None, *, learn: bool) -> tuple[Examples, pl.DataFrame]:
        """Labelled candidates of a part's requests; `learn` adds the positives that retrieval missed, flagged."""
        requests = self.data.requests(part, limit, self.settings.ranker.seed)
        if requests.is_empty():
            raise InputError(f"the split leaves no requests for {part!r}; import more events or change [split] in tandem.toml")
        positives = self.data.truth_of(requests, self.data.source.positive)
        answered = self.answer(requests, positives if learn else None)
        return label(answered, self.data), requests


def some_hidden(contexts: Sequence[dict[str, str | None]]) -> list[dict[str, str | None]]:
    """Contexts to learn from: every fourth is left out, since many a request that is served says nothing about itself."""
    return [{} if place % _HIDDEN == 0 else known for place, known in enumerate(contexts)]


def label(answered: Answered, data: Dataset) -> Examples:
    """The candidates of `answered` with a 0/1 label per task; a candidate that no source returned is flagged as missed."""
    request, item = pairs(answered.candidates)
    labels = {}
    for task in data.source.tasks:
        keys = [place * len(data.items) + rows for place, rows in enumerate(data.truth_of(answered.requests, task.name))]
        true = np.concatenate([np.empty(0, np.int64), *keys])
        labels[task.name] = np.isin(request * len(data.items) + item, true).astype(np.float32)
    missed = (answered.candidates.source < 0)[answered.candidates.ids >= 0]
    return Examples(answered.features, answered.names, labels, request, missed)


def train_ranking(settings: Settings, data: Dataset, offline: Offline, log: Log) -> Ranker:
    """The ranker on `ranker` requests (a fifth of its users decide when to stop), calibrated on `calibrate` requests."""
    examples, requests = offline.examples("ranker", settings.ranker.requests, learn=True)
    users = requests["user_id"].unique().sort().to_numpy()
    held = np.random.default_rng(settings.ranker.seed).permutation(users)[: max(1, int(len(users) * _VALIDATION))]
    is_held = np.isin(requests["user_id"].to_numpy(), held)[examples.request]
    training, validation = examples.take(~is_held), examples.take(is_held).served()
    ranker = train_ranker(training, validation, ranker_config(settings, data.source, examples.names), log)
    return calibrate(ranker, offline.examples("calibrate", None, learn=False)[0])


def ranker_config(settings: Settings, source: Source, names: tuple[str, ...]) -> RankerConfig:
    own = settings.ranker
    return RankerConfig(
        tasks=tuple(RankingTask(task.name) for task in source.tasks),
        positive=source.positive,
        within_request=tuple(name for name in WITHIN_REQUEST if name in names),
        trunk=own.trunk,
        rounds=own.rounds,
        rows_per_round=own.rows_per_round,
        seed=own.seed,
        utility=dict(own.utility),
    )


def workspace_pins(settings: Settings, events: pl.DataFrame) -> Pins:
    """What a ranker that is trained now is built on: the current views, the declared crosses, and the contexts of the events."""
    own = settings.features
    return Pins(read_views(settings.feature_tables), own.crosses, known_contexts(events, own.context))


def _numeric(frame: pl.DataFrame) -> list[str]:
    return [name for name, kind in frame.schema.items() if kind.is_numeric()]


def _with_extra(found: Candidates, extra: list[NDArray[np.int64]]) -> Candidates:
    """Candidates plus the ids in `extra` that are not among them, flagged by source -1."""
    missing = [np.setdiff1d(more, own) for more, own in zip(extra, found.ids, strict=True)]
    width = max((len(more) for more in missing), default=0)
    ids = np.full((len(found.ids), width), -1, np.int64)
    for row, more in enumerate(missing):
        ids[row, : len(more)] = more
    blank = np.full(ids.shape, np.nan, np.float32)
    return Candidates(
        np.concatenate([found.ids, ids], axis=1),
        {name: np.concatenate([values, blank], axis=1) for name, values in found.scores.items()},
        {name: np.concatenate([values, blank], axis=1) for name, values in found.ranks.items()},
        np.concatenate([found.source, np.full(ids.shape, -1, np.int8)], axis=1),
        found.names,
    )


def _stack(parts: list[Candidates]) -> Candidates:
    """Batches of candidates under each other, padded to one width."""
    width = max(part.ids.shape[1] for part in parts)

    def join(values: list[NDArray[Any]], padding: float) -> NDArray[Any]:
        return np.concatenate([np.pad(each, ((0, 0), (0, width - each.shape[1])), constant_values=padding) for each in values])

    names = parts[0].names
    return Candidates(
        join([part.ids for part in parts], -1),
        {name: join([part.scores[name] for part in parts], np.nan) for name in names},
        {name: join([part.ranks[name] for part in parts], np.nan) for name in names},
        join([part.source for part in parts], -1),
        names,
    )
