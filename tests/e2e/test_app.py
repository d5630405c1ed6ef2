"""The HTTP service on a real release: what it answers, what it refuses, and what never leaves it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from fastapi.testclient import TestClient

from tandem.core import errors
from tandem.service.app import create_app, is_loopback
from tandem.service.problems import kind_of
from tandem.service.recommend import Recommender
from tandem.service.settings import Settings
from tandem.service.slate import Ask, Slate

Answer = Any  # the response class of whichever HTTP client Starlette's test client is built on
SECRET = "s3cret-of-the-caller"
LOCAL = "http://127.0.0.1"
JSON = {"content-type": "application/json"}
KEY = "correct horse battery staple"


@pytest.fixture(scope="module")
def client(settings: Settings, recommender: Recommender) -> Iterator[TestClient]:
    with TestClient(create_app(settings, recommender), LOCAL, raise_server_exceptions=False) as opened:
        yield opened


def ask(client: TestClient, **body: Any) -> Answer:
    return client.post("/v1/recommend", json=body)


def ids(answer: Answer) -> list[str]:
    return [item["item_id"] for item in answer.json()["items"]]


def refusal(answer: Answer) -> tuple[int, str]:
    """Status and code of a problem, which repeats nothing of what was sent."""
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code
    assert SECRET not in answer.text
    return answer.status_code, answer.json()["code"]


# ------------------------------------------------------------------------------------------------------------- answers


def test_a_known_user_gets_a_full_slate(client: TestClient, recommender: Recommender, user: str) -> None:
    answer = ask(client, user_id=user, k=7)
    slate = answer.json()
    assert answer.status_code == 200
    assert (slate["returned"], slate["release"], slate["cold_start"], slate["degraded"]) == (7, recommender.release, False, [])
    assert len(set(ids(answer))) == 7
    assert [item["position"] for item in slate["items"]] == list(range(1, 8))
    assert {"user", "candidates", "items", "predict", "rerank", "total"} <= set(slate["took_ms"])
    for item in slate["items"]:
        assert item["title"]
        assert item["reason"]
        assert set(item["predictions"]) == {"click", "like", "purchase"}
        assert all(0 <= chance <= 1 for chance in item["predictions"].values())


def test_what_a_user_has_had_does_not_come_again(client: TestClient, settings: Settings, user: str) -> None:
    events = pl.read_parquet(settings.data / "events.parquet")
    had = set(events.filter((pl.col("user_id") == user) & (pl.col("action") == "click"))["item_id"])
    shown = ids(ask(client, user_id=user, k=150))
    assert had
    assert not had & set(shown)


def test_as_many_as_are_eligible_and_never_a_made_up_one(client: TestClient, catalogue: pl.DataFrame) -> None:
    out = catalogue["item_id"].head(170).to_list()
    shown = ids(ask(client, user_id="nobody", k=150, exclude=out))
    assert sorted(shown) == sorted(catalogue["item_id"].tail(30).to_list())


@pytest.mark.parametrize(
    "name", ["stranger", "a b/c", "../../etc/passwd", "x'; DROP TABLE users; --", "🙂", "用户", "e\u0301", "-1"]
)
def test_an_unknown_user_is_answered(client: TestClient, name: str) -> None:
    answer = ask(client, user_id=name)
    assert answer.status_code == 200
    assert answer.json()["cold_start"] is True
    assert len(ids(answer)) == 10


def test_nobody_in_particular_gets_what_unknown_users_get(client: TestClient) -> None:
    assert ids(ask(client)) == ids(ask(client, user_id="stranger")) != []


def test_a_sentence_finds_the_item_that_it_describes(client: TestClient, catalogue: pl.DataFrame) -> None:
    found = 0
    for item_id, title in catalogue.select("item_id", "title").head(10).rows():
        found += item_id in ids(ask(client, query=title, k=20))
    assert found >= 6


def test_a_sentence_in_any_script_is_answered(client: TestClient) -> None:
    for query in ("给孩子的木制玩具", "مفكرة من ورق معاد تدويره", "🎁" * 50, "two\nlines\tand a tab", "word " * 5000):
        answer = ask(client, query=query, k=3)
        assert (answer.status_code, len(ids(answer))) == (200, 3)


def test_a_sentence_longer_than_the_model_reads_is_cut_and_said_so(client: TestClient) -> None:
    assert ask(client, query="word " * 500).json()["truncated"] is True
    assert ask(client, query="a wooden toy").json()["truncated"] is False


def test_a_blank_sentence_is_none(client: TestClient) -> None:
    assert ids(ask(client, query="  \n ")) == ids(ask(client))


def test_a_session_steers_and_is_not_repeated(client: TestClient, catalogue: pl.DataFrame) -> None:
    session = catalogue["item_id"].head(3).to_list()
    answer = ask(client, session=session, k=20)
    assert answer.status_code == 200
    assert ids(answer) != ids(ask(client, k=20))
    assert not set(session) & set(ids(answer))


def test_unknown_items_in_session_and_exclusions_are_passed_over(client: TestClient) -> None:
    answer = ask(client, session=["never seen"], exclude=["nor this"])
    assert (answer.status_code, ids(answer)) == (200, ids(ask(client)))


def test_a_category_filters_and_a_narrow_one_returns_fewer(client: TestClient, catalogue: pl.DataFrame) -> None:
    wanted = catalogue["categories"].explode().value_counts().sort("count", "categories")["categories"][0]
    members = catalogue.filter(pl.col("categories").list.contains(wanted))["item_id"].to_list()
    answer = ask(client, categories=[wanted], k=100)
    assert sorted(ids(answer)) == sorted(members)
    assert answer.json()["returned"] == len(members) < 100


def test_a_category_that_nothing_has_gives_an_empty_slate_that_says_so(client: TestClient) -> None:
    answer = ask(client, categories=["no such category"])
    assert (answer.status_code, ids(answer), answer.json()["degraded"]) == (200, [], ["nothing_eligible"])


def test_similar_items_are_others(client: TestClient, catalogue: pl.DataFrame) -> None:
    item = catalogue["item_id"][5]
    answer = client.post("/v1/similar", json={"item_id": item, "k": 5})
    assert answer.status_code == 200
    assert len(set(ids(answer))) == 5
    assert item not in ids(answer)
    assert {each["reason_code"] for each in answer.json()["items"]} == {"similar_to"}


def test_why_tells_of_shown_and_of_seen_items(client: TestClient, settings: Settings, user: str) -> None:
    first = ids(ask(client, user_id=user))[0]
    shown = client.get("/v1/why", params={"user_id": user, "item_id": first}).json()
    assert shown["verdict"] == "shown at position 1"
    assert shown["stages"][-1] == {"stage": "slate", "what": "shown", "rank": 1, "score": None}
    events = pl.read_parquet(settings.data / "events.parquet")
    seen = events.filter((pl.col("user_id") == user) & (pl.col("action") == "click"))["item_id"][0]
    assert "already had" in client.get("/v1/why", params={"user_id": user, "item_id": seen}).json()["verdict"]


def test_releases_name_the_champion_and_who_answers(client: TestClient, recommender: Recommender) -> None:
    known = client.get("/v1/releases").json()
    assert known["champion"] == known["serving"] == recommender.release
    assert [each["name"] for each in known["releases"] if each["live"]] == [recommender.release]


def test_a_request_id_is_kept_or_made(client: TestClient) -> None:
    assert ask(client, request_id="order 66").json()["request_id"] == "order 66"
    answer = ask(client)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


def test_the_last_of_two_equal_keys_counts(client: TestClient) -> None:
    answer = client.post("/v1/recommend", content='{"k": 3, "k": 2}', headers=JSON)
    assert len(ids(answer)) == 2


@pytest.mark.parametrize("path", ["/", "/releases"])
def test_the_pages_need_nothing_from_elsewhere(client: TestClient, path: str) -> None:
    page = client.get(path)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "://" not in page.text


def test_the_interface_is_published_with_its_problems(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    asked = {"recommend", "retrieve", "rank", "similar", "events", "users/{user_id}", "items/{item_id}", "why", "releases"}
    asked |= {"healthz", "readyz", "metrics"}
    assert {f"/v1/{route}" for route in asked} == set(paths)
    answers = paths["/v1/recommend"]["post"]["responses"]
    assert {each for every in paths["/v1/recommend"]["post"]["security"] for each in every} == {"HTTPBearer", "APIKeyHeader"}
    assert {"200", "401", "403", "413", "422", "503"} <= set(answers)
    assert answers["422"]["content"]["application/json"]["schema"]["$ref"].endswith("/ProblemAnswer")


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "k", ["0", "-1", str(10**23), "151", '"5"', "2.5", "true", "null", "NaN", "Infinity", "-Infinity", "1e999", "[]"]
)
def test_k_must_be_a_whole_number_within_reach(client: TestClient, k: str) -> None:
    body = f'{{"user_id": "{SECRET}", "k": {k}}}'
    for path in ("/v1/recommend", "/v1/similar"):
        assert refusal(
            client.post(path, content=body.replace("user_id", "item_id") if "similar" in path else body, headers=JSON)
        ) == (422, "invalid_request")


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (rf'{{"user_id": "{SECRET}\ud800"}}', 422),
        (rf'{{"query": "{SECRET}\udfff"}}', 422),
        (rf'{{"context": {{"{SECRET}\ud800": "x"}}}}', 422),
        (rf'{{"user_id": "{SECRET}\u0000"}}', 422),
        (rf'{{"query": "{SECRET}\u0000"}}', 422),
        (rf'{{"query": "{SECRET}\u001b[2J"}}', 422),
        (rf'{{"session": ["ok", "{SECRET}\u0085"]}}', 422),
        (f'{{"user_id": "{SECRET * 20}"}}', 422),
        ('{"user_id": ""}', 422),
        (f'{{"user_id": ["{SECRET}"]}}', 422),
        (f'{{"user_id": {{"$ne": "{SECRET}"}}}}', 422),
        (f'{{"{SECRET}": 1}}', 422),
        (f'{{"context": {{"a": NaN, "{SECRET}": Infinity}}}}', 422),
        (f'{{"context": {{"{SECRET}": 1e999}}}}', 422),
        (f'["{SECRET}"]', 422),
        (f'"{SECRET}"', 422),
        ("null", 422),
        ("", 422),
        (f"{{{SECRET}", 400),
        (f'{{"k": {"9" * 5000}}}', 400),
        ("[" * 30_000, 400),
        ('{"context": ' + '{"a":' * 9_000 + "1" + "}" * 9_001, 400),
        (b'{"user_id": "\xff\xfe"}', 400),
        (b"\x00\x01\x02", 400),
    ],
)
def test_a_bad_body_is_refused_without_echo(client: TestClient, body: str | bytes, status: int) -> None:
    answer = client.post("/v1/recommend", content=body, headers=JSON)
    assert refusal(answer) == (status, {400: "malformed_body", 422: "invalid_request"}[status])


def test_a_refusal_names_our_field_and_not_the_callers(client: TestClient) -> None:
    fields = ask(client, k=0, session=["fine", ""], **{SECRET: 1}).json()["fields"]
    assert {each["field"] for each in fields} == {"body.k", "body.session.1", "body.?"}


def test_a_form_is_not_json(client: TestClient) -> None:
    assert refusal(client.post("/v1/recommend", data={"user_id": SECRET})) == (422, "invalid_request")


@pytest.mark.parametrize("item", ["no such item", "-1", str(2**63), "a/b c"])
def test_an_unknown_item_is_not_found(client: TestClient, user: str, item: str) -> None:
    assert refusal(client.post("/v1/similar", json={"item_id": item})) == (404, "not_found")
    assert refusal(client.get("/v1/why", params={"user_id": user, "item_id": item})) == (404, "not_found")


def test_why_checks_its_ids(client: TestClient) -> None:
    assert refusal(client.get("/v1/why", params={"user_id": SECRET + "\x00", "item_id": "i001"})) == (422, "invalid_request")
    assert refusal(client.get("/v1/why", params={"user_id": SECRET})) == (422, "invalid_request")


def test_unknown_routes_and_methods_are_problems_too(client: TestClient) -> None:
    assert refusal(client.get(f"/v1/{SECRET}")) == (404, "no_such_route")
    assert refusal(client.get("/v1/recommend")) == (405, "method_not_allowed")


def test_a_body_above_64_kb_is_too_large(client: TestClient) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1000

    whole = json.dumps({"query": SECRET * 5000})
    assert refusal(client.post("/v1/recommend", content=whole, headers=JSON)) == (413, "body_too_large")
    assert refusal(client.post("/v1/recommend", content=chunks(), headers=JSON)) == (413, "body_too_large")
    assert refusal(client.post("/v1/recommend", content=b"{}", headers=JSON | {"content-length": str(50 * 2**20)})) == (
        413,
        "body_too_large",
    )
    assert client.post("/v1/recommend", content=json.dumps({"query": "word " * 12_000}), headers=JSON).status_code == 200


@pytest.mark.parametrize(
    "kind", [each for each in vars(errors).values() if isinstance(each, type) and each.__module__ == errors.__name__]
)
def test_every_error_of_ours_has_a_status(kind: type[errors.TandemError]) -> None:
    expected = {
        "InputError": 422, "NotFoundError": 404, "BusyError": 409, "ConflictError": 409, "GateRefusedError": 409,
        "IntegrityError": 503, "IncompatibleError": 503, "UnavailableError": 503, "TandemError": 500,
    }  # fmt: skip
    assert kind_of(kind("x")).status == expected[kind.__name__]


# ---------------------------------------------------------------------------------------------------- failures, secrecy


class Failing:
    """A recommender in which something fails on purpose: the fault that these tests inject."""

    release = "broken"

    def __init__(self, error: Exception) -> None:
        self._error = error

    def recommend(self, ask: Ask) -> Slate:
        raise self._error

    def warm(self) -> None: ...

    def close(self) -> None: ...


def failing(settings: Settings, error: Exception) -> TestClient:
    return TestClient(create_app(settings, Failing(error)), LOCAL, raise_server_exceptions=False)  # type: ignore[arg-type]


def test_a_crash_is_a_plain_500_and_its_message_stays_inside(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tandem.service")
    with failing(settings, RuntimeError(f"could not parse {SECRET}")) as client:
        answer = ask(client, user_id=SECRET, query=SECRET)
    assert refusal(answer) == (500, "internal_error")
    failure = next(json.loads(line) for line in caplog.messages if "failure" in line)
    assert failure["error"] == "RuntimeError"
    assert failure["request_id"] == answer.json()["request_id"]
    assert any("recommend" in place for place in failure["where"])
    assert SECRET not in caplog.text


def test_our_own_errors_keep_their_message_inside(settings: Settings, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "tandem.service")
    with failing(settings, errors.UnavailableError(f"no answer for {SECRET}")) as client:
        assert refusal(ask(client, user_id=SECRET)) == (503, "unavailable")
    assert SECRET not in caplog.text


def test_logs_and_metrics_hold_no_ids_and_no_words(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    ask(client, user_id=SECRET, query=SECRET)
    ask(client, user_id=SECRET, k=0)
    client.get("/v1/why", params={"user_id": SECRET, "item_id": "i001"})
    client.get(f"/{SECRET}")
    scraped = client.get("/metrics").text
    ours = [record.getMessage() for record in caplog.records if record.name.startswith(("tandem", "uvicorn"))]
    assert len(ours) == 4, "probes are not logged"
    assert not [line for line in ours if SECRET in line]
    assert SECRET not in scraped


def test_metrics_count_requests_stages_and_fallbacks(client: TestClient, recommender: Recommender) -> None:
    ask(client, categories=["no such category"])
    ask(client, k=0)
    scraped = client.get("/v1/metrics").text
    assert 'tandem_requests_total{route="/v1/recommend",status="422"}' in scraped
    assert 'tandem_stage_seconds_bucket{le="0.05",stage="predict"}' in scraped
    assert 'tandem_degraded_total{reason="nothing_eligible"}' in scraped
    assert f'tandem_release_info{{release="{recommender.release}"}} 1.0' in scraped
    assert "tandem_ready 1.0" in scraped


# --------------------------------------------------------------------------------------------------------- who may ask


def hashed(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()


@pytest.fixture(scope="module")
def guarded(settings: Settings, recommender: Recommender) -> Iterator[TestClient]:
    own = replace(settings.service, host="0.0.0.0", keys=(hashed("another"), hashed(KEY).upper()))
    with TestClient(create_app(replace(settings, service=own), recommender), "http://shop.example") as opened:
        yield opened


def test_without_a_key_only_health_answers(guarded: TestClient) -> None:
    for path in ("/healthz", "/readyz", "/v1/healthz", "/v1/readyz", "/"):
        assert guarded.get(path).status_code == 200
    for answer in (ask(guarded), guarded.get("/v1/releases"), guarded.get("/metrics"), guarded.get("/v1/metrics")):
        assert refusal(answer) == (401, "key_required")
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "headers",
    [
        {"authorization": "Bearer forged"},
        {"x-api-key": KEY + "x"},
        {"x-api-key": hashed(KEY)},
        {"x-api-key": "ключ".encode()},
        {"authorization": f"Basic {KEY}", "x-api-key": "x"},
    ],
)
def test_a_forged_key_is_refused(guarded: TestClient, headers: dict[str, str]) -> None:
    assert refusal(guarded.post("/v1/recommend", json={}, headers=headers)) == (403, "key_refused")


@pytest.mark.parametrize("headers", [{"authorization": f"Bearer {KEY}"}, {"authorization": f"bearer {KEY}"}, {"x-api-key": KEY}])
def test_a_key_opens(guarded: TestClient, headers: dict[str, str]) -> None:
    assert guarded.post("/v1/recommend", json={}, headers=headers).status_code == 200


def test_an_open_bind_needs_a_key_and_keys_are_hashes(settings: Settings) -> None:
    for host in ("0.0.0.0", "::", "192.168.1.5", "shop.example"):
        with pytest.raises(errors.InputError, match="API key"):
            create_app(replace(settings, service=replace(settings.service, host=host)))
    with pytest.raises(errors.InputError, match="SHA-256"):
        create_app(replace(settings, service=replace(settings.service, keys=(KEY,))))


@pytest.mark.parametrize(
    ("host", "local"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True), ("localhost", True), ("10.0.0.1", False)]
)
def test_loopback(host: str, local: bool) -> None:
    assert is_loopback(host) is local


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "evil.example:8100", "", "[::1"]
)
def test_without_keys_only_this_machines_names_are_answered(client: TestClient, host: str) -> None:
    assert refusal(client.post("/v1/recommend", json={}, headers={"host": host})) == (400, "host_refused")


@pytest.mark.parametrize("host", ["localhost:8100", "127.0.0.1:8100", "[::1]:8100"])
def test_this_machines_names_are_answered(client: TestClient, host: str) -> None:
    assert client.post("/v1/recommend", json={}, headers={"host": host}).status_code == 200


def test_named_hosts_are_answered_and_no_others(settings: Settings, recommender: Recommender) -> None:
    own = replace(settings.service, allowed_hosts=("shop.example", "*.cdn.example"))
    with TestClient(create_app(replace(settings, service=own), recommender), LOCAL) as client:
        status: Callable[[str], int] = lambda host: client.get("/v1/releases", headers={"host": host}).status_code  # noqa: E731
        assert [status(host) for host in ("shop.example", "a.cdn.example")] == [200, 200]
        assert [status(host) for host in ("cdn.example", "xcdn.example", "a.shop.example", "127.0.0.1")] == [400] * 4


# ----------------------------------------------------------------------------------------------------------- readiness


def test_readiness_follows_the_life_of_the_service(settings: Settings, recommender: Recommender) -> None:
    app = create_app(settings, recommender)
    client = TestClient(app, LOCAL)
    assert (client.get("/readyz").status_code, client.get("/healthz").status_code) == (503, 200)
    with TestClient(app, LOCAL) as running:
        assert running.get("/readyz").json() == {"status": "ready", "release": recommender.release}
    assert client.get("/v1/readyz").json()["status"] == "draining"


def test_before_a_release_is_loaded_questions_are_told_to_wait(settings: Settings) -> None:
    assert refusal(ask(TestClient(create_app(settings), LOCAL))) == (503, "not_ready")


def test_without_a_champion_the_service_does_not_start(settings: Settings, tmp_path: Path) -> None:
    with (
        pytest.raises(errors.NotFoundError, match="no release is live"),
        TestClient(create_app(replace(settings, workspace=tmp_path))),
    ):
        pass
