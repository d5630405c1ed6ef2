"""A release is whole, unchanged and of one piece, or it is refused with both sides of the story."""

from __future__ import annotations

import json
import pickle
import resource
import shutil
import stat
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from registry.release import (
    CREATE_STEPS,
    MEASURED,
    SCHEMA_VERSION,
    Manifest,
    ReleaseFacts,
    check_links,
    create_release,
    default_name,
    diff,
    read_manifest,
    release_folder,
    release_hash,
    verify_release,
)
from tandem.core.errors import (
    ConflictError,
    IncompatibleError,
    InputError,
    IntegrityError,
    NotFoundError,
    TandemError,
    UnavailableError,
)
from tandem.core.folders import MANIFEST

MOMENT = datetime(2026, 11, 20, 23, 59, tzinfo=UTC)


def make_parts(root: Path, seed: int = 0) -> dict[str, Path]:
    """Parts as training leaves them: two small weight files, an items table, an index of bytes, JSON."""
    rng = np.random.default_rng(seed)
    for part in ("towers", "ranker", "index"):
        (root / part / "deep").mkdir(parents=True)
    save_file({"w": rng.normal(size=(4, 3)).astype(np.float32)}, root / "towers" / "model.safetensors")
    save_file({"w": rng.normal(size=(2, 2)).astype(np.float32)}, root / "ranker" / "model.safetensors")
    (root / "index" / "deep" / "main.faiss").write_bytes(b"IxFI" + rng.bytes(60))
    (root / "towers" / MANIFEST).write_text('{"of": "the trainer"}')
    pl.DataFrame({"item_id": ["a", "b"], "title": ["A", "B"]}).write_parquet(root / "items.parquet")
    (root / "popular.json").write_text('["b", "a"]')
    return {name: root / name for name in ("towers", "ranker", "index", "items.parquet", "popular.json")}


FACTS = ReleaseFacts(
    created_at=MOMENT,
    fingerprints={"towers": "t1", "items": "i1"},
    links={"index.towers": "t1", "index.items": "i1", "ranker.towers": "t1"},
    window={"start": "2026-01-01", "end": "2026-03-01"},
    seeds={"towers": 7},
    versions={"torch": "2.13.0"},
    source={"kind": "movielens", "history": ("rating",)},
    settings={"towers": {"width": 64}},
    metrics={"recall@100": 0.25, "auc/liked": float("nan")},
    timings={"train_seconds": 12.5},
)


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, Path]:
    return make_parts(tmp_path / "models")


@pytest.fixture
def release(tmp_path: Path, parts: dict[str, Path]) -> Path:
    target = tmp_path / "releases" / "first"
    create_release(parts, target, FACTS)
    return target


def test_what_is_created_is_what_is_read(release: Path, parts: dict[str, Path]) -> None:
    manifest = verify_release(release)
    assert manifest.name == "first"
    assert manifest.schema_version == SCHEMA_VERSION
    assert set(manifest.files) == {
        "towers/model.safetensors", "towers/manifest.json", "ranker/model.safetensors", "index/deep/main.faiss",
        "items.parquet", "popular.json",
    }  # fmt: skip
    assert (release / "towers/model.safetensors").read_bytes() == (parts["towers"] / "model.safetensors").read_bytes()
    assert manifest.metrics == {"recall@100": 0.25, "auc/liked": None}
    assert manifest.source == {"kind": "movielens", "history": ["rating"]}
    assert manifest.fingerprints["towers"] == "t1"
    assert set(manifest.fingerprints) == {"towers", "ranker", "index", "items", "popular"}
    measured = json.loads((release / MEASURED).read_text())
    assert measured == {"created_at": "2026-11-20T23:59:00+00:00", "train_seconds": 12.5}


def test_a_trainer_that_overwrites_its_output_does_not_reach_into_the_release(release: Path, parts: dict[str, Path]) -> None:
    with (parts["towers"] / "model.safetensors").open("r+b") as handle:
        handle.seek(100)
        handle.write(b"other weights")
    verify_release(release)
    assert not (release / "towers/model.safetensors").stat().st_mode & stat.S_IWUSR


def test_same_content_same_hash_whatever_the_name_parent_and_clock(tmp_path: Path, parts: dict[str, Path]) -> None:
    later = replace(FACTS, created_at=datetime(2027, 1, 1, tzinfo=UTC), timings={"train_seconds": 99.0}, parent="one")
    one = create_release(parts, tmp_path / "releases" / "one", FACTS)
    two = create_release(make_parts(tmp_path / "again"), tmp_path / "releases" / "two", later)
    assert one.content_hash == two.content_hash == release_hash(parts, FACTS)
    assert default_name(one.content_hash, MOMENT) == f"20261120-{one.content_hash[:8]}"


