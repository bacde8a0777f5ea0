"""
Checkpoints on a full disk, after kills at every point of a save, damaged, and with code in their pickles; a run folder's lock
and log, and the trackers that receive the log's values.

    .venv/bin/python -m pytest tests/test_checkpoint.py

Needs no network: W&B, and TensorBoard where it is not installed, are replaced by fakes that record their calls.
"""
import atexit
import importlib.machinery
import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
import types

import pytest
import torch

from run import checkpoint
from run import cli
import train_gpt2
from run.folder import Log, check_tracker, kept_log, read_log
from model import GPT, GPTConfig
from run.parallel import Ranks
from run import folder
from run import weights
from run import parallel

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CONFIG = dict(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=31)
STATE = {"optimizers": [], "scaler": {}, "loader": {}, "rng": [], "train_config": {}}
ONE_PROCESS = Ranks(0, 0, 1, "cpu", False)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**CONFIG, **changes}))


def save_step(run_dir, step, seed=None):
    """Saves a checkpoint of step; returns its model."""
    model = make_model(step if seed is None else seed)
    checkpoint.save(str(run_dir), step, checkpoint.model_contents(model, 3.5), {**STATE, "loader": {"position": 8 * step}})
    return model


def same_weights(a, b):
    return a.keys() == b.keys() and all(torch.equal(p, b[name]) for name, p in a.items())


def run_python(code, *arguments, cwd=ROOT):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=cwd, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "PYTHONPATH": ROOT})


# -----------------------------------------------------------------------------
# checkpoints: pairs of files

def test_load_latest_returns_what_was_saved(tmp_path):
    save_step(tmp_path, 10)
    model = save_step(tmp_path, 20)
    loaded = checkpoint.load_latest(str(tmp_path))
    assert same_weights(loaded.model["model"], model.state_dict())
    assert loaded.model["config"] == {**CONFIG, "bias": True, "dropout": 0.0}
    assert (loaded.step, loaded.model["step"], loaded.model["val_loss"], loaded.messages) == (20, 20, 3.5, [])
    assert loaded.state == {**STATE, "loader": {"position": 160}, "step": 20}
    assert sorted(os.listdir(tmp_path)) == ["model_00010.pt", "model_00020.pt", "state_00010.pt", "state_00020.pt"]


def test_model_contents_takes_other_weights_if_they_are_given():
    model, other = make_model(), make_model(1)
    contents = checkpoint.model_contents(model, None, other.state_dict())
    assert same_weights(contents["model"], other.state_dict()) and contents["val_loss"] is None
    assert same_weights(checkpoint.model_contents(model, 2.5)["model"], model.state_dict())


def test_tied_weights_are_stored_once(tmp_path):
    wte_bytes = 4 * 1000 * 32
    model = make_model(vocab_size=1000, n_embd=32)
    checkpoint.save(str(tmp_path), 1, checkpoint.model_contents(model, None), {})
    assert os.path.getsize(tmp_path / "model_00001.pt") < 4 * model.num_params() + wte_bytes / 2


def test_a_step_without_both_files_is_skipped(tmp_path):
    for step in (10, 20, 30):
        save_step(tmp_path, step)
    os.remove(tmp_path / "model_00030.pt")
    os.remove(tmp_path / "state_00020.pt")
    (tmp_path / "model_00040.pt.tmp").write_bytes(b"half")
    assert folder.saved_steps(str(tmp_path)) == [10]
    loaded = checkpoint.load_latest(str(tmp_path))
    assert loaded.step == 10
    assert "step 30" in loaded.messages[0] and "model_00030.pt" in loaded.messages[0]
    assert "step 20" in loaded.messages[1] and "state_00020.pt" in loaded.messages[1]


def test_an_empty_or_missing_folder_has_no_checkpoint(tmp_path):
    assert checkpoint.load_latest(str(tmp_path)) is None
    assert checkpoint.load_latest(str(tmp_path / "nowhere")) is None and folder.saved_steps(str(tmp_path / "nowhere")) == []


def test_after_a_kill_during_the_first_save_the_run_starts_over(tmp_path):
    save_step(tmp_path, 10)
    os.remove(tmp_path / "model_00010.pt")
    assert checkpoint.load_latest(str(tmp_path)) is None


def test_models_without_states_are_an_error_and_do_not_start_over_silently(tmp_path):
    save_step(tmp_path, 10)
    os.remove(tmp_path / "state_00010.pt")
    with pytest.raises(ValueError, match="state_00010.pt.*move the folder away to start over"):
        checkpoint.load_latest(str(tmp_path))


