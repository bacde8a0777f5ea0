"""
--tracker: the streams of log.txt arrive at TensorBoard or W&B too, and a missing package is one line at the start.

    ./test.sh tests/test_tracker.py     # no network: W&B, and TensorBoard where it is not installed, are stand-ins

A stand-in writes down what it is called with; W&B's is a module on the path of a real training process.
"""
import atexit
import importlib.util
import json
import os
import subprocess
import sys
import types

import pytest

from plots import read_log
from tracker import check_tracker, open_tracker

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
TINY = ["--preset", "shakespeare", "--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "8", "--optimizer",
        "adamw", "--total-batch-size", "32", "--batch-size", "2", "--val-every", "2", "--val-tokens", "64",
        "--sample-every", "0", "--save-every", "2", "--compile", "off", "--dtype", "float32", "--device", "cpu",
        "--vocab-size", "50257"]
WANDB = '''
import json, os
class Run:
    id = "abc123"
    def log(self, facts):
        with open(os.environ["CALLS"], "a") as f: f.write(json.dumps(["log", facts]) + "\\n")
    def define_metric(self, name, step_metric):
        with open(os.environ["CALLS"], "a") as f: f.write(json.dumps(["metric", name, step_metric]) + "\\n")
def init(**kwargs):
    kwargs["config"] = kwargs["config"]["n_embd"]
    with open(os.environ["CALLS"], "a") as f: f.write(json.dumps(["init", kwargs]) + "\\n")
    return Run()
'''


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The king and his queen will not come to this house tonight for love or war.\n" * 40)
    return str(path)


def train(folder, text, *flags, modules=None):
    """A finished training process in folder, with {file name: code} put on its path, and what the modules wrote down."""
    (folder / "path").mkdir(exist_ok=True)
    for name, code in (modules or {}).items():
        (folder / "path" / name).write_text(code)
    calls = folder / "calls"
    process = subprocess.run([sys.executable, os.path.join(ROOT, "train_gpt2.py"), *TINY, "--data", text, *flags], cwd=folder,
                             capture_output=True, text=True, timeout=120,
                             env={**os.environ, "PYTHONPATH": str(folder / "path"), "CALLS": str(calls)})
    return process, [json.loads(line) for line in calls.read_text().splitlines()] if calls.exists() else []


def facts_of(folder):
    """{(stream, value, step)} of log.txt."""
    streams = read_log(str(folder / "log" / "shakespeare" / "log.txt"))
    return {(stream, value, step) for stream, points in streams.items() for step, value in points}


def test_a_run_sends_every_fact_of_its_log(tmp_path, text):
    process, calls = train(tmp_path, text, "--tracker", "wandb", "--max-steps", "2", modules={"wandb.py": WANDB})
    assert process.returncode == 0, process.stderr
    assert calls[0] == ["init", {"project": "gpt2", "name": "shakespeare", "id": None, "resume": "allow", "config": 8,
                                 "dir": os.path.join("log", "shakespeare")}]
    assert calls[1] == ["metric", "*", "step"]
    sent = {(stream, value, facts["step"]) for kind, facts, *_ in calls if kind == "log"
            for stream, value in facts.items() if stream != "step"}
    assert sent == facts_of(tmp_path) and {stream for stream, *_ in sent} == {"train", "val", "lr", "norm", "tok_per_sec"}
    assert (tmp_path / "log" / "shakespeare" / "wandb_id.txt").read_text() == "abc123"


def test_wandb_finds_a_run_that_goes_on_by_its_id(tmp_path, monkeypatch):
    (tmp_path / "calls").touch()
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    exec(WANDB, sys.modules["wandb"].__dict__)
    for _ in range(2):
        open_tracker("wandb", str(tmp_path), {"exp_name": "a", "n_embd": 8}, 0)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[1]["id"] for call in calls if call[0] == "init"] == [None, "abc123"]


def test_tensorboard_gets_the_facts_and_drops_what_is_past_the_checkpoint(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append((folder, purge_step))

        def add_scalar(self, *call):
            calls.append(call)

        def close(self):
            calls.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(atexit, "register", lambda function: function())
    open_tracker("tensorboard", "log/a", {}, 500)(501, {"train": 3.5, "lr": 0.1})
    assert calls == [("log/a", 500), "closed", ("train", 3.5, 501), ("lr", 0.1, 501)]


def test_the_real_tensorboard_reads_the_facts_of_the_log(tmp_path, text):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    process, _ = train(tmp_path, text, "--tracker", "tensorboard", "--max-steps", "2")
    assert process.returncode == 0, process.stderr
    events = accumulator.EventAccumulator(str(tmp_path / "log" / "shakespeare"))
    events.Reload()
    read = {(stream, event.value, event.step) for stream in events.Tags()["scalars"] for event in events.Scalars(stream)}
    written = {(stream, step) for stream, _, step in facts_of(tmp_path)}
    assert {(stream, step) for stream, _, step in read} == written
    train_loss = {step: value for stream, value, step in facts_of(tmp_path) if stream == "train"}
    assert {step: value for stream, value, step in read if stream == "train"} == pytest.approx(train_loss, abs=1e-5)


def test_a_missing_package_is_one_line_before_anything_is_read(tmp_path):
    (tmp_path / "path" / "wandb").mkdir(parents=True)  # a folder wandb/ is what W&B leaves where it runs, no package
    hide = ("import importlib.util as u; real = u.find_spec\n"
            "u.find_spec = lambda name, *a: None if name == 'wandb' else real(name, *a)\n")
    there = importlib.util.find_spec("wandb") is not None
    process, _ = train(tmp_path, "no-such-text", "--tracker", "wandb", modules={"sitecustomize.py": hide} if there else None)
    assert process.returncode == 2
    assert process.stderr == ("error: --tracker wandb needs the package wandb, which is not installed: pip install wandb,"
                              " or --tracker none\n")
    assert not os.path.exists(tmp_path / "log" / "shakespeare" / "log.txt")


def test_every_tracker_is_checked_and_none_needs_nothing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert check_tracker("none") is None and open_tracker("none", "", {}, 0) is None
    with pytest.raises(ValueError, match="--tracker tensorboard needs the package tensorboard"):
        check_tracker("tensorboard")
