"""Folders are whole or absent: every crash that can be staged leaves the old content, and damage is named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tandem.core import folders
from tandem.core.errors import BusyError, IntegrityError
from tandem.core.folders import (
    content_hash,
    file_hash,
    hash_files,
    held,
    read_json,
    sweep_partials,
    verify_files,
    whole_folder,
    write_json,
    write_text,
)

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8")),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3),
    max_leaves=8,
)


def fill(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- hashes ------------------------------------------------------------------------------------------------------------


def test_a_files_hash_is_the_known_sha256(tmp_path: Path) -> None:
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_hash(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_equal_values_have_equal_content_hashes_whatever_the_order_of_keys() -> None:
    assert content_hash({"a": 1, "b": ["猫"]}) == content_hash({"b": ["猫"], "a": 1})
    assert content_hash({"a": 1}) != content_hash({"a": "1"})
    assert content_hash(["a", "b"]) != content_hash(["b", "a"])


def test_files_are_hashed_by_path_in_order_without_the_manifest(tmp_path: Path) -> None:
    fill(tmp_path, **{"b.txt": "b", "manifest.json": "{}"})
    fill(tmp_path / "a" / "deep", **{"c.txt": "c"})
    assert list(hash_files(tmp_path)) == ["a/deep/c.txt", "b.txt"]
    assert list(hash_files(tmp_path, skip=frozenset({"b.txt"}))) == ["a/deep/c.txt", "manifest.json"]


def test_a_whole_folder_verifies_and_further_files_do_not_matter(tmp_path: Path) -> None:
    hashes = hash_files(fill(tmp_path, a="1", b="2"))
    fill(tmp_path, more="3")
    verify_files(tmp_path, hashes)


def test_a_flipped_bit_and_a_missing_file_are_named(tmp_path: Path) -> None:
    hashes = hash_files(fill(tmp_path / "release", index="vectors", model="weights"))
    damaged = bytearray((tmp_path / "release" / "index").read_bytes())
    damaged[3] ^= 1
    (tmp_path / "release" / "index").write_bytes(damaged)
    with pytest.raises(IntegrityError, match="release: file index is damaged"):
        verify_files(tmp_path / "release", hashes)
    (tmp_path / "release" / "index").unlink()
    with pytest.raises(IntegrityError, match="release: file index is missing"):
        verify_files(tmp_path / "release", hashes)


# --- files -------------------------------------------------------------------------------------------------------------


@given(JSON)
def test_json_is_read_back_as_written(tmp_path_factory: pytest.TempPathFactory, value: object) -> None:
    path = tmp_path_factory.getbasetemp() / "value.json"
    write_json(path, value)
    assert read_json(path) == value


def test_equal_values_are_equal_bytes(tmp_path: Path) -> None:
    write_json(tmp_path / "one", {"b": 1, "a": "é"})
    write_json(tmp_path / "two", {"a": "é", "b": 1})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes() == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()


def test_writing_makes_the_folder_and_leaves_nothing_beside(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "down" / "CURRENT", "v1")
    write_text(tmp_path / "deep" / "down" / "CURRENT", "v2")
    assert names(tmp_path / "deep" / "down") == ["CURRENT"]
    assert (tmp_path / "deep" / "down" / "CURRENT").read_text() == "v2"


def test_a_write_that_fails_leaves_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    write_text(tmp_path / "CURRENT", "old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "CURRENT", "new")
    assert (tmp_path / "CURRENT").read_text() == "old"
    assert read_by_pattern(tmp_path) == ["CURRENT"]


def read_by_pattern(folder: Path) -> list[str]:
    """What a reader of the folder looks at: hidden files are nobody's."""
    return [name for name in names(folder) if not name.startswith(".partial-")]


def test_readers_never_see_half_a_text(tmp_path: Path) -> None:
    path, long = tmp_path / "CURRENT", 20_000
    write_text(path, "a" * long)
    seen: set[str] = set()
    done = threading.Event()

    def read() -> None:
        while not done.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    reader.start()
    for letter in "bcdefghij":
        write_text(path, letter * long)
    done.set()
    reader.join()
    assert all(len(text) == long and len(set(text)) == 1 for text in seen)


# --- folders -----------------------------------------------------------------------------------------------------------


def test_a_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "releases" / "r1"
    with whole_folder(target) as partial:
        fill(partial / "index", a="1")
        assert not target.exists()
    assert hash_files(target).keys() == {"index/a"}
    assert names(target.parent) == ["r1"]