def test_files_of_another_step_or_kind_are_an_error(tmp_path):
    for step in (10, 20):
        save_step(tmp_path, step)
    (tmp_path / "state_00010.pt").write_bytes((tmp_path / "state_00020.pt").read_bytes())
    with pytest.raises(ValueError, match="state_00010.pt is not the state file of step 10"):
        checkpoint.load_pair(str(tmp_path), 10)
    (tmp_path / "model_00020.pt").write_bytes((tmp_path / "state_00020.pt").read_bytes())
    with pytest.raises(ValueError, match="model_00020.pt is not the model file of step 20"):
        checkpoint.load_pair(str(tmp_path), 20)


def test_step_of_reads_the_step_from_a_files_name():
    assert folder.step_of("log/a/model_00250.pt") == 250 and folder.step_of("state_100000.pt") == 100000
    with pytest.raises(ValueError, match="log/a/best.pt is not named like a checkpoint"):
        folder.step_of("log/a/best.pt")


def test_prune_keeps_the_newest_checkpoints_and_other_files(tmp_path):
    for step in (5, 10, 99999, 100000):
        save_step(tmp_path, step)
    (tmp_path / "log.txt").touch()
    checkpoint.prune(str(tmp_path), 2)
    assert sorted(os.listdir(tmp_path)) == ["log.txt", "model_100000.pt", "model_99999.pt", "state_100000.pt", "state_99999.pt"]
    checkpoint.prune(str(tmp_path), 3)
    assert folder.saved_steps(str(tmp_path)) == [99999, 100000]


def test_prune_keeps_the_best_checkpoint(tmp_path):
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    checkpoint.prune(str(tmp_path), 1, best=2)
    assert folder.saved_steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("keep_best, first, kept", [(False, 3.0, [4]), (True, 3.0, [2, 4]), (True, math.nan, [2, 4])])
def test_save_and_prune_keeps_the_checkpoint_of_the_lowest_validation_loss(tmp_path, capsys, keep_best, first, kept):
    """A loss of NaN at the first of them was taken for the lowest."""
    # step 5 has no checkpoint
    (tmp_path / "log.txt").write_text(f"1 val {first}\n2 val 2.0\n3 val 2.5\n4 val 4.0\n5 val 1.0\n")
    for step in (1, 2, 3, 4):
        state = {**STATE, "train_config": {"keep_best": keep_best, "keep_last": 1}}
        checkpoint.save_and_prune(str(tmp_path), step, checkpoint.model_contents(make_model(), None), state)
    assert folder.saved_steps(tmp_path) == kept
    assert capsys.readouterr().out.endswith(f"saved {tmp_path / 'model_00004.pt'}\n")


def test_newer_checkpoints_are_renamed_and_a_state_without_its_model_is_pruned(tmp_path):
    for step in (1, 2, 3, 4):
        save_step(tmp_path, step)
    os.remove(tmp_path / "model_00003.pt")
    os.remove(tmp_path / "state_00004.pt")
    renamed = checkpoint.rename_newer(str(tmp_path), 1)
    assert [os.path.basename(path) for path in renamed] == ["model_00002.pt", "state_00002.pt", "model_00004.pt"]
    assert all(os.path.exists(f"{path}.aside") and not os.path.exists(path) for path in renamed)
    assert checkpoint.load_latest(str(tmp_path)).step == 1 and (tmp_path / "state_00003.pt").exists()
    save_step(tmp_path, 5)
    checkpoint.prune(str(tmp_path), 2)
    assert folder.saved_steps(tmp_path) == [1, 5] and not (tmp_path / "state_00003.pt").exists()


def test_renamed_checkpoints_are_never_overwritten(tmp_path):
    """Each rollback once replaced the *.aside files of the one before. The files of one rollback get the same number."""
    for rollback in (1, 2, 3):
        (tmp_path / "log.txt").write_text(f"{rollback} val 1.0\n")
        save_step(tmp_path, 1)
        save_step(tmp_path, 2, seed=rollback)
        if rollback == 2:
            os.remove(tmp_path / "state_00002.pt")
        checkpoint.rename_newer(str(tmp_path), 1)
    kept = [weights.load_file(str(tmp_path / f"model_00002.pt{end}"))["model"] for end in (".aside", ".2.aside", ".3.aside")]
    assert all(same_weights(weights, make_model(seed).state_dict()) for seed, weights in enumerate(kept, 1))
    assert (tmp_path / "state_00002.pt.3.aside").exists() and not (tmp_path / "state_00002.pt.2.aside").exists()
    assert [(tmp_path / f"log.txt{end}").read_text() for end in (".aside", ".3.aside", "")] == [
        "1 val 1.0\n", "3 val 1.0\n", "3 val 1.0\n"]  # the run then truncates log.txt


