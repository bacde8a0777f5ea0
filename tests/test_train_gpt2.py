"""
The training script: schedule, settings, plan, one golden step, and real runs in real processes.

    ./test.sh tests/test_train_gpt2.py        # no network, no GPU; two gloo ranks on the CPU

Processes train a model of one block and 16 channels on a text made here.
"""
import atexit
import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from functools import partial

import numpy as np
import psutil
import pytest
import torch

import common
import data
import train_gpt2
from common import ENV, ONE, ROOT, launcher, python, text_of_words
from model import GPTConfig
from run import checkpoint, cli, folder, parallel, runtime, settings
from run.config import INPUT_TXT, PRESETS, TrainConfig, parse_args, preset_settings
from run.parallel import Ranks
from train_gpt2 import evaluate_loss, get_lr, train_step

SCRIPT = os.path.join(ROOT, "train_gpt2.py")
TINY = [*common.TINY, "--batch-size", "2", "--max-steps", "8", "--val-every", "4",
        "--save-every", "4", "--dropout", "0.1", "--optimizer", "muon", "--device", "cpu"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 400 lines of common words."""
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text(text_of_words())
    return str(path)


def command(*flags, ranks=1):
    """The command line of a training process, or of torchrun with several."""
    return [sys.executable, *launcher(ranks), SCRIPT, *TINY, *flags]


def train(cwd, *flags, ranks=1, timeout=120, **kwargs):
    """Runs training in cwd to its end; the finished process, with its output."""
    return python(*command(*flags, ranks=ranks)[1:], cwd=cwd, timeout=timeout, **kwargs)


def start(cwd, *flags, ranks=1, stderr=subprocess.STDOUT):
    """Starts training in cwd; the process, which leads a process group of its own."""
    return subprocess.Popen(command(*flags, ranks=ranks), cwd=cwd, stdout=subprocess.PIPE,
                            stderr=stderr, text=True, start_new_session=True, env=ENV)


def run_here(cwd, *flags):
    """Exit status of train_gpt2.py in this process, without the picture of its losses."""
    with contextlib.ExitStack() as at_exit, pytest.MonkeyPatch.context() as patch:
        patch.setattr(atexit, "register", at_exit.callback)
        patch.setattr(train_gpt2, "plot_run", lambda *args, **kwargs: "")
        patch.setattr(sys, "argv", ["train_gpt2.py", *flags])
        patch.chdir(cwd)
        try:
            cli.run_main(train_gpt2.main)
        except SystemExit as end:
            return end.code or 0
    return 0


def log_of(run_dir, *streams):
    """The log's lines of some streams, unchanged."""
    with open(os.path.join(run_dir, "log.txt"), encoding="utf-8") as f:
        return [line.strip() for line in f if line.split()[1] in streams]


def values_of(run_dir, stream):
    """The log's values of a stream."""
    return [float(line.split()[2]) for line in log_of(run_dir, stream)]


# -----------------------------------------------------------------------------
# the schedule

def test_get_lr_is_warmup_then_cosine_decay_to_the_minimum():
    lr = [get_lr(step, 1.0, 0.1, 10, 110) for step in range(112)]
    assert lr[0] == pytest.approx(0.1)                  # not zero
    assert lr[9] == pytest.approx(1.0) and lr[10] == pytest.approx(1.0)
    assert lr[60] == pytest.approx(0.55)                # halfway
    assert lr[110] == lr[111] == pytest.approx(0.1)
    assert lr[9:] == sorted(lr[9:], reverse=True)


def test_get_lr_of_wsd_is_warmup_then_constant_then_linear_decay_to_the_minimum():
    lr = [get_lr(step, 1.0, 0.1, 10, 110, "wsd", 0.5) for step in range(112)]
    assert lr[:10] == [get_lr(step, 1.0, 0.1, 10, 110) for step in range(10)]   # the same warmup
    assert lr[10:56] == [1.0] * 46                      # 55 steps of decay are left
    assert np.diff(lr[55:111]) == pytest.approx(-0.9 / 55)
    assert lr[110] == lr[111] == pytest.approx(0.1)
    # a decay of 80% starts after the warmup, from the peak
    lr = [get_lr(step, 1.0, 0.0, 40, 100, "wsd", 0.8) for step in range(100)]
    assert max(lr) == 1.0 == lr[40] and np.diff(lr[40:]) == pytest.approx(-1 / 60)


def test_evaluations_are_due_every_n_steps_and_after_the_last_one():
    every = {"val": 4, "hella": 0, "samples": 6}
    due = [train_gpt2.due_at(step, 10, every) for step in range(11)]
    assert [step for step in range(11) if "val" in due[step]] == [0, 4, 8, 10]
    assert [step for step in range(11) if "samples" in due[step]] == [0, 6, 10]
    assert not any("hella" in names for names in due)


# -----------------------------------------------------------------------------
# presets, flags, and the settings of a run

@pytest.mark.parametrize("preset, parameters", [
    ("gpt2-124M", 124_475_904), ("gpt2-350M", 354_871_296), ("gpt2-774M", 774_090_240),
    ("gpt2-1558M", 1_557_686_400)])
def test_presets_are_the_lectures_models_with_a_padded_vocabulary(preset, parameters):
    config = TrainConfig(**preset_settings(preset))
    assert config.gpt_config().num_params() == parameters
    assert config.vocab_size == 50304 and config.block_size == 1024


def test_every_preset_names_its_run():
    for preset in PRESETS:
        assert TrainConfig(**preset_settings(preset), preset=preset).exp_name == preset


def test_only_given_flags_are_returned():
    given = parse_args(["--lr", "0.5", "--dry-run", "--compile", "off", "--exp-name", "my run/"])
    assert given == {"lr": 0.5, "dry_run": True, "compile": "off", "exp_name": "my run"}


def test_the_help_has_the_presets_values_and_examples(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    out = capsys.readouterr().out
    assert re.search(r"gpt2-1558M +size gpt2-xl, lr 0.0002, total_batch_size 1048576, warm", out)
    assert re.search(r"shakespeare +n_layer 2, n_head 4", out)
    assert out.count("train_gpt2.py") == 4 and "the optimizer:" in out  # usage, three examples
    assert re.search(r"--seed .*\(default 1337\)", out, re.S)
    assert re.search(r"--n-head INT .*\(default 12; depends on\s+the\s+preset\)", out, re.S)


def write_shard_name(cwd):
    """An empty file whose name makes edu_fineweb10B a folder of shards."""
    os.mkdir(cwd / "edu_fineweb10B")
    (cwd / "edu_fineweb10B" / "edufineweb_train_000001.npy").touch()


def test_the_preset_follows_from_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, saved = settings.config_from_flags([])
    assert config.preset == "shakespeare" and config.data == INPUT_TXT and saved is None
    assert "holds no shards" in capsys.readouterr().out
    write_shard_name(tmp_path)
    config, _ = settings.config_from_flags([])
    assert (config.preset, config.data) == ("gpt2-124M", "edu_fineweb10B")
    assert settings.config_from_flags(["--preset", "gpt2-350M", "--lr", "1"])[0].lr == 1.0


def test_weights_and_a_text_are_fine_tuned(tmp_path, monkeypatch):
    """Once they had the preset shakespeare: Muon at 0.012."""
    monkeypatch.chdir(tmp_path)
    model = common.tiny_model(block_size=1024, vocab_size=50257)
    torch.save({**checkpoint.model_contents(model, None), "step": 0}, "m.pt")
    c, _ = settings.config_from_flags(["--init-from", "m.pt", "--data", "my_book.txt"])
    assert (c.preset, c.exp_name, c.optimizer, c.lr, c.n_layer) == \
        ("finetune", "my_book-finetune", "adamw", 3e-5, 2)
    assert settings.config_from_flags(["--init-from", "m.pt"])[0].exp_name == "finetune"
    write_shard_name(tmp_path)
    c, _ = settings.config_from_flags(["--init-from", "m.pt", "--exp-name", "x"])
    assert c.preset == "gpt2-124M"


def test_each_text_has_its_own_run_unless_a_preset_or_a_name_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.makedirs("texts.d/shards")
    open("texts.d/shards/a_train_000001.npy", "w").close()
    names = {"my book.txt": "my book", "texts.d": "texts.d", "texts.d/": "texts.d",
             ".": tmp_path.name, INPUT_TXT: "shakespeare", "texts.d/shards": "gpt2-124M"}
    for path, name in names.items():
        assert settings.run_folder({"data": path}) == os.path.join("log", name)
    assert settings.run_folder({"data": "a.txt", "preset": "gpt2-124M"}) == "log/gpt2-124M"
    assert settings.run_folder({"data": "a.txt", "exp_name": "b", "log_dir": "c"}) == "c/b"


# -----------------------------------------------------------------------------
# the settings of a resumed run

# another value of each setting that a resumed run refuses to change, or changes only by --force
OTHER_VALUES = {
    "preset": "gpt2-124M", "init_from": "gpt2", "init": "lecture", "n_layer": 2, "n_head": 1,
    "n_embd": 18, "block_size": 8, "vocab_size": 50257, "optimizer": "adamw",
    "total_batch_size": 64, "seed": 1, "shuffle": "off", "dropout": 0.2, "dtype": "bfloat16"}


@pytest.fixture
def saved(unbroken, monkeypatch):
    """The last Checkpoint of the finished run; config_from_flags resumes from it."""
    saved = checkpoint.load_latest(unbroken[0])
    monkeypatch.setattr(settings, "load_run", lambda given: saved)
    return saved


def test_a_resumed_run_refuses_other_shapes_and_other_runs(saved, capsys):
    assert OTHER_VALUES.keys() == {*settings.FIXED, *settings.FORCED}
    for name, value in OTHER_VALUES.items():
        flags = [f"--{name.replace('_', '-')}", str(value)]
        message = "cannot change when" if name in settings.FIXED else "makes it a different run"
        with pytest.raises(ValueError, match=f"{name}.* {message}"):
            settings.config_from_flags(flags)
    assert capsys.readouterr().out == ""  # nothing announces a change that is then refused
    for name in settings.FORCED:
        flags = [f"--{name.replace('_', '-')}", str(OTHER_VALUES[name]), "--force"]
        config, _ = settings.config_from_flags(flags)
        assert getattr(config, name) == OTHER_VALUES[name]


def test_a_resumed_run_keeps_its_settings_except_for_the_flags(saved, capsys):
    config, _ = settings.config_from_flags([*TINY, "--exp-name", "x", "--log-dir", "y"])
    assert "changed" not in capsys.readouterr().out  # the same values again
    assert (config.preset, config.max_steps, config.run_dir) == ("shakespeare", 8, "y/x")
    config, _ = settings.config_from_flags(["--lr", "0.5"])
    assert (config.lr, config.max_steps) == (0.5, 8)
    settings.config_from_flags(["--max-steps", "16"])
    printed = capsys.readouterr().out
    assert "changed: max_steps was 8, is 16" in printed and "the schedule of the new" in printed
    config, _ = settings.config_from_flags(["--lr", "0.5"])
    assert "changed: lr was 0.012, is 0.5" in capsys.readouterr().out
    config, _ = settings.config_from_flags(["--epochs", "3"])
    assert (config.epochs, config.max_steps) == (3, 0)


def test_how_a_run_was_started_is_not_inherited_when_it_resumes(saved, capsys):
    """Else a run once resumed with --force would accept every later change."""
    started = dict(dry_run=True, eval_only=True, force=True, resume="never")
    assert started.keys() == set(settings.STARTED)
    saved.state["train_config"] |= started
    config, _ = settings.config_from_flags([])
    for name in started:
        assert getattr(config, name) == getattr(TrainConfig, name)
    settings.config_from_flags(["--force"])
    assert "changed" not in capsys.readouterr().out


def test_what_was_chosen_automatically_is_stored_and_resumed(saved, capsys):
    """A float32 run resumed in bfloat16 on another machine, and --dtype float32 was refused."""
    stored = saved.state["train_config"]
    assert stored["dtype"] in ("float32", "bfloat16") and stored["compile"] == "off"
    assert (stored["batch_size"], stored["loss_chunks"]) == (2, 1)
    stored |= {"compile": "max", "batch_size": 4}
    automatic = ["--dtype", "auto", "--compile", "auto", "--batch-size", "0"]
    for flags in [], automatic, ["--dtype", stored["dtype"]]:
        config, _ = settings.config_from_flags(flags)
        assert (config.dtype, config.compile) == (stored["dtype"], "max")
        assert (config.batch_size, config.loss_chunks) == (4, 1)
    assert "changed" not in capsys.readouterr().out
    config, _ = settings.config_from_flags(["--batch-size", "8", "--compile", "off"])
    assert (config.batch_size, config.loss_chunks, config.compile) == (8, 0, "off")


def test_checkpoints_of_older_versions_resume(saved, capsys):
    """Of commit 7415508, whose settings have price and --parallel zero, which is ddp now."""
    saved.state["train_config"] |= {"price": 2.0, "parallel": "zero"}
    assert not parallel.is_fsdp(settings.config_from_flags([])[0], Ranks(0, 0, 2, "cpu", True))
    assert "ignored: price, which this version does not have" in capsys.readouterr().out


def test_a_moved_clone_finds_its_input_txt(saved):
    saved.state["train_config"]["data"] = "/no/such/clone/input.txt"
    assert settings.config_from_flags([])[0].data == INPUT_TXT
    assert settings.config_from_flags(["--data", "mine.txt"])[0].data == "mine.txt"


def test_optimizer_settings_and_dropout_of_a_resumed_run_are_the_flags(saved, tmp_path):
    """They were announced as changed, and the checkpoint's stayed in effect."""
    config, _ = settings.config_from_flags([
        "--weight-decay", "0.3", "--beta1", "0.8", "--beta2", "0.9", "--embd-lr-ratio", "3",
        "--dropout", "0.2", "--force"])
    raw_model = train_gpt2.build_model(config, saved, ONE)
    muon, adamw = optimizers = raw_model.configure_optimizers(
        config.lr, config.weight_decay, (config.beta1, config.beta2), config.optimizer,
        config.embd_lr_ratio)
    train_gpt2.restore(saved, optimizers, torch.amp.GradScaler("cpu", enabled=False), config, ONE)
    assert [g["weight_decay"] for g in muon.param_groups + adamw.param_groups] == [0.3, 0.3, 0.0]
    assert [g["betas"] for g in adamw.param_groups] == [(0.8, 0.9)] * 2
    assert [g["lr_scale"] for g in adamw.param_groups] == [3.0, 1.0]
    assert adamw.state[raw_model.lm_head.weight]["step"] == 8  # the state is the checkpoint's
    block = raw_model.transformer.h[0]
    assert (raw_model.config.dropout, block.attn.dropout, block.mlp.dropout.p) == (0.2, 0.2, 0.2)


def test_resume_takes_a_folder_and_says_what_to_do_with_a_file(unbroken):
    run_dir = str(unbroken[0])
    assert settings.run_folder({"resume": run_dir}) == run_dir
    with pytest.raises(ValueError, match="to resume from an older one, move the newer files away"):
        settings.run_folder({"resume": os.path.join(run_dir, "model_00004.pt")})
    with pytest.raises(FileNotFoundError, match="there is no run with a checkpoint"):
        settings.run_folder({"resume": os.path.dirname(run_dir)})


def test_restarted_ranks_do_not_touch_the_run_that_resume_never_found(
        unbroken, tmp_path, monkeypatch):
    """--resume never ended with an error, torchrun restarted the ranks, and these resumed the run.

    As rank 1, which does not lock the folder.
    """
    run_dir = str(tmp_path / "run")
    shutil.copytree(unbroken[0], run_dir)
    given = {"resume": "never", "log_dir": str(tmp_path), "exp_name": "run"}
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")

    def loads():
        try:
            return settings.load_run(given).step == 8
        except ValueError as e:
            assert "already holds a run" in str(e)
            return False

    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not loads()
    folder.write_config(run_dir, {"resume": "never"}, ONE)  # main, before it trains
    assert loads()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")   # the same command, later
    assert not loads()
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    assert not loads()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")        # requeued: torchrun's first start in it
    assert loads()
    # of a version that did not note it: KeyError
    with open(os.path.join(run_dir, "config.json"), "w", encoding="utf-8") as f:
        json.dump({"config": {"resume": "never"}}, f)
    assert not loads()


def test_the_message_of_a_stop_names_a_command_that_resumes():
    assert settings.how_to_resume(TrainConfig()) == "the same command"
    assert settings.how_to_resume(TrainConfig(resume="never")) == "--resume log/gpt2-124M"


@pytest.mark.parametrize("name, value, message", [
    ("step", 0, "step is 8 on rank 0 and 0 on rank 1"),
    ("lr", 0.1, "lr is 0.012 on rank 0 and 0.1 on rank 1"),
    # --dtype auto on an L4 beside a T4: only one rank scaled its gradients
    ("dtype", "float16", "dtype is 'float32' on rank 0 and 'float16' on rank 1"),
    ("torch", "2.10.0", "torch is .* on rank 0 and '2.10.0' on rank 1"),
    ("run/parallel.py", "another", "run/parallel.py is '[0-9a-f]{8}' on rank 0 and 'another'"),
    ("data", "/elsewhere", None)])
def test_ranks_with_other_checkpoints_settings_or_code_are_an_error(
        name, value, message, saved, monkeypatch):
    """DDP sends rank 0's weights to all; then each rank made other updates, and all finished."""
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--dry-run", "--compile", "off"])

    def two_ranks(found, ranks):
        return [found, {**found, name: value}] if "torch" in found else [found]

    monkeypatch.setattr(parallel, "all_gather", lambda value, ranks: two_ranks(value, ranks)
                        if isinstance(value, dict) else [value])
    if message is None:
        return train_gpt2.main()
    with pytest.raises(ValueError, match=message):
        train_gpt2.main()


def test_ranks_with_other_data_are_an_error(text, monkeypatch):
    config = TrainConfig(**{**preset_settings("shakespeare"), "data": text})
    monkeypatch.setattr(parallel, "all_gather", lambda value, ranks: [value, value])
    assert len(train_gpt2.open_data(config, ONE)) == 2
    monkeypatch.setattr(parallel, "all_gather", lambda value, ranks: [value, [value[0], "another"]])
    with pytest.raises(ValueError, match=r"holds other data on rank 1 than on rank 0"):
        train_gpt2.open_data(config, ONE)


# -----------------------------------------------------------------------------
# the plan

N = 124_475_904  # parameters of the 124M model


@pytest.mark.parametrize("W", range(1, 9))
@pytest.mark.parametrize("preset", ["shakespeare", "finetune", "gpt2-124M"])
def test_the_tokens_of_a_step_are_split_over_any_number_of_ranks(
        preset, W, monkeypatch, tmp_path, capsys):
    """./train.sh failed at its first line on two GPUs, whose B=8 did not divide 8 sequences."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WORLD_SIZE", str(W))
    monkeypatch.setenv("RANK", "0")
    config, _ = settings.config_from_flags(["--preset", preset])
    B, _ = settings.choose_batch_size(config, 10**7, W, math.inf, True)
    unchanged = preset_settings(preset).get("total_batch_size", TrainConfig.total_batch_size)
    sequences = config.total_batch_size // config.block_size
    assert sequences % (B * W) == 0 and B >= 1
    assert abs(config.total_batch_size - unchanged) <= config.block_size * W / 2
    if unchanged % (config.block_size * W) == 0:
        assert config.total_batch_size == unchanged
    else:
        assert f"tokens per step: {config.total_batch_size:,} instead" in capsys.readouterr().out


def test_a_given_batch_size_is_an_upper_bound():
    config = TrainConfig(block_size=32, total_batch_size=32 * 12, batch_size=5)
    choose = partial(settings.choose_batch_size, config, 10**6)
    assert choose(1, math.inf, True)[0] == 4
    assert choose(3, math.inf, True)[0] == 4
    assert choose(6, math.inf, True)[0] == 2
    # a run that resumes keeps its tokens per step
    message = r"12 sequences .* 8 processes; numbers that would fit: \[1, 2, 3, 4, 6, 12\]"
    with pytest.raises(ValueError, match=message):
        choose(8, math.inf, True)


def test_the_automatic_batch_size_fits_the_available_memory():
    def choose(gigabytes, compile):
        config = TrainConfig(compile=compile)
        return settings.choose_batch_size(config, N, 8, gigabytes * 1e9, False)[0]
    compiled, eager = ([choose(gigabytes, compile) for gigabytes in (4, 8, 24, 80)]
                       for compile in ("on", "off"))
    assert eager != compiled  # which needs less memory
    assert all(a <= b for a, b in zip(eager, compiled))
    assert compiled == sorted(compiled) and compiled[1] >= 4 and compiled[-1] == 64 > compiled[0]
    assert all(64 % B == 0 for B in compiled)  # each rank has 64 sequences


def test_the_loss_is_computed_in_chunks_only_where_a_larger_batch_then_fits():
    """On a card of 4 to 8 GB, or where the given B would not fit."""
    def choose(gigabytes, batch_size=0, compile="on"):
        config = TrainConfig(batch_size=batch_size, compile=compile)
        return settings.choose_batch_size(config, N, 1, gigabytes * 1e9, False)
    assert choose(4.5) == (2, 1) and choose(4.5, compile="off") == (2, 8)
    assert choose(8) == (8, 1) and choose(8, compile="off") == (4, 8) and choose(80) == (64, 1)
    assert choose(8, batch_size=32) == (32, 8) and choose(24, batch_size=32) == (32, 1)
    # these do not fit in any way
    assert choose(1) == (1, 8) and choose(2, batch_size=64) == (64, 8)


def test_a_resumed_run_keeps_its_batch_size_if_that_fits_into_all_memory():
    """With a little less free memory B changed, and with it the rounding of the gradients."""
    def choose(gigabytes, batch_size, loss_chunks, world_size=1):
        config = TrainConfig(compile="on", batch_size=batch_size, loss_chunks=loss_chunks)
        return settings.choose_batch_size(config, N, world_size, gigabytes * 1e9, False)
    assert choose(16, 0, 0) == (16, 1) and choose(11, 0, 0) == (8, 1)
    assert choose(11, 16, 1) == (16, 1) and choose(80, 2, 8) == (2, 8)
    assert choose(80, 64, 1, world_size=16) == (32, 1)  # a rank has 32 sequences
    assert choose(8, 16, 1) == (8, 1)  # as in a new run


@pytest.fixture
def plan(monkeypatch, capsys):
    """A function that returns what make_plan prints with this much memory, in bytes."""
    def make(memory, ranks=ONE, resumed=False, **changes):
        monkeypatch.setattr(settings, "free_memory", lambda device: memory)
        config = TrainConfig(**{**preset_settings("shakespeare"), "compile": "off",
                                "dtype": "float32", **changes})
        settings.make_plan(config, 10**6, ranks, resumed)
        return capsys.readouterr().out
    return make


def test_the_plan_says_what_a_resumed_run_cannot_keep(plan, monkeypatch):
    monkeypatch.setattr(parallel, "compile_error", lambda device: "no compiler")
    stored = dict(batch_size=8, loss_chunks=1, compile="on", resumed=True)
    lines = plan(2e8, force=True, **stored)
    assert "training eagerly, torch.compile fails on this machine (rank 0): no compiler" in lines
    assert "changed: compile was 'on', is 'off'" in lines
    assert "changed: loss_chunks was 1, is 8" in lines
    monkeypatch.setattr(parallel, "compile_error", lambda device: "")
    assert "changed" not in plan(None, **stored, max_steps=20)  # too few steps for compile auto
    # B=8 is lowered for three ranks, and raised again for one
    config = TrainConfig(**{**preset_settings("shakespeare"), "total_batch_size": 12 * 128,
                            "compile": "off"})
    B, grad_accum_steps, _ = settings.make_plan(config, 10**6, Ranks(0, 0, 3, "cpu", False))
    assert (B, grad_accum_steps, config.batch_size) == (4, 1, 8)


def test_nothing_is_compiled_where_the_compiler_does_not_work(monkeypatch, capsys):
    """With TORCHDYNAMO_DISABLE=1 "compiled in 0.3 s", and the memory of a compiled step."""
    def choose(mode, max_steps=100, resumed=False):
        config = TrainConfig(compile=mode)
        return parallel.choose_compile(config, max_steps, resumed, ONE)
    with torch._dynamo.config.patch(disable=True):
        torch._dynamo.reset()
        assert choose("auto") == "off" and choose("on", resumed=True) == "off"
        message = r"fails on this machine \(rank 0\): .*TORCHDYNAMO_DISABLE.*; --compile off trains"
        with pytest.raises(ValueError, match=message):
            choose("on")
    assert capsys.readouterr().out.count("training eagerly, torch.compile fails") == 2
    monkeypatch.setattr(parallel, "compile_error", lambda device: "")
    assert choose("auto") == "on" and choose("auto", 99) == "off" and choose("on", 9) == "on"


def test_the_plan_has_the_schedule_and_says_if_the_warmup_is_not_over_in_the_run(plan):
    """With --max-steps 300 gpt2-124M warmed up to the end, and its learning rate never decayed.

    The warmup stays as it is: the first steps of the lecture's run can be compared with it.
    """
    assert ("learning rate: 0.012 after a warmup of 715 steps, WHICH THE RUN OF 300 DOES NOT REACH:"
            " it never decays; --warmup-steps 30 is 10% of the run"
            ) in plan(None, max_steps=300, warmup_steps=715)
    assert ("learning rate: 0.012 after a warmup of 715 steps, cosine to 0 at step 1,430\n"
            ) in plan(None, max_steps=1430, warmup_steps=715)


@pytest.mark.parametrize("free, words", [(10**9, "1.0 GB free\n"),
                                         (10**8, "0.1 GB free, THEY MAY NOT FIT\n")])
def test_the_plan_says_what_checkpoints_need_on_the_disk(free, words, plan, monkeypatch):
    """A full disk showed when the first checkpoint was written."""
    usage = shutil.disk_usage(ROOT)._replace(free=free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert f"disk: up to 4 checkpoints of 0.12 GB, {words}" in plan(None)


def test_a_run_that_does_not_fit_is_refused_unless_forced(plan, monkeypatch):
    # with less memory the loss is computed in chunks, which needs less
    whole, chunked = (1e9 * float(re.search(r"about ([\d.]+) GB", plan(memory, force=True))[1])
                      for memory in (None, 1e8))
    for memory in (None, 1.3 * whole):
        assert "FIT" not in plan(memory) and "chunks" not in plan(memory)
    assert "in 8 chunks to save memory" in plan(whole) and "FIT" not in plan(whole)
    assert chunked < 0.8 * whole
    assert "IT MAY NOT FIT" in plan(0.9 * chunked)
    message = r"needs about .* GB per process, of which 0.1 GB are available: .* --force"
    with pytest.raises(ValueError, match=message):
        plan(1e8)
    assert "IT WILL NOT FIT" in plan(1e8, force=True)
    assert "IT WILL NOT FIT" in plan(1e8, dry_run=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes on this machine share its memory
    assert "IT MAY NOT FIT" in plan(2 * 0.9 * chunked) and "FIT" not in plan(2 * whole)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    # rank 1 has less
    monkeypatch.setattr(parallel, "all_gather", lambda value, ranks: [value, 1e8])
    with pytest.raises(ValueError, match="of which 0.1 GB are available"):
        plan(1e12)


def test_the_plan_has_the_hours_at_half_the_peak_where_it_is_known(plan, monkeypatch):
    assert "time:" not in plan(None)
    monkeypatch.setattr(settings, "peak_flops", lambda *args: 1e14)
    monkeypatch.setattr(settings, "device_name", lambda device: "card")
    model = TrainConfig(**preset_settings("shakespeare")).gpt_config()
    hours = model.flops_per_token(128) * 1024 * 10**8 / 1e14 / 3600
    assert f"time: about {hours:.1f} hours at half the peak of 2 x card\n" in \
        plan(None, Ranks(0, 0, 2, "cpu", False), batch_size=4, max_steps=10**8)


def test_available_memory_of_a_mac_is_what_metal_recommends(monkeypatch):
    """It was unknown there, and the micro-batch as large as on an 80 GB GPU."""
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 11_000_000_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1_000_000_000)
    assert runtime.free_memory("mps") == 10_000_000_000


def test_available_memory_of_a_gpu_includes_what_pytorch_keeps_for_reuse(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1_000, 80_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 60_000)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 20_000)
    assert runtime.free_memory("cuda:0") == 41_000


def test_available_memory_includes_the_page_cache():
    assert runtime.free_memory("cpu") == pytest.approx(psutil.virtual_memory().available, rel=0.3)


# -----------------------------------------------------------------------------
# one step

class FixedLoader:
    """Returns the given micro-batches in turn."""

    def __init__(self, batches):
        self.batches = list(batches)
        self.position = 0

    def next_batch(self):
        self.position += 1
        return self.batches[self.position - 1]


def tiny_model(**changes):
    return common.tiny_model(**{"block_size": 8, **changes}).train()


def random_batch(rows=4):
    return torch.randint(0, 64, (2, rows, 8), generator=torch.Generator().manual_seed(1)).unbind()


ZEROS_AND_ONES = torch.zeros((2, 8), dtype=torch.long), torch.ones((2, 8), dtype=torch.long)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)


def step_once(model, batches, optimizers=None, scaler=NO_SCALER, ranks=ONE, lr=0.01):
    """One train_step over the micro-batches; (loss, norm)."""
    optimizers = optimizers or model.configure_optimizers(lr, 0.1)
    return train_step(0, model, model, optimizers, scaler, FixedLoader(batches), lr, len(batches),
                      1.0, "float32", ranks)[:2]


GOLDEN = [(4.15892, 1.99881), (4.00466, 1.35988)]


def test_golden_step():
    """Two optimizer steps give the recorded numbers.

    Update them only for a deliberate change of the initialization, the model or the optimizer, and
    say so in the commit.
    """
    model = tiny_model()
    for expected in GOLDEN:
        assert step_once(model, [random_batch()]) == pytest.approx(expected, rel=1e-4)


def test_accumulated_gradients_equal_those_of_one_large_batch():
    x, y = random_batch(8)
    whole, parts = tiny_model(), tiny_model()
    expected = step_once(whole, [(x, y)])
    assert step_once(parts, list(zip(x.split(2), y.split(2)))) == pytest.approx(expected, rel=1e-5)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


@pytest.fixture
def reduced(monkeypatch):
    """The tensors that are summed over the ranks."""
    tensors = []

    def all_reduce_sum(tensor, ranks):
        tensors.append(tensor)
        return tensor
    monkeypatch.setattr(parallel, "all_reduce_sum", all_reduce_sum)
    return tensors


def test_ddp_averages_gradients_only_in_the_last_micro_step(reduced):
    model, synchronized = tiny_model(), []

    def note(*args):
        synchronized.append(model.require_backward_grad_sync)
    model.register_forward_pre_hook(note)
    step_once(model, [random_batch()] * 3, ranks=Ranks(0, 0, 1, "cpu", True))
    assert synchronized == [False, False, True]
    assert [tensor.requires_grad for tensor in reduced] == [False]  # loss_accum keeps no graph


def test_each_group_has_its_scaled_learning_rate():
    model = tiny_model()
    optimizers = model.configure_optimizers(1.0, 0.1, embd_lr_ratio=3.0)
    step_once(model, [random_batch()], optimizers, lr=0.01)
    assert [group["lr"] for group in optimizers[0].param_groups] == [0.01, 0.03, 0.01]


def test_grad_clip_0_turns_clipping_off():
    """As in nanoGPT; it scaled every gradient to 0."""
    gradients = []
    for grad_clip in (0.0, 1e9, 0.5):
        model = tiny_model()
        model(*random_batch())[1].backward()
        norm = parallel.clip_grad_norm(model, grad_clip)
        assert norm.item() == pytest.approx(GOLDEN[0][1], rel=1e-4)
        gradients.append(model.lm_head.weight.grad)
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_a_long_step_reports_its_progress(monkeypatch, capsys):
    """A second per micro-step: after 5 s, then every 5 s."""
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    step_once(tiny_model(), [ZEROS_AND_ONES] * 20)
    assert capsys.readouterr().out == ("step     0: 25%, 15 s left\nstep     0: 50%, 10 s left\n"
                                       "step     0: 75%, 5 s left\n")
    step_once(tiny_model(), [ZEROS_AND_ONES] * 4)
    assert capsys.readouterr().out == ""
    durations = {0.2: "0 s", 59: "59 s", 90: "1.5 min", 4000: "1.1 h", 10**6: "277.8 h"}
    assert {seconds: cli.duration(seconds) for seconds in durations} == durations


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_can_be_overfit(optimizer):
    model = tiny_model()
    optimizers = model.configure_optimizers(0.01, 0.0, optimizer=optimizer)
    losses = [step_once(model, [random_batch()], optimizers)[0] for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(64), abs=0.2) and losses[-1] < 0.3


def test_a_nonfinite_loss_stops_before_the_update():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters()}
    message = (r"step 0: non-finite loss nan .*rank \[0\], in windows 0 to 0 .* weights were not"
               " updated")
    with pytest.raises(ValueError, match=message):
        step_once(model, [ZEROS_AND_ONES])
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name


def test_a_float16_overflow_halves_the_scale_down_to_one():
    """Simulated: the loss is scaled past float32's largest number."""
    model = tiny_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    loss, norm = step_once(model, [ZEROS_AND_ONES], scaler=scaler)
    assert math.isfinite(loss) and not math.isfinite(norm) and scaler.get_scale() == 2.0**126
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)  # cannot be lowered further
    model.lm_head.weight.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(ValueError, match="gradient norm"):
        step_once(model, [ZEROS_AND_ONES], scaler=scaler)


@pytest.mark.parametrize("parameter, factor", [
    ("transformer.h.0.mlp.c_fc.weight", float("inf")), ("transformer.wpe.weight", float("inf")),
    ("transformer.wpe.weight", 1e30)])  # finite gradients, whose norm is not
def test_a_float16_overflow_skips_all_optimizers_and_resets_the_growth_tracker(
        parameter, factor):
    """The scaler decides for each optimizer by itself: one of two once updated its weights."""
    model = tiny_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = model.configure_optimizers(0.01, 0.1, optimizer="muon")
    step_once(model, [ZEROS_AND_ONES], optimizers, scaler)
    assert scaler.state_dict()["_growth_tracker"] == 1
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    hook = dict(model.named_parameters())[parameter].register_hook(lambda grad: grad * factor)
    step_once(model, [ZEROS_AND_ONES], optimizers, scaler)
    assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (2.0**9, 0)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    hook.remove()
    step_once(model, [ZEROS_AND_ONES], optimizers, scaler)
    assert (scaler.get_scale(), scaler.state_dict()["_growth_tracker"]) == (2.0**9, 1)
    assert not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


# -----------------------------------------------------------------------------
# evaluations

@pytest.fixture
def stream(tmp_path):
    """A TokenStream of 203 tokens."""
    path = str(tmp_path / "a_val_000000.npy")
    data.write_shard(path, np.random.default_rng(0).integers(0, 64, 203).astype(np.uint16))
    return data.TokenStream([path])


def test_validation_is_the_same_for_any_micro_batch_and_sums_in_float64(
        stream, reduced, monkeypatch):
    """With the means over the first 24, 56 and 101 tokens, from the same forwards."""
    monkeypatch.setattr(train_gpt2.reference, "VAL_TOKENS", (24, 56, 101, 160))
    model = tiny_model()
    tokens = torch.from_numpy(stream.read(0, 161).astype(np.int64))
    expected = {}
    for name, windows in (("val", 20), ("val_24", 3), ("val_56", 7), ("val_101", 12)):
        x, y = tokens[:8 * windows], tokens[1:8 * windows + 1]
        expected[name] = model(x.view(windows, 8), y.view(windows, 8))[1].item()
    rows = []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    for B in (1, 2, 3, 20):
        losses = evaluate_loss(model, stream, B, 8, 160, "float32", ONE)
        assert losses == pytest.approx(expected, rel=1e-6) and [*losses] == [*expected]
        assert sum(rows) == 20 and max(rows) <= B
        rows.clear()
    # a stream that is shorter than some of them
    assert [*evaluate_loss(model, stream, 2, 8, 100, "float32", ONE)] == ["val", "val_24", "val_56"]
    assert [tensor.dtype for tensor in reduced] == [torch.float64] * 5


def test_a_stop_request_ends_an_evaluation_at_the_next_batch(stream, monkeypatch):
    model, batches = tiny_model(), []

    def count_and_stop(module, args, output):
        batches.append(len(args[0]))
        if len(batches) == 2:
            monkeypatch.setattr(cli.StopSignals, "received", "SIGTERM")
    model.register_forward_hook(count_and_stop)
    assert evaluate_loss(model, stream, 1, 8, 160, "float32", ONE) is None
    assert len(batches) == 2 and model.training


def test_each_sample_has_its_own_seed_on_whichever_rank(monkeypatch, capsys):
    monkeypatch.setattr(train_gpt2, "generate_text", lambda *args, seed: [f"seed {seed}"])

    expected = "".join(f"sample {i}: 'seed {42 + i}'\n" for i in range(3))
    train_gpt2.print_samples(tiny_model(), "", "float32", ONE, 3)
    assert capsys.readouterr().out == expected
    # as rank 1 of two
    monkeypatch.setattr(parallel, "all_gather", lambda texts, _: [["seed 42", "seed 44"], texts])
    train_gpt2.print_samples(tiny_model(), "", "float32", Ranks(1, 1, 2, "cpu", False), 3)
    assert capsys.readouterr().out == expected


# -----------------------------------------------------------------------------
# main() in this process, with recorded calls

def test_non_finite_weights_are_neither_saved_nor_finished(
        unbroken, text, tmp_path, capsys):
    """The loss shows them one step later; the run was "finished", with NaN weights."""
    run_dir = tmp_path / "log" / "x"
    shutil.copytree(unbroken[0], run_dir)
    assert run_here(tmp_path, *TINY, "--data", text, "--exp-name", "x", "--max-steps", "9",
                    "--lr", "1e30", "--keep-last", "1") == 2
    assert "weights are non-finite; they are not saved. Resume" in capsys.readouterr().err
    assert folder.saved_steps(run_dir) == folder.saved_steps(unbroken[0])


@pytest.mark.parametrize("rank", [0, 1])
def test_the_run(rank, text, tmp_path, monkeypatch):
    """Three steps on a rank of two, without the other one."""
    calls, lines, fractions = [], [], []

    def record(owner, name, result=None):
        """Replaces a function by one that notes its name and last argument."""
        def recorded(*args, **kwargs):
            calls.append((name, *args[-1:]))
            return result
        monkeypatch.setattr(owner, name, recorded)

    class Writer:
        def check(self):
            calls.append("check")

        def wait(self):
            calls.append("wait")

        def start(self, *args):
            calls.append("start")

    monkeypatch.setattr(parallel, "setup", lambda *args: Ranks(rank, rank, 2, "cpu", False))
    monkeypatch.setattr(checkpoint, "Writer", Writer)
    monkeypatch.setattr(folder.Log, "flush", lambda self: calls.append("flush"))
    monkeypatch.setattr(train_gpt2, "evaluate_loss", lambda *args: {"val": 2.0})
    monkeypatch.setattr(train_gpt2, "peak_flops", lambda *args: 1e9)
    monkeypatch.setattr(train_gpt2, "step_line", lambda *args: lines.append(args))
    monkeypatch.setattr(train_gpt2, "report_progress",
                        lambda label: fractions.append if label == "training" else lambda _: None)
    record(torch, "set_float32_matmul_precision")
    record(train_gpt2, "use_deterministic_algorithms")
    record(torch, "manual_seed")
    record(train_gpt2, "capture", ({}, {}))
    assert run_here(tmp_path, *TINY, "--data", text, "--deterministic", "--max-steps", "3",
                    "--val-every", "2", "--save-every", "2", "--seed", "7", "--schedule", "wsd",
                    "--lr", "0.1", "--warmup-steps", "2", "--min-lr-ratio", "0.5") == 0

    # TF32; the initial weights are the same on every rank, dropout is not
    assert calls[:4] == [("set_float32_matmul_precision", "high"),
                         ("use_deterministic_algorithms", True),
                         ("manual_seed", 7), ("manual_seed", 8 + rank)]
    # the log is on disk before a checkpoint, errors of the writer are raised, the last write is
    # awaited
    save = ["check", "flush", "wait", ("capture", Ranks(rank, rank, 2, "cpu", False))]
    if rank == 0:
        save.append("start")
    assert calls[4:] == ["check", "check", *save, *save, "wait"]

    model = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=50304)
    flops = model.flops_per_token(16)
    assert [line[0] for line in lines] == [0, 1, 2]
    assert fractions == [1 / 3, 2 / 3, 1]
    for step, _, _, lr, _, dt, tok_per_sec, mfu, mfu_name in lines:
        assert lr == get_lr(step, 0.1, 0.05, 2, 3, "wsd", 0.2)
        assert tok_per_sec == 128 / dt and mfu == pytest.approx(flops * tok_per_sec / (2 * 1e9))
        assert mfu_name == "MFU"


