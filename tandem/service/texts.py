"""What is read of items and sentences, and by whom: the encoder of the settings, tuned on the events where that is asked for, and
the catalogue's words.

In: settings and a workspace's tables. Out: item texts, an open `TextReader`, and the adapter that its encoder was tuned to.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
import polars as pl

from retrieval.encoder import TextEncoder
from retrieval.words import TextReader, Words
from tandem.core.folders import content_hash, read_json, whole_folder, write_json
from tandem.service.settings import EncoderSettings, Settings

if TYPE_CHECKING:
    from retrieval.tuning import Lessons
    from tandem.service.learn import Dataset

ADAPTER: Final = "encoder"
"""Folder of the adapter inside a trained retriever and a release; absent where the encoder was not tuned."""
Log = Callable[[dict[str, float]], None]
Progress = Callable[[str, int, int], None]


def item_texts(items: pl.DataFrame) -> list[str]:
    """What the encoder reads of each item: its title, then its text unless that begins with the title anyway."""
    return [text if text.startswith(title) else f"{title}. {text}" for title, text in items.select("title", "text").iter_rows()]


def open_encoder(settings: Settings, adapter: Path | None = None) -> TextEncoder:
    """The encoder of the workspace, with the vectors that it has kept."""
    return text_encoder(settings.encoder, settings.workspace / "cache" / "vectors", adapter)


def trained_reader(settings: Settings, data: Dataset, texts: Sequence[str], log: Log, progress: Progress) -> TextReader:
    """The encoder, tuned where that is asked for, beside the words of these texts."""
    encoder = open_encoder(settings, tuned_adapter(settings, data, texts, log, progress))
    return TextReader(encoder, Words.fit(texts, settings.encoder.words))


def text_encoder(own: EncoderSettings, cache: Path | None = None, adapter: Path | None = None) -> TextEncoder:
    """The encoder that the settings describe."""
    return TextEncoder(
        own.model,
        device=own.device,
        dtype=own.dtype,
        max_tokens=own.max_tokens,
        pooling=own.pooling or None,
        dimension=own.dimension or None,
        prefix=own.prefix,
        query_prefix=own.query_prefix,
        adapter=adapter,
        cache=cache,
    )


def tuned_adapter(settings: Settings, data: Dataset, texts: Sequence[str], log: Log, progress: Progress) -> Path | None:
    """The folder of the adapter that tuning made of this data and these settings; None where it is off or did not help.

    What was tuned once, or found not to help, is not tuned again: `cache/adapters/<hash of all that it was made of>` keeps it.
    """
    if not settings.tuning.steps:
        return None
    from retrieval.tuning import tune

    encoder, lessons = open_encoder(settings), tuning_lessons(data)
    kept = settings.workspace / "cache" / "adapters" / _hash_of(settings, encoder, texts, lessons)
    if not (kept / "verdict.json").is_file():
        with whole_folder(kept) as partial:
            told = _told(log, progress, settings.tuning.steps)
            helped = tune(encoder, texts, lessons, settings.tuning, told, partial / "adapter")
            write_json(partial / "verdict.json", {"helped": helped})
    return kept / "adapter" if read_json(kept / "verdict.json")["helped"] else None


def tuning_lessons(data: Dataset) -> Lessons:
    """Training histories as item rows, with the tasks that came true of each person and item, and the items' categories."""
    from retrieval.tuning import Lessons

    dense = data.items.select("item_id", row=pl.int_range(pl.len(), dtype=pl.Int64))
    names = [task.name for task in data.source.tasks]
    events = data.split.training_events
    came = events.group_by("user_id", "item_id").agg(
        task.matches().any().alias(f"task:{task.name}") for task in data.source.tasks
    )
    people = (
        events.filter(data.source.is_history())
        .sort("user_id", "timestamp", "event_id")
        .join(dense, on="item_id", how="inner", maintain_order="left")
        .join(came, on=["user_id", "item_id"], how="left", maintain_order="left")
        .group_by("user_id", maintain_order=True)
        .agg("row", *(f"task:{name}" for name in names))
    )
    tasks = {name: [np.array(flags, bool) for flags in people[f"task:{name}"].to_list()] for name in names}
    return Lessons([np.array(row, np.int64) for row in people["row"].to_list()], tasks, data.items["categories"].to_list())


def _hash_of(settings: Settings, encoder: TextEncoder, texts: Sequence[str], lessons: Lessons) -> str:
    """Of everything that decides what tuning makes."""
    made_of = hashlib.sha256(content_hash([encoder.fingerprint, list(texts), vars(settings.tuning)]).encode())
    made_of.update(content_hash([list(lessons.tasks), [list(own) for own in lessons.categories]]).encode())
    made_of.update(np.array([len(history) for history in lessons.histories], np.int64).tobytes())
    for arrays in (lessons.histories, *lessons.tasks.values()):
        for each in arrays:
            made_of.update(each.tobytes())
    return made_of.hexdigest()[:32]


def _told(log: Log, progress: Progress, steps: int) -> Log:
    """Hands the lines of tuning on under names of their own, and moves the bar."""

    def tell(line: dict[str, float]) -> None:
        progress("tune encoder", int(line["step"]), steps)
        log({f"tuning/{name}": value for name, value in line.items() if name != "step"})

    return tell
