"""
The data's speed: text to shards beside tiktoken alone and the lecture's pipeline (bench.py tokenize), and the loader
beside the training step it feeds (bench.py loader).

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
import runtime
from bench_limits import in_fresh_process, shape_for
from bench_train import Step, time_step
from config import INPUT_TXT

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


def write_input_txt_as_parquet(folder, copies=8):
    """Writes input.txt, cut into documents of 100 lines, as two parquet files of copies times its size in all."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    with open(INPUT_TXT, encoding="utf-8") as f:
        lines = f.readlines()
    texts = ["".join(lines[i:i + 100]) for i in range(0, len(lines), 100)]
    for i in range(2):
        pq.write_table(pa.table({"text": texts * (copies // 2)}), os.path.join(folder, f"{i:03d}.parquet"))


def bench_tokenize(args):
    """Rows of the whole path, parquet on disk to shards on disk, for --data or input.txt several times over: fineweb.py,
    tiktoken alone in one process, and the lecture's pipeline with as many workers and with cpu_count // 2 as it is
    shipped; medians of interleaved repeats."""
    import pyarrow.parquet as pq
    with tempfile.TemporaryDirectory() as made:
        if not args.data:
            write_input_txt_as_parquet(made)
        folder = args.data or made
        paths = sorted(os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".parquet"))
        texts = [text for path in paths for text in pq.read_table(path, columns=["text"])["text"].to_pylist()]
        if not texts:
            raise ValueError(f"{folder} holds no parquet files with documents in a column text")
        rates = time_pipelines(paths, texts, args.repeats)
    medians = {name: [statistics.median(column) for column in zip(*values)] for name, values in rates.items()}
    alone = medians["tiktoken alone, 1 process"][0]
    return [{"tokenize": name, "MB/s": mb, "M tok/s": tok / 1e6, "x tiktoken": mb / alone}
            for name, (mb, tok) in medians.items()]


def time_pipelines(paths, texts, repeats):
    """{pipeline: [(MB/s, tok/s) of each repeat]} for parquet files and the texts in them."""
    size, workers, shard_size = sum(len(text.encode()) for text in texts), os.cpu_count(), 1_000_000
    todo = {"tiktoken alone, 1 process": lambda out: tiktoken_alone(texts)}
    for n in sorted({1, workers}):
        todo[f"fineweb.py, {n} workers"] = lambda out, n=n: our_pipeline(paths, out, n, shard_size)
    for n in sorted({max(1, workers // 2), workers}):
        todo[f"lecture, {n} workers"] = lambda out, n=n: lecture_pipeline(paths, out, n, shard_size)
    rates = {name: [] for name in todo}
    for _ in range(repeats):
        for name, function in todo.items():
            with tempfile.TemporaryDirectory() as out:
                tokens, seconds = function(out)
                rates[name].append((size / seconds / 1e6, tokens / seconds))
    return rates


# -----------------------------------------------------------------------------
# loader

def time_loader(B, T, device, num_tokens=1 << 24, batches=200):
    """{"read": seconds a batch takes to be read, cast and moved; "wait": seconds next_batch takes a step that is slower}."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "random_train_000001.npy")
        data.write_shard(path, np.random.default_rng(0).integers(0, data.NUM_TOKENS, num_tokens).astype(np.uint16))
        loader = data.DataLoaderLite(data.TokenStream([path]), B, T, device=device)
        try:
            start = time.perf_counter()
            for _ in range(batches):
                loader.next_batch()
            read = (time.perf_counter() - start) / batches
            waits = []
            for _ in range(30):
                time.sleep(4 * read)  # the step; the thread reads ahead meanwhile
                runtime.synchronize(device)
                start = time.perf_counter()
                loader.next_batch()
                runtime.synchronize(device)
                waits.append(time.perf_counter() - start)
        finally:
            loader.close()
    return {"read": read, "wait": statistics.median(waits)}


def bench_loader(args):
    """Rows of a batch's milliseconds, shuffled, beside those of the training step (ours, eager) that it is for."""
    device = runtime.choose_device(args.device)
    dtype = runtime.choose_dtype(args.dtype, device)
    B, T = shape_for(args, device)
    figures = in_fresh_process(time_loader, B, T, device)
    step = time_step(Step(dtype), args.size, B, T, device, args.steps)["seconds"]
    rows = {"reading and casting a batch": figures["read"], "what a step waits for it": figures["wait"], "the step": step}
    return [{"loader": name, "ms a batch": 1000 * seconds, "% of a step": 100 * seconds / step}
            for name, seconds in rows.items()]