def test_a_log_that_was_edited_does_not_stop_a_run_that_keeps_the_best_checkpoint(tmp_path, capsys):
    state = {**STATE, "train_config": {"keep_best": True, "keep_last": 1}}
    for step, contents in ((1, "1 val 3.0\n"), (2, "a note of mine\n1 val 3.0\n")):
        (tmp_path / "log.txt").write_text(contents)
        checkpoint.save_and_prune(str(tmp_path), step, checkpoint.model_contents(make_model(), None), state)
    assert folder.saved_steps(tmp_path) == [1, 2] and "--keep-best needs the log" in capsys.readouterr().out


def test_weights_that_do_not_fit_are_an_error_with_both_shapes():
    model = make_model()
    wrong = {**model.state_dict(), "transformer.wpe.weight": torch.zeros(9, 8)}
    with pytest.raises(ValueError, match=r"weights of a.pt do not fit this model: .*wpe.weight \(9, 8\) for \(8, 8\)"):
        weights.check_weights(model.config, wrong, "a.pt")
    with pytest.raises(ValueError, match=r"transformer.h.1.attn.c_attn.bias.*12 tensors"):
        weights.check_weights(model.config, make_model(n_layer=2).state_dict(), "a.pt")


# -----------------------------------------------------------------------------
# saving while training continues

def test_a_captured_state_does_not_change_with_its_original_and_keeps_tied_weights_tied():
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    captured, _ = parallel.full_state(model, [], parallel.Ranks(0, 0, 1, "cpu", False))
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    assert same_weights(captured, before)
    assert captured["lm_head.weight"].data_ptr() == captured["transformer.wte.weight"].data_ptr()
    assert weights.num_bytes(captured) == 4 * model.num_params()


def test_the_writers_error_is_raised_once_at_the_next_call():
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


def test_too_little_disk_space_is_an_error_before_anything_is_written(tmp_path, monkeypatch):
    save_step(tmp_path, 1)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2**20}))
    with pytest.raises(OSError, match="it needs 0.001 GB, 0.001 GB are free; free some space"):
        save_step(tmp_path, 2)
    assert sorted(os.listdir(tmp_path)) == ["model_00001.pt", "state_00001.pt"]


# -----------------------------------------------------------------------------
# atomic writes

FULL_DISK = """
import resource, sys, torch
from run import checkpoint
from model import GPT, GPTConfig
from run.cli import run_main
def main():
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=64, block_size=8, vocab_size=1000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # bytes per file: a write fails as on a full disk
    checkpoint.save(sys.argv[1], 10, checkpoint.model_contents(model, None), {STATE})
run_main(main)
""".replace("{STATE}", repr(STATE))


