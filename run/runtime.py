"""
The machine: device, dtype, random number generators, memory, peak FLOPs.

    device = choose_device("auto")
    with autocast(device, choose_dtype("auto", device)): ...
"""
import contextlib
import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys

import torch

from run.cli import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Peak dense 16-bit TFLOP/s (no sparsity, float32 accumulation) from the vendors' data sheets, by a part of the device's
# name; the longest match wins. MFU is printed only for the devices listed.
PEAK_TFLOPS = {
    "B200": 2250, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989, "A100": 312, "A800": 312,
    "L40S": 362, "L40": 181, "L4": 121, "A40": 149.7, "A30": 165, "A10G": 70, "A10": 125, "V100": 125, "T4": 65,
    "V100-PCIE": 112, "RTX A6000": 154.8, "MI300X": 1307.4,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71,
}


# -----------------------------------------------------------------------------
# device and dtype

def choose_device(device="auto"):
    """device, or for "auto" the first available of "cuda", "mps", "cpu"; the current CUDA device, if it has an index.

    ValueError for a device that is not available, and for a GPU that this build of PyTorch cannot use: training on the CPU
    instead would go unnoticed.
    """
    device_type, _, index = device.partition(":")
    if device_type in ("auto", "cuda"):
        check_cuda(int(index) if index.isdecimal() else 0)
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device == "auto":
        return next(name for name, is_there in available.items() if is_there)
    if not available.get(device_type) or ":" in device and not (device_type == "cuda" and index.isdecimal()):
        raise ValueError(f"device {device!r} is not available; this machine has"
                         f" {', '.join(name for name, is_there in available.items() if is_there)}")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device {device!r} is not available; this machine has {torch.cuda.device_count()} CUDA devices")
    if index:
        torch.cuda.set_device(int(index))  # otherwise Triton and pin_memory use GPU 0
    return device


def check_cuda(index):
    """Raises ValueError if the driver, or GPU `index`, is too old for this build of PyTorch."""
    other_build = "install a build of PyTorch for an older CUDA (pytorch.org/get-started), or use --device cpu"
    if not torch.cuda.is_available():
        if torch.version.cuda and torch.cuda.device_count() > 0:  # counted by the driver's library, without CUDA
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            smi = shutil.which("nvidia-smi") and subprocess.run(query, capture_output=True, text=True).stdout.split()
            driver = smi[0] if smi else "unknown"
            raise ValueError(f"this machine has {torch.cuda.device_count()} GPUs, but its driver ({driver}) is too old for"
                             f" PyTorch's CUDA {torch.version.cuda}: update it (CUDA 13 needs 580 or newer), {other_build}")
        return
    if torch.version.hip or index >= torch.cuda.device_count():
        return
    major, minor = torch.cuda.get_device_capability(index)
    # kernels run on GPUs of the same major and the same or a higher minor version; PTX (compute_*) on any newer one
    archs = [(arch.split("_")[0], int(number[:-1]), int(number[-1])) for arch in torch.cuda.get_arch_list()
             for number in [re.sub(r"\D", "", arch.split("_")[1])]]
    if not any(m == major and n <= minor or kind == "compute" and (m, n) <= (major, minor) for kind, m, n in archs):
        raise ValueError(f"this PyTorch has no kernels for {torch.cuda.get_device_name(index)} (sm_{major}{minor}), only for"
                         f" {', '.join(torch.cuda.get_arch_list())}: {other_build}")


def choose_dtype(dtype, device):
    """A name in DTYPES; "auto" is bfloat16 where the hardware supports it, float16 on older GPUs, else float32."""
    if dtype != "auto":
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; allowed are auto, {', '.join(DTYPES)}")
        return dtype
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return "bfloat16"
    return "float32"


