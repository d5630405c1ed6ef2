"""One open experiment, ended once, with a history that is only added to; the same on SQLite and PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from registry.experiments import Experiment, Stage
from registry.release import Manifest
from registry.retention import prune
from registry.store import ReleaseStore
from tandem.core.errors import ConflictError, InputError, NotFoundError


@pytest.fixture
def store(database: str, tmp_path: Path) -> Iterator[ReleaseStore]:
    store = ReleaseStore(database, tmp_path / "releases")
    for name in ("a", "b", "c", "d"):
        nothing: dict[str, str] = {}
        manifest = Manifest(1, name, f"hash of {name}", {"a.json": "0"}, nothing, nothing, {}, {}, nothing, {}, {}, {"m": 0.5})
        store.add(manifest, tmp_path / "releases" / name)
    store.promote("a", expected=None, who="ada", why="the first")
    yield store
    store.close()


def start(store: ReleaseStore, challenger: str = "b", kind: str = "canary", percent: float = 5, name: str | None = None) -> Stage:
    with store.work() as work:
        stage = work.start_experiment(challenger, kind, percent, who="ada", why="new towers", name=name)  # type: ignore[arg-type]
        work.commit()
    return stage


def set_percent(store: ReleaseStore, percent: float) -> Stage:
    with store.work() as work:
        stage = work.experiments.set_percent(percent, "bob", "it holds")
        work.commit()
    return stage


def end(store: ReleaseStore, number: int, who: str = "ada", why: str = "enough") -> None:
    with store.work() as work:
        work.experiments.end(number, "stopped", who, why)
        work.commit()


def opened(store: ReleaseStore) -> Stage | None:
    with store.look() as work:
        return work.experiments.open()


def told(store: ReleaseStore) -> list[tuple[str, float, str | None, str]]:
    with store.look() as work:
        return [
            (each.kind, each.percent, each.outcome, each.who) for story in work.experiments.stories() for each in story.changes
        ]


def test_a_new_registry_has_no_experiment(store: ReleaseStore) -> None:
    assert (opened(store), told(store)) == (None, [])
    with store.look() as work, pytest.raises(NotFoundError, match="no experiment yet"):
        work.experiments.story()


def test_an_experiment_is_told_from_start_to_end(store: ReleaseStore) -> None:
    stage = start(store)
    assert stage == Stage(Experiment(1, "b-canary-1", "canary", "b", "a"), 5.0, 1) == opened(store)
    assert set_percent(store, 20).number == 2
    end(store, 1)
    assert opened(store) is None
    assert told(store) == [("start", 5.0, None, "ada"), ("set", 20.0, None, "bob"), ("end", 20.0, "stopped", "ada")]
    with store.look() as work:
        story = work.experiments.story("b-canary-1")
        assert story == work.experiments.story()
    assert (story.last_stage.version, story.last_stage.percent) == (2, 20.0)
    assert story.ended is not None
    assert [each.at for each in story.changes] == sorted({each.at for each in story.changes})
    assert start(store, "c", "ab", 50).experiment.name == "c-ab-2"


def test_a_second_one_is_a_conflict_that_names_the_first(store: ReleaseStore) -> None:
    start(store, name="new-towers")
    with pytest.raises(
        ConflictError, match=r"experiment 'new-towers' \(canary of 'b', 5%\) is open since .* by ada; end it first"
    ):
        start(store, "c")
    assert told(store) == [("start", 5.0, None, "ada")]


def test_a_name_is_never_used_twice_since_it_placed_users(store: ReleaseStore) -> None:
    end(store, start(store, name="x").experiment.number)
    with pytest.raises(ConflictError, match="choose another name"):
        start(store, "c", name="x")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"challenger": "a"}, "'a' is live itself"),
        ({"percent": 0}, "above 0 and at most 100"),
        ({"percent": float("nan")}, "above 0 and at most 100"),
        ({"percent": 100.5}, "above 0 and at most 100"),
        ({"name": "Not A Name"}, "must be 1-64 of a-z"),
    ],
)
def test_a_start_that_means_nothing_is_refused(store: ReleaseStore, changed: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        start(store, **changed)  # type: ignore[arg-type]
    assert opened(store) is None


def test_a_start_needs_a_release_a_champion_and_a_reason(store: ReleaseStore, database: str) -> None:
    with pytest.raises(NotFoundError, match="no release 'x'"):
        start(store, "x")
    with store.work() as work, pytest.raises(InputError, match=r"needs why.*--because"):
        work.start_experiment("b", "canary", 5, who="ada", why=" ")


def test_the_shares_of_an_ab_test_stay(store: ReleaseStore) -> None:
    start(store, kind="ab", percent=50)
    with pytest.raises(InputError, match="whose shares stay"):
        set_percent(store, 60)


def test_setting_without_an_open_experiment_is_not_found(store: ReleaseStore) -> None:
    with pytest.raises(NotFoundError, match="no experiment is open"):
        set_percent(store, 60)


def test_of_many_that_end_it_exactly_one_does_and_the_others_hear_who(store: ReleaseStore, database: str, tmp_path: Path) -> None:
    number = start(store).experiment.number

    def attempt(process: int) -> str:
        own = ReleaseStore(database, tmp_path / "releases")
        try:
            end(own, number, f"process {process}", "its requests failed")
        except ConflictError as error:
            return str(error)
        finally:
            own.close()
        return "ended"

    with ThreadPoolExecutor(8) as pool:
        said = list(pool.map(attempt, range(8)))
    winner = said.index("ended")
    assert said.count("ended") == 1
    assert all(f"end by process {winner} at" in each and "its requests failed" in each for each in said if each != "ended")
    assert told(store)[1:] == [("end", 5.0, "stopped", f"process {winner}")]


def test_of_many_that_start_exactly_one_does(store: ReleaseStore, database: str, tmp_path: Path) -> None:
    def attempt(challenger: str) -> str:
        own = ReleaseStore(database, tmp_path / "releases")
        try:
            return start(own, challenger).experiment.name
        except ConflictError as error:
            return str(error)
        finally:
            own.close()

    with ThreadPoolExecutor(6) as pool:
        said = list(pool.map(attempt, ["b", "c", "d"] * 2))
    stage = opened(store)
    assert stage is not None
    assert [each for each in said if "is open since" not in each] == [stage.experiment.name]


def test_promoting_the_challenger_wins_the_experiment(store: ReleaseStore) -> None:
    start(store)
    store.promote("b", expected="a", who="bob", why="better")
    assert opened(store) is None
    assert told(store)[-1] == ("end", 5.0, "won", "bob")


def test_another_champion_overtakes_the_experiment(store: ReleaseStore) -> None:
    start(store)
    store.promote("c", expected="a", who="bob", why="urgent")
    assert told(store)[-1] == ("end", 5.0, "overtaken", "bob")
    start(store)
    store.rollback(expected="c", who="eve", why="broken")
    assert told(store)[-1] == ("end", 5.0, "overtaken", "eve")


def test_a_promotion_that_is_undone_leaves_the_experiment_open(store: ReleaseStore) -> None:
    stage = start(store)
    with store.work() as work:
        work.promote("b", expected="a", who="bob", why="not committed")
    assert (opened(store), store.champion().name) == (stage, "a")


def test_who_is_in_an_experiment_stays(store: ReleaseStore, tmp_path: Path) -> None:
    start(store)
    with pytest.raises(ConflictError, match="'b' is in the open experiment 'b-canary-1'; stop that one first"):
        store.delete("b")
    done = prune(store, tmp_path / "releases", 0)
    assert (done.kept["b"], set(done.deleted)) == ("in an experiment", {"c", "d"})
    end(store, 1)
    assert prune(store, tmp_path / "releases", 0).deleted == ("b",)


def test_a_rollback_names_the_promotion_that_it_undoes(store: ReleaseStore) -> None:
    """Two processes see the same bad promotion; meanwhile somebody promoted it again, on purpose."""
    version = store.promote("b", expected="a", who="ada", why="better").version
    store.rollback(expected="b", version=version, who="process 1", why="automatic: it failed")
    with pytest.raises(ConflictError):
        store.rollback(expected="b", version=version, who="process 2", why="automatic: it failed")
    store.promote("b", expected="a", who="ada", why="the disk was full")
    with pytest.raises(ConflictError):
        store.rollback(expected="b", version=version, who="process 2", why="automatic: it failed")
    assert store.champion().name == "b"