def test_a_full_disk_is_one_line_and_keeps_the_older_checkpoint(tmp_path):
    older = save_step(tmp_path, 10, seed=1)  # the same step: its model file is the one that cannot be replaced
    done = run_python(FULL_DISK, tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: cannot write") and "model_00010.pt" in done.stderr and done.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path)) == ["model_00010.pt", "state_00010.pt"]
    assert same_weights(checkpoint.load_latest(str(tmp_path)).model["model"], older.state_dict())


def test_an_interrupted_write_leaves_no_file(tmp_path, monkeypatch):
    def interrupt(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_file({"a": 1}, str(tmp_path / "model_00001.pt"))
    assert os.listdir(tmp_path) == []


KILL_EVERYWHERE = """
import os, signal, sys, torch
from run import checkpoint
from model import GPT, GPTConfig
torch.set_num_threads(1)
STATE = {STATE}
model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=31))
for point in range(9):  # before and after each fsync and each replace of a save, and not at all
    run_dir = os.path.join(sys.argv[1], str(point))
    os.makedirs(run_dir)
    checkpoint.save(run_dir, 1, checkpoint.model_contents(model, None), STATE)
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
        checkpoint.save(run_dir, 2, checkpoint.model_contents(model, None), STATE)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    loaded = checkpoint.load_latest(run_dir)
    assert loaded.model["step"] == loaded.state["step"]
    print(os.WIFSIGNALED(status), loaded.step, end="; ")
""".replace("{STATE}", repr(STATE))


def test_a_kill_at_any_point_of_a_save_leaves_a_complete_checkpoint(tmp_path):
    done = run_python(KILL_EVERYWHERE, tmp_path)
    assert done.returncode == 0, done.stderr
    # fsync, replace of the state; fsync, replace of the model: step 2 exists only after the last
    assert done.stdout == "True 1; " * 7 + "True 2; " + "False 2; "


# -----------------------------------------------------------------------------
# damaged files

def damage(path, how):
    contents = path.read_bytes()
    if how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(contents[:len(contents) // 2])
    elif how == "one byte short":
        path.write_bytes(contents[:-1])
    elif how == "text":
        path.write_text("404: Not Found")
    else:  # one flipped bit in a weight
        weight = make_model(20).lm_head.weight.detach().numpy().tobytes()
        at = contents.index(weight[:64]) + 10
        path.write_bytes(contents[:at] + bytes([contents[at] ^ 4]) + contents[at + 1:])


@pytest.mark.parametrize("how", ["empty", "truncated", "one byte short", "text", "flipped"])
@pytest.mark.parametrize("kind", ["model", "state"])
def test_a_damaged_newest_step_is_skipped_with_a_message(tmp_path, kind, how):
    save_step(tmp_path, 10)
    save_step(tmp_path, 20)
    if kind == "state" and how == "flipped":
        (tmp_path / "state_00020.pt").write_bytes((tmp_path / "model_00020.pt").read_bytes())
    damage(tmp_path / f"{kind}_00020.pt", how)
    loaded = checkpoint.load_latest(str(tmp_path))
    message, = loaded.messages
    assert loaded.step == 10 and message.startswith("skipping step 20: ")
    assert f"{kind}_00020.pt" in message and "\n" not in message


def test_only_damaged_steps_are_an_error_and_do_not_start_over_silently(tmp_path):
    save_step(tmp_path, 10)
    damage(tmp_path / "model_00010.pt", "truncated")
    with pytest.raises(ValueError, match="no checkpoint in .* can be loaded.*move the folder away"):
        checkpoint.load_latest(str(tmp_path))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_flipped_bit_in_any_byte_is_detected_or_harmless(tmp_path):
    """torch.load does not verify checksums: one flipped bit in a weight once loaded silently as another weight."""
    contents = {"model": {"a": torch.arange(16.0)}, "step": 3}
    path = tmp_path / "a.pt"
    checkpoint.save_file(contents, str(path))
    intact = path.read_bytes()
    detected = 0
    for i in range(len(intact)):
        path.write_bytes(intact[:i] + bytes([intact[i] ^ 0x10]) + intact[i + 1:])
        try:
            loaded = weights.load_file(str(path))
        except ValueError as e:
            assert str(path) in str(e) and "\n" not in str(e)
            detected += 1
        else:
            assert loaded.keys() == contents.keys() and loaded["step"] == 3, i
            assert torch.equal(loaded["model"]["a"], contents["model"]["a"]), i
    assert detected > 500  # the others are padding and fields that torch.load does not read


class Code:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda obj, path: path.write_bytes(pickle.dumps(obj))])
def test_code_in_a_checkpoint_is_an_error_and_does_not_run(tmp_path, write):
    path = tmp_path / "model_00001.pt"
    write({"model": {}, "config": Code(str(tmp_path / "ran"))}, path)
    with pytest.raises(ValueError, match="model_00001.pt.*(could run code|not a checkpoint)"):
        weights.load_file(str(path))
    assert not os.path.exists(tmp_path / "ran")


# -----------------------------------------------------------------------------
# the run folder: its lock and its config.json

@pytest.fixture
def lock(monkeypatch):
    """Function that locks a run folder; with the argument at_exit=True it calls what lock_run registered for the exit."""
    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)

    def call(run_dir=None, at_exit=False):
        if not at_exit:
            folder.lock_run(str(run_dir))
        while at_exit and registered:
            registered.pop()()
    yield call
    call(at_exit=True)


def names_in(folder):
    """Paths of everything below a folder."""
    return sorted(os.path.relpath(os.path.join(parent, name), folder)
                  for parent, folders, files in os.walk(folder) for name in folders + files)


def test_locking_a_run_folder_removes_what_a_killed_process_was_writing(tmp_path, lock):
    """Their names hold the id of that process, so no later save would overwrite them."""
    left = ["state_00008.pt.12.tmp", "model_00008.pt.12.tmp", "config.json.7.tmp", "state_00004.pt.tmp"]
    other = ["model_00004.pt", "state_00004.pt.aside", "notes.tmp", "loss.png.12.tmp"]
    for name in left + other:
        (tmp_path / name).write_text("x")
    lock(tmp_path)
    lock(at_exit=True)
    assert names_in(tmp_path) == sorted(other)


def test_a_run_folder_that_cannot_be_locked_keeps_its_temporary_files(tmp_path, lock, monkeypatch, capsys):
    """Another process may be writing them."""
    import fcntl

    def flock(*_):
        raise OSError("no locks")
    (tmp_path / "state_00008.pt.12.tmp").write_text("x")
    monkeypatch.setattr(fcntl, "flock", flock)
    lock(tmp_path)
    assert "cannot be locked on this file system" in capsys.readouterr().out
    lock(at_exit=True)
    assert names_in(tmp_path) == ["state_00008.pt.12.tmp"]


def test_a_run_that_wrote_nothing_removes_only_the_empty_folders_that_it_created(tmp_path, lock):
    """The first run of a log folder once removed the folder with all that later runs had saved in it, and --resume e the user's
    empty folder e."""
    os.makedirs(tmp_path / "four" / "existing")
    for run_dir in ("one/empty", "two/empty", "three/used", "four/existing", "five/new/deep"):
        lock(tmp_path / run_dir)
    os.makedirs(tmp_path / "two" / "other")
    for path in ("two/other/model_00001.pt", "three/used/log.txt"):
        (tmp_path / path).write_text("0 val 3.0\n")
    lock(at_exit=True)
    assert names_in(tmp_path) == ["four", "four/existing", "three", "three/used", "three/used/log.txt", "two", "two/other",
                                  "two/other/model_00001.pt"]


def test_a_folder_that_another_process_creates_at_the_same_time_is_not_removed(tmp_path, lock, monkeypatch):
    mkdir = os.mkdir

    def slower(path):
        mkdir(path)  # by the other process
        mkdir(path)
    monkeypatch.setattr(os, "mkdir", slower)
    lock(tmp_path / "log" / "a")
    lock(at_exit=True)
    assert names_in(tmp_path) == ["log", "log/a"]


@pytest.mark.parametrize("name, contents, words", [
    ("config.json", '{"model_type": "gpt2", "n_layer": 12}', "is not the config.json of a run"),  # of Hugging Face
    ("config.json", "[" * 100_000, "is not the config.json of a run"),
    ("log.txt", "Tuesday: called the plumber\n", "line 1: expected `step stream value`, got 'Tuesday: called the plumber'"),
    ("log.txt", "my notes", "line 1: expected `step stream value`, got 'my notes'"),
    ("log.txt", "0 val 3.5\n" + "x" * 100_000, "line 2: expected"), ("log.txt", "\0\xff\n", "line 1: expected"),
    ("log.txt", "99999999999999999999 val 3.5\n", "line 1: expected"), ("log.txt", None, "log.txt is not a regular file"),
    ("config.json", None, "config.json is not a regular file"),
])
def test_files_that_no_run_wrote_are_not_overwritten(name, contents, words, tmp_path, lock):
    """`--log-dir . --exp-name hf` once overwrote the config.json of a Hugging Face folder, and truncated a log.txt of notes."""
    path = tmp_path / "hf" / name
    path.parent.mkdir()
    if contents is None:
        path.mkdir()
    else:
        path.write_text(contents)
    with pytest.raises(ValueError, match=re.escape(words)):
        lock(tmp_path / "hf")
    assert names_in(tmp_path) == ["hf", f"hf/{name}"] and (contents is None or path.read_text() == contents)


def test_the_log_of_a_run_without_checkpoints_is_copied_before_it_is_truncated(tmp_path, lock, capsys):
    for run in ("first", "second", "third"):
        lock(tmp_path)
        log = open_log(tmp_path)
        log(0, quiet=True, **{run: 1.0})
        log.file.close()
        lock(at_exit=True)
    assert [(tmp_path / name).read_text() for name in ("log.txt.aside", "log.txt.2.aside", "log.txt")] == [
        "0 first 1.0\n", "0 second 1.0\n", "0 third 1.0\n"]
    assert capsys.readouterr().out.count("log.txt to *.aside: it is of an earlier run") == 2


def test_config_json_has_the_settings_the_command_the_versions_and_the_hardware(tmp_path):
    assert folder.read_config(str(tmp_path)) == {}
    folder.write_config(str(tmp_path), {"lr": 0.1}, "bfloat16", Ranks(0, 0, 2, "cpu", True))
    assert folder.read_config(str(tmp_path)) == {"lr": 0.1}
    description = json.loads((tmp_path / "config.json").read_text())
    assert description["command"] == sys.argv and description["device"]
    assert (description["world_size"], description["dtype"], description["torch"]) == (2, "bfloat16", torch.__version__)
    assert os.listdir(tmp_path) == ["config.json"]


@pytest.mark.parametrize("contents", ["{", "[]", "{}", '{"config": 3}'])
def test_a_config_json_of_something_else_is_an_error(tmp_path, contents):
    (tmp_path / "config.json").write_text(contents)
    with pytest.raises(ValueError, match="config.json is not the config.json of a run"):
        folder.read_config(str(tmp_path))


# -----------------------------------------------------------------------------
# log.txt

def test_a_log_is_read_into_its_streams(tmp_path):
    (tmp_path / "log.txt").write_text("0 val 10.95\n0 train 10.9\n0 lr 8.39e-07\n1 train 10.5\n")
    assert read_log(str(tmp_path / "log.txt")) == {"val": [(0, 10.95)], "train": [(0, 10.9), (1, 10.5)], "lr": [(0, 8.39e-07)]}


@pytest.mark.parametrize("line", ["1 train", "1 train 2 3", "one train 2.0", "1 train high", "", "1.5 train 2.0"])
def test_an_invalid_line_of_a_log_is_an_error_with_its_number(tmp_path, line):
    (tmp_path / "log.txt").write_text(f"0 train 3.0\n{line}\n2 train 1.0\n")
    with pytest.raises(ValueError, match="log.txt, line 2: expected `step stream value`"):
        read_log(str(tmp_path / "log.txt"))


@pytest.mark.parametrize("torn", ["", "1", "12 ", "1 tra", "1 train ", "1 train 2.", "1 train 2.5"])
def test_a_log_that_was_cut_in_a_line_is_read_up_to_that_line(tmp_path, torn):
    (tmp_path / "log.txt").write_text("0 train 3.0\n" + torn)
    assert read_log(str(tmp_path / "log.txt")) == {"train": [(0, 3.0)]}


# a run of 3 steps that evaluates at every second; step 2 has evaluations before and training values after its checkpoint
BEFORE_2 = "0 val 3.5\n0 train 3.5\n0 lr 0.1\n1 train 3.0\n1 lr 0.1\n1 epoch 1\n"
EVALUATIONS_OF_2 = "2 val 2.5\n2 hella 0.25\n"
AFTER_2 = "2 train 2.5\n2 lr 0.1\n3 train 2.0\n4 val 1.5\n"


def kept(tmp_path, contents, step):
    """(the lines that a run resumed at step keeps of a log, the evaluations of step in them)"""
    (tmp_path / "log.txt").write_text(contents)
    size, evaluated = kept_log(str(tmp_path), step)
    return contents[:size], evaluated


def test_a_resumed_run_keeps_earlier_steps_and_the_evaluations_of_its_step(tmp_path, capsys):
    assert kept(tmp_path, BEFORE_2 + EVALUATIONS_OF_2 + AFTER_2, 2) == (BEFORE_2 + EVALUATIONS_OF_2, {"val", "hella"})
    assert kept(tmp_path, BEFORE_2 + EVALUATIONS_OF_2, 2) == (BEFORE_2 + EVALUATIONS_OF_2, {"val", "hella"})
    assert kept(tmp_path, BEFORE_2 + AFTER_2, 2) == (BEFORE_2, set())  # its evaluations were interrupted
    assert kept(tmp_path, BEFORE_2 + "3 val 2.5\n", 2) == (BEFORE_2, set())
    assert kept(tmp_path, BEFORE_2 + EVALUATIONS_OF_2 + AFTER_2, 0) == ("0 val 3.5\n", {"val"})
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("torn", ["2 hella 0.2", "2 hel", "2 train 2.5", "2"])
def test_a_truncated_last_line_is_dropped_and_is_not_an_evaluation(tmp_path, torn):
    """An evaluation whose line was truncated once counted as logged: its line was dropped, and it was not repeated."""
    assert kept(tmp_path, BEFORE_2 + "2 val 2.5\n" + torn, 2) == (BEFORE_2 + "2 val 2.5\n", {"val"})


@pytest.mark.parametrize("line", ["a note of mine\n", "\n", "2 val\n", "x val 3.0\n", "-1 val 2.0\n", "\udcff\n"])
def test_an_invalid_line_is_kept_and_ignored(tmp_path, line):
    contents = (BEFORE_2 + line + EVALUATIONS_OF_2).encode(errors="surrogateescape")
    (tmp_path / "log.txt").write_bytes(contents + AFTER_2.encode())
    assert kept_log(str(tmp_path), 2) == (len(contents), {"val", "hella"})


@pytest.mark.parametrize("contents, last", [("0 train 3.5\n0 lr 0.1\n", 0), ("0 train 3.5\n1 train 3.0", 0), ("", -1)])
def test_a_log_that_ends_before_the_checkpoint_is_reported(tmp_path, capsys, contents, last):
    assert kept(tmp_path, contents, 2)[1] == set()
    message = f"{tmp_path}/log.txt is incomplete: it lacks steps {last + 1} to 1 before the checkpoint\n"
    assert capsys.readouterr().out == message
    os.remove(tmp_path / "log.txt")
    assert kept_log(str(tmp_path), 2) == (0, set())
    assert "is incomplete" in capsys.readouterr().out


def open_log(run_dir, keep_bytes=0, tracker="none", first_step=0, ranks=ONE_PROCESS):
    return Log(str(run_dir), {"tracker": tracker, "exp_name": "a", "n_embd": 8}, keep_bytes, first_step, ranks)


def test_log_appends_each_value_at_once_and_prints_evaluations(tmp_path, capsys):
    log = open_log(tmp_path)
    log(0, val=3.25)
    assert (tmp_path / "log.txt").read_text() == "0 val 3.25\n"  # before it is closed: a kill loses nothing
    log(0, quiet=True, train=3.5, lr=6e-4)
    log(250, hella=0.25, hella_lm_eval=0.295)
    log(250)
    log.flush()
    assert (tmp_path / "log.txt").read_text() == ("0 val 3.25\n0 train 3.5\n0 lr 0.0006\n"
                                                  "250 hella 0.25\n250 hella_lm_eval 0.295\n")
    assert capsys.readouterr().out == ("step     0 | val 3.2500\nstep   250 | hella 0.2500 | hella_lm_eval 0.2950\n")


def test_log_does_nothing_for_an_evaluation_that_was_interrupted(tmp_path, capsys):
    calls = []
    log = open_log(tmp_path)
    log.tracker = lambda *call: calls.append(call)
    log(250, val=None)
    assert (tmp_path / "log.txt").read_text() == capsys.readouterr().out == "" and calls == []


def test_log_of_a_resumed_run_truncates_what_it_does_not_keep(tmp_path):
    (tmp_path / "log.txt").write_text(BEFORE_2 + EVALUATIONS_OF_2 + AFTER_2)
    log = open_log(tmp_path, *kept_log(str(tmp_path), 2)[:1])
    log(2, quiet=True, train=2.25)
    assert (tmp_path / "log.txt").read_text() == BEFORE_2 + EVALUATIONS_OF_2 + "2 train 2.25\n"


def test_log_of_other_ranks_writes_and_prints_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    log = open_log(tmp_path, tracker="wandb", ranks=Ranks(1, 1, 2, "cpu", True))
    log(0, val=3.25)
    log.flush()
    assert os.listdir(tmp_path) == [] and capsys.readouterr().out == ""


# -----------------------------------------------------------------------------
# trackers

WANDB = '''
import json, os
class Run:
    id = "abc123"
    def log(self, values):
        with open(os.environ["CALLS"], "a") as f: f.write(json.dumps(["log", values]) + "\\n")
    def define_metric(self, name, step_metric):
        with open(os.environ["CALLS"], "a") as f: f.write(json.dumps(["metric", name, step_metric]) + "\\n")
def init(**kwargs):
    kwargs["config"] = kwargs["config"]["n_embd"]
    with open(os.environ["CALLS"], "a") as f: f.write(json.dumps(["init", kwargs]) + "\\n")
    return Run()
'''


def test_wandb_finds_a_resumed_run_by_its_id_and_receives_the_values(tmp_path, monkeypatch):
    (tmp_path / "calls").touch()
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setitem(sys.modules, "wandb", types.ModuleType("wandb"))
    exec(WANDB, sys.modules["wandb"].__dict__)
    for step in range(2):
        open_log(tmp_path, tracker="wandb")(step, val=3.25, lr=0.5)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert [call[1]["id"] for call in calls if call[0] == "init"] == [None, "abc123"]
    assert [call[1] for call in calls if call[0] == "log"] == [{"step": step, "val": 3.25, "lr": 0.5} for step in range(2)]


def test_tensorboard_receives_the_values_and_drops_those_after_the_checkpoint(tmp_path, monkeypatch):
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
    log = open_log(tmp_path, tracker="tensorboard", first_step=500)
    log(501, quiet=True, train=3.5, lr=0.1)
    log(502)
    assert calls == [(str(tmp_path), 500), "closed", ("train", 3.5, 501), ("lr", 0.1, 501)]


def test_a_tracker_that_fails_ends_no_run(tmp_path, monkeypatch, capsys):
    """An exception of W&B once stopped the training."""
    def fail(*_, **__):
        raise RuntimeError("server\nsays no")
    log = open_log(tmp_path)
    log.tracker = fail
    log(1, quiet=True, train=3.5)
    log(2, quiet=True, train=3.25)
    assert read_log(str(tmp_path / "log.txt")) == {"train": [(1, 3.5), (2, 3.25)]}
    assert capsys.readouterr().out == "the tracker failed at step 1, it receives no more values: RuntimeError: server\n"
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=fail))
    with pytest.raises(ValueError, match=r"--tracker wandb cannot be started \(RuntimeError: server\); --tracker none trains"):
        open_log(tmp_path, tracker="wandb")
    closed = []
    monkeypatch.setattr(atexit, "register", closed.append)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(
        SummaryWriter=lambda *_, **__: types.SimpleNamespace(close=fail)))
    open_log(tmp_path, tracker="tensorboard")
    closed[0]()  # at exit


