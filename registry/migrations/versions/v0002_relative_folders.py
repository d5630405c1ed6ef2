"""Folders of releases are kept relative to the releases folder, so that a workspace can be moved."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import op

from registry.places import moved_here, stored

revision = "0002"
down_revision = "0001"

_RELEASES = sa.table("releases", sa.column("name"), sa.column("folder"), sa.column("content_hash"))


def upgrade(releases: Path | None) -> None:
    rows = op.get_bind().execute(sa.select(_RELEASES)).all()
    for name, folder, content_hash in rows:
        place = moved_here(Path(folder), name, content_hash, releases)
        change = sa.update(_RELEASES).where(_RELEASES.c.name == name)
        op.get_bind().execute(change.values(folder=stored(place, releases)))
    op.execute("UPDATE tandem_tables SET version = 2")
