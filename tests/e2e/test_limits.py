"""Limits of the HTTP service on a real release: a caller who asks too often, and a slate whose time is spent."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from fastapi.testclient import TestClient

from tandem.service.app import create_app
from tandem.service.recommend import Recommender
from tandem.service.settings import Settings
from tandem.service.slate import Ask

LOCAL = "http://127.0.0.1"


def client(settings: Settings, recommender: Recommender, **service: Any) -> TestClient:
    return TestClient(create_app(replace(settings, service=replace(settings.service, **service)), recommender), LOCAL)


def test_a_caller_above_the_rate_is_told_when_to_come_again(settings: Settings, recommender: Recommender) -> None:
    with client(settings, recommender, rate="3/hour") as opened:
        answers = [opened.post("/v1/recommend", json={}) for _ in range(4)]
        assert [each.status_code for each in answers] == [200, 200, 200, 429]
        assert answers[3].json()["code"] == "too_many_requests"
        assert 1 <= int(answers[3].headers["retry-after"]) <= 3600
        assert opened.get("/healthz").status_code == opened.get("/metrics").status_code == 200


def test_a_request_whose_budget_is_spent_skips_what_it_can_and_says_so(
    settings: Settings, recommender: Recommender, user: str
) -> None:
    with client(settings, recommender, budget_ms=0) as opened:
        slate = opened.post("/v1/recommend", json={"user_id": user, "query": "a warm sentence", "k": 5}).json()
    assert slate["returned"] == 5
    spent = ["budget_spent", "text_encoder_unavailable", "item_features_unavailable", "ranker_unavailable", "rerank_skipped"]
    assert sorted(slate["degraded"]) == sorted(spent)
    scores = [item["score"] for item in slate["items"]]
    assert scores == sorted(scores, reverse=True)  # the towers' own order


def test_an_ask_with_time_left_is_whole(recommender: Recommender, user: str) -> None:
    assert recommender.recommend(Ask(user_id=user, deadline=time.perf_counter() + 60)).degraded == ()