def test_every_tracker_is_checked_and_none_needs_no_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert check_tracker("none") is None and Log.open_tracker("none", "", {}, 0) is None
    for damaged in (None, 3, ["none"], torch.zeros(2), "os"):  # in a checkpoint; "os" is a package
        with pytest.raises(ValueError, match="--tracker is .*, must be one of none, tensorboard, wandb"):
            check_tracker(damaged)
    with pytest.raises(ValueError, match="--tracker tensorboard needs the package tensorboard"):
        check_tracker("tensorboard")


TINY = ["--preset", "shakespeare", "--n-layer", "1", "--n-head", "1", "--n-embd", "8", "--block-size", "8", "--optimizer",
        "adamw", "--total-batch-size", "32", "--batch-size", "2", "--val-every", "2", "--val-tokens", "64",
        "--sample-every", "0", "--save-every", "2", "--compile", "off", "--dtype", "float32", "--device", "cpu",
        "--vocab-size", "50257"]


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("The king and his queen will not come to this house tonight for love or war.\n" * 40)
    return str(path)


def train_here(monkeypatch, folder, text, *flags):
    """Exit status of a training run in folder, in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *TINY, "--data", text, *flags])
    with pytest.raises(SystemExit) as end:
        cli.run_main(train_gpt2.main)
    return end.value.code


def logged_values(folder):
    """{(stream, value, step)} of a run's log.txt."""
    streams = read_log(str(folder / "log" / "shakespeare" / "log.txt"))
    return {(stream, value, step) for stream, points in streams.items() for step, value in points}


