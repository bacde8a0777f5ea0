"""
The speed of tokenizing compared with tiktoken and the lecture's pipeline, which is reimplemented
here, and of the data loader compared with a training step.
"""
import functools
import glob
import multiprocessing
import os
import tempfile
import time

import numpy as np

import data
from bench.measure import print_table, timed
from bench.train import Variant, time_step
from run.config import INPUT_TXT

SHARD_SIZE = 1_000_000


@functools.cache
def tiktokens_gpt2():
    """The Encoding that tiktoken.get_encoding("gpt2") downloads.

    It is ours with tiktoken's own pattern.
    """
    # tiktoken_ext/openai_public.py of tiktoken 0.14
    pattern = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
    return data.encoding_with(pattern)


def time_encode(encode, texts):
    """(seconds, tokens) of encode over all texts in this thread."""
    encode(texts[0])
    return timed(lambda: sum(len(encode(text)) + 1 for text in texts))


def time_fineweb(paths, out, workers):
    """(seconds, tokens) of fineweb.py from parquet files to shards in folder out."""
    import fineweb

    def run():
        source = fineweb.local_source(paths)
        settings = {"source": source.description, "shard_size": SHARD_SIZE, "val": "documents",
                    "val_tokens": SHARD_SIZE, "max_tokens": 0, "format": "npy",
                    "text_column": "text"}
        manifest = fineweb.make_shards(source, settings, os.path.join(out, "shards"), workers)
        return sum(shard["tokens"] for shard in manifest["shards"])
    return timed(run)


def tokenize_row(row):
    """Tokens of one document, as in build-nanogpt's fineweb.py."""
    tokens = np.array([data.EOT, *tiktokens_gpt2().encode_ordinary(row["text"])])
    assert (tokens >= 0).all() and (tokens < 2**16).all()
    return tokens.astype(np.uint16)


def time_lecture(paths, out, workers):
    """(seconds, tokens) of the lecture's pipeline to shards in folder out.

    The conversion to Arrow files is not timed.
    """
    import datasets
    rows = datasets.load_dataset("parquet", data_files=paths, split="train",
                                 cache_dir=os.path.join(out, "cache"))

    def run():
        shard = np.empty(SHARD_SIZE, dtype=np.uint16)
        n = 0  # tokens in shard
        index = 0
        total = 0
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            for tokens in pool.imap(tokenize_row, rows, chunksize=16):
                total += len(tokens)
                if n + len(tokens) >= SHARD_SIZE:
                    shard[n:] = tokens[:SHARD_SIZE - n]
                    np.save(os.path.join(out, f"lecture_{index:06d}"), shard)
                    tokens = tokens[SHARD_SIZE - n:]
                    index += 1
                    n = 0
                shard[n:n + len(tokens)] = tokens
                n += len(tokens)
        np.save(os.path.join(out, f"lecture_{index:06d}"), shard[:n])
        return total
    return timed(run)


def write_input_txt_as_parquet(folder):
    """Writes input.txt eight times, split into documents of 100 lines, into two parquet files."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    with open(INPUT_TXT, encoding="utf-8") as f:
        lines = f.readlines()
    texts = ["".join(lines[i:i + 100]) for i in range(0, len(lines), 100)]
    for i in range(2):
        pq.write_table(pa.table({"text": 4 * texts}), os.path.join(folder, f"{i:03d}.parquet"))


def bench_tokenize(args):
    """Rows of encoding in one thread, and of the pipelines from parquet files to shards."""
    import pyarrow.parquet as pq
    with tempfile.TemporaryDirectory() as made:
        if not args.data:
            write_input_txt_as_parquet(made)
        folder = args.data or made
        cpus = os.cpu_count()
        paths = sorted(glob.glob(os.path.join(glob.escape(folder), "*.parquet")))
        texts = []
        for path in paths:
            texts += pq.read_table(path, columns=["text"])["text"].to_pylist()
        if not texts:
            raise ValueError(f"{folder} has no parquet files with documents in a column named text")
        tiktoken_encode = tiktokens_gpt2().encode_ordinary
        # functions of an empty folder that return (seconds, tokens)
        pipelines = {
            "tiktoken alone": lambda out: time_encode(tiktoken_encode, texts),
            "data.encode alone": lambda out: time_encode(data.encode, texts),
        }
        for n in sorted({1, cpus}):
            pipelines[f"fineweb.py, workers={n}"] = lambda out, n=n: time_fineweb(paths, out, n)
        for n in sorted({max(1, cpus // 2), cpus}):  # the lecture's script uses half of the CPUs
            pipelines[f"lecture, workers={n}"] = lambda out, n=n: time_lecture(paths, out, n)
        results = {name: [] for name in pipelines}
        for _ in range(args.repeats):
            for name, function in pipelines.items():
                with tempfile.TemporaryDirectory() as out:
                    results[name].append(function(out))
    size = sum(len(text.encode()) for text in texts)
    medians = {name: sorted(times)[len(times) // 2] for name, times in results.items()}
    tiktoken_seconds, _ = medians["tiktoken alone"]
    rows = []
    for name, (seconds, tokens) in medians.items():
        rows.append({"tokenize": name, "MB/s": size / seconds / 1e6,
                     "M tok/s": tokens / seconds / 1e6,
                     "x tiktoken": tiktoken_seconds / seconds})
    return print_table(rows)


def time_loader(args, num_tokens=1 << 24, batches=200):
    """(seconds to read a batch, seconds that next_batch waits for one).

    Reading includes the cast and the move to the device. The wait is that of a slow training loop.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "random_train_000001.npy")
        tokens = np.random.default_rng(0).integers(0, data.NUM_TOKENS, num_tokens)
        data.write_shard(path, tokens.astype(np.uint16))
        stream = data.TokenStream([path])
        loader = data.DataLoaderLite(stream, args.B, args.T, device=args.device)

        def read_all():
            for _ in range(batches):
                loader.next_batch()

        seconds, _ = timed(read_all, args.device)
        read = seconds / batches
        waits = []
        for _ in range(30):
            time.sleep(4 * read)  # the step; meanwhile the prefetch thread reads the next batch
            wait, _ = timed(loader.next_batch, args.device)
            waits.append(wait)
        loader.close()
    return read, np.median(waits).item()


def bench_loader(args):
    """Rows of milliseconds per batch, shuffled, compared with an eager training step."""
    read, wait = time_loader(args)
    step = time_step(Variant(args.dtype), args)["ms/step"]
    times = {
        "read and cast a batch": 1000 * read,
        "wait for a batch": 1000 * wait,
        "training step": step,
    }
    rows = []
    for name, ms in times.items():
        rows.append({"loader": name, "ms/batch": ms, "% of step": 100 * ms / step})
    return print_table(rows)