def test_the_copy_of_a_checkpoint_is_freed_before_the_next_one_is_made(
        text, tmp_path, monkeypatch):
    """Two of them were in pinned memory, 24 bytes per parameter."""
    real, copies, alive = parallel.full_state, [], []

    def full_state(*args):
        alive.append(sum(copy() is not None for copy in copies))
        weights, states = real(*args)
        copies.append(weakref.ref(weights["transformer.wte.weight"]))
        return weights, states
    monkeypatch.setattr(parallel, "full_state", full_state)
    assert run_here(tmp_path, *TINY, "--data", text, "--max-steps", "3", "--save-every", "1",
                    "--val-every", "0") == 0
    assert alive == [0, 0, 0]


def test_the_log_has_a_line_where_an_epoch_ends(tmp_path):
    """After the step that reads the epoch's last window."""
    (tmp_path / "short.txt").write_text(text_of_words(60))
    assert run_here(tmp_path, *TINY, "--data", "short.txt", "--val-every", "0", "--max-steps", "12",
                    "--val-tokens", "16") == 0
    run_dir = tmp_path / "log" / "shakespeare"
    state = checkpoint.load_latest(run_dir).state["loader"]
    ends = [8 * (step + 1) // state["num_windows"] for step in range(12)]  # 8 windows per step
    expected = [f"{step} epoch {ends[step]}" for step in range(1, 12)
                if ends[step] > ends[step - 1]]
    assert log_of(run_dir, "epoch") == expected and len(expected) >= 2


def test_the_last_step_is_saved_and_can_be_evaluated_without_changing_the_run(
        text, tmp_path, capsys):
    """--save-every 0 announced samples of a run that had saved nothing."""
    def files():
        return {path: os.stat(path).st_mtime_ns for path in tmp_path.rglob("*")}

    flags = [*TINY, "--data", text]
    new = ["--save-every", "0", "--max-steps", "2", "--log-dir", "new", "--exp-name", "a/"]
    assert run_here(tmp_path, *flags, *new) == 0
    out = capsys.readouterr().out
    run_dir = tmp_path / "new" / "a"
    assert re.search("samples: .*sample.py new/a\n", out) and folder.saved_steps(run_dir) == [2]
    val = re.search(r" \| val \d+\.\d{4} \| val_bpb \d+\.\d{4}\n", out[out.index("step     2"):])[0]
    shutil.copy(run_dir / "model_00002.pt", run_dir / "model_00009.pt")  # without its state
    before = files()
    assert run_here(tmp_path, "--eval-only", "--resume", "new/a") == 0
    out = capsys.readouterr().out
    assert "skipping step 9: " in out and "step     2" + val in out
    assert run_here(tmp_path, "--eval-only", *flags, "--init-from", "new/a") == 0
    assert "step     0" + val in capsys.readouterr().out
    assert run_here(tmp_path, "--dry-run", "--resume", "new/a") == 0
    assert before == files()


# -----------------------------------------------------------------------------
# real runs

@pytest.fixture(scope="module")
def unbroken(text, tmp_path_factory):
    """A finished run in its own process: (its folder, what it printed)."""
    cwd = tmp_path_factory.mktemp("unbroken")
    process = train(cwd, "--data", text)
    assert process.returncode == 0, process.stderr
    return os.path.join(cwd, "log", "shakespeare"), process.stdout


def test_a_run_writes_its_log_config_checkpoints_and_picture(unbroken):
    run_dir, out = unbroken
    assert sorted(os.listdir(run_dir)) == [
        "config.json", "log.txt", "loss.png", "model_00004.pt", "model_00008.pt", "state_00004.pt",
        "state_00008.pt"]
    losses = values_of(run_dir, "val")
    assert losses[0] == pytest.approx(math.log(50304), abs=0.2) and losses[-1] < losses[0] - 0.1
    assert "published" not in out  # on a text of one's own there is nothing to compare with
    # a line has 8 words of 3.6 letters and as many blanks, in 9 tokens
    bits = [loss / math.log(2) * 9 / (8 * 3.6 + 8) for loss in losses]
    assert values_of(run_dir, "val_bpb") == pytest.approx(bits, rel=0.05)
    assert [int(line.split()[0]) for line in log_of(run_dir, "train")] == list(range(8))
    assert re.search(r"step 0/8 \| loss \d+\.\d{4} \| lr [\d.e+-]+ \| norm [\d.]+"
                     r" \| dt \d+ms \| tok/sec [\d,]+\n", out)
    # a terminal of 80 columns does not wrap the steps' lines
    assert len(train_gpt2.step_line(0, 600, 10.84, 0.012, 4.03, 0.05, 20000, None, "MFU")) <= 80
    with open(os.path.join(run_dir, "config.json"), encoding="utf-8") as f:
        description = json.load(f)
    assert description["config"]["n_embd"] == 16 and description["torch"] == torch.__version__


def test_a_finished_run_is_not_changed(unbroken, capsys):
    run_dir, _ = unbroken
    before = {path.name: path.stat().st_mtime_ns for path in os.scandir(run_dir)}
    assert run_here(os.path.dirname(os.path.dirname(run_dir)), *TINY) == 0
    assert "is finished at step 8" in capsys.readouterr().out
    assert before == {path.name: path.stat().st_mtime_ns for path in os.scandir(run_dir)}


def test_an_evaluation_that_a_stop_interrupted_is_repeated_when_the_run_resumes(unbroken, tmp_path):
    """Here the one after the last step: it is not in the log."""
    run_dir = tmp_path / "log" / "shakespeare"
    shutil.copytree(unbroken[0], run_dir)
    log = (run_dir / "log.txt").read_text()
    kept = [line for line in log.splitlines(True) if not line.startswith("8 val")]
    (run_dir / "log.txt").write_text("".join(kept))
    assert run_here(tmp_path, *TINY) == 0
    assert (run_dir / "log.txt").read_text() == log


def test_a_resumed_run_can_drop_a_tracker_that_is_not_installed(saved, monkeypatch):
    saved.state["train_config"]["tracker"] = "wandb"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tracker wandb needs the package wandb"):
        settings.config_from_flags([])
    assert settings.config_from_flags(["--tracker", "none"])[0].tracker == "none"


class Ended(Exception):
    """A process has ended without printing what was waited for."""


def wait_for(process, pattern):
    """Reads the output of a process up to a line with pattern."""
    lines = []
    for line in process.stdout:
        lines.append(line)
        if re.search(pattern, line):
            return
    raise Ended(f"status {process.wait()}, without {pattern!r}: {''.join(lines)[-2000:]}")


def kill_when(process, pattern):
    """SIGKILLs a process (group) once its output has a line with pattern."""
    wait_for(process, pattern)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=30)


