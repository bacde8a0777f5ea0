"""
What to run first on a new machine: how fast a training step is and what it consists of, whether it
computes the right thing, whether a stopped run resumes bitwise identical, how fast evaluations,
sampling and the optimizers are.

    python -m bench gpu_check                        # every GPU of this machine, nine minutes
    python -m bench gpu_check --device cpu --quick   # every stage at small sizes: a rehearsal

Prints ok or FAIL (status 1) and a measurement for each check, the most valuable first; writes
gpu_check.json and gpu_check_profile.txt (the kernels of a training step) into the current folder.
"""
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace
from unittest import mock

import torch

import hellaswag
import sample
import train_gpt2
from bench.measure import in_fresh_process, timed
from model import GPT, config_for
from run import parallel, runtime
from run.cli import ROOT, first_line
from run.config import TrainConfig
from run.folder import read_config, read_log
from run.settings import estimate_memory

LIMIT = 540  # seconds; a stage that would begin later is skipped

TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--block-size", "32",
        "--batch-size", "2", "--total-batch-size", "128", "--val-tokens", "320", "--compile", "off"]
EXAMPLE = {"activity_label": "Roof", "ctx": "A man is on a roof. He", "label": 3,
           "endings": ["is using skis.", "is ripping tiles.", "holds a cube.", "starts pulling."]}


def random_model(args):
    """A GPT with random weights, of 124M parameters, or with --quick a small one."""
    small = dict(n_layer=2, n_head=2, n_embd=32) if args.quick else {}
    torch.manual_seed(1337)
    return GPT(config_for("gpt2", vocab_size=50304, **small)).to(args.device)


# -----------------------------------------------------------------------------
# the training step of 124M, in train_gpt2.main() itself

def profiled(function, device, path):
    """The result of function(); writes its kernels, on a CPU its operators, slowest first."""
    activity, kind = torch.profiler.ProfilerActivity.CPU, "cpu"
    if device.startswith("cuda"):
        activity, kind = torch.profiler.ProfilerActivity.CUDA, "device"
    with torch.profiler.profile(activities=[activity]) as profile:
        result = function()
        runtime.synchronize(device)
    with open(path, "w", encoding="utf-8") as f:
        f.write(profile.key_averages().table(f"self_{kind}_time_total", max_name_column_width=100))
    return result


def training(args):
    """Yields checks of 16 steps of the gpt2-124M preset: speed, memory, graphs."""
    from torch._dynamo.utils import counters
    seconds = []
    real_step = train_gpt2.train_step

    def step(number, *rest):
        if number == 14:
            return profiled(lambda: real_step(number, *rest), args.device, "gpu_check_profile.txt")
        start = time.perf_counter()
        result = real_step(number, *rest)  # waits for the device
        seconds.append(time.perf_counter() - start)
        return result

    with tempfile.TemporaryDirectory() as folder:
        flags = ["--preset", "gpt2-124M", "--data", os.path.join(ROOT, "input.txt"),
                 "--log-dir", folder, "--device", args.device, "--max-steps", "16",
                 "--warmup-steps", "5", "--hellaswag", "off", "--val-tokens", "16384",
                 "--compile", "on"]
        if args.quick:
            flags += TINY
        with (mock.patch.object(train_gpt2, "train_step", step),
              mock.patch.object(sys, "argv", ["train_gpt2.py", *flags]),
              contextlib.suppress(SystemExit)):
            train_gpt2.main()
        # with the micro-batch that fits this device
        config = TrainConfig(**read_config(os.path.join(folder, "gpt2-124M")))
    B, T = config.batch_size, config.block_size
    shape = config.gpt_config()
    dt = statistics.median(seconds[3:])
    tok_per_sec = config.total_batch_size / dt
    figure = f"{1000 * dt:.1f} ms, {tok_per_sec:,.0f} tok/s, B={B}"
    peak = runtime.peak_flops(args.device, args.dtype)
    if peak:
        figure += f", MFU {shape.flops_per_token(T) * tok_per_sec / peak:.1%}"
    yield "step of 124M", len(seconds) == 15, figure
    if args.device.startswith("cuda"):
        parts = estimate_memory(config, shape.num_params(), B, 1, config.loss_chunks)
        estimate = sum(parts.values()) / 1e9
        memory = torch.cuda.max_memory_allocated() / 1e9
        yield "memory", memory < 1.15 * estimate, f"{memory:.1f} GB, estimate {estimate:.1f}"
    graphs = counters["stats"]["unique_graphs"]
    # a loss in chunks is not compiled: it splits the graph
    passed = args.quick or config.loss_chunks > 1 or graphs == 1
    yield "graphs", passed, f"{graphs} compiled"


