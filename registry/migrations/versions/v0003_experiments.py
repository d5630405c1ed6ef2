"""Experiments: a challenger beside the champion, who sees it, how it ended; and what running services answered lately."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade(**_: Any) -> None:
    name = sa.String(64)
    op.create_table(
        "rollout_experiments",  # MLflow has `experiments`, and may share the database
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("name", name, nullable=False, unique=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("challenger", name, sa.ForeignKey("releases.name"), nullable=False),
        sa.Column("champion", name, sa.ForeignKey("releases.name"), nullable=False),
    )
    op.create_table(
        "experiment_changes",
        sa.Column("version", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("experiment", sa.Integer, sa.ForeignKey("rollout_experiments.number"), nullable=False, index=True),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("percent", sa.Double, nullable=False),
        sa.Column("outcome", sa.String(16)),
        sa.Column("who", sa.String(256), nullable=False),
        sa.Column("why", sa.Text, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "rollout",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("experiment", sa.Integer, sa.ForeignKey("rollout_experiments.number")),
        sa.Column("percent", sa.Double, nullable=False),
        sa.Column("version", sa.Integer, nullable=False),
        sa.CheckConstraint("id = 1", name="rollout_is_one_row"),
    )
    op.create_table(
        "traffic",
        sa.Column("process", sa.String(32), primary_key=True),
        *(sa.Column(key, sa.Integer, primary_key=True, autoincrement=False) for key in ("slot", "champion", "experiment")),
        sa.Column("arm", sa.String(16), primary_key=True),
        *(sa.Column(count, sa.Integer, nullable=False) for count in ("requests", "failed", "degraded", "dropped")),
        sa.Column("latency", sa.JSON, nullable=False),
    )
    op.execute("INSERT INTO rollout (id, percent, version) VALUES (1, 0, 0)")
    op.execute("UPDATE tandem_tables SET version = 3")
