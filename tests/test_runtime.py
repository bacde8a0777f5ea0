"""
Device, dtype, precision, random number generators, peak FLOPs, memory, the machine's description.

    .venv/bin/python -m pytest tests/test_runtime.py

Needs only requirements-dev.txt; the GPUs are simulated.
"""
import contextlib
import ctypes
import os
import sys
from types import SimpleNamespace

import pytest
import torch

from run import runtime
from run.runtime import autocast, choose_device, choose_dtype, get_rng_state, set_rng_state


def fake_devices(monkeypatch, cuda=0, mps=False, xpu=False):
    """Makes torch report this many CUDA devices, and whether there is an MPS or XPU device.

    Returns the list that torch.cuda.set_device fills.
    """
    current = []
    archs = ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"]
    functions = {"is_available": lambda: cuda > 0, "device_count": lambda: cuda,
                 "get_device_capability": lambda index: (9, 0), "get_arch_list": lambda: archs,
                 "get_device_name": lambda index: "some GPU", "set_device": current.append}
    for name, function in functions.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: xpu)
    return current


# -----------------------------------------------------------------------------
# device and dtype

@pytest.mark.parametrize("devices, expected", [
    (dict(cuda=1), "cuda"), (dict(cuda=2, mps=True, xpu=True), "cuda"), (dict(xpu=True), "xpu"),
    (dict(mps=True), "mps"), (dict(), "cpu")])
def test_auto_chooses_a_gpu_before_the_cpu(devices, expected, monkeypatch):
    fake_devices(monkeypatch, **devices)
    assert choose_device("auto") == expected and choose_device("cpu") == "cpu"


@pytest.mark.parametrize("cuda, device, found", [
    (0, "cuda", "cpu"), (0, "mps", "cpu"), (0, "tpu", "cpu"), (0, "cpu:0", "cpu"),
    (2, "cuda:2", "cuda, cuda:0, cuda:1, cpu"), (2, "cuda:x", "cuda, cuda:0, cuda:1, cpu"),
])
def test_an_unavailable_device_is_an_error_that_lists_the_others(cuda, device, found, monkeypatch):
    fake_devices(monkeypatch, cuda)
    with pytest.raises(ValueError, match=f"'{device}' is not available; this machine has {found}$"):
        choose_device(device)


def test_a_device_with_an_index_becomes_the_current_one(monkeypatch):
    """Triton and pin_memory use the current device."""
    current = fake_devices(monkeypatch, cuda=2)
    assert choose_device("cuda:1") == "cuda:1" and current == [1]


