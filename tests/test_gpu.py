"""
The CUDA path, rehearsed on a CPU: fake CUDA tensors, and train_gpt2.py with a CUDA that is the CPU,
alone and as rank 0 of 8 and of 512. Counts are budgets: a change that adds a synchronization or a
collective to the training step fails here.

    .venv/bin/python -m pytest tests/test_gpu.py

The fake tensors need a C++ compiler and a CPU build of PyTorch. On a machine with a GPU,
`python -m bench gpu_check` tests the real thing.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import bench.__main__ as command
import bench.gpu_check as gpu_check
import data
import hellaswag
import sample
import train_gpt2
from common import ONE, ROOT, python, tiny_model

GPU = os.path.join(ROOT, "tests", "gpu")


# -----------------------------------------------------------------------------
# fake CUDA tensors

@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """The results of fake_cuda.py."""
    if torch.version.cuda or torch.version.hip:
        pytest.skip("needs a CPU build of PyTorch: this one has its own hooks and guard for GPUs")
    if not shutil.which("g++"):
        pytest.skip("needs g++")
    guard = str(tmp_path_factory.mktemp("guard") / "guard.so")
    torch_folder = os.path.dirname(torch.__file__)
    subprocess.run(["g++", "-O0", "-std=c++20", "-shared", "-fPIC", f"-I{torch_folder}/include",
                    os.path.join(GPU, "cuda_guard.cpp"), "-o", guard, f"-L{torch_folder}/lib",
                    "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_folder}/lib"], check=True)
    process = python(os.path.join(GPU, "fake_cuda.py"), guard)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.strip().split("\n")[-1])


def test_no_cpu_tensor_meets_a_cuda_tensor(fake):
    """A step in each dtype with each optimizer, validation, HellaSwag, sampling; planted errors."""
    planted = [fake.pop(name) for name in ("planted targets", "planted positions")]
    assert all("at least two devices, cuda:0 and cpu" in error for error in planted)
    # a number read from the device is 1: the sum of the losses of 37 windows of 16 tokens
    expected = {"train_step": [["cuda:0"], ["torch.float32"]], "evaluate_loss": 1 / (37 * 16),
                "score": 12, "sample": [8, "cuda:0"]}
    assert len(fake) == 18
    for name, result in fake.items():
        assert result == expected[name.split()[0]], name


# -----------------------------------------------------------------------------
# train_gpt2.main() with a CUDA that is the CPU

SMALL = ["--data", "in.txt", "--preset", "shakespeare", "--n-layer", "2", "--n-head", "2",
         "--n-embd", "16", "--block-size", "16", "--val-tokens", "16384", "--save-every", "4",
         "--val-every", "4", "--sample-every", "4", "--compile", "on"]
NO_EVALUATIONS = ["--val-every", "0", "--sample-every", "0", "--save-every", "0"]
EXAMPLE = {"ind": 24, "activity_label": "Roof shingle removal", "ctx": "A man is on a roof. he",
           "label": 3, "endings": ["is using wrap.", "is ripping.", "is here.", "is."]}


def pretend(folder, world_size, *flags, **env):
    """The report of pretend_cuda.py, a dict."""
    if not (folder / "in.txt").exists():
        text = "To be, or not to be, that is the question.\n\n" * 12000
        (folder / "in.txt").write_text(text)
        (folder / "hella.jsonl").write_text(json.dumps(EXAMPLE) + "\n")
    process = python(os.path.join(GPU, "pretend_cuda.py"), world_size, *SMALL, *flags, cwd=folder,
                     timeout=300, env=env)
    assert process.returncode == 0 and process.stdout, process.stderr[-3000:]
    report = json.loads(process.stdout.strip().split("\n")[-1])
    assert report["status"] == 0, process.stderr[-3000:]
    return {**report, "output": process.stdout}


def check_budgets(report, world_size):
    """One wait for the GPU, one small all-reduce and no other collective per step."""
    step = report["step"]
    waits = {name: n for name, n in step.items() if name.startswith("wait")}
    assert waits == {"wait: tolist": 1}, step
    assert step.get("all_reduce", 0) == (world_size > 1), step
    assert not {"all_gather_object", "barrier"} & step.keys(), step
    assert report["graphs"] == 2  # a small function, which tries the compiler, and the model
    if world_size > 1:
        assert report["first"] == "set_device 0" and report["backend"] == "nccl"
        assert report["device_id"] == "cuda:0" and report["ddp"]["device_ids"] == [0]


def test_a_step_of_8_ranks_waits_for_the_gpu_once_and_has_one_small_all_reduce(tmp_path):
    report = pretend(tmp_path, 8, "--total-batch-size", "1024", "--batch-size", "1",
                     "--block-size", "64", "--hellaswag", "hella.jsonl", "--hella-every", "4",
                     "--max-steps", "6")
    check_budgets(report, 8)
    assert report["micro_steps"] == 2 and report["step"]["pin_memory"] >= 2
    assert report["step"]["bucket"] >= 1 and report["calls"]["destroy_process_group"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("world_size, flags", [
    (1, ["--batch-size", "1"]), (1, ["--batch-size", "4", "--dtype", "float16"]),
    (1, ["--optimizer", "adamw"]), (8, ["--batch-size", "1", "--dtype", "float16"]),
    (8, ["--batch-size", "4", "--activation-checkpointing"]),
    (512, ["--total-batch-size", "16384", "--batch-size", "1"]),
])
def test_the_budgets_hold_in_each_configuration_and_after_a_resume(world_size, flags, tmp_path):
    flags = ["--total-batch-size", "1024", "--batch-size", "2", *flags]
    check_budgets(pretend(tmp_path, world_size, *flags, "--max-steps", "7"), world_size)
    check_budgets(pretend(tmp_path, world_size, *flags, "--max-steps", "11"), world_size)


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 8])
def test_with_little_gpu_memory_the_loss_is_in_chunks_outside_the_one_graph(world_size, tmp_path):
    """Inside it, inductor kept the gradients of all chunks: more memory than without chunks."""
    flags = ["--total-batch-size", str(1024 * world_size), "--batch-size", "64",
             "--max-steps", "4", "--dtype", "float32"]
    memory = str(450 * 10**6)
    small = pretend(tmp_path, world_size, *flags, "--exp-name", "small", PRETEND_MEMORY=memory)
    large = pretend(tmp_path, world_size, *flags, "--exp-name", "large")
    assert "in 8 chunks to save memory" in small["output"] and "chunks" not in large["output"]
    check_budgets(small, world_size)
    assert small["step"]["chunked_loss"] == small["micro_steps"] == 1
    assert "chunked_loss" not in large["calls"]
    losses = [[float(value) for value in re.findall(r"(?:loss|val) (\d+\.\d+)", report["output"])]
              for report in (small, large)]
    assert len(losses[0]) == 4 + 2 and losses[0] == pytest.approx(losses[1], abs=2e-4)


@pytest.mark.slow
def test_auto_compiles_after_trying_the_compiler(tmp_path):
    report = pretend(tmp_path, 1, "--total-batch-size", "128", "--compile", "auto",
                     "--max-steps", "102", *NO_EVALUATIONS)
    check_budgets(report, 1)


@pytest.mark.slow
def test_ddp_reduces_buckets_while_the_compiled_backward_runs(tmp_path):
    """Warmed up before DDP, the backward was one graph: all buckets were reduced after it."""
    report = pretend(tmp_path, 8, "--total-batch-size", "256", "--batch-size", "1", "--n-layer",
                     "8", "--n-head", "4", "--n-embd", "512", "--max-steps", "3", *NO_EVALUATIONS)
    assert "bRbRbR" in report["backward"], report["backward"]


@pytest.mark.slow
def test_a_gpu_without_bfloat16_trains_in_float16(tmp_path):
    report = pretend(tmp_path, 1, "--total-batch-size", "128", "--max-steps", "3", PRETEND_T4="1")
    with open(tmp_path / "log" / "shakespeare" / "config.json") as f:
        assert json.load(f)["config"]["dtype"] == "float16"
    check_budgets(report, 1)


# -----------------------------------------------------------------------------
# kernels of evaluations

def test_evaluations_use_full_float32_and_variable_lengths_no_cudnn_attention(monkeypatch):
    """HellaSwag in training, where TF32 is on, had another score than from the command line."""
    model = tiny_model(n_layer=1, block_size=32, vocab_size=50257)
    seen = []

    def settings():
        return torch.get_float32_matmul_precision(), torch.backends.cuda.cudnn_sdp_enabled()
    model.transformer.h[0].register_forward_pre_hook(lambda *_: seen.append(settings()))
    rows = [(np.arange(5, dtype=np.uint16), [np.arange(3 + k, dtype=np.uint16) for k in range(4)])]
    batch = data.to_batch(np.zeros((2, 9), np.uint16), "cpu")
    monkeypatch.setattr(data, "iterate_batches", lambda *args: [batch])
    before = settings()
    torch.set_float32_matmul_precision("high")  # as in training
    torch.backends.cuda.enable_cudnn_sdp(True)
    try:
        hellaswag.score(model, rows, "float32", ONE)
        assert set(seen) == {("highest", False)}
        seen.clear()
        list(sample.stream(model, [[1, 2], [3]], 3))
        assert len(seen) == 3 and {cudnn for _, cudnn in seen} == {False}
        seen.clear()
        train_gpt2.evaluate_loss(model, [0] * 100, 2, 8, 16, "float32", ONE)
        assert {precision for precision, _ in seen} == {"highest"}
        assert settings() == ("high", True)
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cuda.enable_cudnn_sdp(before[1])


# -----------------------------------------------------------------------------
# python -m bench gpu_check

@pytest.mark.slow
def test_gpu_check_finds_no_fault_on_a_cpu(tmp_path):
    done = python("-m", "bench", "gpu_check", "--device", "cpu", "--quick", cwd=tmp_path,
                  timeout=580, env={"PYTHONPATH": ROOT})
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads((tmp_path / "gpu_check.json").read_text())
    assert [check["result"] for check in result["checks"]] == ["ok"] * 14
    assert "aten::" in (tmp_path / "gpu_check_profile.txt").read_text()


def test_gpu_check_fails_if_a_check_does_and_skips_what_the_time_does_not_allow(
        monkeypatch, capsys, tmp_path):
    def broken(args):
        yield "first", True, "fine"
        raise ZeroDivisionError("division by zero")

    def good(args):
        yield "second", True, "fine"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu_check, "in_fresh_process", lambda function, *args: function(*args))
    stages = [(broken, 1), (good, 1), (gpu_check.training, gpu_check.LIMIT)]
    monkeypatch.setattr(gpu_check, "STAGES", stages)
    with pytest.raises(ValueError, match="--quick rehearses it"):
        gpu_check.bench_gpu_check(SimpleNamespace(device="cpu", quick=False))
    rows = gpu_check.bench_gpu_check(SimpleNamespace(device="cpu", dtype="float32", quick=True))
    results = {row["gpu_check"]: row["result"] for row in rows}
    assert results == {"first": "ok", "broken": "FAIL", "second": "ok", "training": "skipped"}
    assert "FAIL broken: ZeroDivisionError: division by zero" in capsys.readouterr().out
    monkeypatch.setattr(command, "in_fresh_process", lambda function, args: rows)
    monkeypatch.setattr(sys, "argv", ["bench", "gpu_check", "--device", "cpu"])
    with pytest.raises(SystemExit) as end:
        command.main()
    assert end.value.code == 1