def autocast(device, dtype):
    """Context that runs matmuls in dtype (a name in DTYPES) and keeps softmax, norms and losses in float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device_type=device.split(":")[0], dtype=DTYPES[dtype])  # autocast("cuda:0") raises


@contextlib.contextmanager
def full_float32():
    """Context in which float32 matmuls on a GPU use 24 bits of mantissa, not TF32's 11: for evaluations.

    A score must depend neither on the GPU nor on whether training or the command line computes it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def without_cudnn_attention():
    """Context in which attention uses flash, memory-efficient or math kernels on a GPU: for sampling and scoring.

    torch 2.11 and later prefer cuDNN's attention on H100 and B200. It plans anew for each combination of lengths, which
    takes longer than generating a token.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def synchronize(device):
    """Waits until the device has finished all queued work; call it before reading a clock."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    elif device == "mps":
        torch.mps.synchronize()


# -----------------------------------------------------------------------------
# random number generators

def seed_all(seed):
    """Seeds torch's generators, of the CPU and of every GPU."""
    torch.manual_seed(seed)


def get_rng_state(device):
    """State of the generators this process uses: {"cpu": uint8 tensor, and "cuda" on a GPU}."""
    state = {"cpu": torch.get_rng_state()}
    if device.startswith("cuda"):
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_rng_state(state, device):
    """Restores what get_rng_state returned; ValueError for something else."""
    try:
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and device.startswith("cuda"):
            torch.cuda.set_rng_state(state["cuda"], device)
    except (KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"not the state of torch {torch.__version__}'s random number generators: {first_line(e)}") from e


def use_deterministic_algorithms(mode):
    """Makes every operation deterministic if mode is True, at some cost in speed; call it before the first matmul on CUDA.

    An operation without a deterministic implementation raises. Eager runs on a CPU are bitwise identical without it;
    torch.compile sums the embeddings' gradients in a nondeterministic order if there are several threads.
    """
    if not mode:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a pass over each new tensor
    torch.backends.cudnn.benchmark = False


# -----------------------------------------------------------------------------
# peak FLOPs, memory, and a description of the machine

def peak_flops(device, dtype):
    """Peak dense FLOP/s of the device in a 16-bit dtype, or None if it is not known."""
    if not device.startswith("cuda") or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    # whole words: an RTX A3000 is not an A30; these suffixes denote other chips, or a part of one
    if re.search(r"\b(Ti|SUPER|D|Laptop|Max-Q|MIG)\b", name):
        return None
    match = max((part for part in PEAK_TFLOPS if re.search(rf"\b{part}\b", name)), key=len, default=None)
    return PEAK_TFLOPS[match] * 1e12 if match else None


def keep_freed_memory():
    """Makes glibc keep large freed blocks instead of returning them to the kernel; does nothing on other systems.

    A training step on the CPU frees and allocates the same hundreds of megabytes each time; by default the kernel
    clears every page again on first touch. `python -m bench ladder` measures the gain.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(-4, 0)   # M_MMAP_MAX: no allocation uses mmap
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def free_memory(device):
    """Bytes available on the device to this process, or None if unknown."""
    if device.startswith("cuda"):  # free, or kept by PyTorch's allocator for reuse
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device == "mps":  # the part of the machine's memory that Metal recommends
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if os.path.exists("/proc/meminfo"):  # SC_AVPHYS_PAGES does not count what the page cache would give back
        with open("/proc/meminfo", encoding="utf-8") as f:
            if available := re.search(r"MemAvailable: *(\d+) kB", f.read()):
                return 1024 * int(available[1])
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def device_name(device):
    """The device's product name: "NVIDIA H100 80GB HBM3", or the CPU's model."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as f:
            models = [line.split(":", 1)[1].strip() for line in f if line.startswith("model name")]
        if models:
            return f"{models[0]} ({len(models)} cores)"
    return device


def describe_machine(device):
    """{"commit", "device", "torch", "python"}, for results and logs. "commit" may be None."""
    here = os.path.dirname(os.path.abspath(__file__))
    git = shutil.which("git") and subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here)
    return {"commit": git and git.stdout.strip() or None, "device": device_name(device), "torch": torch.__version__,
            "python": platform.python_version()}