def test_a_driver_that_is_too_old_is_an_error_instead_of_training_on_the_cpu(monkeypatch):
    fake_devices(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for device in ("auto", "cuda", "cuda:1"):
        with pytest.raises(ValueError, match="8 GPUs, but its driver .* too old for .* CUDA 13.0"):
            choose_device(device)
    assert choose_device("cpu") == "cpu"


def test_the_cpu_build_that_pip_installs_on_windows_is_an_error_beside_a_gpu(monkeypatch):
    """There is no train.sh there, which would say so; it trained on the CPU without a word."""
    fake_devices(monkeypatch)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(runtime.shutil, "which", lambda name: "nvidia-smi.exe")
    with pytest.raises(ValueError, match="NVIDIA GPU, but PyTorch was built without CUDA"):
        choose_device("auto")
    assert choose_device("cpu") == "cpu"
    monkeypatch.setattr(runtime.shutil, "which", lambda name: None)
    assert choose_device("auto") == "cpu"


@pytest.mark.parametrize("capability, fits", [
    ((7, 0), False), ((7, 5), True), ((8, 9), True), ((9, 0), True), ((10, 3), True),
    ((12, 1), True), ((13, 0), True), ((6, 1), False), ((11, 0), False)])
def test_a_gpu_without_kernels_in_this_build_is_an_error(capability, fits, monkeypatch):
    fake_devices(monkeypatch, cuda=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    if fits:
        assert choose_device("auto") == "cuda"
    else:
        with pytest.raises(ValueError, match="no kernels for some GPU .sm_%d%d.," % capability):
            choose_device("auto")


def test_dtypes_other_than_auto_are_kept_and_an_unknown_one_is_an_error():
    assert choose_dtype("float16", "cpu") == "float16"
    assert choose_dtype("auto", "cpu") in ("float32", "bfloat16")
    with pytest.raises(ValueError, match="unknown dtype 'half'; allowed are auto, float32"):
        choose_dtype("half", "cpu")


@pytest.mark.parametrize("bf16, expected", [(True, "bfloat16"), (False, "float16")])
def test_auto_dtype_is_bfloat16_on_a_gpu_without_emulation(bf16, expected, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation: bf16 or including_emulation)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert choose_dtype("auto", "cuda:0") == expected and capsys.readouterr().out == ""
    # a run that an A100 has begun
    assert choose_dtype("bfloat16", "cuda:0") == expected
    line = "" if bf16 else "Tesla T4 has no bfloat16: using float16\n"
    assert capsys.readouterr().out == line and choose_dtype("float32", "cuda") == "float32"


@pytest.mark.parametrize("macos, expected", [(14, "bfloat16"), (13, "float32")])
def test_auto_dtype_on_apples_gpu_is_bfloat16_from_macos_14_on(macos, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer",
                        lambda major, minor: macos >= major)
    assert choose_dtype("auto", "mps") == expected


def test_autocast_accepts_a_device_with_an_index(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "autocast",
                        lambda **kwargs: calls.append(kwargs) or contextlib.nullcontext())
    with autocast("cuda:3", "bfloat16"), autocast("cuda:3", "float32"):
        pass
    assert calls == [{"device_type": "cuda", "dtype": torch.bfloat16}]


# -----------------------------------------------------------------------------
# precision, determinism, random numbers


def test_deterministic_mode_makes_an_operation_without_an_implementation_raise(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")  # restored after the test
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    runtime.use_deterministic_algorithms(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    try:
        runtime.use_deterministic_algorithms(True)
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
        assert not torch.utils.deterministic.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)


def test_an_xpu_has_its_own_generator_memory_and_queue(monkeypatch):
    """torch.xpu as the CPU: no test has run on Intel's GPUs."""
    calls = []
    for name, function in {
            "get_rng_state": lambda device: torch.ones(1),
            "set_rng_state": lambda state, device: calls.append((state.item(), device)),
            "synchronize": lambda: calls.append("synchronize"),
            "memory_reserved": lambda: 5, "memory_allocated": lambda: 3,
            "mem_get_info": lambda: (100, 200), "get_device_name": lambda: "Intel Arc"}.items():
        monkeypatch.setattr(torch.xpu, name, function)
    set_rng_state(get_rng_state("xpu"), "xpu")
    runtime.synchronize("xpu")
    assert calls == [(1.0, "xpu"), "synchronize"]
    assert runtime.free_memory("xpu") == 102 and runtime.device_name("xpu") == "Intel Arc"
    # an integrated GPU: a traceback ended the plan
    monkeypatch.setattr(torch.xpu, "mem_get_info", lambda: torch.ones(2) @ torch.ones(3))
    assert runtime.free_memory("xpu") is None
    assert choose_dtype("auto", "xpu") == "bfloat16"
    assert runtime.peak_flops("xpu", "bfloat16") is None


# -----------------------------------------------------------------------------
# peak FLOPs, memory, the description of the machine

@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756),
    ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10G", 70), ("Tesla V100-PCIE-16GB", 112),
    ("NVIDIA GeForce RTX 4090", 165.2), ("AMD Instinct MI300X", 1307.4),
    # not in the table, although a part of the name is: these chips have other peaks
    ("NVIDIA RTX A4000", None), ("NVIDIA T400 4GB", None), ("NVIDIA RTX A3000 Laptop GPU", None),
    ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4080 SUPER", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Quadro P2000", None),
])
def test_peak_flops_is_that_of_the_exact_chip_or_none(name, tflops, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    expected = tflops * 1e12 if tflops else None
    assert runtime.peak_flops("cuda:0", "bfloat16") == expected
    assert runtime.peak_flops("cuda:0", "float32") is None
    assert runtime.peak_flops("cpu", "bfloat16") is None


def test_the_speed_of_a_matmul_is_its_flops_over_its_seconds(monkeypatch):
    """For the GPUs without a known peak; here a clock that ticks once, and a CPU.

    It drew from the device's generator, so a resumed run had other dropout than an unbroken one.
    """
    clock = iter([0.0, 1.0, 5.0, 7.0])
    monkeypatch.setattr(runtime.time, "perf_counter", lambda: next(clock))
    sizes = []
    monkeypatch.setattr(torch, "matmul", lambda a, b: sizes.append((a.shape, a.dtype)))
    state = torch.get_rng_state()
    assert runtime.matmul_flops("cpu", "bfloat16", size=16) == 10 * 2 * 16**3 / 2.0
    assert sizes == [((16, 16), torch.bfloat16)] * 12
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("platform, expected", [("linux", [(-4, 0), (-1, -1)]), ("darwin", [])])
def test_glibc_keeps_freed_memory(platform, expected, monkeypatch):
    """M_MMAP_MAX 0 and M_TRIM_THRESHOLD -1 of malloc.h; other systems have no mallopt."""
    calls = []
    libc = SimpleNamespace(mallopt=lambda *args: calls.append(args))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: libc)
    monkeypatch.setattr(sys, "platform", platform)
    runtime.keep_freed_memory()
    assert calls == expected


def test_describe_machine_works_without_git_and_outside_of_a_repository(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    git = tmp_path / "git"
    descriptions = [runtime.describe_machine("cpu")]
    for script in ("exit 128", "echo 0123abc"):  # 128: outside of a repository
        git.write_text(f"#!/bin/sh\n{script}\n")
        git.chmod(0o755)
        descriptions.append(runtime.describe_machine("cpu"))
    assert [found["commit"] for found in descriptions] == [None, None, "0123abc"]
    assert descriptions[0]["torch"] == torch.__version__
    assert descriptions[0]["python"] == sys.version.split()[0] and descriptions[0]["device"]