def test_a_training_run_sends_every_value_of_its_log(tmp_path, text, monkeypatch):
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    wandb = types.ModuleType("wandb")
    wandb.__spec__ = importlib.machinery.ModuleSpec("wandb", None, origin="wandb.py")
    exec(WANDB, wandb.__dict__)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train_here(monkeypatch, tmp_path, text, "--tracker", "wandb", "--max-steps", "2") == 0
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert calls[0] == ["init", {"project": "gpt2", "name": "shakespeare", "id": None, "resume": "allow", "config": 8,
                                 "dir": os.path.join("log", "shakespeare")}]
    assert calls[1] == ["metric", "*", "step"]
    sent = {(stream, value, values["step"]) for kind, values, *_ in calls if kind == "log"
            for stream, value in values.items() if stream != "step"}
    assert sent == logged_values(tmp_path) and {stream for stream, *_ in sent} == {"train", "val", "val_bpb", "lr", "norm",
                                                                                       "tok_per_sec"}
    assert (tmp_path / "log" / "shakespeare" / "wandb_id.txt").read_text() == "abc123"


def test_the_real_tensorboard_has_the_values_of_the_log(tmp_path, text, monkeypatch):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    closers = []
    monkeypatch.setattr(atexit, "register", closers.append)
    assert train_here(monkeypatch, tmp_path, text, "--tracker", "tensorboard", "--max-steps", "2") == 0
    for close in closers:
        close()
    events = accumulator.EventAccumulator(str(tmp_path / "log" / "shakespeare"))
    events.Reload()
    read = {(stream, event.value, event.step) for stream in events.Tags()["scalars"] for event in events.Scalars(stream)}
    written = {(stream, step) for stream, _, step in logged_values(tmp_path)}
    assert {(stream, step) for stream, _, step in read} == written
    train_loss = {step: value for stream, value, step in logged_values(tmp_path) if stream == "train"}
    assert {step: value for stream, value, step in read if stream == "train"} == pytest.approx(train_loss, abs=1e-5)


