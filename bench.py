"""
Speed, measured: each figure beside its reference and the machine's own limit, in one run.

    python bench.py limits                         # what this machine can do at most
    python bench.py train                          # GPT-2 124M, B=4, T=512 on a CPU; B=16, T=1024 on a GPU
    python bench.py train --size gpt2-medium --batch-size 8 --steps 10 --json train.json
    python bench.py hellaswag --data hellaswag/hellaswag_val.jsonl
    python bench.py tokenize --data folder_of_parquet

Prints a table for each figure; the last line is the JSON of what the tables show: {"figures": {name: rows}}, and what it
was measured on. bench_limits.py has the clock and the machine's limits, the other bench_*.py what they are named after.
"""
import json

import torch

import runtime
from bench_data import bench_tokenize
from bench_hellaswag import bench_hellaswag
from bench_ladder import bench_ladder
from bench_limits import bench_limits
from bench_train import bench_train
from model import SIZES

# function of the flags -> rows, dicts with the same keys; the first names the row
FIGURES = {"limits": bench_limits, "train": bench_train, "ladder": bench_ladder, "hellaswag": bench_hellaswag,
           "tokenize": bench_tokenize}


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


def main():
    parser = runtime.ArgumentParser(description="Measure the suite's speed.", allow_abbrev=False)
    parser.add_argument("figure", choices=list(FIGURES), help="what to measure")
    parser.add_argument("--size", default="gpt2", choices=list(SIZES), help="model (default gpt2)")
    parser.add_argument("--batch-size", type=int, default=0, help="B, sequences (default 4 on a CPU, 16 on a GPU)")
    parser.add_argument("--sequence-length", type=int, default=0, help="T, tokens (default 512 on a CPU, 1024 on a GPU)")
    parser.add_argument("--steps", type=int, default=6, help="train: steps to time (default 6)")
    parser.add_argument("--ranks", type=int, default=0, help="ladder: processes of DDP (default: one a GPU)")
    parser.add_argument("--picture", metavar="FILE", help="ladder: draw it there, .png")
    parser.add_argument("--data", help="hellaswag: examples, .jsonl(.gz); tokenize: a folder of parquet files")
    parser.add_argument("--limit", type=int, default=60, help="hellaswag: examples to score (default 60)")
    parser.add_argument("--repeats", type=int, default=3, help="tokenize: rounds, of which the median counts (default 3)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--json", metavar="FILE", help="write the JSON there too")
    args = parser.parse_args()
    rows = FIGURES[args.figure](args)
    print_table(rows)
    result = {"device": runtime.device_name(runtime.choose_device(args.device)), "torch": torch.__version__,
              "figures": {args.figure: rows}}
    print(json.dumps(result))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(result, f, indent=2)


if __name__ == "__main__":
    runtime.run_main(main)