@pytest.mark.parametrize(
    "other",
    [
        replace(FACTS, seeds={"towers": 8}),
        replace(FACTS, settings={"towers": {"width": 65}}),
        replace(FACTS, versions={"torch": "2.12.0"}),
        replace(FACTS, metrics={"recall@100": 0.26}),
        replace(FACTS, window={"start": "2026-01-01", "end": "2026-03-02"}),
        replace(FACTS, fingerprints={"towers": "t1", "items": "i1", "features": "f2"}),
    ],
)
def test_other_facts_other_hash(parts: dict[str, Path], other: ReleaseFacts) -> None:
    assert release_hash(parts, other) != release_hash(parts, FACTS)


def test_other_bytes_other_hash(tmp_path: Path, parts: dict[str, Path]) -> None:
    assert release_hash(make_parts(tmp_path / "other", seed=1), FACTS) != release_hash(parts, FACTS)


def test_creating_again_returns_the_release_and_other_content_is_refused(release: Path, parts: dict[str, Path]) -> None:
    before = (release / MANIFEST).stat().st_mtime_ns
    assert create_release(parts, release, FACTS) == read_manifest(release)
    assert (release / MANIFEST).stat().st_mtime_ns == before
    with pytest.raises(ConflictError, match="releases never change"):
        create_release(parts, release, replace(FACTS, seeds={"towers": 8}))
    assert verify_release(release).seeds == {"towers": 7}


@pytest.mark.parametrize("step", CREATE_STEPS[:-1])
def test_a_failure_at_any_step_leaves_nothing(tmp_path: Path, parts: dict[str, Path], step: str) -> None:
    def fail(at: str) -> None:
        if at == step:
            raise OSError("disk is gone")

    with pytest.raises(OSError, match="disk is gone"):
        create_release(parts, tmp_path / "releases" / "x", FACTS, after=fail)
    assert [one.name for one in (tmp_path / "releases").iterdir() if not one.name.startswith(".")] == []
    with pytest.raises(NotFoundError):
        verify_release(tmp_path / "releases" / "x")


