"""The built-in world: events obey the truth that made them, and there is something to learn."""

from collections import Counter
from datetime import timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from feature_repo.sources.world import SLATE, START, Truth, World, simulate
from feature_repo.sources.world_text import SUBTYPE_NAMES
from feature_repo.splits import SplitConfig, make_requests
from tandem.core.errors import InputError, NotFoundError
from tandem.core.schema import EVENTS, ITEMS, USERS

USERS_COUNT, ITEMS_COUNT, DAYS = 500, 800, 60


@pytest.fixture(scope="module")
def world() -> World:
    return simulate(USERS_COUNT, ITEMS_COUNT, DAYS, seed=11)


@pytest.fixture(scope="module")
def shown(world: World) -> pl.DataFrame:
    """Impressions with `clicked`."""
    events = world.raw.events
    clicks = events.filter(pl.col("action") == "click").select("request_id", "item_id", pl.lit(True).alias("clicked"))
    impressions = events.filter(pl.col("action") == "impression")
    return impressions.join(clicks, on=["request_id", "item_id"], how="left").with_columns(pl.col("clicked").fill_null(False))


def test_tables_follow_the_schema(world: World) -> None:
    raw = world.raw
    assert dict(raw.events.schema) == {**EVENTS, "device": pl.String(), "surface": pl.String()}
    assert dict(raw.items.schema) == {**ITEMS, "price": pl.Float64(), "brand": pl.String()}
    assert dict(raw.users.schema) == {**USERS, "region": pl.String(), "budget": pl.String()}
    assert raw.events["event_id"].n_unique() == raw.events.height
    assert raw.events.null_count()["timestamp"].item() == 0
    assert (raw.items.height, raw.users.height) == (ITEMS_COUNT, USERS_COUNT)


def test_same_seed_same_world_and_another_seed_another() -> None:
    one, two, three = simulate(30, 60, 10, 5), simulate(30, 60, 10, 5), simulate(30, 60, 10, 6)
    assert one.raw.events.equals(two.raw.events)
    assert one.raw.items.equals(two.raw.items)
    assert np.array_equal(one.truth.before, two.truth.before)
    assert not one.raw.items.equals(three.raw.items)


def test_labels_form_a_chain(world: World) -> None:
    events = world.raw.events
    keys = {action: set(rows.select("request_id", "item_id").rows()) for (action,), rows in events.group_by("action")}
    assert keys["purchase"] < keys["like"] < keys["click"] < keys["impression"]
    counts = dict(events.group_by("action").len().rows())
    assert all(len(keys[action]) == counts[action] for action in keys)
    clicks = events.filter(pl.col("action") == "click")
    assert clicks["value"].min() > 0
    assert events.filter(pl.col("action") != "click")["value"].null_count() == events.height - clicks.height
    assert 20 <= clicks.height / USERS_COUNT <= 35


def test_slates_have_positions_propensities_and_nothing_twice(world: World, shown: pl.DataFrame) -> None:
    slates = shown.group_by("request_id").agg(
        pl.len(), pl.col("position").n_unique().alias("places"), pl.col("item_id").n_unique().alias("items")
    )
    assert (
        slates.select((pl.col("len") == SLATE).all(), (pl.col("places") == SLATE).all(), (pl.col("items") == SLATE).all()).row(0)
        == (True,) * 3
    )
    assert (shown["position"].min(), shown["position"].max()) == (1, SLATE)
    assert shown["propensity"].min() > 0
    assert shown["propensity"].max() <= 1


def test_propensities_estimate_counts_without_bias(shown: pl.DataFrame) -> None:
    """At position 1, the sum of 1/propensity over all shown items estimates the number of items on sale."""
    first = shown.filter(pl.col("position") == 1)
    estimate = (1.0 / first["propensity"]).mean()
    assert isinstance(estimate, float)
    assert 0.6 * ITEMS_COUNT < estimate < 1.2 * ITEMS_COUNT


