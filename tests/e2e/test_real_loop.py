"""The whole loop on each real data set, cut to its 400 busiest items: raw files in, a verified champion that answers out."""

from __future__ import annotations

import os
import tomllib
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest

from feature_repo.sources import read_source
from feature_repo.sources.raw import Raw
from feature_repo.sources.table import TableMapping
from feature_repo.store import save_raw
from tandem.service import recipes
from tandem.service.settings import load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("TANDEM_SHARED_DATA", ROOT.parent / "shared" / "data"))
SETTINGS = """\
encoder = { max_tokens = 24 }
towers = { dimension = 48, epochs = 2 }
ranker = { rounds = 4, requests = 400, candidates = 100 }
evaluation = { requests = 300, resamples = 200 }
"""
FILES = {
    "metarank": DATA / "ranklens" / "events.jsonl.gz",
    "movielens": DATA / "movielens-latest-small" / "ml-latest-small.zip",
    "goodbooks": DATA / "goodbooks-10k",
    "table": DATA / "online-retail" / "online_retail.parquet",
}
ITEMS, USERS = 400, 1500

pytestmark = pytest.mark.real


def _cut(raw: Raw) -> Raw:
    """The busiest items, and the first users by id who touched them."""
    counts = (
        raw.events.filter(raw.source.is_history()).group_by("item_id").len().sort(["len", "item_id"], descending=[True, False])
    )
    items = counts["item_id"].head(ITEMS).to_list()
    events = raw.events.filter(pl.col("item_id").is_in(items))
    users = events["user_id"].unique().sort().head(USERS).to_list()
    return replace(
        raw,
        events=events.filter(pl.col("user_id").is_in(users)),
        items=raw.items.filter(pl.col("item_id").is_in(items)),
        users=raw.users.filter(pl.col("user_id").is_in(users)),
    )


@pytest.mark.parametrize("kind", list(FILES))
def test_from_raw_files_to_an_answer(kind: str, tmp_path: Path) -> None:
    if not FILES[kind].exists():
        pytest.skip(f"{FILES[kind].name} is not there; the real data sets lie beside the project or in $TANDEM_SHARED_DATA")
    (tmp_path / "tandem.toml").write_text(SETTINGS)
    settings = load_settings(tmp_path, {})
    example = tomllib.loads((ROOT / "docs" / "examples" / "online-retail.toml").read_text())
    mapping = TableMapping.parse(example["table"]) if kind == "table" else None
    save_raw(_cut(read_source(kind, FILES[kind], mapping, settings.split.seed)), settings.data, replace=True)

    figures = recipes.run_all(settings).data

    rows = {row["system"]: row for row in figures["funnel"] if row["slice"] == "all users"}
    assert rows["towers"]["recall@100"] > rows["item-kNN"]["recall@100"] * 0.8
    assert rows["towers + ranker"]["ndcg@10"] > rows["towers"]["ndcg@10"] * 0.5
    assert rows["towers + ranker"]["ndcg@10"] > rows["popularity"]["ndcg@10"] * 0.5

    recommender = open_recommender(settings)
    users = pl.read_parquet(settings.models / "evaluation" / "users.parquet")["user_id"]
    known, stranger = recommender.recommend(Ask(user_id=users[0])), recommender.recommend(Ask(user_id="nobody has this id"))
    words = recommender.recommend(Ask(query="a story"))
    recommender.close()
    checked = recipes.features_check(settings)
    assert not checked.refused, checked.made
    assert checked.data["checks"]["served users"]["rows"] > 0
    for slate in (known, stranger, words):
        assert len({item.item_id for item in slate.items}) == 10
        assert slate.degraded == ()
        assert slate.release == figures["champion"]
    assert stranger.cold_start
    assert not known.cold_start
