"""What the benchmarks share: a timer, fresh processes, the peaks of this machine, and a table printer."""
import multiprocessing
import resource
import socket
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import torch

from run import runtime


def in_fresh_process(function, *args):
    """function(*args), run in a new Python process, where earlier work cannot affect the measurement.

    The result must be picklable. Raises MemoryError if the process was killed.
    """
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args).result()
        except BrokenProcessPool as e:
            raise MemoryError(f"the process of {function.__name__} was killed, probably because memory ran out") from e


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


def forward_backward_seconds(function, shapes, dtype, device, repeats=5):
    """Median seconds of function(*tensors) and its gradients, for random tensors of these shapes in dtype (a name)."""
    runtime.keep_freed_memory()
    inputs = [torch.randn(shape, device=device).to(runtime.DTYPES[dtype]).requires_grad_() for shape in shapes]
    grad = torch.randn_like(function(*inputs))
    return timed(lambda: torch.autograd.grad(function(*inputs), inputs, grad), device, repeats, 2)[0]


def matmul_peak(dtype, device, tf32=False):
    """Highest FLOP/s of a matmul (M, K) x (K, N) in dtype (a name), over shapes like GPT-2's."""
    runtime.keep_freed_memory()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    best = 0.0
    for M, K, N in ((2048, 768, 3072), (2048, 3072, 768), (4096, 4096, 4096)):
        a, b = (torch.randn(shape, device=device).to(runtime.DTYPES[dtype]) for shape in ((M, K), (K, N)))
        best = max(best, 2 * M * K * N / timed(lambda a=a, b=b: a @ b, device, 5, 2)[0])
    return best


def read_bandwidth(device):
    """Bytes/s of reading 500 MB, far more than a CPU caches: the sum of a float32 tensor."""
    numbers = torch.ones(125_000_000, device=device)
    return numbers.nbytes / timed(numbers.sum, device, 7, 2)[0]


def peak_gb(device):
    """Peak memory of this process: allocated on the GPU, or resident on the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def print_table(rows):
    """Prints dicts with the same keys as an aligned table, and returns them; columns without any value are omitted.

    A float is printed as 1,234.50, None as -.
    """
    columns = []
    for name in rows[0]:
        values = [row[name] for row in rows]
        if any(value is not None for value in values):
            cells = [name, *("-" if v is None else f"{v:,.2f}" if isinstance(v, float) else str(v) for v in values)]
            align = str.ljust if isinstance(values[0], str) else str.rjust
            columns.append([align(cell, max(map(len, cells))) for cell in cells])
    print("\n".join("  ".join(cells).rstrip() for cells in zip(*columns)), flush=True)
    return rows