# -----------------------------------------------------------------------------
# is it right?

def environment(args):
    """Yields the hardware and the versions, and whether torch.compile works."""
    reason = parallel.compile_error(args.device)
    yield "environment", not reason, (
        f"{max(1, torch.cuda.device_count())} x {runtime.device_name(args.device)}, torch"
        f" {torch.__version__}, cuDNN {torch.backends.cudnn.version()} {reason}")


def losses(args):
    """Yields comparisons of the losses of first steps with those of float32 on the CPU."""
    T = 32 if args.quick else 256
    batches = torch.randint(50257, (4, 2, T + 1), generator=torch.Generator().manual_seed(1))
    on_cpu = SimpleNamespace(device="cpu", quick=args.quick)

    def first_losses(device, dtype, optimizer="adamw", precision="highest"):
        torch.set_float32_matmul_precision(precision)
        ranks = parallel.Ranks(0, 0, 1, device, False)
        model = random_model(on_cpu).to(device)  # the same weights on every device
        optimizers = model.configure_optimizers(1e-3, 0.1, optimizer=optimizer)
        scaler = torch.amp.GradScaler(ranks.device_type, enabled=dtype == "float16")
        xy = iter([(batch[:, :-1], batch[:, 1:]) for batch in batches.to(device)])
        loader = SimpleNamespace(position=0, next_batch=lambda: next(xy))
        return [train_gpt2.train_step(step, model, model, optimizers, scaler, loader, 1e-3, 1, 1.0,
                                      dtype, ranks)[0] for step in range(len(batches))]

    expected = {name: first_losses("cpu", "float32", name) for name in ("adamw", "muon")}
    variants = [("float32", 1e-3, {}), ("bfloat16", 5e-2, {}),
                ("float32", 2e-2, {"optimizer": "muon"})]
    if args.device.startswith("cuda"):
        variants += [("float32", 2e-2, {"precision": "high"}), ("float16", 5e-2, {})]
    for dtype, tolerance, changes in variants:
        found = first_losses(args.device, dtype, **changes)
        reference = expected[changes.get("optimizer", "adamw")]
        largest = max(abs(a - b) for a, b in zip(found, reference))
        name = " ".join(["losses in", dtype, *changes.values()])
        yield name, largest < tolerance, (f"largest difference from float32 on the CPU"
                                          f" {largest:.1e}, allowed {tolerance:.0e}")


def run(folder, name, device, sequences, *flags, ranks=1):
    """{(step, stream): value} of the losses and norms of a small run of train_gpt2.py.

    folder: of all runs. sequences: per step. Raises RuntimeError if the run fails.
    """
    launcher = []
    if ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [sys.executable, *launcher, os.path.join(ROOT, "train_gpt2.py"), "--preset",
               "shakespeare", "--n-embd", "64", "--block-size", "64", "--device", device,
               "--sample-every", "0", "--save-every", "4", "--val-every", "4", "--val-tokens",
               "704", "--batch-size", "1", "--total-batch-size", str(64 * sequences),
               "--schedule", "wsd", "--exp-name", name, *flags]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    if done.returncode != 0:
        raise RuntimeError(f"{name}: status {done.returncode}, {done.stderr.strip()[-200:]}")
    streams = read_log(os.path.join(folder, "log", name, "log.txt"))
    return {(step, stream): value for stream in ("train", "val", "norm")
            for step, value in streams[stream]}


def resume(args):
    """Yields whether a stopped and resumed run equals the uninterrupted one in every digit."""
    for optimizer in ("adamw", "muon"):
        with tempfile.TemporaryDirectory() as folder:
            compiled = "off" if args.quick else "on"
            flags = ["--deterministic", "--optimizer", optimizer, "--compile", compiled]
            whole = run(folder, "whole", args.device, 2, "--max-steps", "8", *flags)
            run(folder, "resumed", args.device, 2, "--max-steps", "4", *flags)
            resumed = run(folder, "resumed", args.device, 2, "--max-steps", "8", *flags)
            equal = whole == resumed and len(whole) == 19
            yield f"resume, {optimizer}", equal, f"{len(whole)} losses and norms, equal: {equal}"


def ranks(args):
    """Yields the differences of the losses on one rank and on all devices, with DDP and FSDP."""
    world_size = torch.cuda.device_count() if args.device.startswith("cuda") else 2
    if world_size < 2 or args.device in ("mps", "xpu"):  # parallel.setup refuses these
        yield "several ranks", True, "not checked: one device"
        return
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--max-steps", "8", "--optimizer", "adamw", "--dtype", "float32"]
        one = run(folder, "one", args.device, 2 * world_size, *flags, "--compile", "off")
        for mode, compiled in (("ddp", "off"), ("fsdp", "off"), ("ddp", "on")):
            if args.quick and compiled == "on":
                continue
            name = f"{mode}, compile {compiled}"
            other = run(folder, name, args.device, 2 * world_size, *flags, "--parallel", mode,
                        "--compile", compiled, ranks=world_size)
            largest = max(abs(one[key] - other[key]) for key in one)
            yield (f"{world_size} ranks, {name}", largest < 1e-2,
                   f"losses and norms differ by {largest:.1e}")