def test_a_tracker_that_is_not_installed_is_one_line_before_anything_is_read(tmp_path, monkeypatch, capsys, lock):
    (tmp_path / "wandb").mkdir()  # W&B leaves a folder wandb/ where it runs; it is not a package
    monkeypatch.syspath_prepend(tmp_path)
    find_spec = importlib.util.find_spec
    if installed := find_spec("wandb").origin:
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "wandb" else find_spec(name, *a))
    assert train_here(monkeypatch, tmp_path, "no-such-text", "--tracker", "wandb") == 2, installed
    assert capsys.readouterr().err == ("error: --tracker wandb needs the package wandb, which is not installed: pip install"
                                       " wandb, or --tracker none\n")
    lock(at_exit=True)
    assert not os.path.exists(tmp_path / "log")


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="anonymous memory is read from Linux's /proc")
def test_loading_a_checkpoint_maps_its_files_instead_of_copying_them(tmp_path):
    """Each of 8 ranks read 18.7 GB of 1558M's checkpoint into memory of its own."""
    def anonymous():
        with open("/proc/self/status") as f:
            return next(int(line.split()[1]) * 1024 for line in f if line.startswith("RssAnon"))
    model = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=128, block_size=8, vocab_size=50304))
    moments = {i: {"exp_avg": torch.ones(50304, 128)} for i in range(4)}
    state = {"optimizers": [{"state": moments, "param_groups": []}], "scaler": {}, "loader": {}, "rng": [], "train_config": {}}
    checkpoint.save(str(tmp_path), 1, checkpoint.model_contents(model, None), state)
    checkpoint.load_latest(str(tmp_path))  # the first meta tensor imports 70 MB of modules
    before = anonymous()
    saved = checkpoint.load_latest(str(tmp_path))
    assert anonymous() - before < 0.2 * os.path.getsize(tmp_path / "state_00001.pt")
    assert saved.state["optimizers"][0]["state"][3]["exp_avg"].sum() == 50304 * 128
