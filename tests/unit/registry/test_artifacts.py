"""Releases on other file systems: whole or not there, verified when they arrive, gone when they are deleted, without secrets."""

from __future__ import annotations

import os
import shutil
import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import fsspec
import pytest

from registry import artifacts as module
from registry.artifacts import Artifacts
from registry.release import Manifest, ReleaseFacts, create_release, verify_release
from registry.retention import delete, prune
from registry.store import ReleaseStore
from registry.work import Release
from tandem.core.errors import ConflictError, InputError, IntegrityError, NotFoundError, UnavailableError

NOON = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place of a real fsspec file system."""
    return f"file://{tmp_path}/share/releases" if request.param == "file" else f"memory://{uuid.uuid4().hex}/releases"


def make(releases: Path, name: str, content: str = "x") -> tuple[Path, Manifest]:
    source = releases.parent / "parts" / name
    (source / "deep").mkdir(parents=True, exist_ok=True)
    (source / "popular.json").write_text(f'["{content}"]')
    (source / "deep" / "more.json").write_text("{}")
    parts = {"popular.json": source / "popular.json", "towers": source / "deep"}
    return releases / name, create_release(parts, releases / name, ReleaseFacts(created_at=NOON, timings={"took_s": 1.5}))


def remote(url: str) -> tuple[Any, str]:
    fs, root = fsspec.core.url_to_fs(url)
    return fs, str(root)


def test_a_release_made_here_is_whole_elsewhere(url: str, tmp_path: Path) -> None:
    folder, manifest = make(tmp_path / "a" / "releases", "r1")
    assert Artifacts(url, folder.parent).upload(folder, manifest) is True
    assert Artifacts(url, folder.parent).upload(folder, manifest) is False, "it is there already"
    there = Artifacts(url, tmp_path / "b" / "releases")
    fetched = there.fetch("r1", manifest.content_hash)
    assert fetched == tmp_path / "b" / "releases" / "r1"
    assert verify_release(fetched, manifest.content_hash) == manifest
    assert (fetched / "measured.json").read_bytes() == (folder / "measured.json").read_bytes()
    assert {path.name for path in fetched.parent.iterdir()} == {"r1", ".fetch.lock"}
    assert there.names() == {"r1"}
    assert not os.access(fetched / "popular.json", os.W_OK) or os.geteuid() == 0


def test_a_half_upload_is_no_release_and_a_second_one_finishes_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before each of its files, the manifest last: nobody takes what lies there for a release."""
    folder, manifest = make(tmp_path / "a" / "releases", "r1")
    elsewhere = Artifacts(url, tmp_path / "b" / "releases")
    files = len(manifest.files) + 2
    whole = module._put
    for number in range(files):
        left = iter(range(number))

        def put(fs: Any, file: Path, place: str, left: Any = left) -> None:
            if next(left, None) is None:
                raise OSError("the network is gone")
            whole(fs, file, place)

        with monkeypatch.context() as cutting:
            cutting.setattr(module, "_put", put)
            with pytest.raises(UnavailableError, match="the network is gone"):
                Artifacts(url, folder.parent).upload(folder, manifest)
        with pytest.raises(NotFoundError, match="neither here nor whole"):
            elsewhere.fetch("r1", manifest.content_hash)
    assert Artifacts(url, folder.parent).upload(folder, manifest) is True
    assert verify_release(elsewhere.fetch("r1", manifest.content_hash), manifest.content_hash).name == "r1"


def test_a_cut_manifest_is_none(url: str, tmp_path: Path) -> None:
    folder, manifest = make(tmp_path / "a" / "releases", "r1")
    Artifacts(url, folder.parent).upload(folder, manifest)
    fs, root = remote(url)
    text = fs.cat_file(f"{root}/r1/manifest.json")
    fs.pipe_file(f"{root}/r1/manifest.json", text[: len(text) // 2])
    with pytest.raises(NotFoundError):
        Artifacts(url, tmp_path / "b" / "releases").fetch("r1", manifest.content_hash)
    assert Artifacts(url, folder.parent).upload(folder, manifest) is True


@pytest.mark.parametrize("what", ["flipped", "missing", "other"])
def test_what_came_damaged_or_is_another_release_is_refused_and_nothing_is_left(url: str, tmp_path: Path, what: str) -> None:
    folder, manifest = make(tmp_path / "a" / "releases", "r1")
    Artifacts(url, folder.parent).upload(folder, manifest)
    fs, root = remote(url)
    expected = manifest.content_hash
    if what == "flipped":
        fs.pipe_file(f"{root}/r1/popular.json", b'["y"]')
    elif what == "missing":
        fs.rm_file(f"{root}/r1/towers/more.json")
    else:
        expected = "0" * 64
    with pytest.raises(IntegrityError):
        Artifacts(url, tmp_path / "b" / "releases").fetch("r1", expected)
    assert {path.name for path in (tmp_path / "b" / "releases").iterdir()} == {".fetch.lock"}


def test_many_who_ask_at_once_fetch_once(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, manifest = make(tmp_path / "a" / "releases", "r1")
    Artifacts(url, folder.parent).upload(folder, manifest)
    fetches, whole, lock = [0], module._get, threading.Lock()

    def counted(*arguments: Any) -> None:
        with lock:
            fetches[0] += 1
        whole(*arguments)

    monkeypatch.setattr(module, "_get", counted)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: Artifacts(url, tmp_path / "b").fetch("r1", manifest.content_hash), range(8)))
    assert set(found) == {tmp_path / "b" / "r1"}
    assert fetches == [1]


def test_a_fetch_that_was_killed_leaves_nothing_that_counts(url: str, tmp_path: Path) -> None:
    folder, manifest = make(tmp_path / "a" / "releases", "r1")
    Artifacts(url, folder.parent).upload(folder, manifest)
    left = tmp_path / "b" / ".fetching" / ".partial-r1-dead" / "popular.json"
    left.parent.mkdir(parents=True)
    left.write_text("half")
    Artifacts(url, tmp_path / "b").fetch("r1", manifest.content_hash)
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"r1", ".fetch.lock"}


