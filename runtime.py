"""
The machine: which device and dtype, the process group, seeds, memory, and how a script ends.

    ranks = setup("auto")             # under torchrun, or alone
    with autocast(ranks.device, dtype): ...
    all_reduce_sum(tensor, ranks)
    teardown()
"""
import argparse
import atexit
import contextlib
import ctypes
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Peak dense 16-bit TFLOP/s (no sparsity, float32 accumulation) from the makers' data sheets, by a part of the device's
# name, the longest match first. No entry, no MFU: a wrong peak is worse than none.
PEAK_TFLOPS = {
    "B200": 2250, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125, "V100": 125, "T4": 65,
    "V100-PCIE": 112, "RTX A6000": 154.8, "MI300X": 1307.4,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71,
}


@dataclass(frozen=True)
class Ranks:
    rank: int
    local_rank: int
    world_size: int
    device: str       # "cuda:0", "mps", "cpu"
    ddp: bool         # started by torchrun

    @property
    def device_type(self):
        """What autocast wants: "cuda", never "cuda:0"."""
        return self.device.split(":")[0]

    @property
    def master_process(self):
        """Whether this rank prints and writes files."""
        return self.rank == 0


def print0(*args, **kwargs):
    """print on rank 0 alone, at once."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(*args, **kwargs, flush=True)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but a wrong flag is an error like any other: one line, without the page of usage before it."""

    def error(self, message):
        raise ValueError(f"{message}; --help lists what is allowed")


def run_main(main):
    """Runs a script's main(): a user's error is one line and status 2, Ctrl-C status 130; a bug keeps its traceback.

    Under torchrun the process leaves without Python's own end: gloo's threads may still want Python, and would abort it.
    """
    status = 1  # a bug's
    if "RANK" in os.environ:
        atexit.register(lambda: leave(status))  # registered first, it runs last
    try:
        run_and_report(main)
        status = 0
    except SystemExit as end:
        status = end.code or 0
        raise


def leave(status):
    """Ends the process at once, with what it printed."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_and_report(main):
    """main(), whose errors are printed and become exit statuses."""
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # what reads our output has enough: `python sample.py ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again when it flushes
        sys.exit(1)
    except torch.OutOfMemoryError as e:
        print(f"error: out of GPU memory, give a smaller --batch-size ({str(e).splitlines()[0][:120]})", file=sys.stderr)
        sys.exit(2)
    except (ValueError, OSError) as e:  # FileNotFoundError and a full disk are OSErrors
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


# -----------------------------------------------------------------------------
# processes and devices

def choose_device(device="auto"):
    """A device torch can use: "auto" takes CUDA, then Apple's MPS, then the CPU; ValueError if a named one is not there."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    device_type = device.split(":")[0]
    if not there.get(device_type):
        raise ValueError(f"device {device!r} is not here; this machine has {', '.join(d for d in there if there[d])}")
    if device_type == "cuda" and ":" in device and not int(device.split(":")[1]) < torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not here; this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def setup(device="auto", timeout_minutes=10):
    """The Ranks of this process; joins the process group when torchrun started it (NCCL on CUDA, gloo otherwise)."""
    device = choose_device(device)
    ddp = "RANK" in os.environ  # torchrun sets RANK, LOCAL_RANK and WORLD_SIZE
    if not ddp:
        return Ranks(0, 0, 1, device, False)
    rank, local_rank, world_size = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    timeout = timedelta(minutes=timeout_minutes)
    if device.startswith("cuda"):
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"torchrun started {local_rank + 1} processes or more on this machine, which has"
                             f" {torch.cuda.device_count()} GPUs: --nproc_per_node={torch.cuda.device_count()}")
        device = f"cuda:{local_rank}"
        # before init_process_group, and named there too: else NCCL guesses the device and may hang
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=torch.device(device), **store_of_this_start(timeout))
    else:
        dist.init_process_group("gloo", timeout=timeout, **store_of_this_start(timeout))
    return Ranks(rank, local_rank, world_size, device, True)


