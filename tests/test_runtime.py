"""
Devices, dtypes, generators, how a script ends, and what ranks tell each other: two real gloo processes.

    .venv/bin/python -m pytest tests/test_runtime.py

Needs nothing but requirements-dev.txt; the GPUs in it are names.
"""
import contextlib
import json
import os
import socket
import subprocess
import sys

import pytest
import torch

import runtime
from runtime import Ranks, autocast, choose_device, choose_dtype, get_rng_state, peak_flops, run_main, seed_all, set_rng_state

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def pretend(monkeypatch, cuda=0, mps=False):
    """Makes torch say that it has so many GPUs, and Apple's or not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


# -----------------------------------------------------------------------------
# devices and dtypes

def test_auto_takes_cuda_then_mps_then_cpu(monkeypatch):
    for cuda, mps, want in ((1, False, "cuda"), (2, True, "cuda"), (0, True, "mps"), (0, False, "cpu")):
        pretend(monkeypatch, cuda, mps)
        assert choose_device("auto") == want


@pytest.mark.parametrize("device, words", [
    ("cuda", "machine has cpu"), ("mps", "machine has cpu"), ("tpu", "'tpu' is not here"), ("", "'' is not here"),
])
def test_a_device_that_is_not_here_is_an_error_that_lists_what_is(monkeypatch, device, words):
    pretend(monkeypatch)
    assert choose_device("cpu") == "cpu"
    with pytest.raises(ValueError, match=words):
        choose_device(device)


def test_a_gpu_past_the_last_is_an_error_with_their_number(monkeypatch):
    pretend(monkeypatch, cuda=2)
    assert choose_device("cuda:1") == "cuda:1"
    with pytest.raises(ValueError, match="'cuda:2' is not here; this machine has 2 CUDA devices"):
        choose_device("cuda:2")


def test_an_unknown_dtype_is_an_error_and_a_known_one_is_kept():
    assert choose_dtype("float16", "cpu") == "float16" and choose_dtype("auto", "mps") == "float32"
    assert choose_dtype("auto", "cpu") in ("float32", "bfloat16")
    with pytest.raises(ValueError, match="unknown dtype 'half'; there are: auto, float32"):
        choose_dtype("half", "cpu")


@pytest.mark.parametrize("bf16, want", [(True, "bfloat16"), (False, "float16")])
def test_auto_dtype_on_a_gpu_is_what_its_hardware_multiplies(monkeypatch, bf16, want):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: bf16 or including_emulation)
    assert choose_dtype("auto", "cuda:0") == want


def test_autocast_takes_the_type_of_a_device_with_an_index(monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda **kwargs: asked.append(kwargs) or contextlib.nullcontext())
    with autocast("cuda:3", "bfloat16"), autocast("cuda:3", "float32"):
        pass
    assert asked == [{"device_type": "cuda", "dtype": torch.bfloat16}]
    assert Ranks(3, 3, 8, "cuda:3", True).device_type == "cuda"


def test_autocast_on_the_cpu_changes_matmuls_and_float32_does_not():
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
    # not in the table, though a part of the name is: each once had, or could have, another chip's peak
    ("NVIDIA RTX A4000", None), ("NVIDIA RTX A3000 Laptop GPU", None), ("NVIDIA RTX A1000", None), ("NVIDIA T400 4GB", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("NVIDIA GeForce RTX 3090 Ti", None), ("NVIDIA GeForce RTX 4080 SUPER", None),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None), ("Quadro P2000", None),
])
def test_peak_flops_of_a_name_is_that_chips_or_none(monkeypatch, name, tflops):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert peak_flops("cuda:0", "bfloat16") == (tflops * 1e12 if tflops else None)
    assert peak_flops("cuda:0", "float32") is None and peak_flops("cpu", "bfloat16") is None


def test_rng_state_round_trip_repeats_the_draws():
    seed_all(1)
    torch.rand(3)
    state = get_rng_state("cpu")
    first = torch.rand(5)
    seed_all(2)
    set_rng_state(state, "cpu")
    assert torch.equal(torch.rand(5), first)
    seed_all(2)
    assert not torch.equal(torch.rand(5), first)


def test_one_process_is_rank_0_of_1_without_a_group(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    ranks = runtime.setup("cpu")
    assert ranks == Ranks(0, 0, 1, "cpu", False) and ranks.master_process
    assert runtime.all_gather("a", ranks) == ["a"] and runtime.all_reduce_sum(torch.tensor(3), ranks) == 3
    with runtime.rank0_first(ranks):
        runtime.barrier(ranks)
    runtime.teardown()
    assert not torch.distributed.is_initialized()


def test_more_processes_than_gpus_is_an_error_with_the_flag_to_change(monkeypatch):
    pretend(monkeypatch, cuda=2)
    for name, value in (("RANK", "2"), ("LOCAL_RANK", "2"), ("WORLD_SIZE", "3")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--nproc_per_node=2"):
        runtime.setup("cuda")


# -----------------------------------------------------------------------------
# how a script ends

def end_of(main, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(main)
    return end.value.code, capsys.readouterr().err


def raising(error):
    def main():
        raise error
    return main


def test_run_main_makes_users_errors_one_line_and_status_2(capsys):
    assert end_of(raising(ValueError("T is 5; it must be 1")), capsys) == (2, "error: T is 5; it must be 1\n")
    status, line = end_of(lambda: open("nowhere.txt"), capsys)
    assert status == 2 and line.startswith("error: ") and "nowhere.txt" in line
    assert end_of(raising(OSError(28, "No space left on device")), capsys) == (2, "error: [Errno 28] No space left on device\n")


def test_run_main_makes_ctrl_c_status_130_without_a_traceback(capsys):
    assert end_of(raising(KeyboardInterrupt()), capsys) == (130, "\ninterrupted\n")


THREADS_IN_CPP = """
import atexit, io, sys, threading, time
import pyarrow as pa, pyarrow.parquet as pq
from runtime import run_main
pq.write_table(pa.table({"n": list(range(20000))}), "a.parquet", row_group_size=100)
def read():
    while True:
        pq.ParquetFile("a.parquet", pre_buffer=False).read(use_threads=False)