# -----------------------------------------------------------------------------
# what else does it cost?

def evaluations(args):
    """Yields the speed of HellaSwag and of sampling, and whether scores depend on TF32 outside."""
    model = random_model(args).eval()
    ranks = parallel.Ranks(0, 0, 1, args.device, False)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "examples.jsonl")
        with open(path, "w", encoding="utf-8") as f:
            f.write((json.dumps(EXAMPLE) + "\n") * (8 if args.quick else 2000))
        dataset = hellaswag.prepare(path)
    sums = []
    for precision in ("high", "highest"):
        torch.set_float32_matmul_precision(precision)
        seconds, (_, found, _) = timed(
            lambda: hellaswag.evaluate(model, dataset, args.dtype, ranks), args.device)
        sums.append(found)
    equal = all((sums[0][style] == sums[1][style]).all() for style in sums[0])
    speed = len(dataset.examples) / seconds  # of the second pass
    yield "HellaSwag", equal, f"{speed:,.0f} short examples/s in both styles"
    tokens = 16 if args.quick else 256

    def generate(hidden, temperature):
        """The tokens, and their number per second."""
        seconds, made = timed(
            lambda: list(sample.stream(model, [[50256]], tokens, None, temperature, hidden=hidden)),
            args.device, 1, 1)
        return torch.cat(made).tolist(), len(made) / seconds

    # in float32, where rounding decides between no two tokens
    plain, plain_speed = generate(model.hidden, 0)
    faster, _ = generate(sample.prepare_for_sampling(model, "float32"), 0)
    model = random_model(args).eval()
    hidden = sample.prepare_for_sampling(model, args.dtype)
    _, speed = generate(hidden, 1.0)
    yield "sampling", plain == faster, (
        f"{speed:,.0f} tok/s, one text; {plain_speed:,.0f} in float32 without preparation")


def optimizers(args):
    """Yields the milliseconds of an optimizer step of 124M alone."""
    for name in ("adamw", "muon"):
        model = random_model(args)
        for p in model.parameters():
            p.grad = torch.randn_like(p) * 1e-3
        made = model.configure_optimizers(6e-4, 0.1, optimizer=name)

        def step(made=made):
            for optimizer in made:
                optimizer.step()

        seconds, _ = timed(step, args.device, 10, 3)
        yield f"{name} step", True, f"{1000 * seconds:.2f} ms"


# the most valuable first, with the seconds that one takes on an H200
STAGES = [(environment, 15), (training, 90), (resume, 150), (losses, 100), (evaluations, 30),
          (optimizers, 20), (ranks, 120)]


def run_stage(stage, args):
    """Rows of a stage's checks, printed as they come; an error is a row of its own."""
    rows = []
    checks = stage(args)
    while True:
        start = time.monotonic()
        try:
            name, passed, figure = next(checks)
        except StopIteration:
            return rows
        except Exception as e:  # a stage that fails must not hide the others
            name, passed, figure = stage.__name__, False, first_line(e)
        result = "ok" if passed else "FAIL"
        seconds = round(time.monotonic() - start, 1)
        rows.append({"gpu_check": name, "result": result, "figure": figure, "seconds": seconds})
        print(f"{result:<4} {name}: {figure} ({seconds:.1f} s)", flush=True)


def bench_gpu_check(args):
    """Rows of all checks; "result" is "ok", "FAIL" or "skipped". ValueError without a GPU."""
    if args.device == "cpu" and not args.quick:
        raise ValueError("gpu_check takes hours on a CPU; --device cpu --quick rehearses it")
    start = time.monotonic()
    rows = []
    for stage, seconds in STAGES:
        if time.monotonic() - start + seconds > LIMIT:
            rows.append({"gpu_check": stage.__name__, "result": "skipped",
                         "figure": "no time left", "seconds": 0.0})
            print(f"skipped {stage.__name__}: {LIMIT} s are over", flush=True)
        else:
            # compiled code, allocated memory and patched functions end with the stage's process
            rows += in_fresh_process(run_stage, stage, args)
        with open("gpu_check.json", "w", encoding="utf-8") as f:
            machine = runtime.describe_machine(args.device)
            json.dump({"machine": machine, "checks": rows}, f, indent=1)
    return rows
