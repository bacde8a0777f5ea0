"""
What to run first on a new machine: is the arithmetic right, does nothing compile twice, how fast is it, do several GPUs agree?

    python -m bench gpu_check                 # every GPU of this machine; under ten minutes
    python -m bench gpu_check --device cpu    # what a CPU can run, with two processes

Prints ok or FAIL and a measurement for each check, then one line of JSON; exit status 1 if a check fails.
"""
import glob
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import torch

from run import parallel
from run import runtime
import sample
import hellaswag
from bench.ladder import bench_ladder
from bench.measure import free_port, in_fresh_process, timed
from bench.train import Variant, build_step
from run.config import TrainConfig
from model import GPT
from run.settings import estimate_memory
from train_gpt2 import train_step

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


# -----------------------------------------------------------------------------
# in this process

def train(device, dtype, steps, B=4, T=64, grad_accum_steps=1, precision="highest", **changes):
    """([(loss, norm), ...] of a small model's first steps on random tokens, the model)."""
    torch.set_float32_matmul_precision(precision)
    torch.manual_seed(1)
    config = TrainConfig(**{**dict(n_layer=2, n_head=4, n_embd=128, block_size=T, total_batch_size=B * T * grad_accum_steps,
                                   batch_size=B, compile="off", device=device), **changes})
    ranks = parallel.Ranks(0, 0, 1, device, False)
    raw_model = GPT(config.gpt_config()).to(device)
    model = parallel.wrap(raw_model, config, config.compile == "on", B, dtype, ranks)
    optimizers = parallel.make_optimizers(raw_model, config, ranks)
    scaler = torch.amp.GradScaler(ranks.device_type, enabled=dtype == "float16")
    generator = torch.Generator().manual_seed(1)

    def next_batch():
        tokens = torch.randint(0, 50257, (B, T + 1), generator=generator).to(device)
        return tuple(t.clone(memory_format=torch.contiguous_format) for t in (tokens[:, :-1], tokens[:, 1:]))
    loader = SimpleNamespace(position=0, next_batch=next_batch)
    return [train_step(step, model, raw_model, optimizers, scaler, loader, 1e-3, grad_accum_steps, 1.0, dtype, ranks)[:2]
            for step in range(steps)], raw_model


def environment(args):
    """Versions, and what Triton needs to compile: a C compiler and Python's headers."""
    version = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = shutil.which("nvidia-smi") and subprocess.run(version, capture_output=True, text=True).stdout.split()[:1]
    found = {"driver": driver and driver[0], "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(),
             "gpus": torch.cuda.device_count(), "arch": "sm_%d%d" % torch.cuda.get_device_capability(args.device),
             "compiler": shutil.which("gcc") or shutil.which("cc") or shutil.which("clang"),
             "headers": os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))}
    return bool(found["compiler"] and found["headers"]), ", ".join(f"{name} {value}" for name, value in found.items())


def attention_backends(args):
    """Which kernels torch chooses for training, and for decoding as sample.py does it."""
    names = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
    q = torch.randn(4, 12, 1024, 64, device=args.device, dtype=torch.bfloat16, requires_grad=True)
    mask = torch.ones(4, 1, 1, 1024, dtype=torch.bool, device=args.device)
    training = names[torch._fused_sdp_choice(q, q, q, is_causal=True)]
    with runtime.without_cudnn_attention(), torch.no_grad():
        decoding = names[torch._fused_sdp_choice(q[:, :, :1], q, q, attn_mask=mask)]
    return training in ("flash", "cudnn") and decoding in ("flash", "efficient"), f"training {training}, decoding {decoding}"


def same_losses(dtype, tolerance, **changes):
    """The check that losses in dtype are those of float32 on the CPU, to a tolerance."""
    def check(args):
        reference = {name: value for name, value in changes.items() if name == "optimizer"}
        ours, theirs = train(args.device, dtype, 8, **changes)[0], train("cpu", "float32", 8, **reference)[0]
        largest = max(abs(a - b) for (a, _), (b, _) in zip(ours, theirs))
        return largest < tolerance, f"largest difference of 8 losses {largest:.1e}, allowed {tolerance:.0e}"
    return check


