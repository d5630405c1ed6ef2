"""`POST /v1/rank` on a real release: the caller's own items in the ranker's order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from tandem.service.app import create_app
from tandem.service.settings import Settings
from tandem.service.wiring import users_with_history

LOCAL = "http://127.0.0.1"


@pytest.fixture(scope="module")
def client(settings: Settings) -> Iterator[TestClient]:
    with TestClient(create_app(settings), LOCAL, raise_server_exceptions=False) as opened:
        yield opened


def rank(client: TestClient, **body: Any) -> Any:
    return client.post("/v1/rank", json=body)


def ids(slate: dict[str, Any]) -> list[str]:
    return [item["item_id"] for item in slate["items"]]


def test_all_of_the_callers_items_come_best_first_and_no_others(client: TestClient, settings: Settings, user: str) -> None:
    sent = pl.read_parquet(settings.data / "items.parquet")["item_id"].sample(50, seed=1).to_list()
    answer = rank(client, user_id=user, item_ids=[*sent, sent[0], "never made"]).json()
    assert sorted(ids(answer)) == sorted(sent)
    assert answer["unknown"] == ["never made"]
    scores = [item["score"] for item in answer["items"]]
    assert scores == sorted(scores, reverse=True)
    assert set(answer["items"][0]["predictions"]) == {"click", "like", "purchase"}
    assert answer["degraded"] == []


def test_the_order_is_the_persons_own(client: TestClient, settings: Settings) -> None:
    sent = pl.read_parquet(settings.data / "items.parquet")["item_id"].head(60).to_list()
    orders = {tuple(ids(rank(client, user_id=each, item_ids=sent).json())) for each in users_with_history(settings.data, 8, 4)}
    assert len(orders) == 4
    assert tuple(ids(rank(client, item_ids=sent).json())) not in orders


def test_what_the_user_had_may_come(client: TestClient, settings: Settings, user: str) -> None:
    had = pl.read_parquet(settings.data / "events.parquet").filter(user_id=user, action="click")["item_id"].unique().to_list()
    assert sorted(ids(rank(client, user_id=user, item_ids=had).json())) == sorted(had)


def test_nothing_that_the_release_holds_is_an_empty_answer(client: TestClient) -> None:
    answer = rank(client, item_ids=["never made"]).json()
    assert (answer["items"], answer["unknown"], answer["degraded"]) == ([], ["never made"], ["nothing_eligible"])


@pytest.mark.parametrize("items", [[], ["a\u0000b"], ["x"] * 1001, "text", None])
def test_lists_that_are_none_are_refused(client: TestClient, items: Any) -> None:
    answer = rank(client, item_ids=items)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
