"""`tandem release gate` and `promote` by what tandem.toml declares, on real release folders made by hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from feature_repo.pins import Pins
from registry.gates import Verdict
from registry.release import ReleaseFacts, create_release
from registry.store import ReleaseStore
from tandem.core.errors import ConflictError, GateRefusedError, InputError, IntegrityError
from tandem.core.folders import write_json
from tandem.service import recipes
from tandem.service.outcome import RefusedError
from tandem.service.recipes.gate import judge
from tandem.service.recipes.workspace import open_releases
from tandem.service.settings import Settings, load_settings

METRICS = {"towers_ranker/coverage@10": 0.5, "task/click/ece": 0.01}


def release(settings: Settings, name: str, lift: float, figures: Mapping[str, float] = METRICS) -> Path:
    """A release with 60 test users; `lift` is what it adds to everybody's metrics."""
    rng, parts = np.random.default_rng(0), settings.workspace / "parts" / name
    users = {"user_id": [f"u{each}" for each in range(60)], "system": ["towers + ranker"] * 60, "cold_user": [True, False] * 30}
    values = {metric: rng.random(60) / 2 + lift for metric in ("ndcg@10", "recall@100")}
    (parts / "evaluation").mkdir(parents=True)
    pl.DataFrame(users | values).write_parquet(parts / "evaluation" / "users.parquet")
    write_json(parts / "index" / "index.json", {"recall": 0.99})
    Pins(()).write(parts / "features.json")
    facts = ReleaseFacts(created_at=datetime(2026, 11, 20, tzinfo=UTC), metrics=figures)
    manifest = create_release(
        {part: parts / part for part in ("evaluation", "index", "features.json")}, settings.releases / name, facts
    )
    with open_releases(settings) as store:
        store.add(manifest, settings.releases / name)
    return settings.releases / name


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """A workspace with `a` live."""
    settings = load_settings(tmp_path, {})
    release(settings, "a", 0.0)
    with open_releases(settings) as store:
        store.promote("a", expected=None, who="ada", why="the first")
    return settings


def declared(settings: Settings, text: str) -> Settings:
    (settings.workspace / "tandem.toml").write_text(text)
    return load_settings(settings.workspace, {})


def test_the_same_gate_twice_gives_the_same_verdict_and_both_are_kept(settings: Settings) -> None:
    release(settings, "b", 0.01)
    first, second = (recipes.release_gate(settings, "b").data for _ in range(2))
    assert first == second
    assert first["passed"] is True
    with open_releases(settings) as store:
        assert [record.verdict["sentences"] for record in store.gates("b")] == [first["sentences"]] * 2


def test_the_verdict_is_a_table_with_the_size_of_the_sample(settings: Settings) -> None:
    release(settings, "b", 0.01)
    told = recipes.release_gate(settings, "b")
    assert told.table is not None
    rows = [dict(zip(told.table.columns, row, strict=True)) for row in told.table.rows]
    assert [row["metric"] for row in rows[:3]] == ["ndcg@10", "recall@100", "towers_ranker/coverage@10"]
    assert (rows[0]["users"], rows[0]["asked"], rows[0]["verdict"]) == ("60 of ≥ 30", "worse by < 0.01", "passed")
    assert rows[0]["difference"] == pytest.approx(0.01)
    assert rows[2]["asked"] == "falls ≤ 50%"
    assert (told.notes, told.refused) == ((), False)


def test_too_few_users_are_said_with_their_number_and_what_was_asked(settings: Settings) -> None:
    release(settings, "b", 0.1)
    strict = declared(settings, '[gates.metrics]\n"ndcg@10" = { minimum_users = 61 }\n')
    with pytest.raises(RefusedError, match=r"^ndcg@10: refused, 60 users are fewer than the 61 asked for$") as caught:
        recipes.release_gate(strict, "b")
    told = caught.value.outcome
    assert (told.refused, told.notes) == (True, ("ndcg@10: refused, 60 users are fewer than the 61 asked for",))
    assert told.table is not None
    assert told.table.rows[0][-2:] == ("60 of ≥ 61", "REFUSED")


