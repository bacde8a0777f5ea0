"""
Checkpoints under attack: full disks, kills at every point of a save, cut and flipped files, pickles with code in them.

    .venv/bin/python -m pytest tests/test_checkpoint.py

Needs nothing but requirements-dev.txt.
"""
import os
import pickle
import subprocess
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoint
from model import GPT, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=31)
STATE = {"optimizers": [], "scaler": {}, "loader": {}, "rng": [], "log_bytes": 0, "train_config": {}}


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**CONFIG, **changes}))


def save_step(run_dir, step, seed=None):
    model = make_model(step if seed is None else seed)
    checkpoint.save(str(run_dir), step, checkpoint.contents_of(model, 3.5), {**STATE, "loader": {"position": 8 * step}})
    return model


def same_weights(a, b):
    return all(torch.equal(p, b[name]) for name, p in a.items()) and a.keys() == b.keys()


def run_python(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120)


# -----------------------------------------------------------------------------
# pairs of files

def test_what_was_saved_comes_back(tmp_path):
    save_step(tmp_path, 10)
    model = save_step(tmp_path, 20)
    contents, state, messages = checkpoint.load_latest(str(tmp_path))
    assert same_weights(contents["model"], model.state_dict())
    assert contents["config"] == {**CONFIG, "bias": True, "dropout": 0.0}
    assert (contents["step"], contents["val_loss"], messages) == (20, 3.5, [])
    assert state == {**STATE, "loader": {"position": 160}, "step": 20}
    assert sorted(os.listdir(tmp_path)) == ["model_00010.pt", "model_00020.pt", "state_00010.pt", "state_00020.pt"]


def test_tied_weights_are_stored_once(tmp_path):
    wte_bytes = 4 * 1000 * 32
    model = make_model(vocab_size=1000, n_embd=32)
    checkpoint.save(str(tmp_path), 1, checkpoint.contents_of(model, None), {})
    assert os.path.getsize(tmp_path / "model_00001.pt") < 4 * model.num_params() + wte_bytes / 2


def test_a_step_without_both_files_does_not_count(tmp_path):
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    os.remove(tmp_path / "model_00030.pt")
    os.remove(tmp_path / "state_00020.pt")
    (tmp_path / "model_00040.pt.tmp").write_bytes(b"half")
    assert checkpoint.saved_steps(str(tmp_path)) == [10]
    contents, _, messages = checkpoint.load_latest(str(tmp_path))
    assert contents["step"] == 10
    assert "step 30" in messages[0] and "model_00030.pt" in messages[0]
    assert "step 20" in messages[1] and "state_00020.pt" in messages[1]


def test_an_empty_or_missing_folder_has_nothing_to_go_on_from(tmp_path):
    assert checkpoint.load_latest(str(tmp_path)) is None
    assert checkpoint.load_latest(str(tmp_path / "nowhere")) is None and checkpoint.saved_steps(str(tmp_path / "nowhere")) == []


def test_a_kill_during_the_first_save_of_all_is_a_fresh_start(tmp_path):
    save_step(tmp_path, 10)
    os.remove(tmp_path / "model_00010.pt")
    assert checkpoint.load_latest(str(tmp_path)) is None


def test_models_whose_states_are_gone_are_not_started_over_in_silence(tmp_path):
    save_step(tmp_path, 10)
    os.remove(tmp_path / "state_00010.pt")
    with pytest.raises(ValueError, match="state_00010.pt.*move the folder away"):
        checkpoint.load_latest(str(tmp_path))


def test_prune_keeps_the_newest_pairs_and_other_files(tmp_path):
    for step in (5, 10, 99999, 100000):
        save_step(tmp_path, step)
    (tmp_path / "log.txt").touch()
    checkpoint.prune(str(tmp_path), 2)
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "model_100000.pt", "model_99999.pt", "state_100000.pt", "state_99999.pt"]
    checkpoint.prune(str(tmp_path), 3)
    assert checkpoint.saved_steps(str(tmp_path)) == [99999, 100000]


def test_prune_keeps_the_best_too(tmp_path):
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    checkpoint.prune(str(tmp_path), 1, best=2)
    assert checkpoint.saved_steps(tmp_path) == [2, 4]


def test_newer_steps_are_set_aside_whole_or_half(tmp_path):
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    os.remove(tmp_path / "model_00003.pt")
    moved = checkpoint.set_aside(str(tmp_path), 1)
    assert [os.path.basename(path) for path in moved] == ["model_00002.pt", "state_00002.pt", "state_00003.pt"]
    assert checkpoint.load_latest(str(tmp_path))[0]["step"] == 1 and len(os.listdir(tmp_path)) == 5