def test_clicks_are_as_frequent_as_the_truth_says_at_every_position(world: World, shown: pl.DataFrame) -> None:
    truth = world.truth
    rows = shown.sample(12_000, seed=1)
    chance = np.array(
        [
            truth.click_probability(user, time, [item])[0]
            for user, time, item in rows.select("user_id", "timestamp", "item_id").rows()
        ]
    )
    expected = chance * truth.behaviour.examine(rows["position"].to_numpy())
    clicked = rows["clicked"].to_numpy()
    for low, high in ((1, 5), (6, 12), (13, 20)):
        here = ((rows["position"] >= low) & (rows["position"] <= high)).to_numpy()
        error = 4 * np.sqrt((expected[here] * (1 - expected[here])).sum())
        assert abs(clicked[here].sum() - expected[here].sum()) < error
    # And by chance of click: what the truth calls likely happens, what it calls unlikely does not.
    assert clicked[expected > 0.4].mean() > 0.4
    assert clicked[expected < 0.02].mean() < 0.02


def test_likes_and_purchases_follow_their_probabilities(world: World) -> None:
    truth, events = world.truth, world.raw.events
    clicks = events.filter(pl.col("action") == "click").sample(2500, seed=2)
    chances = []
    for user, time, item in clicks.select("user_id", "timestamp", "item_id").rows():
        click, like, buy = (truth.task_probability(task, user, time, [item])[0] for task in ("click", "like", "purchase"))
        chances.append((like / click, buy / click))
    for place, action in enumerate(("like", "purchase")):
        done = clicks.join(events.filter(pl.col("action") == action), on=["request_id", "item_id"], how="semi").height
        expected = sum(chance[place] for chance in chances)
        assert abs(done - expected) < 4 * np.sqrt(expected)


def test_first_position_is_looked_at_more_than_the_last(shown: pl.DataFrame) -> None:
    rate = dict(shown.group_by("position").agg(pl.col("clicked").mean()).rows())
    assert rate[1] > 1.5 * rate[20]


def test_nothing_is_shown_before_it_is_on_sale_or_after_it_was_clicked(world: World, shown: pl.DataFrame) -> None:
    on_sale = shown.join(world.raw.items.select("item_id", "available_from"), on="item_id")
    assert on_sale.filter(pl.col("available_from") > pl.col("timestamp")).is_empty()
    late = world.raw.items.filter(pl.col("available_from") > START)
    assert late.height == ITEMS_COUNT // 4
    assert shown.join(late, on="item_id", how="semi").height > 1000
    clicks = shown.filter("clicked").select("user_id", "item_id", pl.col("timestamp").alias("clicked_at"))
    again = shown.join(clicks, on=["user_id", "item_id"]).filter(pl.col("timestamp") > pl.col("clicked_at"))
    assert again.is_empty()


def test_words_tell_what_an_item_is(world: World) -> None:
    items = world.raw.items
    assert items["title"].n_unique() == items.height
    for row in items.head(200).to_dicts():
        department, subtype = row["categories"]
        assert subtype in SUBTYPE_NAMES
        assert subtype.lower() in row["text"]
        assert row["brand"] in row["title"]
        assert row["price"] > 1
        assert department != subtype


def test_bios_hint_at_the_first_taste(world: World) -> None:
    truth = world.truth
    cooks = [row for row, text in enumerate(world.raw.users["text"]) if "ooks most evenings" in text]
    others = [row for row in range(USERS_COUNT) if row not in set(cooks)]
    assert truth.before[cooks, 0].min() > truth.before[others, 0].mean()


def test_tastes_drift_from_one_to_another(world: World) -> None:
    truth = world.truth
    turned = int(np.argmin(truth.turn))
    user, microseconds = truth.user_ids[turned], timedelta(microseconds=1)
    start, end = START - 60 * timedelta(days=1), START + DAYS * timedelta(days=1)
    before, after = truth.click_probability(user, start), truth.click_probability(user, end)
    assert np.abs(before - after).max() > 0.3
    near = truth.click_probability(user, end + microseconds)
    assert np.allclose(after, near, atol=1e-6)


def test_best_slate_beats_others_and_respects_what_it_may_show(world: World) -> None:
    truth, user, time = world.truth, world.truth.user_ids[3], START + timedelta(days=30)
    best = truth.best_slate(user, time, 10)
    chances = truth.click_probability(user, time, best)
    assert list(chances) == sorted(chances, reverse=True)
    assert truth.expected_clicks(user, time, best) > truth.expected_clicks(user, time, best[::-1])
    assert not set(truth.best_slate(user, time, 10, exclude=best[:4])) & set(best[:4])
    allowed = np.zeros(ITEMS_COUNT, dtype=bool)
    allowed[[4, 7]] = True
    assert set(truth.best_slate(user, time, 10, available=allowed)) == {truth.item_ids[4], truth.item_ids[7]}
    on_sale = dict(zip(truth.item_ids, truth.available, strict=True))
    assert max(on_sale[item] for item in best) <= time.timestamp() * 1e6
    assert truth.expected_clicks(user, time, []) == 0.0


