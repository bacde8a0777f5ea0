"""
Speed figures. Here: python bench.py tokenize PARQUET... [--workers N]

The whole path of fineweb.py, parquet on disk to shards on disk, beside tiktoken alone in one process, and beside the
lecture's pipeline (rows of the datasets library through mp.Pool.imap, one array a document) with as many workers, and
with cpu_count // 2 of them as it is shipped. Prints one line each, and last a line of JSON.
"""
import argparse
import json
import multiprocessing as mp
import os
import shutil
import statistics
import tempfile
import time

import numpy as np
import pyarrow.parquet as pq

import data
import fineweb
from runtime import run_main


def tokenize_row(row):
    """Tokens of one document, as build-nanogpt's fineweb.py makes them."""
    tokens = np.array([data.EOT, *data.get_tokenizer().encode_ordinary(row["text"])])
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def lecture_pipeline(paths, out, workers, shard_size):
    """The lecture's pipeline into folder out; returns the tokens written."""
    import datasets
    rows = datasets.load_dataset("parquet", data_files=paths, split="train", cache_dir=os.path.join(out, "cache"))
    shard, n, index, total = np.empty(shard_size, dtype=np.uint16), 0, 0, 0
    start = time.perf_counter()  # the rows are on disk: its copy of the text is not counted
    with mp.get_context("fork").Pool(workers) as pool:
        for tokens in pool.imap(tokenize_row, rows, chunksize=16):
            total += len(tokens)
            if n + len(tokens) >= shard_size:
                first = shard_size - n
                shard[n:] = tokens[:first]
                np.save(os.path.join(out, f"lecture_{index:06d}"), shard)
                index, tokens, n = index + 1, tokens[first:], 0
            shard[n:n + len(tokens)] = tokens
            n += len(tokens)
    np.save(os.path.join(out, f"lecture_{index:06d}"), shard[:n])
    return total, time.perf_counter() - start


def our_pipeline(paths, out, workers, shard_size):
    """fineweb.py into folder out; returns the tokens written and the seconds."""
    start = time.perf_counter()
    source = fineweb.local_source(paths)
    asked = {"source": source.description, "shard_size": shard_size, "val_tokens": shard_size, "max_tokens": 0,
             "format": "npy", "text_column": "text", "skip_bad_files": False}
    manifest = fineweb.make_shards(source, asked, os.path.join(out, "ours"), workers)
    return sum(shard["tokens"] for shard in manifest["shards"]), time.perf_counter() - start


def tiktoken_alone(texts):
    """encode_ordinary over all texts in this process; returns the tokens and the seconds."""
    encode = data.get_tokenizer().encode_ordinary
    encode(texts[0])
    start = time.perf_counter()
    return sum(len(encode(text)) + 1 for text in texts), time.perf_counter() - start


def bench_tokenize(paths, workers, repeats=3, shard_size=1_000_000):
    """Figures of tokenizing the parquet files: {name: [MB/s, tok/s]}, medians of interleaved repeats, as a dict."""
    texts = [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
    size = sum(len(text.encode()) for text in texts)
    todo = {"tiktoken, 1 process": lambda out: tiktoken_alone(texts)}
    for n in sorted({1, workers}):
        todo[f"fineweb.py, {n} workers"] = lambda out, n=n: our_pipeline(paths, out, n, shard_size)
    for n in sorted({max(1, os.cpu_count() // 2), workers}):
        todo[f"lecture, {n} workers"] = lambda out, n=n: lecture_pipeline(paths, out, n, shard_size)
    rates = {name: [] for name in todo}
    for _ in range(repeats):
        for name, function in todo.items():
            out = tempfile.mkdtemp()
            try:
                tokens, seconds = function(out)
                rates[name].append((size / seconds / 1e6, tokens / seconds))
            finally:
                shutil.rmtree(out)
    medians = {name: [statistics.median(r[i] for r in values) for i in (0, 1)] for name, values in rates.items()}
    for name, (mb, tok) in medians.items():
        print(f"{name:24} {mb:7.1f} MB/s  {tok / 1e6:6.2f}M tok/s  all: {', '.join(f'{r[0]:.1f}' for r in rates[name])}")
    return medians


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=["tokenize"])
    parser.add_argument("paths", nargs="+", help="parquet files with a column text")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    args = parser.parse_args()
    print(json.dumps(bench_tokenize(args.paths, args.workers)))


if __name__ == "__main__":
    run_main(main)
