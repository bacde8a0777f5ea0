"""
Speed, measured: each figure beside its reference and the machine's own limit, in one run.

    python bench.py limits                         # what this machine can do at most
    python bench.py train                          # GPT-2 124M, B=4, T=512 on a CPU; B=16, T=1024 on a GPU
    python bench.py train --size gpt2-medium --batch-size 8 --steps 10 --json train.json
    python bench.py ladder --json ladder.json --picture ladder.png
    python bench.py hellaswag --data hellaswag/hellaswag_val.jsonl
    python bench.py tokenize --data folder_of_parquet
    python bench.py sample
    python bench.py loader
    python bench.py checkpoint
    python bench.py all --quick --json new.json --compare old.json

Prints a table for each figure; the last line is the JSON of what the tables show, {"figures": {name: rows}}, and of what it
was measured on. bench_limits.py has the clock and the machine's limits, the other bench_*.py what they are named after.
"""
import argparse
import json
import os

import runtime
from bench_checkpoint import bench_checkpoint
from bench_data import bench_loader, bench_tokenize
from bench_hellaswag import bench_hellaswag
from bench_ladder import bench_ladder
from bench_limits import bench_limits, in_fresh_process
from bench_sample import bench_sample
from bench_train import bench_train
from model import SIZES

# function of the flags -> rows, dicts with the same keys; the first value names the row
FIGURES = {"limits": bench_limits, "train": bench_train, "ladder": bench_ladder, "hellaswag": bench_hellaswag,
           "sample": bench_sample, "tokenize": bench_tokenize, "loader": bench_loader, "checkpoint": bench_checkpoint}

# What --quick measures with: enough to see that something became slower, not to be published.
QUICK = dict(batch_size=2, sequence_length=128, steps=3, limit=4, repeats=1)

# Columns that --compare compares, and whether more is better.
COMPARED = {"tok/s": True, "examples/s": True, "MB/s": True, "GFLOP/s": True, "GB/s": True,
            "ms a batch": False, "seconds": False, "peak GB": False}


def print_table(rows):
    """Prints a list of dicts with the same keys as an aligned table."""
    cells = [list(rows[0]), *[[show(value) for value in row.values()] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    for row in cells:
        print("  ".join(cell.ljust(width) if i == 0 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(row, widths))))


def show(value):
    """A table's cell: show(1234.5) -> "1,234.50"; "-" for None, what was not measured."""
    return "-" if value is None else f"{value:,.2f}" if isinstance(value, float) else str(value)


def compare(old, new):
    """Rows of the figures that two results have in common; ratio: over 1 is better now, whatever the unit.

    Example: 100 tok/s then and 90 now -> ratio 0.9, "worse"; what is within 5% is "same".
    """
    rows = []
    for figure in new["figures"]:
        before = {next(iter(row.values())): row for row in old["figures"].get(figure, [])}
        for row in new["figures"][figure]:
            name = next(iter(row.values()))
            for unit in COMPARED.keys() & row.keys():
                was, now = before.get(name, {}).get(unit), row[unit]
                if was and now:
                    ratio = now / was if COMPARED[unit] else was / now
                    verdict = "worse" if ratio < 0.95 else "better" if ratio > 1.05 else "same"
                    rows.append({"figure": f"{figure}: {name}", "unit": unit, "was": was, "is": now, "ratio": ratio,
                                 "now": verdict})
    return rows


def read_result(path):
    """The result that --json wrote; ValueError for another file."""
    with open(path, encoding="utf-8") as f:
        try:
            result = json.load(f)
        except ValueError as e:
            raise ValueError(f"{path} is no JSON ({e}); --compare takes what --json wrote") from e
    if not isinstance(result, dict) or not {"figures", "machine", "settings"} <= result.keys():
        raise ValueError(f"{path} is no result of bench.py; --compare takes what --json wrote")
    return result


def print_comparison(old, new):
    """Prints how the figures changed, and what else did."""
    for what in ("machine", "settings"):
        for name in old[what].keys() | new[what].keys():
            if old[what].get(name) != new[what].get(name):
                print(f"another {name}: was {old[what].get(name)!r}, is {new[what].get(name)!r}")
    rows = compare(old, new)
    if not rows:
        raise ValueError("the two results have no figure in common")
    print_table(rows)
    worse = [f"{row['figure']} ({row['unit']})" for row in rows if row["now"] == "worse"]
    print(f"{len(worse)} of {len(rows)} became worse by more than 5%" + (f": {', '.join(worse)}" if worse else ""))


def parse_args(argv=None):
    parser = runtime.ArgumentParser(description="Measure the suite's speed.", allow_abbrev=False)
    parser.add_argument("figure", choices=[*FIGURES, "all"], help="what to measure")
    parser.add_argument("--size", default="gpt2", choices=list(SIZES), help="model (default gpt2)")
    parser.add_argument("--batch-size", type=int, default=0, help="B, sequences (default 4 on a CPU, 16 on a GPU)")
    parser.add_argument("--sequence-length", type=int, default=0, help="T, tokens (default 512 on a CPU, 1024 on a GPU)")
    parser.add_argument("--steps", type=int, default=6, help="training steps to time (default 6)")
    parser.add_argument("--ranks", type=int, default=0, help="ladder: processes of DDP (default: one a GPU)")
    parser.add_argument("--picture", metavar="FILE", help="ladder: draw it there, .png")
    parser.add_argument("--data", help="hellaswag: examples, .jsonl(.gz); tokenize: a folder of parquet files;"
                                       " by default both are made of input.txt")
    parser.add_argument("--limit", type=int, default=60, help="hellaswag: examples to score (default 60)")
    parser.add_argument("--repeats", type=int, default=3, help="tokenize: rounds, of which the median counts (default 3)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--json", metavar="FILE", help="write the JSON there too")
    parser.add_argument("--quick", action="store_true", help="small shapes; all leaves out limits and ladder")
    parser.add_argument("--compare", metavar="FILE", help="an earlier --json: print how the figures changed, as ratios")
    args = parser.parse_args(argv)
    if args.figure == "all" and args.data:
        raise ValueError("all takes no --data: hellaswag and tokenize want different files; run them by themselves")
    if min(args.batch_size, args.sequence_length, args.ranks) < 0 or min(args.steps, args.limit, args.repeats) < 1:
        raise ValueError("--steps, --limit and --repeats must be 1 or more, the other numbers 0 or more")
    return argparse.Namespace(**{**vars(args), **QUICK}) if args.quick else args


def main():
    args = parse_args()
    old = read_result(args.compare) if args.compare else None
    device = runtime.choose_device(args.device)
    figures = {}
    left_out = ("limits", "ladder") if args.quick else ()
    for name in [name for name in FIGURES if name not in left_out] if args.figure == "all" else [args.figure]:
        # in a process of its own: what one figure sets (memory that is kept, thread pools) is not there for the next
        figures[name] = in_fresh_process(FIGURES[name], args)
        print_table(figures[name])
    settings = {name: value for name, value in vars(args).items() if name not in ("figure", "json", "compare", "picture")}
    result = {"machine": runtime.describe_machine(device), "settings": settings, "figures": figures}
    if old:
        print_comparison(old, result)
    if args.json:
        with open(f"{args.json}.tmp", "w", encoding="utf-8") as f:
            json.dump(result, f, indent=2)
        os.replace(f"{args.json}.tmp", args.json)
    print(json.dumps(result))


if __name__ == "__main__":
    runtime.run_main(main)
