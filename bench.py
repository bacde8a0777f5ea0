"""
Speed, measured: each figure beside its reference and the machine's own limit, in one run.

    python bench.py train                          # GPT-2 124M, B=4, T=512 on a CPU; B=16, T=1024 on a GPU
    python bench.py train --size gpt2-medium --batch-size 8 --steps 10 --json train.json
    python bench.py hellaswag --data hellaswag/hellaswag_val.jsonl
    python bench.py tokenize --data folder_of_parquet

Every variant of the training step runs in a fresh process, so that no allocator or thread pool of one serves the other.
Times are medians over the steps after a warm-up. The references are the lecture's arithmetic, in lines of our own.
The last line printed is the JSON of what the table shows.
"""
import json
import multiprocessing
import os
import statistics
import tempfile
import time

import numpy as np
import torch

import data
import fineweb
import hellaswag
import runtime
import scoring
from model import GPT, SIZES, config_for
from train_gpt2 import train_step

# -----------------------------------------------------------------------------
# measuring

def in_fresh_process(function, *args):
    """function(*args), run in a new Python process; its result must pickle."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def median_seconds(function, repeats, device, warmup=2):
    """Median seconds of function() over repeats calls, after warmup calls that do not count."""
    times = []
    for i in range(warmup + repeats):
        runtime.synchronize(device)
        start = time.perf_counter()
        function()
        runtime.synchronize(device)
        if i >= warmup:
            times.append(time.perf_counter() - start)
    return statistics.median(times)


def peak_rss():
    """Largest resident memory this process ever had, bytes; None where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def matmul_peak(dtype, device):
    """Best FLOP/s of a plain matrix product (M, K) x (K, N) in dtype (a name), over shapes that GPT-2 has."""
    runtime.keep_freed_memory()
    best = 0.0
    for M, K, N in ((2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096)):
        a, b = (torch.randn(shape, device=device).to(runtime.DTYPES[dtype]) for shape in ((M, K), (K, N)))
        seconds = median_seconds(lambda a=a, b=b: a @ b, 5, device)
        best = max(best, 2 * M * K * N / seconds)
    return best


