"""One change of a live index as the journal keeps it: a line of JSON with the ids, then the vectors' bytes."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from typing import Literal, Self

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Record:
    """`put`: vectors (n, D) float32 of n ids; `delete`: ids that are gone; `name`: ids that get the next numbers, no more."""

    kind: Literal["put", "delete", "name"]
    ids: tuple[str, ...]
    vectors: NDArray[np.float32] | None = None

    def packed(self) -> bytes:
        head = json.dumps([self.kind, list(self.ids)], ensure_ascii=False).encode()
        body = b"" if self.vectors is None else np.ascontiguousarray(self.vectors, "<f4").tobytes()
        return struct.pack("<I", len(head)) + head + body

    @classmethod
    def unpacked(cls, payload: bytes) -> Self:
        (size,) = struct.unpack_from("<I", payload)
        kind, ids = json.loads(payload[4 : 4 + size])
        body = np.frombuffer(payload, "<f4", offset=4 + size)
        return cls(kind, tuple(ids), body.reshape(len(ids), -1) if kind == "put" else None)
