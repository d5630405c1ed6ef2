"""Alembic migrations of the registry's tables: from nothing or any older version to the newest, inside the caller's transaction.

Each file in `versions/` is one step; its revision is the version of the tables after it ("0002"), which `tandem_tables` keeps
as a number too, since that is what every Tandem reads first. A step gets `releases`, the workspace's releases folder or None.
Alembic's own table is `tandem_migrations`: MLflow may keep its `alembic_version` in the same database.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final

from sqlalchemy.engine import Connection

BOOKS: Final = "tandem_migrations"
_one_at_a_time = threading.Lock()  # Alembic's `op` is one per process


def migrate(connection: Connection, found: int | None, releases: Path | None) -> None:
    """Bring the tables to the newest version; `found` is the one they have, None where there are no tables."""
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    steps = ScriptDirectory(Path(__file__).parent)

    def ahead(heads: Any, context: Any) -> Any:
        return steps._upgrade_revs("head", heads)

    context = MigrationContext.configure(connection, opts={"fn": ahead, "version_table": BOOKS})
    with _one_at_a_time, Operations.context(context):
        if found is not None and not context.get_current_heads():  # made before there were migrations
            context.stamp(steps, f"{found:04d}")
        context.run_migrations(releases=releases)
