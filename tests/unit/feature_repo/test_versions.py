"""A definition is a version: it keeps its number, its table stays while somebody pins it, and goes when nobody does."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from feature_repo.aggregates import AggregateConfig
from feature_repo.features import Declared
from feature_repo.made import as_made, fillings, made_by
from feature_repo.pins import Pins, check_pins, known_contexts
from feature_repo.versions import FIRST_PART, Filled, prune_versions, write_versions
from feature_repo.views import TIMESTAMP, ViewSchema, all_views, kept_views, read_views, write_views
from tandem.core.errors import IncompatibleError
from tandem.core.folders import read_json, write_json
from tandem.core.schema import TIME, Source, Task

START = datetime(2026, 3, 1, tzinfo=UTC)
SOURCE = Source(
    "shop", (Task("click", "click"), Task("big", "buy", at_least=10)), "click", ("click", "buy"), False, "time", "view"
)


def table(value: Any = 1, **more: Any) -> pl.DataFrame:
    return pl.DataFrame({"item_id": ["i1"], TIMESTAMP: [START], "sold": [value], **more}, schema_overrides={TIMESTAMP: TIME})


def write(
    folder: Path, made: dict[str, Any], frame: pl.DataFrame | None = None, pinned: Collection[str] = (), ttl: float | None = None
) -> str:
    (view,) = write_versions({"item_sales": Filled(table() if frame is None else frame, made, ttl)}, folder, pinned)
    return view.name


def names(folder: Path) -> tuple[list[str], list[str], list[str]]:
    """Current views, kept views, and folders that there are."""
    there = sorted(path.name for path in folder.iterdir() if path.is_dir())
    return [view.name for view in read_views(folder)], [view.name for view in kept_views(folder)], there


@pytest.mark.parametrize(
    "change",
    [
        {"made": {"revision": 2}},
        {"made": {"revision": 1, "windows": [1, 7]}},
        {"frame": table(1.5)},
        {"frame": table(returned=[0])},
        {"ttl": 7.0},
    ],
)
def test_whatever_makes_a_view_another_makes_another_version(tmp_path: Path, change: dict[str, Any]) -> None:
    assert write(tmp_path, {"revision": 1}) == "item_sales"
    assert write(tmp_path, {"revision": 1}, table(5)) == "item_sales"  # other values are not another view
    assert write(tmp_path, **({"made": {"revision": 1}} | change)) == "item_sales__v2"
    assert names(tmp_path) == (["item_sales__v2"], [], ["item_sales__v2"])
    (view,) = read_views(tmp_path)
    assert (view.base, view.version, view.path) == ("item_sales", 2, "features/item_sales__v2")


def test_a_pinned_version_stays_untouched_and_goes_when_nobody_pins_it(tmp_path: Path) -> None:
    write(tmp_path, {"revision": 1})
    before = (tmp_path / "item_sales" / FIRST_PART).read_bytes()
    write(tmp_path, {"revision": 2}, table(2), pinned=["item_sales"])
    write(tmp_path, {"revision": 3}, table(3), pinned=["item_sales", "item_sales__v2"])
    assert names(tmp_path) == (
        ["item_sales__v3"],
        ["item_sales", "item_sales__v2"],
        ["item_sales", "item_sales__v2", "item_sales__v3"],
    )
    assert (tmp_path / "item_sales" / FIRST_PART).read_bytes() == before
    assert [view.version for view in all_views(tmp_path)] == [3, 1, 2]
    assert prune_versions(tmp_path, ["item_sales"]) == ("item_sales__v2",)
    assert names(tmp_path) == (["item_sales__v3"], ["item_sales"], ["item_sales", "item_sales__v3"])
    assert prune_versions(tmp_path, ["item_sales"]) == ()


def test_a_definition_that_comes_back_gets_its_number_back(tmp_path: Path) -> None:
    write(tmp_path, {"revision": 1})
    write(tmp_path, {"revision": 2}, pinned=["item_sales"])
    assert write(tmp_path, {"revision": 1}, pinned=["item_sales__v2"]) == "item_sales"
    assert names(tmp_path) == (["item_sales"], ["item_sales__v2"], ["item_sales", "item_sales__v2"])
    assert write(tmp_path, {"revision": 3}) == "item_sales__v3"  # a number is never used twice
    assert len(read_json(tmp_path / "versions.json")["views"]["item_sales"]) == 3


def test_a_pinned_version_is_filled_anew_where_that_can_be_done(tmp_path: Path) -> None:
    write(tmp_path, {"revision": 1})
    asked: list[ViewSchema] = []

    def refill(view: ViewSchema) -> pl.DataFrame:
        asked.append(view)
        return table(77)

    write_versions({"item_sales": Filled(table(), {"revision": 2})}, tmp_path, ["item_sales"], refill)
    assert [dict(view.made_by) for view in asked] == [{"revision": 1}]
    assert pl.read_parquet(tmp_path / "item_sales" / FIRST_PART)["sold"].to_list() == [77]


def test_a_workspace_from_before_versions_keeps_its_first_one(tmp_path: Path) -> None:
    """Its schema says nothing of what fills a view; the same shape is taken for the same view."""
    write_views(tmp_path, (ViewSchema.of_table("item_sales", "item", table(), path="features/item_sales"),))
    raw = read_json(tmp_path / "schema.json")
    del raw["views"][0]["made_by"]
    write_json(tmp_path / "schema.json", raw)
    assert write(tmp_path, {"revision": 1}) == "item_sales"
    assert write(tmp_path, {"revision": 2}) == "item_sales__v2"


def test_a_lost_ledger_gives_no_number_twice(tmp_path: Path) -> None:
    write(tmp_path, {"revision": 1})
    write(tmp_path, {"revision": 2})
    (tmp_path / "versions.json").unlink()
    assert write(tmp_path, {"revision": 2}) == "item_sales__v2"
    assert write(tmp_path, {"revision": 3}) == "item_sales__v3"
    assert read_json(tmp_path / "versions.json")["views"]["item_sales"][0] is None


# --- what fills a version ---------------------------------------------------------------------------------------------------

OLD = AggregateConfig(
    windows=(1, 7), declared={"item_buys": Declared("item", action="buy"), "user_big": Declared("user", task="big")}
)
NEW = AggregateConfig(windows=(2,), declared={"item_buys": Declared("item", action="buy", window_days=3)})


def view(base: str, config: AggregateConfig = OLD, source: Source = SOURCE) -> ViewSchema:
    return ViewSchema.of_table(
        base, base.split("_")[0], table() if base.startswith("item") else USER, made_by=made_by(base, config, source)
    )


USER = pl.DataFrame({"user_id": ["u"], TIMESTAMP: [START], "n": [1]}, schema_overrides={TIMESTAMP: TIME})


def test_settings_come_back_as_a_version_was_defined_with_them() -> None:
    other = Source("shop", (Task("click", "click"),), "click", ("click",), True, "time")
    for base, wanted in {"user_stats": ("windows",), "item_declared": ("declared",), "user_history": ("history_length",)}.items():
        made = as_made(view(base), NEW, other)
        assert made is not None
        again = made_by(base, *made)
        assert again == made_by(base, OLD, SOURCE)
        assert all(name in again for name in wanted)
    assert as_made(view("user_stats"), OLD, SOURCE) == (OLD, SOURCE)


def test_what_other_code_computed_is_not_filled_anew() -> None:
    facts = {**made_by("user_stats", OLD, SOURCE), "revision": 0}
    older = ViewSchema.of_table("user_stats", "user", USER, made_by=facts)
    assert as_made(older, OLD, SOURCE) is None


def test_views_of_today_are_filled_together_and_each_older_one_by_its_own() -> None:
    today = [view(base, NEW) for base in ("user_stats", "item_stats", "user_history", "item_declared")]
    older = [view("item_declared"), view("user_stats")]
    groups = [(config.windows, [each.base for each in views]) for config, _, views in fillings([*today, *older], NEW, SOURCE)]
    assert groups[0] == ((2,), ["user_stats", "item_stats", "user_history", "item_declared"])
    assert sorted(groups[1:]) == [((1, 7), ["user_stats"]), ((2,), ["item_declared"])]


# --- pins -------------------------------------------------------------------------------------------------------------------


def test_pins_are_read_back_with_all_they_say(tmp_path: Path) -> None:
    fading = AggregateConfig(declared={"item_faded": Declared("item", half_life_days=3.0)}, history_length=7)
    views = (view("item_declared", fading), view("user_history", fading))
    pins = Pins(views, context={"device": ("phone", "desk")})
    pins.write(tmp_path / "features.json")
    again = Pins.read(tmp_path / "features.json")
    assert again == pins
    assert (again.half_lives, again.history_length, again.item_columns) == ({"item_faded": 3.0}, 7, {"sold": "sold"})


def test_a_release_from_before_versions_is_read(tmp_path: Path) -> None:
    write_json(tmp_path / "features.json", {"user_stats": {"version": 1, "features": ["n", "names"]}})
    pins = Pins.read(tmp_path / "features.json").limited_to(["n", "hour"])
    assert (pins.numbers("user"), pins.context, pins.history_length) == (("n",), {}, None)
    here = pl.DataFrame({"user_id": ["u"], TIMESTAMP: [START], "n": [1], "names": ["x"]}, schema_overrides={TIMESTAMP: TIME})
    check_pins(pins, [ViewSchema.of_table("user_stats", "user", here)], "old")
    with pytest.raises(IncompatibleError, match="old was built on view user_stats version 1"):
        check_pins(pins, [ViewSchema.of_table("user_stats", "user", USER)], "old")


def test_a_view_that_changed_or_went_is_refused_with_both_definitions() -> None:
    pins = Pins((view("user_stats"),))
    check_pins(pins, [view("user_stats")], "summer")
    with pytest.raises(IncompatibleError) as changed:
        check_pins(pins, [view("user_stats", NEW)], "summer")
    assert '"windows": [1, 7]' in str(changed.value)
    assert '"windows": [2]' in str(changed.value)
    assert "features build" in str(changed.value)
    with pytest.raises(IncompatibleError, match=r'"windows": \[1, 7\].*but the workspace has no such view'):
        check_pins(pins, [], "summer")


def test_contexts_are_the_frequent_values_of_columns_that_events_have() -> None:
    events = pl.DataFrame({"device": ["desk", "phone", "phone", None], "shelf": [2, 2, 1, 1], "empty": [None] * 4})
    assert known_contexts(events, ["device", "surface", "shelf", "empty"]) == {"device": ("phone", "desk"), "shelf": ("1", "2")}