def test_expected_clicks_use_the_position(world: World) -> None:
    truth, user, time = world.truth, world.truth.user_ids[0], START
    one, two = truth.item_ids[:2]
    first, second = truth.click_probability(user, time, [one, two])
    expected = first + second * 2**-truth.behaviour.decay
    assert truth.expected_clicks(user, time, [one, two]) == pytest.approx(expected)


def test_truth_survives_saving(world: World, tmp_path: Path) -> None:
    world.truth.save(tmp_path / "truth")
    loaded = Truth.load(tmp_path / "truth")
    user, time = world.truth.user_ids[5], START + timedelta(days=20)
    for task in ("click", "like", "purchase"):
        assert np.array_equal(loaded.task_probability(task, user, time), world.truth.task_probability(task, user, time))
    assert loaded.best_slate(user, time, 10) == world.truth.best_slate(user, time, 10)


def test_unknown_names_are_refused(world: World, tmp_path: Path) -> None:
    truth, user = world.truth, world.truth.user_ids[0]
    with pytest.raises(NotFoundError, match="no user 'nobody'"):
        truth.click_probability("nobody", START)
    with pytest.raises(NotFoundError, match="no item 'nothing'"):
        truth.click_probability(user, START, ["nothing"])
    with pytest.raises(InputError, match="no task 'share'"):
        truth.task_probability("share", user, START)
    with pytest.raises(NotFoundError, match="only `tandem simulate` makes one"):
        Truth.load(tmp_path)
    with pytest.raises(InputError, match="at least 1 user"):
        simulate(0, 10, 10, 0)


def test_smallest_worlds_work() -> None:
    for users, items in ((1, 2), (4, 5)):
        raw = simulate(users, items, 20, 1).raw
        assert (raw.users.height, raw.items.height) == (users, items)
        assert raw.events.filter(pl.col("action") == "click").select("user_id", "item_id").is_duplicated().sum() == 0


def test_there_is_something_to_learn(world: World) -> None:
    """The best slate is worth over twice the popular one; counting a user's categories and brands finds much of the gap."""
    events, truth = world.raw.events, world.truth
    result = make_requests(events, world.raw.source, SplitConfig("time", 0))
    clicks = events.filter(pl.col("action") == "click")
    training = clicks.filter(pl.col("timestamp") < result.cutoffs["ranker"])
    popularity = dict(training.group_by("item_id").len().rows())
    items = {row["item_id"]: (*row["categories"], row["brand"]) for row in world.raw.items.to_dicts()}
    sums = np.zeros(3)
    for user, time in result.requests.filter(pl.col("part") == "test").head(150).select("user_id", "timestamp").rows():
        history = clicks.filter((pl.col("user_id") == user) & (pl.col("timestamp") < time))["item_id"].to_list()
        on_sale = truth.available <= time.timestamp() * 1e6
        candidates = [item for item, sold in zip(truth.item_ids, on_sale, strict=True) if sold and item not in set(history)]
        liked = [Counter(items[item][place] for item in history) for place in range(3)]

        def affinity(item: str, liked: list[Counter[str]] = liked) -> float:
            department, subtype, brand = (counts[name] for counts, name in zip(liked, items[item], strict=True))
            return float((0.5 * department + subtype + 0.2) * (brand + 0.3) * (1 + popularity.get(item, 0)) ** 0.3)

        popular = sorted(candidates, key=lambda item: -popularity.get(item, 0))[:10]
        slates = (truth.best_slate(user, time, 10, exclude=history), popular, sorted(candidates, key=affinity, reverse=True)[:10])
        sums += [truth.expected_clicks(user, time, slate) for slate in slates]
    best, popular_clicks, affine = sums
    assert best > 2 * popular_clicks
    assert (affine - popular_clicks) / (best - popular_clicks) > 0.3
