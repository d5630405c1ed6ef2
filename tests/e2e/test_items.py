"""Single items on a real release: put and deleted over HTTP and by command, in every worker, after restarts and promotions."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from feature_repo.item_changes import FOLDER, ItemChanges
from feature_repo.store import load_items
from tandem.service import recipes
from tandem.service.app import create_app
from tandem.service.recommend import Recommender
from tandem.service.settings import Settings, load_settings
from tandem.service.slate import Ask
from tandem.service.wiring import open_recommender, users_with_history

Answer = Any
LOCAL = "http://127.0.0.1"
MUG = {"title": "An extraordinary teapot of blue porcelain", "text": "Hand painted, for four cups.", "categories": ["teapots"]}


@pytest.fixture
def settings(tiny_workspace: Path, tmp_path: Path) -> Settings:
    shutil.copytree(tiny_workspace, tmp_path / "ws")
    return load_settings(tmp_path / "ws", {})


@pytest.fixture
def recommender(settings: Settings) -> Iterator[Recommender]:
    opened = open_recommender(settings)
    yield opened
    opened.close()


@pytest.fixture
def client(settings: Settings, recommender: Recommender) -> Iterator[TestClient]:
    with TestClient(create_app(settings, recommender), LOCAL, raise_server_exceptions=False) as opened:
        yield opened


@pytest.fixture
def catalogue(settings: Settings) -> pl.DataFrame:
    return pl.read_parquet(settings.data / "items.parquet")


def ids(answer: Answer) -> list[str]:
    assert answer.status_code == 200, answer.text
    return [item["item_id"] for item in answer.json()["items"]]


def everything(client: TestClient, **asked: Any) -> list[list[str]]:
    """What every route that lists items says."""
    return [
        ids(client.post("/v1/recommend", json={"k": 150, **asked})),
        ids(client.post("/v1/retrieve", json={"k": 150, **asked})),
    ]


def anywhere(client: TestClient, **asked: Any) -> set[str]:
    return {item for found in everything(client, **asked) for item in found}


def waited_for(seen: Callable[[], bool], seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if seen():
            return True
        time.sleep(0.02)
    return seen()


# ----------------------------------------------------------------------------------------------------------------- put


def test_a_put_item_goes_through_the_whole_spine(client: TestClient, settings: Settings, catalogue: pl.DataFrame) -> None:
    user = users_with_history(settings.data, 8, 1)[0]
    price = float(catalogue["price"].max() or 0) + 1
    answer = client.put("/v1/items/teapots/blue 1", json={**MUG, "attributes": {"price": price}})
    assert answer.json() == {"item_id": "teapots/blue 1", "created": True, "deleted": False, "release": answer.json()["release"]}
    found = client.post("/v1/recommend", json={"user_id": user, "query": MUG["title"], "k": 5}).json()
    (item,) = [each for each in found["items"] if each["item_id"] == "teapots/blue 1"]
    assert found["degraded"] == []
    assert (item["title"], item["categories"]) == (MUG["title"], MUG["categories"])
    assert item["reason_code"] == "matches_query"
    assert set(item["predictions"]) == {"click", "like", "purchase"}
    assert all(0 < chance < 1 for chance in item["predictions"].values())
    candidate = client.post("/v1/retrieve", json={"query": MUG["title"], "k": 3}).json()["items"][0]
    assert candidate["item_id"] == "teapots/blue 1"
    assert candidate["sources"]["towers"]["rank"] == 1
    for filters in ({"ranges": {"price": {"at_least": price}}}, {"categories_any": ["teapots"]}):
        assert everything(client, filters=filters) == [["teapots/blue 1"]] * 2
    assert client.post("/v1/similar", json={"item_id": "teapots/blue 1", "k": 5}).json()["returned"] == 5
    assert client.get("/v1/why", params={"user_id": user, "item_id": "teapots/blue 1"}).json()["title"] == MUG["title"]
    assert ids(client.post("/v1/recommend", json={"session": ["teapots/blue 1"], "k": 20})) != ids(
        client.post("/v1/recommend", json={"k": 20})
    )


def test_a_changed_item_is_as_it_is_now_and_keeps_what_was_learned(client: TestClient, catalogue: pl.DataFrame) -> None:
    before = client.post("/v1/retrieve", json={"k": 1}).json()["items"][0]
    item = catalogue.row(by_predicate=pl.col("item_id") == before["item_id"], named=True)
    changed = {"title": "Quite another title", "text": item["text"], "categories": item["categories"]}
    answer = client.put(f"/v1/items/{item['item_id']}", json={**changed, "attributes": {"price": item["price"]}})
    assert answer.json()["created"] is False
    after = client.post("/v1/retrieve", json={"k": 1}).json()["items"][0]
    assert (after["item_id"], after["title"]) == (item["item_id"], "Quite another title")
    assert after["sources"]["popular"] == before["sources"]["popular"]
    assert client.put(f"/v1/items/{item['item_id']}", json=changed).status_code == 200
    unpriced = everything(client, filters={"ranges": {"price": {"at_least": 0}}, "include": [item["item_id"]]})
    assert unpriced == [[], []]


def test_an_item_of_tomorrow_waits(client: TestClient) -> None:
    late = (datetime.now(UTC) + timedelta(days=900)).isoformat()
    client.put("/v1/items/late", json={**MUG, "available_from": late})
    assert "late" not in anywhere(client, query=MUG["title"])
    assert "late" in ids(client.post("/v1/retrieve", json={"query": MUG["title"], "filters": {"available": False}}))


# -------------------------------------------------------------------------------------------------------------- delete


def test_a_deleted_item_is_nowhere_and_may_come_again(client: TestClient, settings: Settings, catalogue: pl.DataFrame) -> None:
    user = users_with_history(settings.data, 8, 1)[0]
    gone = ids(client.post("/v1/recommend", json={"user_id": user, "k": 3}))
    for item_id in gone:
        assert client.delete(f"/v1/items/{item_id}").json()["deleted"] is True
    for asked in ({"user_id": user}, {"session": gone}, {"query": "a gift"}, {}, {"filters": {"include": gone}}):
        assert not set(gone) & anywhere(client, **asked)
    other = next(item for item in catalogue["item_id"] if item not in gone)
    assert not set(gone) & set(ids(client.post("/v1/similar", json={"item_id": other, "k": 150})))
    for answer in (
        client.post("/v1/similar", json={"item_id": gone[0]}),
        client.get("/v1/why", params={"user_id": user, "item_id": gone[0]}),
        client.delete(f"/v1/items/{gone[0]}"),
    ):
        assert (answer.status_code, answer.json()["code"]) == (404, "not_found")
    client.put(f"/v1/items/{gone[0]}", json=MUG)
    assert gone[0] in ids(client.post("/v1/recommend", json={"query": MUG["title"]}))


def test_a_catalogue_may_be_emptied_one_by_one(client: TestClient, settings: Settings, catalogue: pl.DataFrame) -> None:
    ItemChanges(settings.data).delete(catalogue["item_id"].to_list())
    assert waited_for(lambda: everything(client) == [[], []], 1.0)
    answer = client.post("/v1/recommend", json={}).json()
    assert (answer["items"], answer["degraded"]) == ([], ["empty_catalogue"])
    client.put("/v1/items/first", json=MUG)
    assert everything(client) == [["first"], ["first"]]


# ------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "body.title"),
        ({"title": ""}, "body.title"),
        ({"title": "a\u0000"}, "body.title"),
        ({**MUG, "colour": "blue"}, "body.?"),
        ({**MUG, "categories": ["x"] * 33}, "body.categories"),
        ({**MUG, "available_from": "2026-01-01"}, "body.available_from"),
        ({**MUG, "attributes": {"s3cret": 1}}, "body.attributes"),
        ({**MUG, "attributes": {"price": "s3cret"}}, "body.attributes"),
        ({**MUG, "attributes": {"title": "over"}}, "body.attributes"),
    ],
)
def test_what_is_no_item_is_refused_and_changes_nothing(client: TestClient, settings: Settings, body: Any, field: str) -> None:
    answer = client.put("/v1/items/new", json=body)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert answer.json()["fields"][0]["field"].startswith(field)
    assert "s3cret" not in answer.text
    assert not (settings.data / FOLDER).exists()


@pytest.mark.parametrize("item_id", ["%00", "a%07b", "x" * 257, "%F0%28%8C%28"])
def test_what_is_no_id_is_refused(client: TestClient, item_id: str) -> None:
    for answer in (client.put(f"/v1/items/{item_id}", json=MUG), client.delete(f"/v1/items/{item_id}")):
        assert answer.status_code in (400, 422) or "\ufffd" in answer.text or answer.status_code == 404
    assert client.put("/v1/items/big", content=b"{" + b" " * 70_000 + b"}").status_code == 413
    assert client.delete("/v1/items/nobody knows it").status_code == 404


def test_a_release_without_a_workspace_takes_no_items(settings: Settings, recommender: Recommender) -> None:
    alone = Recommender(replace(recommender._parts, live=None))
    with TestClient(create_app(settings, alone), LOCAL, raise_server_exceptions=False) as client:
        assert client.put("/v1/items/x", json=MUG).status_code == 503


# ------------------------------------------------------------------------------- other workers, restarts, promotions, data


def test_every_worker_and_a_later_one_sees_it_within_a_second(client: TestClient, settings: Settings) -> None:
    other = open_recommender(settings)
    gone = ids(client.post("/v1/recommend", json={}))[0]

    def shown(recommender: Recommender) -> set[str]:
        slate = recommender.recommend(Ask(query=MUG["title"], k=150))
        return {item.item_id for item in slate.items} & {"blue", gone}

    assert shown(other) == {gone}
    client.put("/v1/items/blue", json=MUG)
    client.delete(f"/v1/items/{gone}")
    assert waited_for(lambda: shown(other) == {"blue"}, 1.0)
    later = open_recommender(settings)
    assert shown(later) == {"blue"}
    for each in (other, later):
        each.close()


def test_another_process_puts_and_deletes_by_command(client: TestClient, settings: Settings, catalogue: pl.DataFrame) -> None:
    gone, file = catalogue["item_id"][0], settings.workspace / "new.csv"
    file.write_text(f'item_id,title,categories,price\nblue,"{MUG["title"]}",teapots|gifts,12.5\n')
    for words in (["put", str(file)], ["delete", gone]):
        run = [sys.executable, "-m", "tandem.service.cli", "--workspace", str(settings.workspace), "items", *words, "--json"]
        subprocess.run(run, check=True, capture_output=True)
    assert waited_for(lambda: "blue" in ids(client.post("/v1/recommend", json={"query": MUG["title"]})), 1.0)
    assert gone not in anywhere(client, filters={"include": [gone, "blue"]})
    assert everything(client, filters={"categories_all": ["teapots", "gifts"], "ranges": {"price": {"at_most": 12.5}}}) == [
        ["blue"],
        ["blue"],
    ]
    vectors = [change.vectors for change in ItemChanges(settings.data).read()]
    assert vectors[0] is not None
    assert vectors[0].shape[0] == 1


def test_the_next_training_learns_them_and_a_rollback_still_lists_them(settings: Settings, catalogue: pl.DataFrame) -> None:
    old = open_recommender(settings)
    gone = catalogue["item_id"][1]
    old.live.put(pl.DataFrame({"item_id": ["blue"], "title": [MUG["title"]]}))
    old.live.delete(gone)
    assert {"blue"} < set(load_items(settings.data)["item_id"])
    recipes.run_all(settings)
    made = pl.read_parquet(settings.data / "items.parquet")["item_id"].to_list()
    assert "blue" in made
    assert gone not in made
    (name,) = {path.name for path in settings.releases.iterdir() if not path.name.startswith(".")} - {old.release}
    recipes.release_promote(settings, name, because="it knows the new items", force=True)  # the gate may mind so small a world
    new = open_recommender(settings)
    assert new.release == name
    assert new._parts.retriever.listing.view is None  # nothing to tell it
    assert "blue" in new._parts.retriever.item_ids
    new.live.put(pl.DataFrame({"item_id": ["later"], "title": ["Later still"]}))
    again = open_recommender(settings, old.release)
    for each, names in ((new, {"blue", "later"}), (again, {"blue", "later"}), (old, {"blue", "later"})):
        time.sleep(0.3)
        found = {item.item_id for item in each.retrieve(Ask(k=300)).items}
        assert names <= found
        assert gone not in found
        each.close()


def test_events_of_a_put_item_are_taken(client: TestClient, settings: Settings) -> None:
    event = {"user_id": "new user", "item_id": "blue", "action": "click"}
    assert client.post("/v1/events", json={"events": [event]}).json()["refused"][0]["reason"] == "unknown item"
    client.put("/v1/items/blue", json=MUG)
    taken = client.post("/v1/events", json={"events": [event]}).json()
    assert (taken["appended"], taken["refused"]) == (1, [])


def test_a_damaged_journal_leaves_what_was_listed_and_is_said(client: TestClient, settings: Settings) -> None:
    client.put("/v1/items/blue", json=MUG)
    (file,) = (settings.data / FOLDER).glob("journal-*.bin")
    with file.open("ab") as handle:
        handle.write(b"?" * 64)
    time.sleep(0.3)
    answer = client.post("/v1/recommend", json={"query": MUG["title"]}).json()
    assert answer["items"][0]["item_id"] == "blue"
    assert answer["degraded"] == ["item_changes_unavailable"]
