"""Item texts to vectors on the CPU: our encoder beside sentence-transformers in float32, both with MiniLM's own weights."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import numpy as np
import polars as pl
from data import read

from retrieval.encoder import TextEncoder
from retrieval.model_folder import find_model
from tandem.service.texts import item_texts

HERE = Path(__file__).parent


def report(scratch: Path, count: int, python: Path | None) -> None:
    """CPU seconds for `count` texts of three catalogues, cosine of ours with the peer's, then a run from the cache."""
    texts: list[str] = []
    for name in ("ranklens", "online-retail", "movielens"):
        if len(texts) < count:
            texts += item_texts(read(name)[1])
    texts = texts[:count]
    cache = scratch / f"encode-{time.time_ns()}"
    encoder = TextEncoder(cache=cache)
    encoder.encode(["warm up"])
    seconds, vectors = _timed(encoder, texts)
    again, _ = _timed(TextEncoder(cache=cache), texts)
    print(f"\n| {len(texts):,} texts | CPU s | texts / CPU s | cosine with sentence-transformers |\n|---|---|---|---|")
    cosine = "not run"
    if python is not None:
        peer, theirs = _peer(scratch, texts, encoder, python)
        close = (vectors * theirs).sum(1)
        cosine = f"mean {close.mean():.5f}, least {close.min():.5f}"
        print(f"| sentence-transformers, float32 | {peer:.1f} | {len(texts) / peer:,.0f} | |")
    print(f"| ours, {encoder.dtype} | {seconds:.1f} | {len(texts) / seconds:,.0f} | {cosine} |")
    print(f"| ours, second run | {again:.3f} | {len(texts) / again:,.0f} | |", flush=True)


def _timed(encoder: TextEncoder, texts: list[str]) -> tuple[float, np.ndarray]:
    began = time.process_time()
    vectors = encoder.encode(texts)
    return time.process_time() - began, vectors


def _peer(scratch: Path, texts: list[str], encoder: TextEncoder, python: Path) -> tuple[float, np.ndarray]:
    source, out = scratch / "texts.parquet", scratch / "theirs.npz"
    pl.DataFrame({"text": texts}).write_parquet(source)
    words = [python, HERE / "peers" / "encode.py", find_model(encoder.model), encoder.max_tokens, source, out]
    subprocess.run([str(word) for word in words], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    answer = np.load(out)
    return float(answer["seconds"]), answer["vectors"]
