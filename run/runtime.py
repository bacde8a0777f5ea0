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
import time

import torch

from run.cli import first_line, print0

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Peak dense 16-bit TFLOP/s (no sparsity, float32 accumulation) from the vendors' data sheets, by a
# part of the device's name; the longest match wins.
PEAK_TFLOPS = {
    "B200": 2250, "H200 NVL": 835, "H200": 989, "H100 NVL": 835, "H100 PCIe": 756, "H100": 989,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "L4": 121, "A40": 149.7, "A30": 165,
    "A10G": 70, "A10": 125, "V100": 125, "V100-PCIE": 112, "T4": 65, "RTX A6000": 154.8,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 4080": 97.5, "RTX 3090": 71, "MI300X": 1307.4,
}


# -----------------------------------------------------------------------------
# device and dtype

def choose_device(device="auto"):
    """device, or for "auto" the first available of "cuda", "xpu" (Intel), "mps", "cpu".

    ValueError for a device that is not available, and for a GPU that this build of PyTorch cannot
    use: training on the CPU instead would go unnoticed.
    """
    index = re.fullmatch(r"cuda:(\d+)", device)
    index = int(index[1]) if index else 0
    if device == "auto" or device.startswith("cuda"):
        check_cuda(index)
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.xpu.is_available():
        available.insert(0, "xpu")
    if torch.cuda.is_available():
        available = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *available]
    if device == "auto":
        return available[0]
    if device not in available:
        raise ValueError(f"device {device!r} is not available; this machine has"
                         f" {', '.join(available)}")
    if device.startswith("cuda:"):
        torch.cuda.set_device(index)  # otherwise Triton and pin_memory use GPU 0
    return device


OTHER_BUILD = ("install a build of PyTorch for an older CUDA (pytorch.org/get-started), or use"
               " --device cpu")


def check_cuda(index):
    """Raises ValueError if this build of PyTorch cannot use the driver, or GPU `index`."""
    # train.sh checks this on Linux
    if sys.platform == "win32" and not torch.version.cuda and shutil.which("nvidia-smi"):
        raise ValueError("this machine has an NVIDIA GPU, but PyTorch was built without CUDA, as"
                         " pip's default for Windows is: install it by the pip command for CUDA of"
                         " pytorch.org/get-started, or use --device cpu")
    num_gpus = torch.cuda.device_count()  # counted by the driver's library, without CUDA
    if torch.version.cuda and num_gpus > 0 and not torch.cuda.is_available():
        raise ValueError(f"this machine has {num_gpus} GPUs, but its driver (see nvidia-smi) is too"
                         f" old for PyTorch's CUDA {torch.version.cuda}: update it (CUDA 13 needs"
                         f" 580 or newer), {OTHER_BUILD}")
    if torch.version.hip or index >= num_gpus:
        return
    major, minor = torch.cuda.get_device_capability(index)
    archs = torch.cuda.get_arch_list()
    if not any(runs_on(arch, (major, minor)) for arch in archs):
        raise ValueError(f"this PyTorch has no kernels for {torch.cuda.get_device_name(index)}"
                         f" (sm_{major}{minor}), only for {', '.join(archs)}: {OTHER_BUILD}")


def runs_on(arch, capability):
    """Whether code of an architecture ("sm_80", "compute_120") runs on a GPU of a capability.

    Kernels (sm_*) run on GPUs of the same major and the same or a higher minor version, PTX
    (compute_*) on any newer one.
    """
    kind, number = re.match(r"(sm|compute)_(\d+)", arch).groups()  # "sm_90a" is sm_90, too
    version = (int(number[:-1]), int(number[-1]))
    if kind == "sm" and version[0] != capability[0]:
        return False
    return version <= capability


def choose_dtype(dtype, device):
    """A name in DTYPES.

    "auto" is bfloat16 where the hardware supports it, float16 on older GPUs, else float32. These
    GPUs use float16 for "bfloat16" too, which they emulate slowly; a message is printed.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"unknown dtype {dtype!r}; allowed are auto, {', '.join(DTYPES)}")
    if dtype in ("auto", "bfloat16") and device.startswith("cuda"):
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return "bfloat16"
        if dtype == "bfloat16":
            print0(f"{device_name(device)} has no bfloat16: using float16")
        return "float16"
    if dtype != "auto":
        return dtype
    has_bfloat16 = (device == "xpu"
                    or device == "mps" and torch.backends.mps.is_macos_or_newer(14, 0)
                    or device == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return "bfloat16" if has_bfloat16 else "float32"


def autocast(device, dtype):
    """Context that runs matmuls in dtype; softmax, norms and losses stay in float32."""
    if dtype == "float32":
        return contextlib.nullcontext()
    # autocast("cuda:0") raises
    return torch.autocast(device_type=device.split(":")[0], dtype=DTYPES[dtype])


@contextlib.contextmanager
def full_float32():
    """Context in which float32 matmuls on a GPU use float32's 24 bits of mantissa, not TF32's 11.

    For evaluations: a score must depend neither on the GPU nor on whether training or the command
    line computes it.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def without_cudnn_attention():
    """Context in which attention on a GPU does not use cuDNN's kernels: for sampling and scoring.

    torch 2.11 and later prefer cuDNN's attention on H100 and B200. It is planned again for each
    combination of lengths, which takes longer than generating a token.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def synchronize(device):
    """Waits until the device has finished all queued work; call it before reading a clock."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