def test_a_killed_run_resumes_bitwise_identical(unbroken, text, tmp_path, capsys):
    # the save of step 6, before its update, waits for that of step 4
    kill_when(start(tmp_path, "--data", text, "--save-every", "2"), "step +6/8")
    assert run_here(tmp_path, *TINY) == 0  # data and settings come from the checkpoint
    assert re.search("from step [46],", capsys.readouterr().out)
    run_dir = tmp_path / "log" / "shakespeare"
    streams = ("train", "val", "norm", "lr")
    assert log_of(run_dir, *streams) == log_of(unbroken[0], *streams)
    ours, theirs = (torch.load(os.path.join(place, "model_00008.pt"))["model"]
                    for place in (run_dir, unbroken[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
@pytest.mark.parametrize("W, total", [(2, 1024), (3, 1152), (8, 1024)])
def test_the_shakespeare_preset_trains_on_any_number_of_ranks(W, total, tmp_path):
    """As ./train.sh does on a machine with W GPUs: the mean over all sequences is exact."""
    flags = ["--preset", "shakespeare", "--data", INPUT_TXT, "--optimizer", "adamw",
             "--dtype", "float32", "--compile", "off", "--device", "cpu", "--max-steps", "3",
             "--val-every", "0", "--sample-every", "0", "--save-every", "0"]
    logs = []
    for ranks, more in ((W, []), (1, ["--total-batch-size", str(total)])):
        done = python(*launcher(ranks), SCRIPT, *flags, *more, "--exp-name", f"on_{ranks}",
                      cwd=tmp_path, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        log = log_of(tmp_path / "log" / f"on_{ranks}", "train")
        logs.append([float(line.split()[2]) for line in log])
    assert len(logs[0]) == 3 and logs[0] == pytest.approx(logs[1], abs=1e-4)


@pytest.mark.slow
def test_torchrun_killed_and_started_again_resumes(text, tmp_path):
    kill_when(start(tmp_path, "--data", text, ranks=2), "step +5/8")
    process = train(tmp_path, ranks=2)
    # the ranks outlive torchrun; rank 0 saves and stops when its stdout is closed, soon after
    assert process.returncode == 0 and re.search("from step [4-8]", process.stdout), process.stderr
    steps = [line.split()[0] for line in log_of(tmp_path / "log" / "shakespeare", "train")]
    assert steps == [str(step) for step in range(8)]


@contextlib.contextmanager
def limited_file_size(num_bytes):
    """Context in which writing more into a file fails, as on a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(text, tmp_path, capsys):
    with limited_file_size(2_000_000):
        assert run_here(tmp_path, *TINY, "--data", text) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: cannot write") and error.count("\n") == 1
    assert sorted(os.listdir(tmp_path / "log" / "shakespeare")) == ["config.json", "log.txt"]


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, text, capsys):
    assert run_here(tmp_path, *TINY, "--data", text, "--dry-run") == 0
    assert os.listdir(tmp_path) == []
    printed = capsys.readouterr().out
    for part in ("parameters", "8 steps of 128 tokens", "4 micro-steps of B=2 x T=16",
                 "GB per process (state", "FLOPs"):
        assert part in printed


@pytest.mark.slow
def test_deterministic_runs_train(text, tmp_path):
    """Every operation has a deterministic implementation; otherwise torch raises."""
    for name in ("a", "b"):
        process = train(tmp_path, "--data", text, "--deterministic", "--exp-name", name)
        assert process.returncode == 0, process.stderr
    a, b = (log_of(tmp_path / "log" / name, "train", "val", "norm") for name in ("a", "b"))
    assert a == b


def test_the_best_checkpoint_of_a_text_is_kept_and_named(text, tmp_path, monkeypatch, capsys):
    """A small book, read many times, ended with an overfit model and had lost the better one."""
    losses = iter([9.0, 5.0, 3.0, 4.0, 6.0])
    monkeypatch.setattr(train_gpt2, "evaluate_loss", lambda *args: {"val": next(losses)})
    assert run_here(tmp_path, *TINY, "--data", text, "--max-steps", "4", "--keep-last", "1",
                    "--save-every", "1", "--val-every", "1") == 0
    assert folder.saved_steps(tmp_path / "log" / "shakespeare") == [2, 4]
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.startswith("the validation loss was lowest at step 2: ")
    assert line.endswith("sample.py log/shakespeare/model_00002.pt")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_compile_train(dtype, text, tmp_path):
    """float16 uses the GradScaler; with --compile on a failing compilation fails the run."""
    process = train(tmp_path, "--data", text, "--dtype", dtype, "--compile", "on", timeout=300)
    assert process.returncode == 0, process.stderr
    losses = values_of(tmp_path / "log" / "shakespeare", "val")
    assert losses[-1] < losses[0] - 0.1


PLAN = [SCRIPT, "--preset", "gpt2-124M", "--dry-run"]


def test_only_rank_0_prints_that_torch_is_imported(tmp_path):
    """test_cli.py has rank 0."""
    # found before the real one
    (tmp_path / "torch.py").write_text("import sys; print('imported'); sys.exit(0)")
    process = python(*PLAN, cwd=tmp_path, env={"PYTHONPATH": f"{tmp_path}:{ROOT}", "RANK": "1"})
    assert (process.returncode, process.stdout, process.stderr) == (0, "imported\n", "")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is Linux's OpenMP")
def test_waiting_threads_sleep_soon_unless_the_user_chooses_otherwise(tmp_path, monkeypatch):
    """They spun for milliseconds: under other load a step took several times as long."""
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delitem(ENV, name, raising=False)
    for policy, spins in (({}, "3000"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "30000000000")):
        process = python(*PLAN, "--device", "cpu", cwd=tmp_path,
                         env={"OMP_DISPLAY_ENV": "verbose", **policy})  # prints what it has read
        assert process.returncode == 0 and "parameters" in process.stdout
        assert f"GOMP_SPINCOUNT = '{spins}'" in process.stderr
