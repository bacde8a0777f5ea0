"""
How bench.py measures, and the limits of the machine that its figures stand beside.

Everything is timed by the median of repeats after a warm-up, with the device waited for; what could be helped or
hindered by what ran before (allocators, thread pools, caches of compiled code) runs in a process of its own.
"""
import multiprocessing
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

import runtime

# -----------------------------------------------------------------------------
# measuring

def in_fresh_process(function, *args):
    """function(*args), run in a new Python process; its result must pickle. MemoryError if the process was killed."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as e:
            raise MemoryError(f"the process of {function.__name__} was killed, as for want of memory") from e


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


def forward_backward_seconds(function, shapes, dtype, device, repeats=5):
    """Median seconds of function(*tensors) and its gradients, for random tensors of these shapes in dtype (a name)."""
    inputs = [torch.randn(shape, device=device).to(runtime.DTYPES[dtype]).requires_grad_() for shape in shapes]
    grad = torch.randn_like(function(*inputs))
    return median_seconds(lambda: torch.autograd.grad(function(*inputs), inputs, grad), repeats, device)


def peak_rss():
    """Largest resident memory this process ever had, bytes; None where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def peak_memory(device):
    """Most bytes that this process held at one time, on the GPU or resident on the CPU; None if that cannot be told."""
    return torch.cuda.max_memory_allocated(device) if device.startswith("cuda") else peak_rss()


def shape_for(args, device):
    """(B, T) of the training step to measure: the flags', or 4 x 512 on a CPU and 16 x 1024 on a GPU."""
    on_cpu = device == "cpu"
    return args.batch_size or (4 if on_cpu else 16), args.sequence_length or (512 if on_cpu else 1024)


# -----------------------------------------------------------------------------
# limits

def matmul_peak(dtype, device, tf32=False):
    """Best FLOP/s of a plain matrix product (M, K) x (K, N) in dtype (a name), over shapes that GPT-2 has."""
    runtime.keep_freed_memory()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    best = 0.0
    for M, K, N in ((2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096)):
        a, b = (torch.randn(shape, device=device).to(runtime.DTYPES[dtype]) for shape in ((M, K), (K, N)))
        seconds = median_seconds(lambda a=a, b=b: a @ b, 5, device)
        best = max(best, 2 * M * K * N / seconds)
    return best


def memory_bandwidth(device):
    """Bytes/s that a copy of float32 moves, reads and writes together; 256 MB, far past a CPU's caches."""
    source = torch.randn(1 << 26, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), 5, device)


def bench_limits(args):
    """Rows of what this machine can do at most: matrix products in each dtype, copying memory."""
    device = runtime.choose_device(args.device)
    rows = []
    kinds = {"float32": ("float32", False), "bfloat16": ("bfloat16", False)}
    if device.startswith("cuda"):
        kinds["TF32"] = ("float32", True)
    for name, (dtype, tf32) in kinds.items():
        peak = in_fresh_process(matmul_peak, dtype, device, tf32)
        rows.append({"limits": f"matmul, {name}", "GFLOP/s": peak / 1e9, "GB/s": None})
    rows.append({"limits": "copy of 256 MB", "GFLOP/s": None, "GB/s": in_fresh_process(memory_bandwidth, device) / 1e9})
    return rows