def store_of_this_start(timeout):
    """Arguments of init_process_group: none, or a new store, where torchrun may start the ranks again (--max-restarts).

    torchrun's own store outlives its ranks (torch 2.11 to 2.13). What those that died left in it, their addresses and
    NCCL's id, the next ones would take for each other's, and hang. So rank 0 opens another and leaves its port there.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return {}
    host, rank, world_size = os.environ["MASTER_ADDR"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torchruns = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    if rank == 0:
        store = dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        torchruns.set("port of this start", str(store.port))
    else:
        deadline = time.monotonic() + timeout.total_seconds()
        while not is_open(host, port := int(torchruns.get("port of this start"))):  # that of a rank 0 which is dead
            if time.monotonic() > deadline:
                raise ValueError(f"rank 0 opened no store on {host} within --timeout; look at what it printed")
            time.sleep(0.1)
        store = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    return {"store": store, "rank": rank, "world_size": world_size}


def is_open(host, port):
    """Whether somebody listens at a TCP port."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def teardown():
    """Leaves the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def all_reduce_sum(tensor, ranks):
    """tensor summed over the ranks, in place, and returned. SUM is the one reduction that every backend has right."""
    if ranks.ddp:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_gather(value, ranks):
    """[value of rank 0, value of rank 1, ...]; any plain value or tensor on the CPU."""
    if not ranks.ddp:
        return [value]
    values = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def barrier(ranks):
    """Waits until every rank is here."""
    if ranks.ddp:
        dist.barrier()


def agree(flag, ranks):
    """Whether flag is true on any rank: the same answer on all of them, so that all take the same way."""
    if not ranks.ddp:
        return bool(flag)
    return bool(all_reduce_sum(torch.tensor(float(bool(flag)), device=ranks.device), ranks).item())


@contextlib.contextmanager
def rank0_first(ranks):
    """Runs the body on rank 0, then on the others: what rank 0 writes to disk, they find."""
    if not ranks.master_process:
        barrier(ranks)
    yield
    if ranks.master_process:
        barrier(ranks)


class Stop(Exception):
    """Raised on all ranks at the same point once any of them was told to stop; .status is what to exit with."""

    def __init__(self, signal_name, status):
        super().__init__(signal_name)
        self.status = status


class StopSignals:
    """SIGTERM, SIGUSR1 and Ctrl-C, noted instead of obeyed, so that the step can be finished and saved.

    A second Ctrl-C ends the process at once, in the middle of whatever it does, a collective that hangs included. Use:
    with StopSignals(ranks) as stop: ... stop.check() ... where all ranks are at the same point.
    """
    # name: exit status. 75 is EX_TEMPFAIL of sysexits.h, "try again later": for a batch system's requeue
    STATUS = {"SIGTERM": 0, "SIGUSR1": 75, "SIGINT": 130}

    def __init__(self, ranks):
        self.ranks, self.received = ranks, None
        self.names = {getattr(signal, name): name for name in self.STATUS if hasattr(signal, name)}  # Windows has no USR1

    def __enter__(self):
        # Python runs its signal handlers between two operations of the main thread, which may be a long wait. The kernel's
        # note of a signal arrives in this socket at once, and a thread reads it.
        self.reader, self.writer = socket.socketpair()
        self.writer.setblocking(False)
        self.old_fd = signal.set_wakeup_fd(self.writer.fileno(), warn_on_full_buffer=False)
        self.old_handlers = {number: signal.signal(number, lambda *_: None) for number in self.names}
        threading.Thread(target=self._listen, daemon=True, name="StopSignals").start()
        return self

    def __exit__(self, *_):
        for number, handler in self.old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self.old_fd)
        self.writer.close()  # ends the thread

    def _listen(self):
        first = 0.0
        while number := self.reader.recv(1):
            name = self.names.get(number[0])
            # torchrun passes on a Ctrl-C that the terminal has sent here too: within half a second it is the same one
            if name == self.received == "SIGINT" and time.monotonic() - first > 0.5:
                os._exit(130)
            if name and not self.received:
                self.received, first = name, time.monotonic()
                print0(f"{name}: finishing the step, then saving" + "; again to stop at once" * (name == "SIGINT"))
        self.reader.close()

    def check(self):
        """Raises Stop on all ranks when any of them has received a signal; all ranks must call it equally often."""
        received = self.received
        if agree(received, self.ranks):
            name = max(all_gather(received or "", self.ranks))  # seldom two kinds at once: any order will do
            raise Stop(name, self.STATUS[name])


def synchronize(device):
    """Waits for the device to finish what it was given, so that a clock read afterwards is right."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    elif device == "mps":
        torch.mps.synchronize()


# -----------------------------------------------------------------------------
# dtypes, random numbers, memory