def test_a_disk_without_room_for_it_twice_is_refused_before_anything_is_written(
    tmp_path: Path, parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [one for path in parts.values() for one in ([path] if path.is_file() else path.rglob("*")) if one.is_file()]
    need = 2 * sum(one.stat().st_size for one in files)
    real = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=need - 1))
    with pytest.raises(UnavailableError, match="free some space"):
        create_release(parts, tmp_path / "releases" / "x", FACTS)
    assert [one.name for one in (tmp_path / "releases").iterdir() if one.name != ".create.lock"] == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: real._replace(free=need))
    assert create_release(parts, tmp_path / "releases" / "x", FACTS).name == "x"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_is_caught(release: Path, tmp_path: Path, data: st.DataObject) -> None:
    """FAISS and safetensors load most one-bit damage without a word; the hash does not, nor does the manifest's own."""
    copy = tmp_path / "copies" / "first"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(release, copy)
    path = data.draw(st.sampled_from(sorted(one for one in copy.rglob("*") if one.is_file() and one.name != MEASURED)))
    content = bytearray(path.read_bytes())
    bit = data.draw(st.integers(0, 8 * len(content) - 1))
    content[bit // 8] ^= 1 << bit % 8
    path.chmod(0o644)
    path.write_bytes(content)
    same = path.name == MANIFEST and path.parent == copy and _still_says_the_same(path, release / MANIFEST)
    if same:  # a flip in white space changes no word
        verify_release(copy)
    else:
        with pytest.raises((IntegrityError, IncompatibleError)):
            verify_release(copy)


def _still_says_the_same(a: Path, b: Path) -> bool:
    try:
        return bool(json.loads(a.read_text()) == json.loads(b.read_text()))
    except ValueError:
        return False


def test_on_a_full_disk_nothing_is_left_and_the_releases_there_stay(
    release: Path, tmp_path: Path, parts: dict[str, Path]
) -> None:
    """Not a byte can be written while the second release is made; then there is room, and it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = {path.name for path in release.parent.iterdir()}
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            create_release(parts, release.parent / "second", FACTS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in release.parent.iterdir()} == before
    assert verify_release(release).name == release.name
    assert create_release(parts, release.parent / "second", FACTS).name == "second"


def test_too_little_room_is_said_before_anything_is_copied(
    tmp_path: Path, parts: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("registry.release.shutil.disk_usage", lambda _: SimpleNamespace(free=10))
    with pytest.raises(UnavailableError, match=r"0 MB free, the release needs .*; free some space"):
        create_release(parts, tmp_path / "releases" / "x", FACTS)
    assert not (tmp_path / "releases" / "x").exists()


def test_truncated_missing_and_extra_files_are_refused(release: Path) -> None:
    weights = release / "towers/model.safetensors"
    content = weights.read_bytes()
    weights.chmod(0o644)
    weights.write_bytes(content[:-1])
    with pytest.raises(IntegrityError, match=r"towers/model.safetensors is damaged"):
        verify_release(release)
    weights.unlink()
    with pytest.raises(IntegrityError, match="is missing"):
        verify_release(release)
    weights.write_bytes(content)
    verify_release(release)
    (release / "towers" / "more.json").write_text("{}")
    with pytest.raises(IntegrityError, match=r"towers/more.json is not in its manifest"):
        verify_release(release)


def test_a_link_is_refused_even_to_the_same_bytes(release: Path, tmp_path: Path) -> None:
    (release / "popular.json").rename(tmp_path / "outside.json")
    (release / "popular.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(IntegrityError, match="is a link"):
        verify_release(release)


def test_a_folder_without_manifest_is_not_a_release(release: Path) -> None:
    (release / MANIFEST).unlink()
    with pytest.raises(IntegrityError, match="not whole"):
        verify_release(release)


def test_a_release_under_another_name_or_hash_is_refused(release: Path) -> None:
    with pytest.raises(IntegrityError, match="registry knows 000000000000"):
        verify_release(release, expected="0" * 64)
    verify_release(release, expected=read_manifest(release).content_hash)
    other = release.with_name("second")
    release.rename(other)
    with pytest.raises(IntegrityError, match="belongs to release 'first'"):
        verify_release(other)


@pytest.mark.parametrize(("version", "way_out"), [(SCHEMA_VERSION + 1, "pip install --upgrade"), (0, "tandem release create")])
def test_another_schema_version_names_the_command(release: Path, version: int, way_out: str) -> None:
    path = release / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
    with pytest.raises(IncompatibleError, match=way_out):
        verify_release(release)


def test_a_release_that_an_older_tandem_wrote_is_read_or_refused_with_the_command() -> None:
    """A folder as schema version 1 wrote it, kept for good: who changes the schema decides here what becomes of old releases."""
    old = Path(__file__).parents[2] / "data" / "schema-1-release"
    try:
        manifest = verify_release(old)
    except IncompatibleError as refusal:
        assert SCHEMA_VERSION > 1
        assert "run `tandem release create`" in str(refusal)  # noqa: PT017
        return
    assert manifest.content_hash == "6d08c0011380b669a31bd0abdd35162b0fb701d7f254e8eef98de64892a0b4e2"
    assert (manifest.schema_version, manifest.name, manifest.seeds) == (1, "schema-1-release", {"towers": 7})
    assert manifest.metrics == {"towers/recall@100": 0.25, "task/click/auc": None}
    assert manifest.links == {"index.towers": "t1"}
    assert json.loads((old / "popular.json").read_text()) == {"item_ids": ["a", "b"]}


@pytest.mark.parametrize("text", ["", "null", "[]", "{}", '{"schema_version": true}', '{"schema_version": "1"}', "[" * 100_000])
def test_a_manifest_that_is_none_is_refused(release: Path, text: str) -> None:
    (release / MANIFEST).write_text(text)
    with pytest.raises(IntegrityError):
        verify_release(release)


@pytest.mark.parametrize("name", ["weights.pkl", "weights.pt", "weights.npy", "weights.bin", "weights"])
def test_forbidden_kinds_are_refused_at_creation(tmp_path: Path, parts: dict[str, Path], name: str) -> None:
    (parts["towers"] / name).write_bytes(b"anything")
    with pytest.raises(IntegrityError, match="never holds"):
        create_release(parts, tmp_path / "releases" / "x", FACTS)


@pytest.mark.parametrize("name", ["model2.safetensors", "vocab.txt", "more.json", "rows.parquet", "more.faiss", "spiece.model"])
def test_a_pickle_is_refused_under_any_allowed_suffix(tmp_path: Path, parts: dict[str, Path], name: str) -> None:
    (parts["towers"] / name).write_bytes(pickle.dumps({"weights": [1.0] * 20}))
    with pytest.raises(IntegrityError, match=f"towers/{name} does not hold"):
        create_release(parts, tmp_path / "releases" / "x", FACTS)


def test_a_mixed_release_is_refused_naming_both_fingerprints(tmp_path: Path, parts: dict[str, Path]) -> None:
    mixed = replace(FACTS, links={**FACTS.links, "index.towers": "t0"})
    with pytest.raises(IncompatibleError, match=r"index was built with towers t0, but its towers is t1"):
        create_release(parts, tmp_path / "releases" / "x", mixed)
    assert not (tmp_path / "releases" / "x").exists()


def test_a_part_must_say_with_what_it_was_built(tmp_path: Path, parts: dict[str, Path]) -> None:
    silent = replace(FACTS, links={"index.towers": "t1", "index.items": "i1"})
    with pytest.raises(IncompatibleError, match=r"'ranker\.towers'"):
        create_release(parts, tmp_path / "releases" / "x", silent)


def test_a_link_to_a_part_that_is_not_there_is_refused(release: Path) -> None:
    manifest = replace(read_manifest(release), links={"ranker.features": "f1"})
    with pytest.raises(IncompatibleError, match="features f1, which the release lacks"):
        check_links(manifest)


def test_popularity_alone_is_a_release(tmp_path: Path, parts: dict[str, Path]) -> None:
    only = {name: parts[name] for name in ("popular.json", "items.parquet")}
    create_release(only, tmp_path / "releases" / "popular-only", ReleaseFacts(created_at=MOMENT))
    assert set(verify_release(tmp_path / "releases" / "popular-only").fingerprints) == {"popular", "items"}


@pytest.mark.parametrize("name", ["manifest.json", "measured.json", "/etc", "../up", "a/../../up"])
def test_parts_cannot_be_called_anything(tmp_path: Path, parts: dict[str, Path], name: str) -> None:
    with pytest.raises(InputError, match="cannot be a part"):
        create_release({**parts, name: parts["popular.json"]}, tmp_path / "releases" / "x", FACTS)


def test_a_part_that_is_not_there_and_no_parts_at_all(tmp_path: Path, parts: dict[str, Path]) -> None:
    with pytest.raises(NotFoundError, match="part encoder"):
        create_release({**parts, "encoder": tmp_path / "nowhere"}, tmp_path / "releases" / "x", FACTS)
    with pytest.raises(InputError, match="at least one part"):
        create_release({}, tmp_path / "releases" / "x", FACTS)


def test_a_setting_that_json_cannot_hold_is_named(parts: dict[str, Path]) -> None:
    with pytest.raises(InputError, match="settings of a release hold"):
        release_hash(parts, replace(FACTS, settings={"folder": Path("/x")}))


HOSTILE = [
    "",
    ".",
    "..",
    "../x",
    "a/b",
    "/abs",
    "A",
    "a b",
    "a'; DROP TABLE",
    "a\x00",
    "é",
    "😀",
    "%2e%2e",
    "-a",
    "x" * 65,
    "file:x",
    "a\n",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="is not a release name"):
        release_folder(tmp_path, name)


@given(name=st.text(alphabet="az09._-/\\%A é\x00", max_size=12))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_name_stays_inside_the_folder_or_is_refused(tmp_path: Path, name: str) -> None:
    try:
        folder = release_folder(tmp_path, name)
    except TandemError:
        return
    assert folder.parent == tmp_path


def test_a_name_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "releases").mkdir()
    (tmp_path / "releases" / "out").symlink_to("/")
    with pytest.raises(InputError, match="leads out"):
        release_folder(tmp_path / "releases", "out")


def test_diff_tells_what_changed_in_words_and_figures(tmp_path: Path, parts: dict[str, Path]) -> None:
    one = create_release(parts, tmp_path / "releases" / "one", FACTS)
    changed = make_parts(tmp_path / "other", seed=1)
    facts = replace(
        FACTS,
        seeds={"towers": 8},
        settings={"towers": {"width": 128}},
        metrics={"recall@100": 0.3, "auc/liked": 0.7},
        versions={},
    )
    two = create_release({**parts, "ranker": changed["ranker"]}, tmp_path / "releases" / "two", facts)
    lines = [str(change) for change in diff(one, two)]
    assert "metric recall@100: 0.25 -> 0.3 (+0.05)" in lines
    assert "metric auc/liked: added (0.7)" in lines
    assert "seed towers: 7 -> 8 (+1)" in lines
    assert "setting towers.width: 64 -> 128 (+64)" in lines
    assert "version torch: gone (2.13.0)" in lines
    old, new = one.files["ranker/model.safetensors"][:12], two.files["ranker/model.safetensors"][:12]
    assert f"file ranker/model.safetensors: {old} -> {new}" in lines
    assert not [line for line in lines if "towers/" in line or "items" in line]
    assert diff(one, one) == ()


def test_a_manifest_survives_json(release: Path) -> None:
    manifest = read_manifest(release)
    assert Manifest.from_dict(json.loads(json.dumps(manifest.to_dict())), "x") == manifest