def print_table(rows):
    """Prints a list of dicts with the same keys as an aligned table."""
    cells = [list(rows[0]), *[[f"{v:,.2f}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))


# -----------------------------------------------------------------------------
# train

class OneBatch:
    """A loader that always gives the same random batch: the step is timed, not the disk."""

    def __init__(self, B, T, device):
        self.B, self.T, self.position = B, T, 0
        self.x, self.y = torch.randint(0, 50257, (2, B, T), device=device).unbind(0)

    def next_batch(self):
        """x, y of shape (B, T)."""
        return self.x, self.y


def time_train(variant, size, B, T, dtype, device, steps):
    """{"seconds", "loss", "rss"} of a training step: variant "lecture", "eager" or "compiled".

    lecture: its step as it stands, eager, AdamW looped over tensors where the device is not CUDA, as its script has it.
    eager, compiled: ours, as train_gpt2.py runs it without and with torch.compile.
    """
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")
    raw_model = GPT(config_for(size, vocab_size=50304)).to(device)
    batch = OneBatch(B, T, device)
    losses = []
    if variant == "lecture":
        decayed = [p for p in raw_model.parameters() if p.dim() >= 2]
        others = [p for p in raw_model.parameters() if p.dim() < 2]
        optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                      lr=6e-4, betas=(0.9, 0.95), eps=1e-8, fused=device.startswith("cuda"))

        def step():
            optimizer.zero_grad()
            with runtime.autocast(device, dtype):
                _, loss = raw_model(batch.x, batch.y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    else:
        runtime.keep_freed_memory()
        optimizers = raw_model.configure_optimizers(6e-4, 0.1)
        scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == "float16")
        mode = "on" if variant == "compiled" else "off"
        model = runtime.compile_for_training(raw_model, mode, steps, B, T, dtype, device)
        ranks = runtime.Ranks(0, 0, 1, device, False)

        def step():
            losses.append(train_step(model, raw_model, optimizers, scaler, batch, 6e-4, 1, 1.0, dtype, ranks)[0])
    seconds = median_seconds(step, steps, device)
    memory = torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_rss()
    return {"seconds": seconds, "loss": losses[-1], "memory": memory, "flops": raw_model.flops_per_token(T) * B * T}


def bench_train(args):
    """Rows of the training step's figures: the lecture's step, ours eager, ours compiled; with the matmul peak."""
    device = runtime.choose_device(args.device)
    dtype = runtime.choose_dtype(args.dtype, device)
    B, T = args.batch_size or (4 if device == "cpu" else 16), args.sequence_length or (512 if device == "cpu" else 1024)
    peak = in_fresh_process(matmul_peak, dtype, device)
    print(f"{runtime.device_name(device)}, torch {torch.__version__}, {dtype}, {args.size}, B={B}, T={T};"
          f" matmul peak {peak / 1e9:,.0f} GFLOP/s", flush=True)
    rows = []
    for variant in ("lecture", "eager", "compiled"):
        figures = in_fresh_process(time_train, variant, args.size, B, T, dtype, device, args.steps)
        reference = rows[0]["ms a step"] if rows else figures["seconds"] * 1000
        rows.append({"step": variant, "ms a step": figures["seconds"] * 1000, "tok/s": B * T / figures["seconds"],
                     "x lecture": reference / (figures["seconds"] * 1000),
                     "% of matmul peak": 100 * figures["flops"] / figures["seconds"] / peak,
                     "peak GB": (figures["memory"] or 0) / 1e9, "loss": figures["loss"]})
        print(f"  {variant}: {B * T / figures['seconds']:,.0f} tok/s", flush=True)
    return rows


# -----------------------------------------------------------------------------
# hellaswag

@torch.no_grad()
def lecture_hellaswag(model, examples, device, dtype):
    """(examples/s, predictions): the lecture's way, one example at a time, logits everywhere (build-nanogpt's hellaswag.py)."""
    predicted = []
    start = time.perf_counter()
    for example in examples:
        tokens, mask, _ = (t.to(device) if torch.is_tensor(t) else t for t in hellaswag.render_example(example))
        with runtime.autocast(device, dtype):
            logits = model.lm_head(model.hidden(tokens, torch.arange(tokens.size(1), device=device)))   # (4, N, V)
        shift_logits = logits[:, :-1, :].contiguous()
        flat_shift_logits = shift_logits.view(-1, shift_logits.size(-1))
        losses = torch.nn.functional.cross_entropy(flat_shift_logits, tokens[:, 1:].reshape(-1), reduction="none").view(4, -1)
        shift_mask = mask[:, 1:]
        predicted.append(((losses * shift_mask).sum(dim=1) / shift_mask.sum(dim=1)).argmin().item())
    runtime.synchronize(device)
    return len(examples) / (time.perf_counter() - start), predicted


def bench_hellaswag(args):
    """Rows of scoring --limit examples with random weights, completion style: the lecture's way as it stands,
    with freed memory kept as our scripts run, and ours. flips: predictions unlike those of float32."""
    device = runtime.choose_device(args.device)
    dtype = runtime.choose_dtype(args.dtype, device)
    runtime.seed_all(1337)
    model = GPT(config_for(args.size, vocab_size=50304)).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:  # spread over the file: its first part has shorter texts than its second
        examples = list(hellaswag.iterate_examples(args.data or hellaswag.path_of("val")))
        with open(os.path.join(folder, "sample.jsonl"), "w", encoding="utf-8") as f:
            for i in range(min(args.limit, len(examples))):
                f.write(json.dumps(examples[i * len(examples) // min(args.limit, len(examples))]) + "\n")
        task = hellaswag.prepare(f.name)
    encoded, lengths = task.encoded["completion"], task.lengths["completion"]
    ranks = runtime.Ranks(0, 0, 1, device, False)
    lecture_hellaswag(model, task.examples[:2], device, dtype)
    figures = {"lecture": lecture_hellaswag(model, task.examples, device, dtype)}
    runtime.keep_freed_memory()
    figures["lecture, memory kept"] = lecture_hellaswag(model, task.examples, device, dtype)
    sums = []
    seconds = median_seconds(lambda: sums.append(scoring.score(model, encoded, dtype, ranks)[0]), 3, device, warmup=1)
    figures["ours"] = len(encoded) / seconds, hellaswag.predictions(sums[-1], lengths)[1].tolist()
    truth = hellaswag.predictions(scoring.score(model, encoded, "float32", ranks)[0], lengths)[1].tolist()
    return [{"hellaswag": name, "examples/s": speed, "x lecture": speed / figures["lecture"][0],
             "flips": sum(a != b for a, b in zip(predicted, truth)), "examples": len(encoded)}
            for name, (speed, predicted) in figures.items()]


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


# -----------------------------------------------------------------------------
# the command

FIGURES = {"train": bench_train, "hellaswag": bench_hellaswag, "tokenize": bench_tokenize}


def main():
    parser = runtime.ArgumentParser(description="Measure the suite's speed.", allow_abbrev=False)
    parser.add_argument("figure", choices=list(FIGURES), help="what to measure")
    parser.add_argument("--size", default="gpt2", choices=list(SIZES), help="model (default gpt2)")
    parser.add_argument("--batch-size", type=int, default=0, help="B, sequences (default 4 on a CPU, 16 on a GPU)")
    parser.add_argument("--sequence-length", type=int, default=0, help="T, tokens (default 512 on a CPU, 1024 on a GPU)")
    parser.add_argument("--steps", type=int, default=6, help="train: steps to time (default 6)")
    parser.add_argument("--data", help="hellaswag: examples, .jsonl(.gz); tokenize: a folder of parquet files")
    parser.add_argument("--limit", type=int, default=60, help="hellaswag: examples to score (default 60)")
    parser.add_argument("--repeats", type=int, default=3, help="tokenize: rounds, of which the median counts (default 3)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    rows = FIGURES[args.figure](args)
    print_table(rows)
    print(json.dumps(rows))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(rows, f, indent=2)


if __name__ == "__main__":
    runtime.run_main(main)
