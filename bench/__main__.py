"""
Benchmarks: each measures its reference in the same run and prints ratios.

    python -m bench gpu_check   # on a new machine, first of all
    python -m bench train       # GPT-2 124M, B=4, T=512 on a CPU; B=16, T=1024 on a GPU
    python -m bench train --size gpt2-medium --batch-size 8 --steps 10 --json train.json
    python -m bench ladder --json ladder.json --picture ladder.png
    python -m bench hellaswag --data hellaswag/hellaswag_val.jsonl
    python -m bench tokenize    # input.txt, or --data FOLDER of parquet files
    python -m bench all --quick --json new.json --compare old.json

Prints a table per benchmark. --json writes

    {"machine": {...}, "settings": the flags, "benchmarks": {name: rows}}
"""
import json
import os
import sys

from run import cli
from run.files import atomic_write, check_output, check_regular

NAMES = ["train", "ladder", "hellaswag", "sample", "tokenize", "loader", "checkpoint", "gpu_check"]

# --quick: enough to notice a regression
QUICK = dict(batch_size=2, sequence_length=128, steps=3, limit=4, repeats=1)


def parse_args(argv=None):
    """The flags; ValueError for an invalid one."""
    parser = cli.ArgumentParser(__doc__, prog="python -m bench")
    add = parser.add_argument
    add("benchmark", choices=[*NAMES, "all"], metavar="BENCHMARK",
        help="train: a training step;"
             " ladder: its optimizations, added one by one;"
             " hellaswag: scoring;"
             " sample: generating text;"
             " tokenize: text to shards;"
             " loader: batches from shards;"
             " checkpoint: saving and loading;"
             " all;"
             " gpu_check: whether this machine computes the right thing, first of all on a new one")
    add("--size", default="gpt2", metavar="NAME",
        help="model: gpt2 ... gpt2-xl, gpt3-small ... gpt3-xl (default gpt2)")
    add("--batch-size", type=cli.number(int, 0), default=0,
        help="B, sequences (default 4 on a CPU, 16 on a GPU; sample: 1 and 4)")
    add("--sequence-length", type=cli.number(int, 0), default=0,
        help="T, tokens (default 512 on a CPU, 1024 on a GPU; sample: 256 and as many as fit)")
    add("--steps", type=cli.number(int, 1), default=6,
        help="training steps to time (default 6)")
    add("--ranks", type=cli.number(int, 0, os.cpu_count()), default=0,
        help="ladder: processes of DDP (default: one per GPU)")
    add("--picture", metavar="FILE", help="ladder: draw it into this file, .png or .svg")
    add("--data", metavar="PATH",
        help="hellaswag: a .jsonl(.gz) file; tokenize: a folder of parquet files"
             " (default input.txt)")
    add("--limit", type=cli.number(int, 1), default=60,
        help="hellaswag: examples to score (default 60)")
    add("--repeats", type=cli.number(int, 1), default=3,
        help="tokenize: runs to take the median of (default 3)")
    add("--device", default="auto", help="cuda, xpu, mps or cpu (default: the best available)")
    add("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    add("--json", nargs="?", const="-", metavar="FILE",
        help="write the result to this file; without FILE, to stdout")
    add("--compare", metavar="FILE",
        help="an earlier --json file: print how the result changed")
    add("--quick", action="store_true",
        help="small shapes, to notice regressions; all skips ladder")
    args = parser.parse_args(argv)
    for path in (args.json, args.picture):  # before the benchmark has run for minutes
        if path not in (None, "-"):
            check_output(path)
    if args.quick:
        vars(args).update(QUICK)
    return args


if __name__ == "__main__":
    cli.start(parse_args)

import torch

from model import config_for
from run import runtime
from bench.checkpoint import bench_checkpoint
from bench.data import bench_loader, bench_tokenize
from bench.gpu_check import bench_gpu_check
from bench.hellaswag import bench_hellaswag
from bench.ladder import bench_ladder
from bench.measure import in_fresh_process, print_table
from bench.sample import bench_sample
from bench.train import bench_train