# -----------------------------------------------------------------------------
# random number generators

def get_rng_state(device):
    """State of the generators this process uses: {"cpu": uint8 tensor, and "cuda" or "xpu"}."""
    state = {"cpu": torch.get_rng_state()}
    kind = device.partition(":")[0]
    if kind in ("cuda", "xpu"):
        state[kind] = torch.get_device_module(kind).get_rng_state(device)
    return state


def set_rng_state(state, device):
    """Restores what get_rng_state returned; ValueError for something else."""
    try:
        torch.set_rng_state(state["cpu"])
        kind = device.partition(":")[0]
        if kind != "cpu" and kind in state:
            torch.get_device_module(kind).set_rng_state(state[kind], device)
    except (KeyError, TypeError, RuntimeError) as e:
        raise ValueError(f"not the state of torch {torch.__version__}'s random number generators:"
                         f" {first_line(e)}") from e


def use_deterministic_algorithms(mode):
    """Makes every operation deterministic if mode is True, at some cost in speed.

    Call it before the first matmul on CUDA. An operation without a deterministic implementation
    raises. Eager runs on a CPU are bitwise identical without it; torch.compile sums the embeddings'
    gradients in a nondeterministic order if there are several threads.
    """
    if not mode:
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS is first used
    torch.use_deterministic_algorithms(True)
    # a debugging aid that costs a pass over each new tensor
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.benchmark = False


# -----------------------------------------------------------------------------
# peak FLOPs, memory, and a description of the machine

def peak_flops(device, dtype):
    """Peak dense FLOP/s of the device in a 16-bit dtype from its data sheet, or None."""
    if not device.startswith("cuda") or dtype == "float32":
        return None
    name = torch.cuda.get_device_name(device)
    # whole words: an RTX A3000 is not an A30; these suffixes denote other chips, or a part of one
    if re.search(r"\b(Ti|SUPER|D|Laptop|Max-Q|MIG)\b", name):
        return None
    matches = [part for part in PEAK_TFLOPS if re.search(rf"\b{part}\b", name)]
    if not matches:
        return None
    return PEAK_TFLOPS[max(matches, key=len)] * 1e12


def matmul_flops(device, dtype, size=4096):
    """FLOP/s of a matmul of two size x size matrices in dtype, measured in a second or less.

    It replaces the peak of a GPU that PEAK_TFLOPS does not have.
    """
    # its own generator: the device's has the state of the checkpoint that a run resumes from
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype], generator=generator)
    for repeats in (2, 10):  # the first ones load the kernel
        synchronize(device)
        start = time.perf_counter()
        for _ in range(repeats):
            torch.matmul(a, a)
        synchronize(device)
        seconds = (time.perf_counter() - start) / repeats
    return 2 * size**3 / seconds


def keep_freed_memory():
    """Makes glibc keep large freed blocks instead of returning them to the kernel.

    A training step on the CPU frees and allocates the same hundreds of megabytes each time; by
    default the kernel clears every page again on first touch. `python -m bench ladder` measures the
    gain.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):  # musl has none
            libc.mallopt(-4, 0)   # M_MMAP_MAX: no allocation uses mmap
            libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks


def free_memory(device):
    """Bytes available on the device to this process, or None if unknown."""
    if device.startswith("cuda"):  # free, or kept by PyTorch's allocator for reuse
        reusable = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + reusable
    if device == "xpu":
        reusable = torch.xpu.memory_reserved() - torch.xpu.memory_allocated()
        try:
            return torch.xpu.mem_get_info()[0] + reusable
        except RuntimeError:  # integrated GPUs do not report it (pytorch, issue 194576)
            return None
    if device == "mps":  # the part of the machine's memory that Metal recommends
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    if os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo", encoding="utf-8") as f:
            available = re.search(r"MemAvailable: *(\d+) kB", f.read())
        if available:  # with what the page cache would give back
            return 1024 * int(available[1])
    return None


def device_name(device):
    """The device's product name: "NVIDIA H100 80GB HBM3", or the CPU's model."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    if device == "xpu":
        return torch.xpu.get_device_name()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            models = re.findall(r"^model name\s*: (.*)$", f.read(), re.MULTILINE)
        if models:
            return f"{models[0]} ({len(models)} cores)"
    return device


def describe_machine(device):
    """{"commit", "device", "torch", "python"}, for results and logs. "commit" may be None."""
    commit = None
    if shutil.which("git"):
        here = os.path.dirname(os.path.abspath(__file__))
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=here)
        commit = git.stdout.strip() or None
    return {"commit": commit, "device": device_name(device), "torch": torch.__version__,
            "python": platform.python_version()}