def graphs(args):
    """Number of graphs that torch.compile captures at B = 1 and at B = 4."""
    from torch._dynamo.utils import counters
    counts = []
    for B in (1, 4):
        torch._dynamo.reset()
        counters.clear()
        train(args.device, args.dtype, 2, B=B, grad_accum_steps=2, compile="on")
        counts.append(counters["stats"]["unique_graphs"])
    return counts == [1, 1], f"graphs at B=1 and B=4: {counts}"


def equal_scores(args):
    """Log-probabilities of endings as training computes them, where TF32 is on, and as the command line does."""
    _, model = train(args.device, "float32", 0)
    rows = [(np.arange(9, dtype=np.uint16), [np.arange(k, k + 5, dtype=np.uint16) for k in range(4)])] * 5
    scores, ranks = [], parallel.Ranks(0, 0, 1, args.device, False)
    for precision in ("high", "highest"):
        torch.set_float32_matmul_precision(precision)
        scores.append(hellaswag.score(model, rows, args.dtype, ranks)[0])
    return bool((scores[0] == scores[1]).all()), f"largest difference {abs(scores[0] - scores[1]).max():.1e}"


def decoding(args):
    """Milliseconds per token of the first and the second text: plans and kernels are made in the first."""
    _, model = train(args.device, "float32", 0, T=128)
    model = model.to(runtime.DTYPES[args.dtype]).eval()
    first, second = (1000 * timed(lambda: len(list(sample.stream(model, [[1, 2, 3]], 64))), args.device)[0] / 64
                     for _ in range(2))
    return first < 5 * second + 20, f"{first:.1f} ms per token, then {second:.1f}"


def speed(args):
    """tok/s and MFU of a compiled training step of 124M at B=64, and its memory beside the estimate."""
    B, T = 64, 1024
    shape, ranks = SimpleNamespace(size="gpt2", B=B, T=T), parallel.Ranks(0, 0, 1, args.device, False)
    run, raw_model, _ = build_step(Variant(args.dtype, compile=True), shape, ranks)
    seconds, loss = timed(run, args.device, 10, 3)
    tok_per_sec, peak = B * T / seconds, runtime.peak_flops(args.device, args.dtype)
    config = TrainConfig(block_size=T, total_batch_size=B * T, batch_size=B)
    estimate = sum(estimate_memory(config, raw_model.num_params(), B, args.dtype, 1, True).values()) / 1e9
    memory = torch.cuda.max_memory_allocated() / 1e9
    mfu = raw_model.config.flops_per_token(T) * tok_per_sec / peak if peak else float("nan")
    figure = f"{tok_per_sec:,.0f} tok/s, MFU {mfu:.1%}, {memory:.1f} GB (estimate {estimate:.1f}), loss {loss:.3f}"
    return not mfu < 0.38 and memory < 1.15 * estimate, figure  # MFU is nan where the peak is not known


def ladder(args):
    """The lecture's ladder, from float32 to the last rung that this machine has."""
    shape = SimpleNamespace(size="gpt2", B=16, T=1024, steps=5, ranks=0, picture=None, device=args.device, dtype=args.dtype)
    rows = bench_ladder(shape)
    first, last = rows[0], rows[-1]
    return last["x float32"] > 2, f"{first['tok/s']:,.0f} to {last['tok/s']:,.0f} tok/s: {last['x float32']:.1f} x"


# -----------------------------------------------------------------------------
# runs of train_gpt2.py, in a temporary folder