def test_a_name_is_taken_once_for_all_who_share_the_place(url: str, tmp_path: Path) -> None:
    folder, manifest = make(tmp_path / "a" / "releases", "r1")
    Artifacts(url, folder.parent).upload(folder, manifest)
    other, different = make(tmp_path / "c" / "releases", "r1", content="y")
    with pytest.raises(ConflictError, match="has a release 'r1' with content"):
        Artifacts(url, other.parent).upload(other, different)
    assert Artifacts(url, other.parent).delete("r1", different.content_hash) is False, "it is not ours"
    assert Artifacts(url, other.parent).names() == {"r1"}


def test_what_is_deleted_is_gone_there_too(url: str, tmp_path: Path) -> None:
    releases = tmp_path / "a" / "releases"
    artifacts = Artifacts(url, releases)
    store = ReleaseStore(f"sqlite:///{tmp_path}/tandem.db", releases)
    for name in ("r1", "r2", "r3", "r4"):
        folder, manifest = make(releases, name, content=name)
        artifacts.upload(folder, manifest)
        store.add(manifest, folder)
    store.promote("r1", expected=None, who="ada", why="the first")
    delete(store, releases, "r4", artifacts=artifacts)
    assert artifacts.names() == {"r1", "r2", "r3"}
    store.delete("r3")  # and here the process died
    shutil.rmtree(releases / "r3")
    prune(store, releases, keep=1, artifacts=artifacts)
    assert artifacts.names() == {"r1", "r2"}
    elsewhere = ReleaseStore(f"sqlite:///{tmp_path}/tandem.db", tmp_path / "b")
    found = Artifacts(url, tmp_path / "b").here(elsewhere.get("r2"))
    assert verify_release(found.folder).name == "r2"
    store.close()
    elsewhere.close()


def test_a_release_that_is_here_is_not_fetched_and_without_a_url_nothing_is(tmp_path: Path) -> None:
    folder, manifest = make(tmp_path / "releases", "r1")
    release = Release("r1", manifest.content_hash, folder, NOON, manifest)
    assert Artifacts("sftp://nobody.invalid/x", tmp_path / "releases").here(release) is release
    none = Artifacts("", tmp_path / "releases")
    gone = Release("r1", manifest.content_hash, tmp_path / "gone", NOON, manifest)
    assert not none
    assert (none.here(gone), none.upload(folder, manifest), none.names(), none.delete("r1", "x")) == (gone, False, set(), False)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("bucket/prefix", "is no URL"),
        ("s3:/bucket", "is no URL"),
        ("s3://AKIAEXAMPLE:secretsecret@bucket/prefix", "holds credentials"),
        ("https://host/x?token=secretsecret", "holds credentials"),
    ],
)
def test_addresses_that_are_none_or_hold_credentials_are_refused(url: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said) as caught:
        Artifacts(url, tmp_path)
    assert "secretsecret" not in str(caught.value)


def test_a_protocol_that_nobody_knows_or_that_lacks_its_package_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nosuchprotocol"):
        Artifacts("nosuchprotocol://x/y", tmp_path).names()


def test_names_that_lead_out_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a release name"):
        Artifacts(f"file://{tmp_path}/share", tmp_path / "releases").fetch("../x", "0" * 64)


def test_secrets_of_the_environment_never_stand_in_an_error() -> None:
    error = OSError("403 for key AKIAEXAMPLE1 signed with hunter2hunter2\nsecond line")
    environment = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLE1", "AWS_SECRET_ACCESS_KEY": "hunter2hunter2", "HOME": "second"}
    assert module._said(error, environment) == "403 for key *** signed with ***"
