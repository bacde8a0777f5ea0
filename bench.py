"""
Speed, measured: each figure beside its reference and the machine's own limit, in one run.

    python bench.py train                          # GPT-2 124M, B=4, T=512 on a CPU; B=16, T=1024 on a GPU
    python bench.py train --size gpt2-medium --batch-size 8 --steps 10 --json train.json

Every variant runs in a fresh process, so that no allocator, compiler cache or thread pool of one serves the other.
Times are medians over the steps after a warm-up. The references are the lecture's arithmetic, in lines of our own.
The last line printed is the JSON of what the table shows.
"""
import json
import multiprocessing
import statistics
import time

import torch

import runtime
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


def main():
    parser = runtime.ArgumentParser(description="Measure the suite's speed.", allow_abbrev=False)
    parser.add_argument("figure", choices=["train"], help="what to measure")
    parser.add_argument("--size", default="gpt2", choices=list(SIZES), help="model (default gpt2)")
    parser.add_argument("--batch-size", type=int, default=0, help="B, sequences (default 4 on a CPU, 16 on a GPU)")
    parser.add_argument("--sequence-length", type=int, default=0, help="T, tokens (default 512 on a CPU, 1024 on a GPU)")
    parser.add_argument("--steps", type=int, default=6, help="steps to time (default 6)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the best there is)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    parser.add_argument("--json", metavar="FILE", help="write the rows there too")
    args = parser.parse_args()
    rows = bench_train(args)
    print_table(rows)
    print(json.dumps(rows))
    if args.json:
        with open(args.json, "w", encoding="utf-8") as f:
            json.dump(rows, f, indent=2)


if __name__ == "__main__":
    runtime.run_main(main)