class Runs:
    """Runs train_gpt2.py on a small text and reads its log."""

    def __init__(self, folder, device, world_size):
        self.folder, self.device, self.world_size = folder, device, world_size
        with open(os.path.join(folder, "t.txt"), "w") as f:
            f.write("the king and his queen will not come to this house tonight\n" * 4000)

    def command(self, name, *flags, ranks=1, restarts=0, data="t.txt"):
        """The command line of a run on some ranks."""
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", f"--max-restarts={restarts}"]
        return [sys.executable, *(launcher if ranks > 1 else []), os.path.join(ROOT, "train_gpt2.py"), "--data", data,
                "--preset", "shakespeare", "--n-layer", "2", "--n-embd", "64", "--block-size", "64", "--optimizer", "adamw",
                "--device", self.device, "--dtype", "float32", "--compile", "off", "--sample-every", "0", "--save-every", "4",
                "--val-every", "4", "--val-tokens", str(64 * 11), "--total-batch-size", str(64 * 2 * self.world_size),
                "--batch-size", "1", "--schedule", "wsd", "--exp-name", name, *flags]

    def run(self, *args, **kwargs):
        """The finished process of command(...)."""
        return subprocess.run(self.command(*args, **kwargs), cwd=self.folder, capture_output=True, text=True, timeout=300,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})

    def log(self, name):
        """{(step, stream): value as text} of a run, of the losses and norms."""
        with open(os.path.join(self.folder, "log", name, "log.txt"), encoding="utf-8") as f:
            return {(int(step), stream): value for step, stream, value in map(str.split, f)
                    if stream in ("train", "val", "norm")}

    def difference(self, name, other):
        """The largest difference of two runs' losses; inf if they do not have the same ones."""
        a, b = ({key: float(value) for key, value in self.log(run).items() if key[1] != "norm"} for run in (name, other))
        return max((abs(a[key] - b[key]) for key in a), default=0.0) if a.keys() == b.keys() and a else float("inf")


def last_line(process):
    """The end of a process's messages, for the figure of a check that failed."""
    return "" if process.returncode == 0 else f"status {process.returncode}: {process.stderr.strip()[-150:]!r}; "


def deterministic_resume(runs):
    """A run that was stopped and resumed equals the uninterrupted one in every digit."""
    whole = runs.run("whole", "--max-steps", "8", "--deterministic")
    runs.run("resumed", "--max-steps", "4", "--deterministic")
    resumed = runs.run("resumed", "--max-steps", "8", "--deterministic")
    equal = runs.log("whole") == runs.log("resumed")
    return equal and len(runs.log("whole")) == 19, f"{last_line(whole)}{last_line(resumed)}19 losses and norms equal: {equal}"


def ranks_agree(runs):
    """Losses on 1 and W ranks, with 11 validation windows, which W does not divide."""
    one, process = runs.run("one", "--max-steps", "8"), runs.run("ddp", "--max-steps", "8", ranks=runs.world_size)
    largest = runs.difference("one", "ddp")
    return largest < 1e-3, f"{last_line(one)}{last_line(process)}1 and {runs.world_size} ranks differ by {largest:.1e}"


def sharded(runs):
    """Losses under zero and fsdp are those of one rank; a checkpoint of fsdp resumes under ddp."""
    figures, good = [], True
    for name, modes in (("zero", ["zero"]), ("fsdp", ["fsdp"]), ("fsdp to ddp", ["fsdp", "ddp"])):
        for steps, mode in zip(([8] if len(modes) == 1 else [4, 8]), modes):
            process = runs.run(name.replace(" ", "-"), "--max-steps", str(steps), "--parallel", mode, ranks=runs.world_size)
        largest = runs.difference("one", name.replace(" ", "-"))
        good, figures = good and largest < 1e-3, [*figures, f"{name}: {last_line(process)}{largest:.1e}"]
    return good, "largest differences to one rank, " + ", ".join(figures)


def wrong_data(runs):
    """A wrong --data ends all ranks soon, with one message."""
    start = time.monotonic()
    process = runs.run("wrong", ranks=runs.world_size, data="nowhere")
    seconds, messages = time.monotonic() - start, re.findall(r"^error: .*$", process.stderr, re.MULTILINE)
    good = process.returncode != 0 and len(messages) == 1 and "no data at nowhere" in messages[0] and seconds < 60
    return good, f"{seconds:.0f} s, {len(messages)} message(s)"


