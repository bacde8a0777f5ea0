"""
Device, dtype, random number generators, peak FLOPs, and the description of the machine.

    .venv/bin/python -m pytest tests/test_runtime.py

Needs only requirements-dev.txt; the GPUs are simulated.
"""
import contextlib
import os
import sys

import pytest
import torch

from run.runtime import autocast, choose_device, choose_dtype, describe_machine, get_rng_state, peak_flops, seed_all, set_rng_state


def fake_devices(monkeypatch, cuda=0, mps=False):
    """Makes torch report this many CUDA devices, and whether there is an MPS device."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "some GPU")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90", "sm_100", "sm_120", "compute_120"])
    current = []
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    return current


# -----------------------------------------------------------------------------
# device, dtype, peak FLOPs, random number generators

def test_auto_chooses_cuda_then_mps_then_cpu(monkeypatch):
    for cuda, mps, want in ((1, False, "cuda"), (2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")):
        fake_devices(monkeypatch, cuda, mps)
        assert choose_device("auto") == want


@pytest.mark.parametrize("device, words", [
    ("cuda", "'cuda' is not available; this machine has cpu"), ("mps", "this machine has cpu"),
    ("tpu", "'tpu' is not available"), ("", "'' is not available"), ("cpu:x", "'cpu:x' is not available"),
    ("cpu:0", "'cpu:0' is not available"), ("cuda:x", "'cuda:x' is not available"),
])
def test_a_device_that_is_not_available_is_an_error_that_lists_those_that_are(monkeypatch, device, words):
    fake_devices(monkeypatch)
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match=words):
        choose_device(device)


def test_the_index_of_a_missing_gpu_is_an_error_with_the_number_of_gpus(monkeypatch):
    current = fake_devices(monkeypatch, cuda=2)
    assert choose_device("cuda:1") == "cuda:1" and current == [1]  # Triton and pin_memory use the current device
    for device in ("cuda:x", "cuda:-1", "cuda:", "cuda:0:1"):
        with pytest.raises(ValueError, match=f"'{device}' is not available"):
            choose_device(device)
    with pytest.raises(ValueError, match="'cuda:2' is not available; this machine has 2 CUDA devices"):
        choose_device("cuda:2")
    with pytest.raises(ValueError, match="'cuda:x' is not available"):
        choose_device("cuda:x")


def test_a_driver_that_is_too_old_is_an_error_instead_of_training_on_the_cpu(monkeypatch, tmp_path):
    fake_devices(monkeypatch)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 550.54\necho 550.54\n")
    os.chmod(tmp_path / "nvidia-smi", 0o755)
    for path, driver in ((tmp_path, "550.54"), (tmp_path / "nothing", "unknown")):
        monkeypatch.setenv("PATH", str(path))
        for device in ("auto", "cuda", "cuda:1"):
            with pytest.raises(ValueError, match=rf"8 GPUs, but its driver \({driver}\) is too old for PyTorch's CUDA 13.0"):
                choose_device(device)
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize("capability, fits", [((7, 0), False), ((7, 5), True), ((8, 9), True), ((9, 0), True), ((10, 3), True),
                                              ((12, 1), True), ((13, 0), True), ((6, 1), False), ((11, 0), False)])
def test_a_gpu_without_kernels_in_this_build_is_an_error(monkeypatch, capability, fits):
    fake_devices(monkeypatch, cuda=1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    if fits:
        assert choose_device("auto") == "cuda"
        return
    with pytest.raises(ValueError, match=rf"no kernels for some GPU \(sm_{capability[0]}{capability[1]}\), only for sm_75"):
        choose_device("auto")


def test_an_unknown_dtype_is_an_error_that_lists_the_known_ones():
    assert choose_dtype("float16", "cpu") == "float16" and choose_dtype("auto", "mps") == "float32"
    assert choose_dtype("auto", "cpu") in ("float32", "bfloat16")
    with pytest.raises(ValueError, match="unknown dtype 'half'; allowed are auto, float32"):
        choose_dtype("half", "cpu")


@pytest.mark.parametrize("bf16, want", [(True, "bfloat16"), (False, "float16")])
def test_auto_dtype_is_bfloat16_on_a_gpu_that_supports_it_without_emulation(monkeypatch, bf16, want):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    assert choose_dtype("auto", "cuda:0") == want


def test_autocast_accepts_a_device_with_an_index(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, "autocast", lambda **kwargs: calls.append(kwargs) or contextlib.nullcontext())
    with autocast("cuda:3", "bfloat16"), autocast("cuda:3", "float32"):
        pass
    assert calls == [{"device_type": "cuda", "dtype": torch.bfloat16}]


def test_autocast_changes_the_dtype_of_matmuls_unless_it_is_float32():
    a = torch.ones(4, 4)
    with autocast("cpu", "bfloat16"):
        assert (a @ a).dtype == torch.bfloat16
    with autocast("cpu", "float32"):
        assert (a @ a).dtype == torch.float32


@pytest.mark.parametrize("name, tflops", [
    ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835),
    ("NVIDIA H200", 989), ("NVIDIA L40S", 362), ("NVIDIA L4", 121), ("NVIDIA A10G", 70), ("NVIDIA A10", 125),
    ("Tesla V100-SXM2-16GB", 125), ("Tesla V100-PCIE-16GB", 112), ("Tesla T4", 65), ("NVIDIA GeForce RTX 4090", 165.2),
    ("AMD Instinct MI300X", 1307.4),
    # not in the table, although a part of the name is: these chips have other peaks
    ("NVIDIA RTX A4000", None), ("NVIDIA RTX A3000 Laptop GPU", None), ("NVIDIA RTX A1000", None), ("NVIDIA T400 4GB", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4080 SUPER", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Quadro P2000", None),
])
def test_peak_flops_is_that_of_the_exact_chip_or_none(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda:0", "bfloat16") == (tflops * 1e12 if tflops else None)
    assert peak_flops("cuda:0", "float32") is None and peak_flops("cpu", "bfloat16") is None


def test_restoring_the_rng_state_repeats_the_random_numbers():
    seed_all(1)
    torch.rand(3)
    state = get_rng_state("cpu")
    first = torch.rand(5)
    seed_all(2)
    set_rng_state(state, "cpu")
    assert torch.equal(torch.rand(5), first)
    seed_all(2)
    assert not torch.equal(torch.rand(5), first)


@pytest.mark.parametrize("state", [{}, None, {"cpu": 5}, {"cpu": torch.zeros(3, dtype=torch.uint8)},
                                   {"cpu": torch.zeros(5056)}])
def test_something_else_than_an_rng_state_is_an_error(state):
    with pytest.raises(ValueError, match="not the state of torch .* random number generators"):
        set_rng_state(state, "cpu")


# -----------------------------------------------------------------------------
# the description of the machine

def test_describe_machine_works_without_git_and_outside_of_a_repository(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    without_git = describe_machine("cpu")
    (tmp_path / "git").write_text("#!/bin/sh\nexit 128\n")  # what git does outside of a repository
    os.chmod(tmp_path / "git", 0o755)
    outside = describe_machine("cpu")
    (tmp_path / "git").write_text("#!/bin/sh\necho 0123abc\n")
    inside = describe_machine("cpu")
    assert without_git == outside == {**inside, "commit": None} and inside["commit"] == "0123abc"
    assert inside["torch"] == torch.__version__ and inside["python"] == sys.version.split()[0] and inside["device"]
