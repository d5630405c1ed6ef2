"""What changed, on disk: an append-only file that many processes write in turn and all of them read.

In: records (bytes). Out: the same records in the same order in every process, also after a crash. A record is framed by its
length and a hash; an append returns after fsync. What a killed writer left unfinished is cut off by the next writer and never
read. `rewrite` replaces the file by a shorter one of the next number; readers then start over.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from tandem.core.errors import IncompatibleError, IntegrityError
from tandem.core.folders import read_json, write_json

_FRAME: Final = struct.Struct("<4sII16s")
"""Mark, length of the payload, CRC-32 of mark and length (a damaged length must not look like an unfinished record), hash."""
_MAGIC: Final = b"TJ01"
CARD_FILE: Final = "journal.json"
_LOCK_FILE: Final = "journal.lock"
_FIRST: Final = "journal-00000001.bin"


class Journal:
    """One process's view of a journal folder. Not for several threads at once: its owner takes turns."""

    def __init__(self, folder: Path, bound_to: str) -> None:
        """Open or begin the journal of what `bound_to` names (an index, say); IncompatibleError if it is another's."""
        self.folder = folder
        self._file = _FIRST
        self._offset = 0
        folder.mkdir(parents=True, exist_ok=True)
        with self.writing():
            self._bind(bound_to)

    @property
    def size(self) -> int:
        """Bytes read so far of the present file."""
        return self._offset

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the folder's lock; other writers wait. It dies with its process."""
        with (self.folder / _LOCK_FILE).open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def append(self, record: bytes) -> None:
        """Write and sync one record while holding `writing`. After an error (disk full, say) the file is as it was."""
        path = self.folder / self._newest()
        end = self._end_of_whole(path)
        with path.open("ab") as handle:
            try:
                handle.truncate(end)
                handle.write(_framed(record))
                handle.flush()
                os.fsync(handle.fileno())
            except OSError:
                os.truncate(path, end)
                raise
        if not end:
            _sync(self.folder)

    def read(self) -> tuple[bool, list[bytes]]:
        """(did it start over?, records since the last call). Costs two look-ups in the folder when there are none."""
        newest = self._newest()
        over = newest != self._file
        if over:
            self._file, self._offset = newest, 0
        records = []
        for record, end in _whole_frames(self.folder / newest, self._offset):
            records.append(record)
            self._offset = end
        return over, records

    def rewrite(self, records: Sequence[bytes]) -> None:
        """Say the same in fewer records while holding `writing`: they become the next file, and the present one goes."""
        present = self._newest()
        number = int(present[len("journal-") : -len(".bin")]) + 1
        beside = self.folder / ".partial-journal"
        with beside.open("wb") as handle:
            for record in records:
                handle.write(_framed(record))
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(self.folder / f"journal-{number:08d}.bin")
        _sync(self.folder)
        (self.folder / present).unlink(missing_ok=True)

    def _bind(self, bound_to: str) -> None:
        path = self.folder / CARD_FILE
        if not path.is_file():
            write_json(path, {"bound_to": bound_to})
        found = read_json(path)["bound_to"]
        if found != bound_to:
            raise IncompatibleError(
                f"journal {self.folder.name} belongs to {found[:40]!r}, not to {bound_to[:40]!r}; give each index one of its own"
            )

    def _newest(self) -> str:
        """Name of the present file: the one with the highest number."""
        names = [entry.name for entry in os.scandir(self.folder) if entry.name.startswith("journal-")]
        return max(names, default=_FIRST)

    def _end_of_whole(self, path: Path) -> int:
        known = self._offset if path.name == self._file else 0
        return max((end for _, end in _whole_frames(path, known)), default=known)


def _framed(payload: bytes) -> bytes:
    return _FRAME.pack(_MAGIC, len(payload), _length_check(len(payload)), _digest(payload)) + payload


def _length_check(size: int) -> int:
    return zlib.crc32(_MAGIC + size.to_bytes(4, "little"))


def _digest(payload: bytes) -> bytes:
    return hashlib.sha256(payload).digest()[:16]


def _whole_frames(path: Path, start: int) -> Iterator[tuple[bytes, int]]:
    """(payload, end) of every frame from `start` on; stops at one that is not finished. IntegrityError for a damaged one."""
    data, at = _bytes_from(path, start), 0
    while len(data) - at >= _FRAME.size:
        magic, size, check, digest = _FRAME.unpack_from(data, at)
        end = at + _FRAME.size + size
        payload = data[at + _FRAME.size : end]
        framed = magic == _MAGIC and check == _length_check(size)
        if not framed or (len(payload) == size and _digest(payload) != digest):
            raise IntegrityError(
                f"{path.name}: the record at byte {start + at} is damaged; bring the file back from a copy, or cut it there"
            )
        if len(payload) < size:
            return
        yield payload, start + end
        at = end


def _bytes_from(path: Path, start: int) -> bytes:
    """What stands in the file from `start` on; nothing where there is no file, or no longer."""
    try:
        if path.stat().st_size <= start:
            return b""
        with path.open("rb") as handle:
            handle.seek(start)
            return handle.read()
    except FileNotFoundError:
        return b""


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
