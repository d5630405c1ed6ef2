"""One champion, an exact history, and a compare-and-set that only one can win; the same on SQLite and PostgreSQL."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import product
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text, update

from registry.release import Manifest
from registry.store import ReleaseStore
from registry.tables import TABLES_VERSION, ReleaseRow
from registry.work import PROMOTE_STEPS, Champion
from tandem.core.errors import (
    BusyError,
    ConflictError,
    GateRefusedError,
    IncompatibleError,
    InputError,
    NotFoundError,
    UnavailableError,
)

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


def manifest(name: str, content: str | None = None) -> Manifest:
    nothing: dict[str, str] = {}
    return Manifest(1, name, content or f"hash of {name}", {"a.json": "0"}, nothing, nothing, {}, {}, nothing, {}, {}, {"m": 0.5})


class Clock:
    """A minute goes by at each look."""

    def __init__(self) -> None:
        self.now = NOON

    def __call__(self) -> datetime:
        self.now += timedelta(minutes=1)
        return self.now


@pytest.fixture
def store(database: str) -> Iterator[ReleaseStore]:
    store = ReleaseStore(database, clock=Clock())
    for name in ("a", "b", "c", "d"):
        store.add(manifest(name), Path("/releases") / name)
    yield store
    store.close()


def promote(store: ReleaseStore, *names: str) -> None:
    for name in names:
        store.promote(name, expected=store.champion().name, who="ada", why=f"{name} is better")


def test_a_new_registry_has_nothing_live(database: str) -> None:
    store = ReleaseStore(database)
    assert store.champion() == Champion(None, 0, None)
    assert store.list() == ()
    assert store.history() == ()
    assert store.champion_at(NOON) is None
    store.close()


def test_a_release_is_remembered_as_it_was_added(store: ReleaseStore) -> None:
    release = store.get("a")
    assert release.manifest == manifest("a")
    assert release.folder == Path("/releases/a")
    assert release.created_at == NOON + timedelta(minutes=1)
    assert [one.name for one in store.list()] == ["a", "b", "c", "d"]


def test_adding_again_is_fine_and_a_name_never_changes_its_content(store: ReleaseStore) -> None:
    assert store.add(manifest("a"), Path("/elsewhere")) == store.get("a")
    with pytest.raises(ConflictError, match="names are never reused"):
        store.add(manifest("a", content="other"), Path("/releases/a"))


def test_promotions_are_told_exactly(store: ReleaseStore) -> None:
    store.promote("a", expected=None, who="ada", why="the first")
    gate = store.judged("b", "a", True, {"sentences": ["ndcg@10 better"]})
    store.promote("b", expected="a", who="bob", why="ndcg@10 +0.01", gate=gate.number)
    first, second = store.history()
    assert (first.version, first.kind, first.previous, first.name, first.who, first.why) == (
        1,
        "promote",
        None,
        "a",
        "ada",
        "the first",
    )
    assert (second.version, second.previous, second.name, second.who, second.gate) == (2, "a", "b", "bob", gate.number)
    assert first.at < gate.judged_at < second.at
    assert store.champion() == Champion("b", 2, second.at)
    assert store.gates("b") == (gate,)


def test_what_was_live_when(store: ReleaseStore) -> None:
    promote(store, "a", "b")
    first, second = (line.at for line in store.history())
    instant = timedelta(microseconds=1)
    assert [store.champion_at(at) for at in (first - instant, first, second - instant, second)] == [None, "a", "a", "b"]


def test_a_change_is_told_with_the_one_that_ended_it_though_its_release_is_gone(store: ReleaseStore) -> None:
    gate = store.judged("a", None, True, {"sentences": ["fine"]})
    store.promote("a", expected=None, who="ada", why="the first", gate=gate.number)
    promote(store, "b", "c", "d")
    store.delete("a")
    with store.look() as work:
        lines = work.history()
        change = work.change_at(lines[1].at - timedelta(microseconds=1))
        assert change == lines[0]
        assert work.change_after(1) == lines[1]
        assert work.change_after(4) is None
        assert work.change_at(lines[0].at - timedelta(microseconds=1)) is None
        release, deleted = work.recall("a")
        assert (release.name, deleted is not None, work.recall("d")[1]) == ("a", True, None)
        assert work.gate(gate.number) == gate
        for ask in (lambda: work.recall("nobody"), lambda: work.gate(99)):
            with pytest.raises(NotFoundError):
                ask()


def test_the_loser_is_told_who_won_and_when(store: ReleaseStore) -> None:
    store.promote("a", expected=None, who="ada", why="the first")
    store.promote("b", expected="a", who="bob", why="better")
    with pytest.raises(ConflictError, match=r"'c' was to replace a, but 'b' is live since 2026-11-20 \d\d:\d\d:00 UTC by bob"):
        store.promote("c", expected="a", who="cy", why="better")
    with pytest.raises(ConflictError, match="'b' is live already"):
        store.promote("b", expected="a", who="cy", why="again")
    with pytest.raises(ConflictError, match="'b' is live already"):
        store.promote("b", expected="b", who="cy", why="again")
    assert [line.name for line in store.history()] == ["a", "b"]


def test_expecting_a_champion_where_there_is_none(store: ReleaseStore) -> None:
    with pytest.raises(ConflictError, match="nothing is live"):
        store.promote("a", expected="b", who="ada", why="x")


def test_a_champion_that_went_and_came_back_is_noticed_by_its_version(store: ReleaseStore) -> None:
    promote(store, "a")
    seen = store.champion()
    promote(store, "b")
    store.rollback(expected="b", who="ada", why="errors")
    with pytest.raises(ConflictError, match=r"'c' was judged against 'a' before it went and came back at .* by ada \(change 3\)"):
        store.promote("c", expected="a", version=seen.version, who="cy", why="judged before")
    store.promote("c", expected="a", version=seen.version + 2, who="cy", why="judged after")


def test_history_goes_forward_although_clocks_go_back(database: str) -> None:
    times = iter([NOON, NOON, NOON, NOON - timedelta(hours=1)])
    store = ReleaseStore(database, clock=lambda: next(times))
    store.add(manifest("a"), Path("a"))
    store.add(manifest("b"), Path("b"))
    promote(store, "a", "b")
    assert [line.at for line in store.history()] == [NOON, NOON + timedelta(microseconds=1)]
    store.close()


def test_rollback_twice_goes_back_twice(store: ReleaseStore) -> None:
    promote(store, "a", "b", "c")
    assert store.previous() == "b"
    assert store.rollback(expected="c", who="ada", why="errors").name == "b"
    assert store.previous() == "a"
    assert store.rollback(expected="b", who="ada", why="still errors").name == "a"
    with pytest.raises(NotFoundError, match="no champion before"):
        store.rollback(expected="a", who="ada", why="and more")
    promote(store, "d")
    line = store.rollback(expected="d", who="ada", why="errors")
    assert (line.kind, line.previous, line.name, line.version) == ("rollback", "d", "a", 7)


def test_rollback_to_a_named_release_that_was_live(store: ReleaseStore) -> None:
    promote(store, "a", "b", "c")
    assert store.rollback("a", expected="c", who="ada", why="known good").name == "a"
    with pytest.raises(InputError, match="never live"):
        store.rollback("d", expected="a", who="ada", why="x")
    with pytest.raises(ConflictError, match="'a' is live since"):
        store.rollback("b", expected="c", who="bob", why="pressed at the same time")


def test_rollback_steps_over_a_deleted_release(store: ReleaseStore) -> None:
    promote(store, "a", "b", "c", "d")
    store.rollback("b", expected="d", who="ada", why="errors since c")
    promote(store, "c", "d")
    store.add(manifest("e"), Path("e"))
    promote(store, "e")
    store.delete("b")
    store.rollback("c", expected="e", who="ada", why="errors")
    assert store.previous() == "a"


def test_pinned_are_the_champion_and_those_a_rollback_would_find(store: ReleaseStore) -> None:
    promote(store, "a", "b", "c", "d")
    assert store.pinned() == ("d", "c", "b")
    store.rollback(expected="d", who="ada", why="errors")
    assert store.pinned() == ("c", "b", "a")
    assert store.pinned(before=0) == ("c",)


def test_the_live_release_and_those_a_rollback_needs_cannot_be_deleted(store: ReleaseStore) -> None:
    promote(store, "a", "b", "c", "d")
    with pytest.raises(ConflictError, match="'d' is live since"):
        store.delete("d")
    for name in ("c", "b"):
        with pytest.raises(ConflictError, match=f"'{name}' was live just before 'd', and a rollback may need it"):
            store.delete(name)
    store.delete("a")
    assert [one.name for one in store.list()] == ["b", "c", "d"]


def test_a_deleted_name_stays_taken_and_in_history(store: ReleaseStore) -> None:
    promote(store, "a", "b", "c", "d")
    deleted = store.delete("a")
    for use in (store.get, store.delete):
        with pytest.raises(NotFoundError, match="deleted"):
            use("a")
    with pytest.raises(NotFoundError):
        store.promote("a", expected="d", who="ada", why="x")
    with pytest.raises(ConflictError, match="deleted"):
        store.add(manifest("a"), Path("/releases/a"))
    assert [line.name for line in store.history()] == ["a", "b", "c", "d"]
    with store.look() as work:
        assert work.deleted() == (deleted,)


def test_the_challenger_is_who_last_passed_against_the_live_one(store: ReleaseStore) -> None:
    assert store.challenger() is None
    store.judged("a", None, True, {})
    assert store.challenger() == "a"
    promote(store, "a")
    assert store.challenger() is None, "it is live now"
    store.judged("b", "a", True, {})
    store.judged("c", "a", True, {})
    store.judged("d", "a", False, {})
    store.judged("a", "a", True, {})
    assert store.challenger() == "c"
    store.delete("c")
    assert store.challenger() == "b"
    promote(store, "b")
    assert store.challenger() is None, "what passed against a says nothing about b"
    store.rollback(expected="b", who="ada", why="errors")
    assert store.challenger() is None, "b had its turn, and lost it"


@pytest.mark.parametrize("name", ["nobody", "", "a'; DROP TABLE releases; --", "😀"])
def test_unknown_names_are_not_found(store: ReleaseStore, name: str) -> None:
    with pytest.raises(NotFoundError):
        store.get(name)
    with pytest.raises(NotFoundError):
        store.promote(name, expected=None, who="ada", why="x")
    assert store.champion().name is None


def test_history_must_say_who_and_why(store: ReleaseStore) -> None:
    with pytest.raises(InputError, match="who"):
        store.promote("a", expected=None, who=" ", why="x")
    with pytest.raises(InputError, match="why"):
        store.promote("a", expected=None, who="ada", why="")
    assert store.champion() == Champion(None, 0, None)


def test_a_gate_that_said_no_refuses(store: ReleaseStore) -> None:
    promote(store, "a")
    gate = store.judged("b", "a", False, {"sentences": ["ndcg@10 is worse by 0.2"]})
    with pytest.raises(GateRefusedError, match=r"ndcg@10 is worse by 0\.2"):
        store.promote("b", expected="a", who="ada", why="x", gate=gate.number)


def test_a_forced_promotion_says_so_and_names_the_gate_that_refused(store: ReleaseStore) -> None:
    promote(store, "a")
    gate = store.judged("b", "a", False, {})
    line = store.promote("b", expected="a", who="ada", why="the old one fails", gate=gate.number, forced=True)
    assert (line.kind, line.gate) == ("forced", gate.number)
    assert store.history()[-1] == line
    assert store.pinned() == ("b", "a")
    other = store.judged("c", "a", False, {})
    with pytest.raises(ConflictError, match="compared 'c' with a, not with b"):
        store.promote("c", expected="b", who="ada", why="x", gate=other.number, forced=True)


def test_a_gate_counts_only_for_its_challenger_and_champion(store: ReleaseStore) -> None:
    promote(store, "a")
    gate = store.judged("b", "a", True, {})
    with pytest.raises(NotFoundError, match="no gate"):
        store.promote("c", expected="a", who="ada", why="x", gate=gate.number)
    with pytest.raises(NotFoundError, match="no gate 999"):
        store.promote("b", expected="a", who="ada", why="x", gate=999)
    promote(store, "c")
    with pytest.raises(ConflictError, match="compared 'b' with a, not with c"):
        store.promote("b", expected="c", who="ada", why="x", gate=gate.number)


def test_model_version_is_noted(store: ReleaseStore) -> None:
    store.registered("a", "3")
    assert (store.get("a").model_version, store.get("b").model_version) == ("3", None)


def fail_after_adding(store: ReleaseStore) -> None:
    with store.work() as work:
        work.add(manifest("e"), Path("e"))
        raise ZeroDivisionError


def test_without_commit_nothing_happened(store: ReleaseStore) -> None:
    with store.work() as work:
        work.promote("a", expected=None, who="ada", why="x")
        assert work.champion().name == "a"
    with pytest.raises(ZeroDivisionError):
        fail_after_adding(store)
    assert store.champion() == Champion(None, 0, None)
    assert len(store.list()) == 4
    assert store.history() == ()


def test_add_gate_and_promotion_last_together(store: ReleaseStore) -> None:
    with store.work() as work:
        work.add(manifest("e"), Path("e"))
        gate = work.judged("e", None, True, {})
        work.promote("e", expected=None, who="ada", why="x", gate=gate.number)
        work.commit()
    assert store.champion().name == "e"


def test_steps_are_told_in_order(database: str) -> None:
    told: list[str] = []
    store = ReleaseStore(database, after=told.append)
    store.add(manifest("a"), Path("a"))
    store.add(manifest("b"), Path("b"))
    told.clear()
    store.promote("a", expected=None, who="ada", why="x")
    assert tuple(told) == PROMOTE_STEPS
    store.promote("b", expected="a", who="ada", why="x")
    told.clear()
    store.rollback(expected="b", who="ada", why="x")
    assert tuple(told) == PROMOTE_STEPS
    store.close()


def at_once(count: int, act: Callable[[int], str]) -> list[str]:
    """What `count` threads, let go together, come back with: a result, or the name of the error."""
    start = threading.Barrier(count)

    def one(number: int) -> str:
        start.wait()
        try:
            return act(number)
        except ConflictError as error:
            return str(error)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


def race(store: ReleaseStore, expected: str | None, round_: int, number: int) -> str:
    return store.promote(f"r{round_}-{number}", expected=expected, who=f"racer {number}", why="race").name


def test_of_fifty_promotions_at_once_one_wins(database: str) -> None:
    store = ReleaseStore(database)
    with store.work() as work:
        for round_, number in product((1, 2, 3), range(50)):
            work.add(manifest(f"r{round_}-{number}"), Path("x"))
        work.commit()
    for round_ in (1, 2, 3):
        results = at_once(50, partial(race, store, store.champion().name, round_))
        winner = store.champion()
        assert winner.version == round_
        assert [one for one in results if one == winner.name] == [winner.name]
        losers = [one for one in results if one != winner.name]
        assert [one for one in losers if f"but '{winner.name}' is live since" not in one] == []
    assert [line.version for line in store.history()] == [1, 2, 3]
    assert [line.previous for line in store.history()] == [None, *[line.name for line in store.history()[:-1]]]
    store.close()


def test_a_release_is_never_deleted_while_it_becomes_live(database: str) -> None:
    """Ten times: one thread promotes what the other deletes. Either order is fine; a deleted champion is not."""
    store = ReleaseStore(database)
    store.add(manifest("base"), Path("base"))
    promote(store, "base")
    for number in range(10):
        name = f"r{number}"
        store.add(manifest(name), Path(name))
        expected = store.champion().name

        def act(who: int, name: str = name, expected: str | None = expected) -> str:
            try:
                if who:
                    return store.promote(name, expected=expected, who="ada", why="x").name
                return store.delete(name).name
            except NotFoundError as error:
                return str(error)

        results = at_once(2, act)
        assert results.count(name) == 1
        store.get(str(store.champion().name))
    store.close()


def test_a_reader_is_not_held_up_by_a_writer(store: ReleaseStore) -> None:
    promote(store, "a")
    with store.work() as work:
        work.promote("b", expected="a", who="ada", why="x")
        with ThreadPoolExecutor(1) as pool:
            assert pool.submit(store.champion).result(timeout=30).name == "a"
        work.commit()
    assert store.champion().name == "b"


def test_tables_of_another_version_are_refused(database: str) -> None:
    ReleaseStore(database).close()
    engine = create_engine(database)
    with engine.begin() as connection:
        connection.execute(text("UPDATE tandem_tables SET version = version + 1"))
    engine.dispose()
    with pytest.raises(
        IncompatibleError, match=rf"version {TABLES_VERSION + 1}, this Tandem needs {TABLES_VERSION}; run `pip install"
    ):
        ReleaseStore(database)


def test_opening_at_once_creates_the_tables_once(database: str) -> None:
    def open_one(number: int) -> str:
        ReleaseStore(database).close()
        return str(number)

    assert at_once(10, open_one) == [str(number) for number in range(10)]
    store = ReleaseStore(database)
    assert store.champion() == Champion(None, 0, None)
    store.close()


def test_a_database_that_is_away_is_unavailable_and_its_password_stays_secret() -> None:
    with pytest.raises(UnavailableError, match="does not answer") as caught:
        ReleaseStore("postgresql+psycopg://ada:secret@127.0.0.1:9/x")
    assert "secret" not in str(caught.value)


def test_a_locked_sqlite_file_is_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("registry.database.BUSY_MILLISECONDS", 50)
    url = f"sqlite:///{tmp_path}/tandem.db"
    store = ReleaseStore(url)
    with store.work() as work:
        work.add(manifest("a"), Path("a"))
        with pytest.raises(BusyError, match="locked"):
            store.add(manifest("b"), Path("b"))
        assert store.list() == ()
    store.close()


@pytest.mark.parametrize("url", ["", "nonsense", "mysql://x/y", "redis://x"])
def test_addresses_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(InputError):
        ReleaseStore(url)


def test_a_time_without_zone_is_refused(database: str) -> None:
    store = ReleaseStore(database, clock=lambda: NOON.replace(tzinfo=None))
    with pytest.raises(Exception, match="no time zone"):
        store.add(manifest("a"), Path("a"))
    store.close()


def test_times_of_other_zones_come_back_in_utc(database: str) -> None:
    from zoneinfo import ZoneInfo

    store = ReleaseStore(database, clock=lambda: NOON.astimezone(ZoneInfo("Asia/Tokyo")))
    created = store.add(manifest("a"), Path("a")) and store.get("a").created_at
    assert created == NOON
    assert created.utcoffset() == timedelta(0)
    store.close()


def test_a_manifest_of_another_schema_is_not_taken_in(store: ReleaseStore) -> None:
    with pytest.raises(IncompatibleError, match="schema version 2"):
        store.add(replace(manifest("z"), schema_version=2), Path("z"))
    assert [one.name for one in store.list()] == ["a", "b", "c", "d"]


@pytest.mark.parametrize("version", [0, 2])
def test_releases_of_another_schema_are_told_of_and_go_and_hinder_nobody(store: ReleaseStore, version: int) -> None:
    """Tables outlive Tandems: a release that this one cannot load is listed, replaced and deleted all the same."""
    promote(store, "a")
    with store._engine.begin() as connection:
        raw = {"schema_version": version, "name": "a", "content_hash": "0" * 64, "of_another_time": 1}
        connection.execute(update(ReleaseRow).where(ReleaseRow.name == "a").values(manifest=raw))
    assert [one.name for one in store.list()] == ["a", "b", "c", "d"]
    assert (store.get("a").manifest.schema_version, store.get("a").manifest.metrics) == (version, {})
    promote(store, "b")
    promote(store, "c")
    promote(store, "d")
    assert store.pinned() == ("d", "c", "b")
    assert store.delete("a").name == "a"
    assert [line.name for line in store.history()] == ["a", "b", "c", "d"]