def main():
    for _ in range(8):
        threading.Thread(target=read, daemon=True).start()
    time.sleep(0.2)
    atexit.register(print, "the tracker's end")
    if sys.argv[1] == "2":
        raise ValueError("no such thing")
    assert sys.argv[1] == "0", "a bug"
run_main(main)
"""


@pytest.mark.parametrize("status, printed", [(0, ""), (1, "AssertionError: a bug"), (2, "error: no such thing")])
def test_run_main_under_torchrun_ends_with_its_status_whatever_threads_do(status, printed, tmp_path):
    process = subprocess.run([sys.executable, "-c", THREADS_IN_CPP, str(status)], cwd=tmp_path, capture_output=True, text=True,
                             env={**os.environ, "RANK": "0", "PYTHONPATH": ROOT}, timeout=60)
    assert process.returncode == status and printed in process.stderr, process.stderr
    assert "the tracker's end" in process.stdout


def test_run_main_lets_a_bug_keep_its_traceback_and_a_good_end_be_0():
    with pytest.raises(AssertionError, match="ours"):
        run_main(raising(AssertionError("ours")))
    assert run_main(lambda: None) is None


def test_a_wrong_flag_is_one_line(capsys):
    parser = runtime.ArgumentParser(prog="x.py", allow_abbrev=False)
    parser.add_argument("--steps", type=int, choices=(1, 2))
    for arguments, words in ((["--step", "1"], "unrecognized arguments: --step 1"), (["--steps", "3"], "invalid choice: 3"),
                             (["--steps"], "expected one argument")):
        status, line = end_of(lambda arguments=arguments: parser.parse_args(arguments), capsys)
        assert status == 2 and words in line and line.startswith("error: ") and line.count("\n") == 1


def test_print0_speaks_on_rank_0_alone(capsys, monkeypatch):
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        runtime.print0("rank", rank)
    assert capsys.readouterr().out == "rank 0\n"


def test_config_json_says_what_ran_and_on_what(tmp_path):
    path = tmp_path / "config.json"
    runtime.write_run_description(str(path), {"lr": 0.1}, Ranks(0, 0, 2, "cpu", True), "bfloat16")
    description = json.loads(path.read_text())
    assert description["config"] == {"lr": 0.1} and description["command"] == sys.argv
    assert (description["world_size"], description["dtype"], description["torch"]) == (2, "bfloat16", torch.__version__)
    assert os.listdir(tmp_path) == ["config.json"]


# -----------------------------------------------------------------------------
# two processes

TWO_RANKS = """
import os, sys, time, torch, runtime
ranks = runtime.setup("cpu")
file = sys.argv[1]
with runtime.rank0_first(ranks):
    if ranks.master_process:
        time.sleep(0.5)  # a rank that did not wait would be here first
        open(file, "w").close()
    found = os.path.exists(file)
total = runtime.all_reduce_sum(torch.tensor([1.0 + ranks.rank, 10.0], dtype=torch.float64), ranks)
values = runtime.all_gather({"rank": ranks.rank, "state": torch.tensor([ranks.rank])}, ranks)
runtime.barrier(ranks)
runtime.print0("said once")
print(ranks.rank, ranks.world_size, ranks.ddp, ranks.master_process, found, total.tolist(),
      [(v["rank"], v["state"].item()) for v in values], flush=True)
runtime.teardown()
assert not torch.distributed.is_initialized()
"""


def test_two_ranks_add_gather_and_let_rank_0_go_first(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for rank in range(2):
        env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
        processes.append(subprocess.Popen([sys.executable, "-c", TWO_RANKS, str(tmp_path / "made")], cwd=ROOT, env=env,
                                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    outputs = [process.communicate(timeout=120) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    shared = "[3.0, 20.0] [(0, 0), (1, 1)]\n"
    assert outputs[0][0] == "said once\n0 2 True True True " + shared
    assert outputs[1][0] == "1 2 True False True " + shared
