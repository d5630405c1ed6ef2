"""What stays, what goes, and that what goes is gone from tables and disk while readers keep what they have open."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from registry.release import ReleaseFacts, create_release, verify_release
from registry.retention import delete, prune, reasons_to_keep
from registry.store import ReleaseStore
from tandem.core.errors import BusyError, ConflictError, InputError, NotFoundError
from tandem.core.folders import held

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)
FACTS = ReleaseFacts(created_at=NOON)


def make(store: ReleaseStore, releases: Path, name: str) -> Path:
    source = releases.parent / "popular.json"
    source.write_text(f'["{name}"]')
    store.add(create_release({"popular.json": source}, releases / name, FACTS), releases / name)
    return releases / name


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    folder = tmp_path / "releases"
    folder.mkdir()
    return folder


@pytest.fixture
def store(database: str, releases: Path) -> Iterator[ReleaseStore]:
    """Releases r0 to r9, made in that order, a minute apart."""
    minutes = iter(range(10_000))
    store = ReleaseStore(database, releases, clock=lambda: NOON + timedelta(minutes=next(minutes)))
    for number in range(10):
        make(store, releases, f"r{number}")
    yield store
    store.close()


def promote(store: ReleaseStore, *names: str) -> None:
    for name in names:
        store.promote(name, expected=store.champion().name, who="ada", why="x")


def folders(releases: Path) -> set[str]:
    return {path.name for path in releases.iterdir() if path.is_dir()}


def test_reasons_in_order_of_weight() -> None:
    assert reasons_to_keep(["e", "d", "c", "b", "a"], ["b", "a"], "b", 2) == {
        "b": "live",
        "a": "live before",
        "e": "new",
        "d": "new",
    }
    assert reasons_to_keep(["c", "b", "a"], ["b"], "a", 0) == {"b": "live", "a": "challenger"}
    assert reasons_to_keep(["b", "a"], [], None, 9) == {"b": "new", "a": "new"}


def test_champions_challenger_and_newest_stay_the_rest_goes(store: ReleaseStore, releases: Path) -> None:
    promote(store, "r0", "r1", "r2", "r3")
    store.judged("r5", "r3", True, {})
    pruned = prune(store, releases, keep=2)
    assert dict(pruned.kept) == {
        "r3": "live", "r2": "live before", "r1": "live before", "r5": "challenger", "r9": "new", "r8": "new",
    }  # fmt: skip
    assert set(pruned.deleted) == {"r0", "r4", "r6", "r7"}
    assert pruned.freed > 4 * 100
    assert folders(releases) == set(pruned.kept)
    assert {release.name for release in store.list()} == set(pruned.kept)
    assert [verify_release(release.folder).name for release in store.list()] == ["r1", "r2", "r3", "r5", "r8", "r9"]
    assert [line.name for line in store.history()] == ["r0", "r1", "r2", "r3"]
    again = prune(store, releases, keep=2)
    assert (again.deleted, again.freed) == ((), 0)
    assert store.rollback(expected="r3", who="ada", why="errors").name == "r2"


def test_without_a_champion_the_newest_stay(store: ReleaseStore, releases: Path) -> None:
    assert set(prune(store, releases, keep=3).kept) == {"r9", "r8", "r7"}
    assert folders(releases) == {"r9", "r8", "r7"}


def test_one_release_is_deleted_by_name(store: ReleaseStore, releases: Path) -> None:
    promote(store, "r0", "r1")
    for name, why in (("r1", "is live since"), ("r0", "a rollback may need it")):
        with pytest.raises(ConflictError, match=why):
            delete(store, releases, name)
    assert delete(store, releases, "r5").deleted == ("r5",)
    with pytest.raises(NotFoundError, match="deleted"):
        delete(store, releases, "r5")
    assert folders(releases) == {f"r{number}" for number in range(10)} - {"r5"}


def test_what_is_open_can_be_read_to_its_end(store: ReleaseStore, releases: Path) -> None:
    with (releases / "r5" / "popular.json").open() as handle:
        delete(store, releases, "r5")
        assert handle.read() == '["r5"]'
        assert os.fstat(handle.fileno()).st_nlink == 0


def test_folders_elsewhere_and_of_other_names_are_left(store: ReleaseStore, releases: Path, tmp_path: Path) -> None:
    source = tmp_path / "popular.json"
    outside = tmp_path / "share" / "far"
    store.add(create_release({"popular.json": source}, outside, FACTS), outside)
    store.add(create_release({"popular.json": source}, tmp_path / "x" / "alias", FACTS), releases / "r9")
    (releases / "link").symlink_to(outside)
    store.add(create_release({"popular.json": source}, tmp_path / "y" / "link", FACTS), releases / "link")
    for name in ("far", "alias", "link"):
        done = delete(store, releases, name)
    assert set(done.left) == {outside, releases / "r9", releases / "link"}
    assert verify_release(outside).name == "far"
    assert verify_release(releases / "r9").name == "r9"


def test_nothing_is_deleted_while_a_release_is_created(store: ReleaseStore, releases: Path) -> None:
    with held(releases / ".create.lock", "release create"), pytest.raises(BusyError, match="release create"):
        prune(store, releases, keep=0)
    assert len(store.list()) == 10


def test_a_number_that_is_none_is_refused(store: ReleaseStore, releases: Path) -> None:
    with pytest.raises(InputError, match="keep = -1"):
        prune(store, releases, keep=-1)


def test_a_release_that_becomes_live_meanwhile_is_not_pruned(store: ReleaseStore, releases: Path) -> None:
    """Nine promotions against prunings at the same time: whatever wins, the live release is there and whole."""
    promote(store, "r0")

    def go_live(name: str) -> None:
        try:
            promote(store, name)
        except (NotFoundError, ConflictError):
            return

    with ThreadPoolExecutor(2) as pool:
        for number in range(1, 10):
            live = pool.submit(go_live, f"r{number}")
            pruned = pool.submit(prune, store, releases, 9 - number)
            live.result()
            assert set(pruned.result().kept) <= {f"r{one}" for one in range(10)}
            name = store.champion().name
            assert name is not None
            assert verify_release(store.get(name).folder).name == name
            assert folders(releases) == {release.name for release in store.list()}