# Functions of the flags that return rows: dicts with the same keys, the first of which names the
# row.
BENCHMARKS = {
    "train": bench_train,
    "ladder": bench_ladder,
    "hellaswag": bench_hellaswag,
    "sample": bench_sample,
    "tokenize": bench_tokenize,
    "loader": bench_loader,
    "checkpoint": bench_checkpoint,
    "gpu_check": bench_gpu_check,
}

# columns that --compare compares
COMPARED = ("tok/s", "examples/s", "MB/s", "ms/batch", "seconds", "peak GB")


def read_result(path):
    """The result that --json wrote; ValueError for another file."""
    check_regular(path)
    try:
        with open(path, encoding="utf-8") as f:
            result = json.load(f)
        measurements(result)
        return {name: {**result[name]} for name in ("machine", "settings", "benchmarks")}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"{path} is not a file that --json wrote ({e!r:.80})") from e


def measurements(result):
    """{("train: eager", "tok/s"): 382.0, ...}: what --compare compares."""
    found = {}
    for benchmark, rows in result["benchmarks"].items():
        for row in rows:
            name, *_ = row.values()
            for unit in COMPARED:
                if row.get(unit):
                    found[f"{benchmark}: {name}", unit] = float(row[unit])
    return found


def print_comparison(old, new):
    """Prints what both results measured, with ratios.

    A ratio above 1 is faster or smaller: 100 tok/s before and 90 now is 0.9.
    """
    old_settings = {**old["machine"], **old["settings"]}
    for name, value in {**new["machine"], **new["settings"]}.items():
        if old_settings.get(name) != value:
            print(f"different {name}: {old_settings.get(name)!r} before, {value!r} now")
    old_values = measurements(old)
    rows = []
    for key, now in measurements(new).items():
        before = old_values.get(key)
        if before:
            name, unit = key
            ratio = now / before if unit.endswith("/s") else before / now
            rows.append({"compared": name, "unit": unit, "before": before, "now": now,
                         "ratio": ratio})
    if not rows:
        raise ValueError("the two results have no measurement in common")
    print_table(rows)
    worse = [f"{row['compared']} ({row['unit']})" for row in rows if row["ratio"] < 0.95]
    names = f": {', '.join(worse)}" if worse else ""
    print(f"{len(worse)} of {len(rows)} are worse by more than 5%{names}")


def main():
    args = parse_args()
    args.device = runtime.choose_device(args.device)
    args.dtype = runtime.choose_dtype(args.dtype, args.device)
    config_for(args.size)  # an unknown one is an error before the first benchmark
    # the shape of the training steps to time
    default_B, default_T = (4, 512) if args.device == "cpu" else (16, 1024)
    args.B = args.batch_size or default_B
    args.T = args.sequence_length or default_T
    old = read_result(args.compare) if args.compare else None
    names = [args.benchmark]
    if args.benchmark == "all":
        skipped = ["gpu_check"]
        if args.quick:
            skipped.append("ladder")
        names = [name for name in BENCHMARKS if name not in skipped]
    device = runtime.device_name(args.device)
    print(f"{device}, torch {torch.__version__}, {args.size}, {args.dtype},"
          f" training steps of B={args.B}, T={args.T}", flush=True)
    # each in a fresh process: what one changes (the allocator, thread pools) must not affect the
    # next
    rows = {name: in_fresh_process(BENCHMARKS[name], args) for name in names}
    settings = {name: value for name, value in vars(args).items()
                if name not in ("benchmark", "json", "compare", "picture")}
    machine = runtime.describe_machine(args.device)
    result = {"machine": machine, "settings": settings, "benchmarks": rows}
    try:
        if args.json == "-":
            print(json.dumps(result))
        elif args.json:
            with atomic_write(args.json, "w") as f:
                json.dump(result, f, indent=1)
    finally:
        if old:
            print_comparison(old, result)
    if any(row.get("result") == "FAIL" for row in rows.get("gpu_check", [])):
        sys.exit(1)


if __name__ == "__main__":
    cli.run_main(main)
