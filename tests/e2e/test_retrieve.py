"""`POST /v1/retrieve`, and filters on every route that has them, on a real release."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from tandem.service.app import create_app
from tandem.service.filter_schemas import FiltersBody
from tandem.service.recommend import Recommender
from tandem.service.settings import load_settings

Answer = Any
LOCAL = "http://127.0.0.1"


@pytest.fixture(scope="module")
def client(tiny_workspace: Path, recommender: Recommender) -> Iterator[TestClient]:
    app = create_app(load_settings(tiny_workspace, {}), recommender)
    with TestClient(app, LOCAL, raise_server_exceptions=False) as opened:
        yield opened


def retrieve(client: TestClient, **body: Any) -> Answer:
    return client.post("/v1/retrieve", json=body)


def ids(answer: Answer) -> list[str]:
    return [item["item_id"] for item in answer.json()["items"]]


def test_candidates_come_with_all_that_named_them(client: TestClient, recommender: Recommender, user: str) -> None:
    answer = retrieve(client, user_id=user, k=40).json()
    items = answer["items"]
    assert (answer["returned"], answer["release"], answer["index"], answer["degraded"]) == (40, recommender.release, "Flat", [])
    assert len({item["item_id"] for item in items}) == 40
    assert [item["score"] for item in items] == sorted((item["score"] for item in items), reverse=True)
    assert {name for item in items for name in item["sources"]} >= {"towers", "covisit", "popular"}
    by_towers = {item["sources"]["towers"]["rank"]: item for item in items if "towers" in item["sources"]}
    assert set(by_towers) >= set(range(1, 21))
    assert all(item["score"] == pytest.approx(item["sources"]["towers"]["score"], abs=1e-4) for item in by_towers.values())
    assert items[0]["sources"]["towers"]["rank"] == 1
    assert {"user", "query", "candidates", "total"} <= set(answer["took_ms"])
    assert "predict" not in answer["took_ms"]


def test_any_mix_is_answered(client: TestClient, catalogue: pl.DataFrame, user: str) -> None:
    title, session = catalogue["title"][3], catalogue["item_id"].tail(2).to_list()
    asks: list[dict[str, Any]] = [{}, {"user_id": user}, {"session": session}, {"query": title}]
    asks.append({"user_id": user, "query": title})
    found = [ids(retrieve(client, **ask)) for ask in asks]
    assert len({tuple(each[:10]) for each in found}) == len(asks)
    assert catalogue["item_id"][3] in found[3][:10]
    assert not set(session) & set(found[2])
    assert retrieve(client).json()["cold_start"] is True


def test_what_filters_removed_and_left_adds_up_to_the_catalogue(client: TestClient, catalogue: pl.DataFrame, user: str) -> None:
    category = catalogue["categories"].explode().value_counts().sort("count", "categories")["categories"][-1]
    filters = {"categories_any": [category], "ranges": {"price": {"at_most": float(catalogue["price"].median())}}}
    answer = retrieve(client, user_id=user, k=150, filters=filters).json()
    assert answer["eligible"] + sum(answer["removed"].values()) == len(catalogue)
    assert set(answer["removed"]) == {"not available yet", "price", "category", "excluded"}
    assert min(answer["removed"]["price"], answer["removed"]["category"]) > 0
    assert answer["returned"] == answer["eligible"] > 0


@pytest.mark.parametrize("route", ["retrieve", "recommend", "similar"])
def test_filters_mean_the_same_on_every_route(client: TestClient, catalogue: pl.DataFrame, route: str) -> None:
    own = {"item_id": catalogue["item_id"][0]} if route == "similar" else {}
    names = catalogue["categories"].explode().drop_nulls().unique().sort().to_list()[:3]
    price, first, last = pl.col("price"), catalogue["item_id"].head(30).to_list(), catalogue["item_id"].tail(190).to_list()
    cases: list[tuple[dict[str, Any], pl.Expr]] = [
        ({"categories_any": names[:2]}, pl.col("categories").list.set_intersection(names[:2]).list.len() > 0),
        ({"categories_all": names[:1], "categories_none": names[1:]}, pl.col("categories").list.contains(names[0])),
        ({"ranges": {"price": {"at_least": 20, "at_most": 40}}}, price.is_between(20, 40)),
        ({"attributes": {"price": catalogue["price"].head(4).to_list()}}, price.is_in(catalogue["price"].head(4).to_list())),
        ({"include": first}, pl.col("item_id").is_in(first)),
        ({"exclude": last}, ~pl.col("item_id").is_in(last)),
    ]
    for filters, wanted in cases:
        if "categories_none" in filters:
            wanted &= pl.col("categories").list.set_intersection(names[1:]).list.len() == 0
        answer = client.post(f"/v1/{route}", json={"k": 150, "filters": filters} | own)
        everywhere = set(catalogue.filter(wanted)["item_id"]) - set(own.values())
        assert answer.status_code == 200
        assert len(ids(answer)) == min(150, len(everywhere)), filters
        assert set(ids(answer)) <= everywhere, filters


def test_what_was_seen_may_be_asked_for(client: TestClient, user: str) -> None:
    hidden, shown = (set(ids(retrieve(client, user_id=user, k=150, filters={"seen": seen}))) for seen in (False, True))
    assert set(ids(retrieve(client, user_id=user, k=150))) == hidden
    assert shown - hidden


def test_nothing_eligible_is_said(client: TestClient) -> None:
    answer = retrieve(client, filters={"categories_any": ["no such category"]}).json()
    assert (answer["items"], answer["eligible"], answer["degraded"]) == ([], 0, ["nothing_eligible"])


@pytest.mark.parametrize(
    ("filters", "field"),
    [
        ({"colour": 1}, "body.filters.?"),
        ({"attributes": {"s3cret": "x"}}, "body.filters"),
        ({"attributes": {"price": "s3cret"}}, "body.filters"),
        ({"attributes": {"price": []}}, "body.filters.attributes.?"),
        ({"ranges": {"price": {}}}, "body.filters.ranges.?"),
        ({"ranges": {"price": {"at_least": 2, "at_most": 1}}}, "body.filters.ranges.?"),
        ({"include": ["\u0000"]}, "body.filters.include.0"),
        ({"include": ["x"] * 1001}, "body.filters.include"),
        ({"seen": "perhaps"}, "body.filters.seen"),
    ],
)
def test_filters_that_mean_nothing_are_refused_by_field(client: TestClient, filters: dict[str, Any], field: str) -> None:
    for route in ("retrieve", "recommend"):
        answer = client.post(f"/v1/{route}", json={"filters": filters})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
        assert any(each["field"].startswith(field) for each in answer.json()["fields"]), answer.json()
        assert "s3cret" not in answer.text


def test_the_page_names_every_filter_and_its_curl_is_answered(client: TestClient) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "retrieval.md").read_text(encoding="utf-8")
    table = page.split("\n## Filters\n")[1].split("\n## ")[0]
    assert set(re.findall(r"`(\w+)`(?=[^|]*\|[^|]*\|$)", table, re.MULTILINE)) == set(FiltersBody.model_fields)
    (body,) = re.findall(r"v1/retrieve .*?-d '(\{.*?\})'$", page, re.MULTILINE | re.DOTALL)
    answer = client.post("/v1/retrieve", content=body, headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["returned"]) == (200, 50)


def test_k_has_the_services_limit_and_the_schema_tells_of_it_all(client: TestClient) -> None:
    assert [retrieve(client, k=k).status_code for k in (0, -1, 10**23, 151, 150)] == [422, 422, 422, 422, 200]
    paths = client.get("/openapi.json").json()["paths"]
    body = paths["/v1/retrieve"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/RetrieveBody"}
