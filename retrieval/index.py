"""Vectors -> the k nearest by inner product. The only file that knows faiss, imported when an index is built or loaded.

In: vectors (N, D) float32; row number = dense item id. Out: scores (B, k) float32 and ids (B, k) int64, best first, equal scores
by lower id, padded with -inf and -1 only when fewer than k items are allowed. Judged by exact search (`exact.py`).
A built index never changes: searches may run from many threads at once.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from retrieval.checks import Floats, Mask, check_k, check_width, checked_mask, checked_rows
from retrieval.exact import exact_search, renamed, scan
from retrieval.int8 import Codes
from retrieval.kinds import INT8, NAMES, IndexConfig, resolve_kind
from retrieval.topk import best, pack, unpack
from tandem.core.errors import IncompatibleError, InputError, IntegrityError, NotFoundError, UnavailableError
from tandem.core.folders import content_hash, file_hash, read_json, verify_files, whole_folder, write_json

Ids = NDArray[np.int64]

__all__ = ["IndexConfig", "VectorIndex"]

_INDEX_FILE: Final = "index.faiss"
_CARD_FILE: Final = "index.json"
_GPU_MAX_K: Final = 2_048
_WIDEST_REFINE: Final = 16
_ROUNDS: Final = 8
_POINTS_PER_CENTRE: Final = 64


@dataclass(frozen=True, eq=False)
class VectorIndex:
    """A built, tuned, immutable index. `recall` was measured against exact search; `breadth` is efSearch or nprobe.

    `widen`: kinds that re-score (`...,RFlat`) do so with that many times k candidates. `milliseconds`: of one query, measured
    where there was a budget for it; None elsewhere.
    """

    kind: str
    dimension: int
    count: int
    recall: float
    breadth: int
    config: IndexConfig
    index: Any = field(repr=False)
    widen: int = 1
    milliseconds: float | None = None
    _codes: Codes | None = field(default=None, repr=False)
    _gpu: Any = field(default=None, repr=False)
    _gpu_turn: threading.Lock = field(default_factory=threading.Lock, repr=False)
    _gpu_lost: threading.Event = field(default_factory=threading.Event, repr=False)

    @classmethod
    def build(cls, vectors: Floats, config: IndexConfig | None = None, queries: Floats | None = None) -> Self:
        """Index `vectors` (N, D) and tune on `queries` (Q, D); without queries, on a sample of the vectors themselves.

        Raises InputError for NaN, infinite or no vectors and for an unknown kind, IncompatibleError for queries of another width.
        """
        config = config or IndexConfig()
        vectors = checked_rows(vectors, "vectors")
        if not len(vectors) and not config.allow_empty:
            raise InputError("no vectors to index; import items first, or set allow_empty to publish an empty index")
        kind = resolve_kind(config.kind, len(vectors), vectors.shape[1], config.storage)
        index, gpu = _build_faiss(vectors, kind, config)
        codes = Codes.of(vectors) if kind == INT8 else None
        built = cls(kind, vectors.shape[1], len(vectors), 1.0, 0, config, index, _codes=codes, _gpu=gpu)
        asked = _sample(vectors if queries is None else checked_rows(queries, "queries"), config.tuning_queries)
        check_width(asked, built.dimension)
        return built._tuned(vectors, asked) if len(vectors) and len(asked) else built

    def search(self, queries: Floats, k: int, allowed: Mask | None = None) -> tuple[Floats, Ids]:
        """The k best items per query: scores (B, k) float32, ids (B, k) int64; `allowed` (N,) bool is applied inside the search.

        Raises InputError for a NaN or infinite query or k outside 1..100,000, IncompatibleError for a wrong width or mask length.
        """
        check_k(k)
        queries = checked_rows(queries, "queries")
        check_width(queries, self.dimension)
        allowed = checked_mask(allowed, self.count)
        eligible = self.count if allowed is None else int(np.count_nonzero(allowed))
        if not eligible or not len(queries):
            return best(np.empty((len(queries), 0), np.float32), k)
        if self._exact_is_cheaper(eligible):
            return self._exact(queries, k, allowed)
        return self._search_index(queries, k, allowed, eligible)

    @property
    def in_budget(self) -> bool | None:
        """Was one query answered within `config.budget_ms` when the index was built? None where nobody asked."""
        return None if self.milliseconds is None else self.milliseconds <= self.config.budget_ms

    def vectors(self, ids: Ids) -> Floats:
        """Stored vectors (len(ids), D) float32; of a compressing kind, what it kept of them."""
        return np.asarray(self.index.reconstruct_batch(np.asarray(ids, np.int64)), np.float32)

    def save(self, folder: Path) -> None:
        """Write index.faiss and index.json as one whole folder; an older one stays in place until the new one is complete."""
        with whole_folder(folder) as partial:
            _write(self.index, partial / _INDEX_FILE)
            card = {
                "kind": self.kind,
                "dimension": self.dimension,
                "count": self.count,
                "recall": self.recall,
                "breadth": self.breadth,
                "widen": self.widen,
                **({} if self.milliseconds is None else {"milliseconds": self.milliseconds}),
                "config": asdict(self.config),
                "sha256": file_hash(partial / _INDEX_FILE),
            }
            write_json(partial / _CARD_FILE, {**card, "seal": content_hash(card)})

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Read what `save` wrote. NotFoundError without one; IntegrityError before faiss sees a damaged byte."""
        faiss = _faiss()

        card = _read_card(folder)
        verify_files(folder, {_INDEX_FILE: card["sha256"]})
        index = faiss.read_index(str(folder / _INDEX_FILE))
        if (index.d, index.ntotal) != (card["dimension"], card["count"]):
            raise IntegrityError(
                f"{folder.name}: index.faiss holds {index.ntotal} vectors of {index.d} numbers, index.json says "
                f"{card['count']} of {card['dimension']}; build the index again"
            )
        config = _read_config(card["config"])
        if index.metric_type != faiss.METRIC_INNER_PRODUCT:
            raise IncompatibleError(
                f"{folder.name}: index.faiss measures by metric {index.metric_type}, Tandem by inner product "
                f"({faiss.METRIC_INNER_PRODUCT}); build the index again"
            )
        gpu = _to_gpu(index, card["kind"], config)
        facts = {name: card[name] for name in ("kind", "dimension", "count", "recall", "breadth")}
        loaded = cls(
            **facts, config=config, index=index, widen=card.get("widen", 1), milliseconds=card.get("milliseconds"), _gpu=gpu
        )
        return replace(loaded, _codes=Codes.of(loaded._stored())) if loaded.kind == INT8 else loaded

    def _tuned(self, vectors: Floats, queries: Floats) -> Self:
        """Widen the search until its recall reaches the target, and re-score no more than that takes; the widest if none does."""
        k = min(self.config.k, self.count)
        scores, _ = exact_search(vectors, queries, k)
        tried = replace(self, widen=_WIDEST_REFINE if _refines(self.index) else 1)
        for breadth in _breadths(self.index, k):
            tried = replace(tried, breadth=breadth)._judged(vectors, queries, scores[:, -1:], k)
            if tried.recall >= self.config.target_recall:
                return tried._narrowed(vectors, queries, scores[:, -1:], k)
        return tried

    def _narrowed(self, vectors: Floats, queries: Floats, worst: Floats, k: int) -> Self:
        """The least re-scoring that still reaches the target."""
        kept = self
        while kept.widen > 1:
            less = replace(kept, widen=kept.widen // 2)._judged(vectors, queries, worst, k)
            if less.recall < self.config.target_recall:
                break
            kept = less
        return kept

    def _judged(self, vectors: Floats, queries: Floats, worst: Floats, k: int) -> Self:
        return replace(self, recall=self._recall(vectors, queries, worst, k))

    def _recall(self, vectors: Floats, queries: Floats, worst: Floats, k: int) -> float:
        """Share of the answers that truly score at least the k-th best score; a tie with it counts as found."""
        exactly = self.kind in ("Flat", INT8)
        _, ids = self._exact(queries, k, None) if exactly else self._ask(queries, k, None, self.breadth)
        true = np.einsum("bd,bkd->bk", queries, vectors[np.maximum(ids, 0)])
        tolerance = 1e-5 * np.maximum(np.abs(worst), 1e-3)
        return float(np.mean((ids >= 0) & (true >= worst - tolerance)))

    def _search_index(self, queries: Floats, k: int, allowed: Mask | None, eligible: int) -> tuple[Floats, Ids]:
        """Ask faiss, more broadly as the allowed get rarer; a row that comes back short is searched exactly."""
        breadth = -(-self.breadth * self.count // eligible)
        scores, ids = _padded(*self._ask(queries, min(k, self.count), allowed, breadth), k)
        short = (ids[:, : min(k, eligible)] < 0).any(axis=1)
        if short.any():
            scores[short], ids[short] = self._exact(queries[short], k, allowed)
        return scores, ids

    def _ask(self, queries: Floats, k: int, allowed: Mask | None, breadth: int) -> tuple[Floats, Ids]:
        """What faiss answers, unique and in order; -inf and -1 where it found nothing."""
        widen = min(self.widen, max(1, self.count // k))
        on_gpu = self._ask_gpu(queries, k, breadth, widen) if allowed is None and k <= _GPU_MAX_K else None
        parameters = _parameters(self.index, breadth, widen, allowed)
        scores, ids = self.index.search(queries, k, params=parameters) if on_gpu is None else on_gpu
        return unpack(np.sort(pack(np.where(ids >= 0, scores, -np.inf).astype(np.float32), np.maximum(ids, 0)), axis=1))

    def _ask_gpu(self, queries: Floats, k: int, breadth: int, widen: int) -> tuple[Floats, Ids] | None:
        """The GPU's answer; None where there is no GPU, or it failed (lost, out of memory) and may be done without."""
        if self._gpu is None:
            return None
        try:
            with self._gpu_turn:  # one GPU resource serves one search at a time
                found: tuple[Floats, Ids] = self._gpu.search(queries, k, params=_parameters(self.index, breadth, widen, None))
            self._gpu_lost.clear()
            return found
        except RuntimeError as error:
            self._gpu_lost.set()
            if self.config.device == "gpu":
                reason = str(error).strip().splitlines()[-1][:200]
                raise UnavailableError(f'the GPU failed ({reason}) and index.device = "gpu"; use "auto" to go on') from None
            return None

    @property
    def gpu_lost(self) -> bool:
        """Does the processor answer in the place of a GPU that has failed?"""
        return self._gpu_lost.is_set()

    def _exact(self, queries: Floats, k: int, allowed: Mask | None) -> tuple[Floats, Ids]:
        if self._codes is not None:
            return self._codes.scan(self._stored(), queries, k, allowed)
        if self.kind == "Flat":
            return scan(self._stored(), queries, k, allowed)
        ids = np.arange(self.count) if allowed is None else np.flatnonzero(allowed)
        scores, places = scan(self.vectors(ids), queries, k, None)
        return scores, renamed(places, ids)

    def _stored(self) -> Floats:
        """The vectors inside a flat index (N, D) float32, without a copy."""
        flat = _innermost(self.index)
        return np.asarray(_faiss().rev_swig_ptr(flat.get_xb(), self.count * self.dimension)).reshape(self.count, self.dimension)

    def _exact_is_cheaper(self, eligible: int) -> bool:
        """Compare a scan of the allowed vectors with the index's own work, which grows as the allowed get rarer.

        A flat index on the CPU is always scanned here: in batches faiss's own scan takes several times longer.
        """
        if self.kind in ("Flat", INT8):
            return self._gpu is None or eligible < self.count
        if eligible == self.count:
            return False
        return not _filters(self.index) or eligible * eligible <= _visited(self.index, self.breadth, self.count) * self.count


def _faiss() -> Any:
    """The library, imported at the first use. Its stubs know half of it, hence Any."""
    try:
        import faiss
    except ImportError as error:
        raise UnavailableError(f"faiss is not installed ({error}); pip install 'tandem-recommender[cpu]' or '[gpu]'") from None
    return faiss


def _build_faiss(vectors: Floats, kind: str, config: IndexConfig) -> tuple[Any, Any]:
    """(CPU index, GPU copy or None). One thread for HNSW, whose graph otherwise depends on how threads interleave."""
    faiss = _faiss()

    try:
        index = faiss.index_factory(vectors.shape[1], "Flat" if kind == INT8 else kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise InputError(
            f"index kind {kind!r} is not a faiss index_factory string ({reason}); use one of {', '.join(NAMES)}"
        ) from None
    graph = _innermost(index)
    if isinstance(graph, faiss.IndexHNSW):
        graph.hnsw.efConstruction = config.construction
    if isinstance(graph, faiss.IndexIVF):
        graph.cp.niter, graph.cp.max_points_per_centroid = _ROUNDS, _POINTS_PER_CENTRE
    gpu = _to_gpu(index, kind, config)
    with _threads(1 if isinstance(graph, faiss.IndexHNSW) else faiss.omp_get_max_threads()):
        _fill(index if gpu is None else gpu, vectors, kind)
    if gpu is not None:
        index = faiss.index_gpu_to_cpu(gpu)
    if isinstance(_innermost(index), faiss.IndexIVF):
        _innermost(index).make_direct_map()
    return index, gpu


def _write(index: Any, path: Path) -> None:
    """Write a faiss file through our own handle: faiss's own writer may report success on a full disk."""
    faiss = _faiss()

    failed: list[OSError] = []
    with path.open("wb") as handle:

        def write(part: bytes) -> int:
            try:
                return handle.write(part)
            except OSError as error:  # faiss would say only that a callback failed
                failed.append(error)
                raise

        try:
            faiss.write_index(index, faiss.PyCallbackIOWriter(write))
            handle.flush()
            os.fsync(handle.fileno())
        except (RuntimeError, OSError) as error:
            raise (failed[0] if failed else error) from None


def _fill(index: Any, vectors: Floats, kind: str) -> None:
    try:
        if not index.is_trained and len(vectors):
            index.train(vectors)
        index.add(vectors)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1][:200]
        raise InputError(f"index kind {kind!r} does not take {len(vectors)} vectors ({reason}); use auto, flat or hnsw") from None


def _to_gpu(index: Any, kind: str, config: IndexConfig) -> Any:
    """A GPU copy of a flat or IVF index where faiss and the machine have a GPU, with a resource of its own; None elsewhere.

    Raises UnavailableError where the settings insist on a GPU and there is none, or none for this kind.
    """
    faiss = _faiss()

    problem = None if config.device == "cpu" else _gpu_problem(faiss, kind)
    if problem is not None and config.device == "gpu":
        raise UnavailableError(f'index.device = "gpu", but {problem}; use "auto", which goes on without one')
    if problem is not None or config.device == "cpu":
        return None
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), 0, index)


def _gpu_problem(faiss: Any, kind: str) -> str | None:
    """Why this kind cannot be on a GPU here. Asked for by name: faiss's own helpers do nothing, quietly, where there is none."""
    if not hasattr(faiss, "StandardGpuResources"):
        return "this faiss was built without GPUs (pip install 'tandem-recommender[gpu]')"
    if faiss.get_num_gpus() < 1:
        return "faiss sees no GPU on this machine"
    if not (kind == "Flat" or kind.startswith("IVF")):  # INT8 is for processors, a graph for memory
        return f"kind {kind} has no form for GPUs (flat and ivf have)"
    return None


def _innermost(index: Any) -> Any:
    """The index below its transforms and refinements: the one that has efSearch or nprobe."""
    faiss = _faiss()

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return _innermost(index.index)
    if isinstance(index, faiss.IndexRefine):
        return _innermost(index.base_index)
    return index


def _parameters(index: Any, breadth: int, widen: int, allowed: Mask | None) -> Any:
    """Search parameters of one call, nested as the index is: nothing in the shared index is set."""
    faiss = _faiss()

    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=_parameters(index.index, breadth, widen, allowed))
    if isinstance(index, faiss.IndexRefine):
        inner = _parameters(index.base_index, breadth, widen, allowed)
        return faiss.IndexRefineSearchParameters(k_factor=widen, base_index_params=inner)
    chosen = {} if allowed is None else {"sel": faiss.IDSelectorBitmap(np.packbits(allowed, bitorder="little"))}
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(nprobe=min(max(breadth, 1), index.nlist), **chosen)
    if isinstance(index, faiss.IndexHNSW):
        return faiss.SearchParametersHNSW(efSearch=min(max(breadth, 1), index.ntotal), **chosen)
    return faiss.SearchParameters(**chosen) if chosen else None


def _breadths(index: Any, k: int) -> Sequence[int]:
    """Search widths to try, narrow first; one that is meaningless (0) for an index that has none."""
    faiss = _faiss()

    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return _doubling(1, inner.nlist)
    if isinstance(inner, faiss.IndexHNSW):
        return _doubling(min(max(k, 16), index.ntotal), index.ntotal)
    return [0]


def _refines(index: Any) -> bool:
    """Does the kind look at float32 vectors in the end?"""
    faiss = _faiss()
    return isinstance(faiss.downcast_index(index), faiss.IndexRefine)


def _filters(index: Any) -> bool:
    """Can this kind leave items out while it searches? The others are searched exactly when there is a filter."""
    faiss = _faiss()
    inner = _innermost(index)
    return isinstance(inner, (faiss.IndexIVF, faiss.IndexHNSW, faiss.IndexFlat, faiss.IndexScalarQuantizer))


def _visited(index: Any, breadth: int, count: int) -> int:
    """About how many vectors one unfiltered search looks at."""
    faiss = _faiss()

    inner = _innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return breadth * count // int(inner.nlist)
    if isinstance(inner, faiss.IndexHNSW):
        return breadth * int(inner.hnsw.nb_neighbors(0)) // 2
    return count // 8  # a linear scan of codes: decoding and gathering pays off when few are left


def _doubling(first: int, last: int) -> list[int]:
    widths = [first]
    while widths[-1] < last:
        widths.append(min(widths[-1] * 2, last))
    return widths


def _padded(scores: Floats, ids: Ids, k: int) -> tuple[Floats, Ids]:
    missing = ((0, 0), (0, k - ids.shape[1]))
    return np.pad(scores, missing, constant_values=-np.inf), np.pad(ids, missing, constant_values=-1)


def _sample(rows: Floats, limit: int) -> Floats:
    """At most `limit` rows, evenly spaced."""
    if len(rows) <= limit:
        return rows
    return rows[np.linspace(0, len(rows) - 1, limit).astype(np.int64)]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    faiss = _faiss()

    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(count)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _read_card(folder: Path) -> dict[str, Any]:
    path = folder / _CARD_FILE
    if not path.is_file():
        raise NotFoundError(f"no index in {folder}; build one with `tandem train towers`")
    try:
        card = read_json(path)
        seal = card.pop("seal")
    except (ValueError, KeyError, AttributeError):
        raise IntegrityError(f"{folder.name}: {_CARD_FILE} is damaged; build the index again") from None
    if seal != content_hash(card):
        raise IntegrityError(f"{folder.name}: {_CARD_FILE} does not match its own seal; build the index again")
    return dict(card)


def _read_config(values: dict[str, Any]) -> IndexConfig:
    try:
        return IndexConfig(**values)
    except TypeError as error:
        raise IncompatibleError(f"index.json was written by another version of Tandem ({error}); build the index again") from None