# -----------------------------------------------------------------------------
# saving while training goes on

def test_a_snapshot_is_what_was_there_and_tied_weights_stay_tied():
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    value = {"model": model.state_dict(), "rest": [(1, "a", optimizer.state_dict())], "empty": torch.zeros(0)}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    copy = checkpoint.snapshot(value)
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert same_weights(copy["model"], before) and copy["rest"][0][:2] == (1, "a")
    assert copy["model"]["lm_head.weight"].data_ptr() == copy["model"]["transformer.wte.weight"].data_ptr()
    assert checkpoint.num_bytes(copy["model"]) == 4 * model.num_params() == checkpoint.num_bytes(value)


def test_the_writers_error_is_raised_at_the_next_call_and_once():
    writer = checkpoint.Writer()
    writer.start(lambda: None)
    writer.wait()

    def fail():
        raise OSError("no room")
    writer.start(fail)
    with pytest.raises(OSError, match="no room"):
        while True:
            writer.check()
    writer.check()
    writer.start(fail)
    with pytest.raises(OSError, match="no room"):
        writer.start(lambda: None)


def test_too_little_room_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save_step(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    with pytest.raises(OSError, match="it takes 0.001 GB, 0.001 GB are free; make room"):
        save_step(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["model_00001.pt", "state_00001.pt"]


# -----------------------------------------------------------------------------
# whole or not at all

FULL_DISK = """
import resource, sys, torch, checkpoint
from model import GPT, GPTConfig
from runtime import run_main
def main():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=8, vocab_size=1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes a file may have: what a full disk does to a write
    checkpoint.save(sys.argv[1], 10, checkpoint.contents_of(model, None), {STATE})
run_main(main)
""".replace("{STATE}", repr(STATE))


def test_a_full_disk_is_one_line_and_leaves_the_older_checkpoint_whole(tmp_path):
    older = save_step(tmp_path, 10, seed=1)  # the same step: its model file is the one that cannot be replaced
    done = run_python(FULL_DISK, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write") and "model_00010.pt" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["model_00010.pt", "state_00010.pt"]
    assert same_weights(checkpoint.load_latest(str(tmp_path))[0]["model"], older.state_dict())


def test_an_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch):
    def interrupt(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_file({"a": 1}, str(tmp_path / "model_00001.pt"))
    assert os.listdir(tmp_path) == []


KILL_EVERYWHERE = """
import os, signal, sys, torch, checkpoint
from model import GPT, GPTConfig
torch.set_num_threads(1)
STATE = {STATE}
model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=31))
for point in range(9):  # before and after each fsync and each replace of a save, and not at all
    run_dir = os.path.join(sys.argv[1], str(point))
    os.makedirs(run_dir)
    checkpoint.save(run_dir, 1, checkpoint.contents_of(model, None), STATE)
    pid = os.fork()
    if pid == 0:
        points = 0
        def die_here():
            global points
            if points == point:
                os.kill(os.getpid(), signal.SIGKILL)
            points += 1
        def dying(function):
            def call(*args):
                die_here()
                function(*args)
                die_here()
            return call
        os.fsync, os.replace = dying(os.fsync), dying(os.replace)
        checkpoint.save(run_dir, 2, checkpoint.contents_of(model, None), STATE)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    contents, state, messages = checkpoint.load_latest(run_dir)
    assert contents["step"] == state["step"]
    print(os.WIFSIGNALED(status), contents["step"], end="; ")
""".replace("{STATE}", repr(STATE))


def test_a_kill_at_any_point_of_a_save_leaves_a_whole_pair(tmp_path):
    done = run_python(KILL_EVERYWHERE, tmp_path)
    assert done.returncode == 0, done.stderr
    # fsync, replace of the state; fsync, replace of the model: only past the last is step 2 there
    assert done.stdout == "True 1; " * 7 + "True 2; " + "False 2; "


# -----------------------------------------------------------------------------
# damaged files

def damage(path, how):
    contents = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "cut":
        path.write_bytes(contents[:len(contents) // 2])
    elif how == "one byte short":
        path.write_bytes(contents[:-1])
    elif how == "text":
        path.write_text("404: Not Found")
    else:  # one bit of a weight
        weight = make_model(20).lm_head.weight.detach().numpy().tobytes()
        at = contents.index(weight[:64]) + 10
        path.write_bytes(contents[:at] + bytes([contents[at] ^ 4]) + contents[at + 1:])


@pytest.mark.parametrize("how", ["empty", "cut", "one byte short", "text", "flipped"])
@pytest.mark.parametrize("kind", ["model", "state"])
def test_a_damaged_newest_step_is_passed_over_and_said(tmp_path, kind, how):
    save_step(tmp_path, 10)
    save_step(tmp_path, 20)
    if kind == "state" and how == "flipped":
        (tmp_path / "state_00020.pt").write_bytes((tmp_path / "model_00020.pt").read_bytes())
    damage(tmp_path / f"{kind}_00020.pt", how)
    contents, _, messages = checkpoint.load_latest(str(tmp_path))
    assert contents["step"] == 10 and len(messages) == 1
    assert "passing over step 20" in messages[0] and f"{kind}_00020.pt" in messages[0] and "\n" not in messages[0]


def test_when_every_step_is_damaged_that_is_an_error_and_not_a_fresh_start(tmp_path):
    save_step(tmp_path, 10)
    damage(tmp_path / "model_00010.pt", "cut")
    with pytest.raises(ValueError, match="no checkpoint in .* can be loaded.*move the folder away"):
        checkpoint.load_latest(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_flip_of_any_byte_is_found_or_harmless(tmp_path):
    """torch.load checks no checksums: one flipped bit in a weight once loaded as another weight, without a word."""
    contents = {"model": {"a": torch.arange(16.0)}, "step": 3}
    path = tmp_path / "a.pt"
    checkpoint.save_file(contents, str(path))
    whole = path.read_bytes()
    found = 0
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 0x10]) + whole[i + 1:])
        try:
            loaded = checkpoint.load_file(str(path))
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            found += 1
        else:
            assert loaded.keys() == contents.keys() and loaded["step"] == 3, i
            assert torch.equal(loaded["model"]["a"], contents["model"]["a"]), i
    assert found > 500  # what is harmless is padding and what torch.load does not read


class Code:
    """An object whose unpickling would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_code_in_a_checkpoint_is_refused_and_does_not_run(tmp_path, write):
    path = tmp_path / "model_00001.pt"
    write({"model": {}, "config": Code(str(tmp_path / "ran"))}, path)
    with pytest.raises(ValueError, match="model_00001.pt.*(could run code|no checkpoint)"):
        checkpoint.load_file(str(path))
    assert not os.path.exists(tmp_path / "ran")


# -----------------------------------------------------------------------------
# a model from anywhere

def check_same_model(loaded, model):
    assert not loaded.training and loaded.config == model.config
    assert same_weights(loaded.state_dict(), model.state_dict())


def test_load_model_reads_a_run_folder_and_a_file(tmp_path):
    older, newest = save_step(tmp_path, 99999), save_step(tmp_path, 100000)
    (tmp_path / "config.json").write_text("{}")  # a run's own, not Hugging Face's
    (tmp_path / "log.txt").touch()
    model, info = checkpoint.load_model(str(tmp_path))
    check_same_model(model, newest)
    assert info == {"path": str(tmp_path / "model_100000.pt"), "step": 100000, "val_loss": 3.5}
    model, info = checkpoint.load_model(str(tmp_path / "model_99999.pt"))
    check_same_model(model, older)
    assert info["step"] == 99999


def test_load_model_reads_a_hugging_face_folder(tmp_path):
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=31)).eval()
    theirs.save_pretrained(tmp_path)
    model, _ = checkpoint.load_model(str(tmp_path))
    idx = torch.arange(8)[None]
    assert torch.allclose(model(idx, idx)[0], theirs(idx).logits, atol=1e-4)


def test_load_model_says_what_it_takes_when_there_is_nothing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.*gpt2-xl"):
        checkpoint.load_model(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        checkpoint.load_model(str(tmp_path))
    save_step(tmp_path, 10)
    with pytest.raises(ValueError, match="state_00010.pt is no model checkpoint"):
        checkpoint.load_model(str(tmp_path / "state_00010.pt"))
    torch.save({"model": {}, "model_args": CONFIG, "config": {"out_dir": "out"}}, tmp_path / "ckpt.pt")  # nanoGPT's
    with pytest.raises(ValueError, match="weights of .*ckpt.pt are of another shape"):
        checkpoint.load_model(str(tmp_path / "ckpt.pt"))


def test_weights_of_another_shape_are_named_with_both_shapes(tmp_path):
    model = make_model()
    weights = {**model.state_dict(), "transformer.wpe.weight": torch.zeros(9, 8)}
    with pytest.raises(ValueError, match=r"there.pt .*transformer.wpe.weight \(9, 8\) for \(8, 8\)"):
        checkpoint.load_weights(model, weights, "there.pt")
    with pytest.raises(ValueError, match=r"transformer.h.1.attn.c_attn.bias.*12 tensors"):
        checkpoint.load_weights(model, make_model(n_layer=2).state_dict(), "there.pt")