def choose_dtype(dtype, device):
    """A name in DTYPES: "auto" takes bfloat16 where the hardware multiplies it, float16 on older GPUs, else float32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; there are: auto, {', '.join(DTYPES)}")
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"


def autocast(device, dtype):
    """Context in which matmuls run in dtype (a name in DTYPES) and what needs float32 stays in it; nothing for float32."""
    device_type = device.split(":")[0]  # autocast("cuda:0") raises
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type=device_type, dtype=DTYPES[dtype])


def seed_all(seed):
    """Seeds torch's generators, of the CPU and of every GPU."""
    torch.manual_seed(seed)


def get_rng_state(device):
    """State of the generators that this process draws from: {"cpu": uint8 tensor, and "cuda" on a GPU}."""
    state = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def be_deterministic():
    """Makes every operation of torch give the same bits each time, at some cost in speed; call it before CUDA is used.

    An operation that has no such way raises. On the CPU runs with equally many threads are bit-equal without it.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over each new tensor
    torch.backends.cudnn.benchmark = False


def set_rng_state(state, device):
    """Takes back what get_rng_state gave."""
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and device.startswith("cuda"):
        torch.cuda.set_rng_state(state["cuda"], device)


def peak_flops(device, dtype):
    """Peak dense FLOP/s of the device in a 16-bit dtype, or None where the table does not know it."""
    if not device.startswith("cuda") or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    # whole words: an RTX A3000 is no A30; and what follows the word may make it another chip, or a slice of one
    if re.search(r"\b(Ti|SUPER|D|Laptop|Max-Q|MIG)\b", name):
        return None
    match = max((part for part in PEAK_TFLOPS if re.search(rf"\b{part}\b", name)), key=len, default=None)
    return PEAK_TFLOPS[match] * 1e12 if match else None


def keep_freed_memory():
    """Makes glibc keep large freed blocks instead of giving them back to the kernel; does nothing elsewhere.

    A training step on the CPU frees and asks again for the same hundreds of megabytes; by default each comes back as
    fresh pages that the kernel clears one by one on first touch. bench.py train measures what this gains.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)   # M_MMAP_MAX: no block of its own mapping
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


def free_memory(device):
    """Bytes that a new run may fill on the device, or None where that cannot be told."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def device_name(device):
    """The device as its maker calls it: "NVIDIA H100 80GB HBM3", or the CPU's model."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            models = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        if models:
            return f"{models[0]} ({len(models)} cores)"
    return device


def describe_machine(device):
    """{"commit", "device", "torch", "python"}: what a figure was measured with."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here)
    return {"commit": git.stdout.strip() or None, "device": device_name(device), "torch": torch.__version__,
            "python": platform.python_version()}


def write_run_description(path, config, ranks, dtype):
    """config.json of a run: its config, and what it ran on, with which versions and which command; replaced whole."""
    description = {"config": config, "command": sys.argv, "world_size": ranks.world_size, "dtype": dtype,
                   **describe_machine(ranks.device)}
    with open(f"{path}.tmp", "w", encoding="utf-8") as f:
        json.dump(description, f, indent=2)
    os.replace(f"{path}.tmp", path)


# -----------------------------------------------------------------------------
# torch.compile

def compile_for_training(raw_model, mode, steps, B, T, dtype, device):
    """torch.compile(raw_model), warmed up by one forward and backward, or raw_model itself.

    mode: "on", "off", or "auto": where a compiler is at hand and the run is long enough to earn it back. What auto
    finds not to work is said in one line. The warm-up lets every rank compile before it meets the others in a
    gradient reduction, whose time-out a slow compiler would exceed.
    """
    has_compiler = device.startswith("cuda") or device == "cpu" and bool(shutil.which("g++") or shutil.which("clang++"))
    if mode == "off" or mode == "auto" and not (has_compiler and steps >= 100):
        return raw_model
    print0("compiling ...")
    start, rng_state = time.time(), get_rng_state(device)
    model = torch.compile(raw_model)
    x, y = (torch.zeros((B, T), dtype=torch.long, device=device) for _ in range(2))  # one for both would compile again
    try:
        with autocast(device, dtype):
            _, loss = model(x, y)
        loss.backward()
        print0(f"compiled in {time.time() - start:.1f} s")
    except Exception as e:  # no Python headers, no Triton, a GPU too old, ...
        if mode == "on" or isinstance(e, torch.OutOfMemoryError):
            raise
        print0(f"torch.compile does not work here, going on without: {type(e).__name__} {str(e).strip()[:160]!r}")
        model = raw_model
    raw_model.zero_grad(set_to_none=True)
    set_rng_state(rng_state, device)
    return model
