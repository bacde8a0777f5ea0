"""
The data's speed: text to shards beside tiktoken alone and the lecture's pipeline (bench.py tokenize).

The reference is the lecture's arithmetic, in lines of our own.
"""
import multiprocessing
import os
import statistics
import tempfile
import time

import numpy as np

import data
import fineweb

# -----------------------------------------------------------------------------
# tokenize

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
    with multiprocessing.get_context("fork").Pool(workers) as pool:
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


def bench_tokenize(args):
    """Rows of the whole path, parquet on disk to shards on disk: fineweb.py, tiktoken alone in one process, and the
    lecture's pipeline with as many workers and with cpu_count // 2 as it is shipped; medians of interleaved repeats."""
    import pyarrow.parquet as pq
    if not args.data:
        raise ValueError("tokenize needs --data: a folder of parquet files with a column text")
    paths = sorted(os.path.join(args.data, name) for name in os.listdir(args.data) if name.endswith(".parquet"))
    texts = [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
    size, workers, shard_size = sum(len(text.encode()) for text in texts), os.cpu_count(), 1_000_000
    todo = {"tiktoken alone, 1 process": lambda out: tiktoken_alone(texts)}
    for n in sorted({1, workers}):
        todo[f"fineweb.py, {n} workers"] = lambda out, n=n: our_pipeline(paths, out, n, shard_size)
    for n in sorted({max(1, workers // 2), workers}):
        todo[f"lecture, {n} workers"] = lambda out, n=n: lecture_pipeline(paths, out, n, shard_size)
    rates = {name: [] for name in todo}
    for _ in range(args.repeats):
        for name, function in todo.items():
            with tempfile.TemporaryDirectory() as out:
                tokens, seconds = function(out)
                rates[name].append((size / seconds / 1e6, tokens / seconds))
    medians = {name: [statistics.median(column) for column in zip(*values)] for name, values in rates.items()}
    alone = medians["tiktoken alone, 1 process"][0]
    return [{"tokenize": name, "MB/s": mb, "M tok/s": tok / 1e6, "x tiktoken": mb / alone}
            for name, (mb, tok) in medians.items()]