def test_a_promotion_holds_only_while_the_champion_that_was_judged_stays(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `b` was judged somebody promoted `c` and rolled back: `a` is live again, but not as it was judged."""
    release(settings, "b", 0.01)
    release(settings, "c", 0.02)
    away = replace(settings, registry=replace(settings.registry, mlflow_uri="http://127.0.0.1:9"))

    def judge_slowly(settings: Settings, store: ReleaseStore, name: str) -> tuple[int, Verdict]:
        found = judge(settings, store, name)
        with open_releases(settings) as other:
            other.promote("c", expected="a", who="ben", why="in between")
            other.rollback(expected="c", who="ben", why="no good")
        return found

    monkeypatch.setattr("tandem.service.recipes.releases.judge", judge_slowly)
    with pytest.raises(ConflictError, match=r"'b' was judged against 'a' before it went and came back"):
        recipes.release_promote(away, "b")
    with open_releases(settings) as store:
        assert store.champion().name == "a"


def test_what_is_declared_decides(settings: Settings) -> None:
    release(settings, "b", -0.005)
    assert recipes.release_gate(settings, "b").data["passed"]
    strict = declared(settings, '[gates.metrics]\n"ndcg@10" = { margin = 0.001, slices = { cold_user = 0.01 } }\n')
    with pytest.raises(GateRefusedError, match=r"^ndcg@10: .* not shown to be worse by less than 0.001$"):
        recipes.release_gate(strict, "b")


def test_a_guardrail_stops_a_promotion_and_its_sentence_is_stored(settings: Settings) -> None:
    release(settings, "b", 0.1, METRICS | {"towers_ranker/coverage@10": 0.2})
    with pytest.raises(GateRefusedError, match=r"coverage@10: refused, challenger 0.2, champion 0.5; it may fall by 50%"):
        recipes.release_promote(settings, "b")
    with open_releases(settings) as store:
        assert store.champion().name == "a"
        (record,) = store.gates("b")
    assert [("coverage@10" in sentence) for sentence in record.verdict["refusals"]] == [True]


def test_a_forced_promotion_is_recorded_with_its_reason_and_what_the_gate_said(settings: Settings) -> None:
    release(settings, "b", -0.2)
    away = replace(settings, registry=replace(settings.registry, mlflow_uri="http://127.0.0.1:9"))
    with pytest.raises(InputError, match="needs a reason"):
        recipes.release_promote(away, "b", force=True)
    done = recipes.release_promote(away, "b", because="the old one is on fire", force=True)
    assert done.data["forced"] is True
    assert "MLflow's alias is not set yet" in done.made
    told = recipes.release_at(away, datetime.now(UTC)).data
    assert (told["release"], told["kind"], told["why"]) == ("b", "forced", "the old one is on fire")
    assert "not shown to be worse by less than" in told["gate"][0]


def test_index_recall_and_size_are_guarded(settings: Settings) -> None:
    release(settings, "b", 0.1)
    strict = declared(settings, '[gates.guardrails]\n"index/recall" = { at_least = 0.995 }\nbytes = { at_most = 100 }\n')
    with pytest.raises(GateRefusedError, match=r"index/recall: refused, challenger 0.99, .*; bytes: refused"):
        recipes.release_gate(strict, "b")


def test_rows_that_were_touched_are_never_judged(settings: Settings) -> None:
    rows = release(settings, "b", -0.2) / "evaluation" / "users.parquet"
    users = pl.read_parquet(rows).with_columns(pl.lit(1.0).alias("ndcg@10"), pl.lit(1.0).alias("recall@100"))
    rows.unlink()
    users.write_parquet(rows)
    with pytest.raises(IntegrityError, match=r"users.parquet is damaged"):
        recipes.release_gate(settings, "b")


def test_the_settings_of_the_page_are_read_and_are_the_defaults_where_it_says_so(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "registry.md").read_text(encoding="utf-8")
    default, own, *others = re.findall(r"^```toml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    plain = load_settings(tmp_path, {})
    (tmp_path / "tandem.toml").write_text(default)
    assert load_settings(tmp_path, {}).gates == plain.gates
    (tmp_path / "tandem.toml").write_text(own)
    assert "cold_user" in load_settings(tmp_path, {}).gates.metrics["ndcg@10"].slices
    (team,) = [each for each in others if "artifacts" in each]
    (tmp_path / "tandem.toml").write_text(team)
    assert load_settings(tmp_path, {}).registry.artifacts == "s3://bucket/prefix"
