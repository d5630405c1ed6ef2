"""The first tables: releases, gates, promotions, and the one champion, who is nobody yet."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade(**_: Any) -> None:
    moment, name = sa.DateTime(timezone=True), sa.String(64)
    op.create_table("tandem_tables", sa.Column("version", sa.Integer, primary_key=True, autoincrement=False))
    op.create_table(
        "releases",
        sa.Column("name", name, primary_key=True),
        sa.Column("content_hash", sa.String(64), nullable=False),
        sa.Column("folder", sa.Text, nullable=False),
        sa.Column("manifest", sa.JSON, nullable=False),
        sa.Column("created_at", moment, nullable=False),
        sa.Column("model_version", sa.String(64)),
        sa.Column("deleted_at", moment),
    )
    op.create_table(
        "gates",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("challenger", name, sa.ForeignKey("releases.name"), nullable=False, index=True),
        sa.Column("champion", name, sa.ForeignKey("releases.name")),
        sa.Column("passed", sa.Boolean, nullable=False),
        sa.Column("verdict", sa.JSON, nullable=False),
        sa.Column("judged_at", moment, nullable=False),
    )
    op.create_table(
        "promotions",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("previous", name, sa.ForeignKey("releases.name")),
        sa.Column("name", name, sa.ForeignKey("releases.name"), nullable=False),
        sa.Column("who", sa.String(256), nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("at", moment, nullable=False),
        sa.Column("gate", sa.Integer, sa.ForeignKey("gates.number")),
    )
    op.create_table(
        "champion",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("name", name, sa.ForeignKey("releases.name")),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("since", moment),
        sa.CheckConstraint("id = 1", name="champion_is_one_row"),
    )
    op.execute("INSERT INTO tandem_tables (version) VALUES (1)")
    op.execute("INSERT INTO champion (id, version) VALUES (1, 0)")