def test_a_new_folder_takes_the_old_ones_place_with_nothing_of_it_left(tmp_path: Path) -> None:
    fill(tmp_path / "models", old="1", shared="1")
    with whole_folder(tmp_path / "models") as partial:
        fill(partial, new="2", shared="2")
    assert names(tmp_path / "models") == ["new", "shared"]
    assert (tmp_path / "models" / "shared").read_text() == "2"
    assert names(tmp_path) == ["models"]


def test_an_error_while_filling_keeps_the_old_folder_and_vanishes(tmp_path: Path) -> None:
    fill(tmp_path / "models", old="1")

    def interrupted() -> None:
        with whole_folder(tmp_path / "models") as partial:
            fill(partial, new="2")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert names(tmp_path) == ["models"]
    assert names(tmp_path / "models") == ["old"]


def test_a_folder_that_cannot_be_synced_does_not_replace_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(28, "No space left on device")

    fill(tmp_path / "models", old="1")
    monkeypatch.setattr(folders, "_sync", full)
    with pytest.raises(OSError, match="No space"), whole_folder(tmp_path / "models") as partial:
        fill(partial, new="2")
    assert names(tmp_path) == ["models"]
    assert names(tmp_path / "models") == ["old"]


def test_a_writer_killed_while_swapping_leaves_the_old_folder_or_the_new_one(tmp_path: Path) -> None:
    """Whatever call the swap dies at, and after the next sweep, one whole folder stands there."""
    fill(tmp_path / "models", old="1")
    writer = python(
        """
        import os, signal, sys
        from pathlib import Path
        from tandem.core.folders import whole_folder
        renamed = Path.rename
        def rename(path, target):
            renamed(path, target)
            os.kill(os.getpid(), signal.SIGKILL)
        Path.rename = rename
        with whole_folder(Path(sys.argv[1])) as partial:
            (partial / "new").write_text("2")
        """,
        str(tmp_path / "models"),
    )
    writer.communicate()
    sweep_partials(tmp_path)
    assert names(tmp_path) == ["models"]
    assert names(tmp_path / "models") in (["old"], ["new"])


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", textwrap.dedent(code), *arguments]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_a_writer_killed_in_the_middle_leaves_the_old_folder_and_a_partial_one_to_sweep(tmp_path: Path) -> None:
    fill(tmp_path / "models", old="1")
    writer = python(
        """
        import sys
        from pathlib import Path
        from tandem.core.folders import whole_folder
        with whole_folder(Path(sys.argv[1])) as partial:
            (partial / "new").write_text("2")
            print("half", flush=True)
            sys.stdin.read()
        """,
        str(tmp_path / "models"),
    )
    assert said(writer) == "half"
    end(writer)
    assert names(tmp_path / "models") == ["old"]
    assert read_by_pattern(tmp_path) == ["models"]
    assert sweep_partials(tmp_path) == 1
    assert names(tmp_path) == ["models"]


def test_sweeping_removes_only_what_writers_left(tmp_path: Path) -> None:
    fill(tmp_path, **{".partial-text": "1", ".hidden": "2", "partial-kept": "3"})
    fill(tmp_path / ".partial-folder" / "deep", a="1")
    assert sweep_partials(tmp_path) == 2
    assert names(tmp_path) == [".hidden", "partial-kept"]
    assert sweep_partials(tmp_path / "absent") == 0


# --- locks -------------------------------------------------------------------------------------------------------------


def test_a_second_holder_is_told_who_holds_it_since_when(tmp_path: Path) -> None:
    lock = tmp_path / "locks" / "materialize.lock"
    with (
        held(lock, "tandem features materialize"),
        pytest.raises(
            BusyError, match=rf"materialize is busy.*tandem features materialize \(process {os.getpid()}\) since 20\d\d-"
        ),
        held(lock, "another"),
    ):
        pytest.fail("two held one lock")


def test_a_lock_is_free_after_its_block_and_after_an_error(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    with held(lock, "first"):
        pass
    with pytest.raises(ZeroDivisionError), held(lock, "second"):
        _ = 1 / 0
    with held(lock, "third"):
        assert lock.read_text().startswith("third ")


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    lock = tmp_path / "a.lock"
    holder = python(
        """
        import sys
        from pathlib import Path
        from tandem.core.folders import held
        with held(Path(sys.argv[1]), "the other process"):
            print("held", flush=True)
            sys.stdin.read()
        """,
        str(lock),
    )
    assert said(holder) == "held"
    with pytest.raises(BusyError, match="the other process"), held(lock, "me"):
        pytest.fail("two processes held one lock")
    end(holder)
    with held(lock, "me"):
        assert lock.read_text().startswith("me ")
