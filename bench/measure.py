"""What the benchmarks share: timers, fresh processes, the peaks of this machine, tables."""
import functools
import multiprocessing
import os
import socket
import statistics
import sys
import threading
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from run import runtime


def end_with_parent():
    """Ends this process when its parent ends, even if that was killed."""
    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)
    threading.Thread(target=wait, daemon=True).start()


def in_fresh_process(function, *args):
    """function(*args), run in a new process, where earlier work cannot affect the measurement.

    The result must be picklable. Raises MemoryError if the process was killed.
    """
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=end_with_parent) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as e:
            raise MemoryError(f"the process of {function.__name__} was killed,"
                              " probably because memory ran out") from e


def free_port():
    """A TCP port that no process of this machine uses."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def timed(function, device="cpu", repeats=1, warmup=0):
    """(median seconds of repeats calls of function() after warmup calls, its last result)."""
    seconds = []
    for _ in range(warmup + repeats):
        runtime.synchronize(device)
        start = time.perf_counter()
        result = function()
        runtime.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[warmup:]), result


def kernel_seconds(function, device, repeats):
    """Median seconds of function() after two calls.

    On CUDA, the GPU's time, measured over ten calls at once.
    """
    if not device.startswith("cuda"):
        median, _ = timed(function, device, repeats, warmup=2)
        return median
    seconds = []
    with torch.cuda.device(device):
        for _ in range(2):
            function()
        for _ in range(repeats):
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            for _ in range(10):
                function()
            end.record()
            end.synchronize()
            seconds.append(start.elapsed_time(end) / 1000 / 10)  # elapsed_time is in ms
    return statistics.median(seconds)


def random_tensors(shapes, dtype, device):
    """Tensors of random numbers in dtype (a name)."""
    return [torch.randn(shape, device=device).to(runtime.DTYPES[dtype]) for shape in shapes]


def forward_backward_seconds(function, shapes, dtype, device, repeats=5):
    """Median seconds of function(*tensors) and its gradients, for random tensors in dtype."""
    runtime.keep_freed_memory()
    inputs = [tensor.requires_grad_() for tensor in random_tensors(shapes, dtype, device)]
    grad = torch.randn_like(function(*inputs))

    def run():
        return torch.autograd.grad(function(*inputs), inputs, grad)

    return kernel_seconds(run, device, repeats)


def matmul_peak(dtype, device, tf32=False):
    """Highest FLOP/s of a matmul (M, K) x (K, N) in dtype (a name), over shapes like GPT-2's."""
    runtime.keep_freed_memory()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    best = 0.0
    for M, K, N in ((2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096)):
        a, b = random_tensors([(M, K), (K, N)], dtype, device)
        seconds = kernel_seconds(functools.partial(torch.matmul, a, b), device, 5)
        best = max(best, 2 * M * K * N / seconds)
    return best


def read_bandwidth(device):
    """Bytes/s of reading 500 MB, far more than a CPU caches: the sum of a float32 tensor."""
    numbers = torch.ones(125_000_000, device=device)
    return numbers.nbytes / kernel_seconds(numbers.sum, device, 7)


def peak_gb(device):
    """Peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # Windows has none
    unit = 1 if sys.platform == "darwin" else 1024  # bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def print_table(rows):
    """Prints dicts with the same keys as an aligned table, and returns them.

    Columns without any value are omitted. A float is printed as 1,234.50, None as -.
    """
    def cell(value):
        if value is None:
            return "-"
        return f"{value:,.2f}" if isinstance(value, float) else str(value)

    columns = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        if all(value is None for value in values):
            continue
        cells = [name, *map(cell, values)]
        width = max(map(len, cells))
        align = str.ljust if isinstance(values[0], str) else str.rjust
        columns.append([align(text, width) for text in cells])
    print("\n".join("  ".join(cells).rstrip() for cells in zip(*columns)), flush=True)
    return rows
