"""sentence-transformers in float32: `python encode.py MODEL MAX_TOKENS TEXTS.parquet OUT.npz` (vectors, processor seconds)."""

import os
import sys
import time

import numpy as np
import polars as pl
import torch
from sentence_transformers import SentenceTransformer

model_folder, longest, source, out = sys.argv[1:]
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
model = SentenceTransformer(model_folder, device="cpu")
model.max_seq_length = int(longest)
texts = pl.read_parquet(source)["text"].to_list()
model.encode(["warm up"])
began = time.process_time()
vectors = model.encode(texts, batch_size=32, normalize_embeddings=True)
np.savez(out, vectors=vectors, seconds=time.process_time() - began)
