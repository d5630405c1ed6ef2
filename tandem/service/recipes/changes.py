"""Recipes for single items: put and deleted in the workspace's journal, seen by a running service within a second."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from tandem.core.errors import NotFoundError
from tandem.core.schema import check_id
from tandem.service.outcome import Outcome
from tandem.service.recipes.workspace import Progress, quiet
from tandem.service.settings import Settings

if TYPE_CHECKING:
    from tandem.service.live_items import ItemEncoder

_AT_ONCE: Final = 64


def items_put(settings: Settings, path: Path, progress: Progress = quiet) -> Outcome:
    """List the items of a file, or list them as they are now. The champion's encoder reads their texts, if there is one."""
    from feature_repo.item_changes import ItemChanges, checked_items
    from feature_repo.sources.files import read_table
    from feature_repo.store import items_schema
    from tandem.service.texts import item_texts

    items = checked_items(read_table(path), items_schema(settings.data))
    changes, encoder = ItemChanges(settings.data), _champions_encoder(settings)
    for start in range(0, len(items), _AT_ONCE):
        progress("put items", start, len(items))
        part = items.slice(start, _AT_ONCE)
        vectors = None if encoder is None else encoder.items(item_texts(part))
        changes.put(part, vectors, "" if encoder is None else encoder.fingerprint)
    progress("put items", len(items), len(items))
    made = f"{len(items):,} items put; a running service lists them within a second, the next training learns from them"
    return Outcome(made, {"items": len(items)}, None, "tandem retrain")


def items_delete(settings: Settings, item_id: str) -> Outcome:
    """Take an item out of every answer. Raises NotFoundError for one that the workspace does not have."""
    from feature_repo.item_changes import ItemChanges
    from feature_repo.store import load_items

    item_id = check_id(item_id, "item id")
    if item_id not in load_items(settings.data)["item_id"]:
        raise NotFoundError(f"no item {item_id!r} in {settings.data}; nothing was deleted")
    ItemChanges(settings.data).delete([item_id])
    made = f"{item_id} is deleted; a running service stops listing it within a second"
    return Outcome(made, {"item_id": item_id, "deleted": True}, None, "tandem retrain")


def _champions_encoder(settings: Settings) -> ItemEncoder | None:
    """The text encoder of the release that is live, so that services need not read the texts themselves."""
    if not settings.knows_releases:
        return None
    from tandem.service.wiring import champions_encoder

    return champions_encoder(settings)
