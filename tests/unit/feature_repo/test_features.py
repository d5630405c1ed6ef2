"""What a workspace may declare, and how it is told what it may not."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_repo.features import Cross, Declared, OwnTable, check_sides, half_lives
from tandem.core.errors import InputError
from tandem.service.settings import load_settings

TOML = """
[features]
windows = [1, 14]
context = ["device"]
declared.item_buys_7d = { entity = "item", action = "purchase", window_days = 7 }
crosses.price_to_usual = { left = "price", right = "user_mean_value" }

[features.declared.user_clicks_faded]
entity = "user"
action = "click"
half_life_days = 14

[features.tables.item_margin]
path = "margin.csv"
entity = "item"
ttl_days = 3
"""


def test_declarations_are_read_from_the_settings(tmp_path: Path) -> None:
    (tmp_path / "tandem.toml").write_text(TOML)
    own = load_settings(tmp_path, {}).features
    assert own.declared == {
        "item_buys_7d": Declared("item", action="purchase", window_days=7),
        "user_clicks_faded": Declared("user", action="click", half_life_days=14.0),
    }
    assert own.tables == {"item_margin": OwnTable("margin.csv", "item", ttl_days=3.0)}
    assert own.crosses == {"price_to_usual": Cross("price", "user_mean_value", "ratio")}
    assert (own.context, own.windows, own.history_length) == (("device",), (1, 14), 100)
    assert list(own.declared_of("item")) == ["item_buys_7d"]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("declared.x = { entity = 'shop' }", "'shop' is not one of"),
        ("declared.x = { action = 'buy' }", "features.declared.x lacks entity"),
        ("declared.x = { entity = 'item', windowdays = 7 }", "did you mean 'window_days'"),
        ("declared.x = { entity = 'item', window_days = 0 }", r"x\] window_days = 0; give 1 or more"),
        ("declared.x = { entity = 'item', half_life_days = 0 }", r"x\] half_life_days = 0.0; give a number above 0"),
        ("declared.x = { entity = 'item', window_days = 7, half_life_days = 7 }", "give one of them, or neither"),
        ("declared.x = { entity = 'item', action = 'a', task = 'b' }", "an action and a task"),
        ("declared.x = { entity = 'item', what = 'median' }", "'median' is not one of"),
        ("declared.x_time = { entity = 'item' }", "stored times"),
        ("declared.X = { entity = 'item' }", "a name is a-z"),
        ("declared.a__v2 = { entity = 'item' }", "single underscores"),
        ("tables.item_stats = { path = 'x.csv', entity = 'item' }", "the name of a built-in view"),
        ("tables.mine = { path = 'x.csv', entity = 'item', ttl_days = -1 }", "ttl_days = -1.0"),
        ("tables.mine = { entity = 'item' }", "features.tables.mine lacks path"),
        ("context = ['user_id']", "every event has"),
        ("crosses.x = { left = 'a', right = 'b', how = 'power' }", "'power' is not one of"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "tandem.toml").write_text(f"[features]\n{line}\n")
    with pytest.raises(InputError, match=said):
        load_settings(tmp_path, {})


def test_only_sums_and_counts_fade_between_events() -> None:
    declared = {
        "a": Declared("user", half_life_days=3.0),
        "b": Declared("user", half_life_days=3.0, what="mean"),
        "c": Declared("user", window_days=3),
    }
    assert half_lives(declared) == {"a": 3.0}


def test_a_cross_of_what_is_not_there_names_the_nearest() -> None:
    with pytest.raises(InputError, match=r"\[features.crosses.x\] names 'prise'.*nearest: \['price'\]"):
        check_sides({"x": Cross("price", "prise")}, ["price", "hour"])
    with pytest.raises(InputError, match="the name of a feature that there is already"):
        check_sides({"hour": Cross("price", "price")}, ["price", "hour"])
