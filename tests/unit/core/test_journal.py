"""The journal: order, durability, torn ends, damage, and several processes at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tandem.core.errors import IncompatibleError, IntegrityError
from tandem.core.journal import Journal


def put(*ids: str) -> bytes:
    return b"put " + "|".join(ids).encode() + bytes(range(256)) * len(ids)


def write(folder: Path, *records: bytes) -> None:
    journal = Journal(folder, "towers")
    for record in records:
        with journal.writing():
            journal.append(record)


RECORDS = [put("a", "b"), b"delete a", put("商品/1 ü"), b"x"]


def test_what_is_written_is_read_once_in_order(tmp_path: Path) -> None:
    write(tmp_path, *RECORDS)
    reader = Journal(tmp_path, "towers")
    over, records = reader.read()
    assert not over
    assert records == RECORDS
    assert reader.read() == (False, [])
    write(tmp_path, put("c"))
    assert reader.read()[1] == [put("c")]


def test_an_unfinished_record_is_never_read_and_the_next_writer_cuts_it_off(tmp_path: Path) -> None:
    write(tmp_path, *RECORDS)
    (file,) = tmp_path.glob("journal-*.bin")
    whole = file.read_bytes()
    write(tmp_path, put("last"))
    longer = file.read_bytes()
    for cut in range(len(whole), len(longer)):
        file.write_bytes(longer[:cut])
        reader = Journal(tmp_path, "towers")
        assert reader.read()[1] == RECORDS
        write(tmp_path, put("after"))
        assert reader.read()[1] == [put("after")]


def test_a_flipped_bit_is_refused_by_readers_and_writers(tmp_path: Path) -> None:
    write(tmp_path, *RECORDS)
    (file,) = tmp_path.glob("journal-*.bin")
    whole = file.read_bytes()
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        file.write_bytes(bytes(damaged))
        with pytest.raises(IntegrityError, match=r"record at byte \d+ is damaged"):
            Journal(tmp_path, "towers").read()
        if place % 20 == 0:
            with pytest.raises(IntegrityError):
                write(tmp_path, put("more"))
    assert len(file.read_bytes()) == len(whole)


def test_a_journal_of_another_index_is_refused(tmp_path: Path) -> None:
    write(tmp_path, *RECORDS)
    with pytest.raises(IncompatibleError, match="'towers', not to 'others'"):
        Journal(tmp_path, "others")


def test_a_full_disk_leaves_the_journal_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, *RECORDS)

    def full(_: int) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="no space"):
            write(tmp_path, put("lost"))
    write(tmp_path, put("kept"))
    assert Journal(tmp_path, "towers").read()[1] == [*RECORDS, put("kept")]


def test_a_rewritten_journal_makes_readers_start_over(tmp_path: Path) -> None:
    write(tmp_path, *RECORDS)
    reader, late = Journal(tmp_path, "towers"), Journal(tmp_path, "towers")
    reader.read()
    with late.writing():
        late.rewrite([put("b")])
    write(tmp_path, put("c"))
    over, records = reader.read()
    assert over
    assert records == [put("b"), put("c")]
    assert len(list(tmp_path.glob("journal-*.bin"))) == 1


WRITER = """
import sys
from pathlib import Path
from tandem.core.journal import Journal
journal = Journal(Path(sys.argv[1]), "towers")
for number in range(int(sys.argv[3])):
    with journal.writing():
        journal.append(f"{sys.argv[2]}{number}".encode() + b" " * 200_000)
    print(number, flush=True)
"""


def writer(folder: Path, name: str, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", WRITER, str(folder), name, str(count)], stdout=subprocess.PIPE, text=True)


def test_processes_write_in_turn_and_all_of_it_is_read(tmp_path: Path) -> None:
    running = [writer(tmp_path, name, 20) for name in "ab"]
    assert [process.wait() for process in running] == [0, 0]
    ids = [record.split()[0].decode() for record in Journal(tmp_path, "towers").read()[1]]
    for name in "ab":
        assert [item_id for item_id in ids if item_id.startswith(name)] == [f"{name}{number}" for number in range(20)]


@pytest.mark.parametrize("after", [0, 3, 11])
def test_what_a_killed_writer_was_told_is_written_is_there(tmp_path: Path, after: int) -> None:
    process = writer(tmp_path, "a", 100_000)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(after + 1)]
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().split()]
    process.wait()
    write(tmp_path, b"put after")
    ids = [record.split()[0].decode() for record in Journal(tmp_path, "towers").read()[1]]
    assert ids[-1] == "put"
    assert ids[:-1] == [f"a{number}" for number in range(len(ids) - 1)]
    assert len(ids) - 1 >= len(acknowledged)