def killed_rank(runs):
    """torchrun restarts the ranks after rank 1 is killed; the run ends as an uninterrupted one."""
    command = runs.command("killed", "--max-steps", "8", ranks=runs.world_size, restarts=1)
    with subprocess.Popen(command, cwd=runs.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        output, killed = [], False
        for line in process.stdout:
            output.append(line)
            if not killed and line.startswith("saved"):
                killed = True
                for pid in ranks_with(b"RANK=1\0", b"killed\0"):
                    os.kill(pid, signal.SIGKILL)
    resumed = any(line.startswith("resuming ") for line in output)
    return process.returncode == 0 and resumed and runs.difference("one", "killed") < 1e-3, \
        f"status {process.returncode}, restarted {resumed}, differs by {runs.difference('one', 'killed'):.1e}"


def ranks_with(variable, argument):
    """Process ids with an environment variable and a command line argument; Linux only."""
    pids = []
    for path in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{path}/environ", "rb") as environ, open(f"{path}/cmdline", "rb") as cmdline:
                found = b"\0" + variable in b"\0" + environ.read() and argument in cmdline.read()
        except OSError:  # it has ended, or belongs to another user
            continue
        if found:
            pids.append(int(os.path.basename(path)))
    return pids


def overlap_of_rank(args, rank, world_size, port):
    """Fraction of the time of NCCL's kernels during which other kernels run too, in a training step of one of the ranks."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))
    ranks = parallel.setup(args.device)
    run, _, _ = build_step(Variant(args.dtype, compile=True), SimpleNamespace(size="gpt2", B=16, T=1024), ranks)
    for _ in range(3):
        run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        runtime.synchronize(ranks.device)
    kernels = [(e.name, e.time_range.start, e.time_range.end) for e in profile.events()
               if e.device_type == torch.autograd.DeviceType.CUDA]
    parallel.teardown()
    ours = sorted((start, end) for name, start, end in kernels if "nccl" not in name.lower())
    nccl = [(start, end) for name, start, end in kernels if "nccl" in name.lower()]
    covered = sum(max(0, min(end, b) - max(start, a)) for start, end in nccl for a, b in ours)
    return covered / max(1, sum(end - start for start, end in nccl))


def overlap(args):
    """DDP reduces gradients while the backward still computes others."""
    W, port = torch.cuda.device_count(), free_port()
    with ThreadPoolExecutor(W) as pool:
        ranks = [pool.submit(in_fresh_process, overlap_of_rank, args, rank, W, port) for rank in range(W)]
        fraction = statistics.median(rank.result() for rank in ranks)
    return fraction > 0.5, f"{fraction:.0%} of the reductions' time overlaps with computation"


# -----------------------------------------------------------------------------
# all checks

def bench_gpu_check(args):
    """Rows of all checks that this machine can run; "result" is "ok" or "FAIL"."""
    on_gpu = args.device.startswith("cuda")
    world_size = torch.cuda.device_count() if on_gpu else 2 if args.device == "cpu" else 1  # no process group has MPS
    checks = {"environment": environment, "attention kernels": attention_backends} if on_gpu else {}
    checks |= {"float32 losses": same_losses("float32", 1e-3), "bfloat16 losses": same_losses("bfloat16", 5e-2),
               "muon losses": same_losses("float32", 2e-2, optimizer="muon"),
               "activation checkpointing": same_losses("float32", 1e-3, activation_checkpointing=True)}
    if on_gpu:
        checks |= {"TF32 losses": same_losses("float32", 2e-2, precision="high"),
                   "float16 losses": same_losses("float16", 5e-2)}
    checks |= {"one graph": graphs, "HellaSwag scores": equal_scores, "decoding": decoding}
    checks |= {"speed of 124M": speed, "ladder": ladder} if on_gpu else {}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs = Runs(folder, args.device, world_size)
        of_runs = {"deterministic resume": deterministic_resume}
        if world_size > 1:
            of_runs |= {"1 and W ranks": ranks_agree, "sharded": sharded, "wrong --data": wrong_data,
                        "killed rank": killed_rank}
        if on_gpu and world_size > 1:
            checks |= {"overlap": overlap}
        for name, check in (checks | of_runs).items():
            start = time.monotonic()
            try:
                passed, figure = check(runs if name in of_runs else args)
            except Exception as e:  # a check that fails must not hide the others
                passed, figure = False, f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
            rows.append({"gpu_check": name, "result": "ok" if passed else "FAIL", "figure": figure,
                         "seconds": round(time.monotonic() - start, 1)})
            print(f"{rows[-1]['result']:<4} {name}: {figure} ({rows[-1]['seconds']:.1f} s)", flush=True)
    print(json.dumps({"machine": runtime.describe_machine(args.device), "world_size": world_size, "checks": rows}), flush=True)
    return rows
