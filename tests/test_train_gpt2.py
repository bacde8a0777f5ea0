"""
The training script: schedule, configuration, one golden step, and real runs in real processes.

    ./test.sh tests/test_train_gpt2.py        # no network, no GPU; two gloo ranks on the CPU

Processes train a model of one block and 16 channels on a text made here.
"""
import glob
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref

import pytest
import torch

from run import checkpoint
from run import cli
from run import parallel
from run import settings
from run import runtime
import train_gpt2
from run.config import INPUT_TXT, PRESETS, TrainConfig, parse_args, preset_settings
from model import GPT, GPTConfig
from run.parallel import Ranks
from train_gpt2 import NonFinite, evaluate_loss, get_lr, train_step
from run import folder

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ALONE = Ranks(0, 0, 1, "cpu", False)
TINY = ["--preset", "shakespeare", "--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--block-size", "16",
        "--total-batch-size", "128", "--batch-size", "2", "--max-steps", "8", "--val-every", "4", "--sample-every", "0",
        "--save-every", "4", "--compile", "off", "--dtype", "float32", "--device", "cpu", "--dropout", "0.1"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text of 400 lines of common words."""
    words = "the king and his queen will not come to this house tonight for love or war my lord".split()
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("data") / "text.txt"
    path.write_text("\n".join(" ".join(rng.choices(words, k=8)) for _ in range(400)))
    return str(path)


def command(*flags, ranks=1):
    """The command line of a training process, or of torchrun with several."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return [*launcher, os.path.join(ROOT, "train_gpt2.py"), *TINY, *flags]


def train(cwd, *flags, ranks=1, timeout=120):
    """Runs training in cwd to its end; the finished process, with its output."""
    return subprocess.run(command(*flags, ranks=ranks), cwd=cwd, capture_output=True, text=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})


def log_of(run_dir, *streams):
    """The log's lines of some streams, unchanged."""
    with open(os.path.join(run_dir, "log.txt"), encoding="utf-8") as f:
        return [line.strip() for line in f if line.split()[1] in streams]


# -----------------------------------------------------------------------------
# pure functions

def test_get_lr_is_warmup_then_cosine_decay_to_the_minimum():
    lr = [get_lr(step, 1.0, 0.1, 10, 110) for step in range(112)]
    assert lr[0] == pytest.approx(0.1)                  # not zero
    assert lr[9] == pytest.approx(1.0) and lr[10] == pytest.approx(1.0)
    assert lr[60] == pytest.approx(0.55)                # halfway
    assert lr[110] == lr[111] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(lr[9:], lr[10:]))


def test_get_lr_of_wsd_is_warmup_then_constant_then_linear_decay_to_the_minimum():
    lr = [get_lr(step, 1.0, 0.1, 10, 110, "wsd", 0.5) for step in range(112)]
    assert lr[:10] == [get_lr(step, 1.0, 0.1, 10, 110) for step in range(10)]   # the same warmup
    assert lr[10:56] == [1.0] * 46                      # 55 steps of decay are left
    assert [a - b for a, b in zip(lr[55:110], lr[56:111])] == pytest.approx([0.9 / 55] * 55)
    assert lr[110] == lr[111] == pytest.approx(0.1)


@pytest.mark.slow
def test_a_run_follows_the_schedule_it_is_given(text, tmp_path):
    flags = ["--schedule", "wsd", "--wsd-decay", "0.5", "--warmup-steps", "2", "--val-every", "0", "--save-every", "0"]
    process = train(tmp_path, "--data", text, "--lr", "0.01", "--min-lr-ratio", "0.2", *flags)
    assert process.returncode == 0, process.stderr
    logged = [float(line.split()[2]) for line in log_of(tmp_path / "log" / "shakespeare", "lr")]
    assert logged == [get_lr(step, 0.01, 0.002, 2, 8, "wsd", 0.5) for step in range(8)]


def test_wsd_decay_must_be_a_fraction():
    for fraction in (0.0, 1.5):
        with pytest.raises(ValueError, match="--wsd-decay"):
            TrainConfig(wsd_decay=fraction)


@pytest.mark.parametrize("preset, parameters", [("gpt2-124M", 124_475_904), ("gpt2-350M", 354_871_296),
                                                ("gpt2-774M", 774_090_240), ("gpt2-1558M", 1_557_686_400)])
def test_presets_are_the_lectures_models_with_a_padded_vocabulary(preset, parameters):
    config = TrainConfig(**preset_settings(preset))
    with torch.device("meta"):
        assert GPT(config.gpt_config()).num_params() == parameters
    assert config.vocab_size == 50304 and config.sequence_length == 1024


def test_every_preset_divides_its_batch_and_names_its_run():
    for preset in PRESETS:
        changes = preset_settings(preset)
        config = TrainConfig(**changes, preset=preset)
        assert config.exp_name == preset
        B, _ = settings.choose_batch_size(config, 10**6, 8 if preset != "shakespeare" else 1, None, False, "bfloat16", True)
        assert B >= 1


def test_the_124M_preset_is_the_lectures_recipe():
    c = TrainConfig(**preset_settings("gpt2-124M"))
    assert (c.total_batch_size, c.lr, c.min_lr_ratio, c.warmup_steps, c.beta1, c.beta2, c.weight_decay, c.grad_clip) == \
        (524288, 6e-4, 0.1, 715, 0.9, 0.95, 0.1, 1.0)
    assert c.optimizer == "adamw" and c.epochs == 1.0


def test_a_batch_size_that_does_not_divide_lists_those_that_do():
    config = TrainConfig(block_size=32, total_batch_size=32 * 12, batch_size=5)
    with pytest.raises(ValueError, match=r"\[1, 2, 3, 4, 6, 12\], or --total-batch-size 320 or 480"):
        settings.choose_batch_size(config, 10**6, 1, None, True, "float32", False)
    config.batch_size = 32
    with pytest.raises(ValueError, match=r", or --total-batch-size 1024$"):
        settings.choose_batch_size(config, 10**6, 1, None, True, "float32", False)
    config.batch_size = 0
    with pytest.raises(ValueError, match=r"12 sequences .* 8 processes; numbers that would fit: \[1, 2, 3, 4, 6, 12\]"):
        settings.choose_batch_size(config, 10**6, 8, None, True, "float32", False)


def test_the_automatic_batch_size_fits_the_available_memory():
    config = TrainConfig()
    sizes, eager = ([settings.choose_batch_size(config, 124_475_904, 8, gigabytes * 1e9, False, "bfloat16", compiled)[0]
                     for gigabytes in (4, 8, 24, 80)] for compiled in (True, False))
    assert all(a <= b for a, b in zip(eager, sizes)) and eager != sizes  # the compiled step needs less memory
    assert sizes == sorted(sizes) and sizes[1] >= 4 and sizes[-1] == 64 and sizes[0] < sizes[-1]
    for B in sizes:
        assert (config.total_batch_size // config.sequence_length // 8) % B == 0


def test_the_loss_is_computed_in_chunks_only_where_a_larger_batch_then_fits():
    """On a card of 4 to 8 GB, or where the given B would not fit."""
    def choose(gigabytes, batch_size=0, compiled=True):
        config = TrainConfig(batch_size=batch_size)
        return settings.choose_batch_size(config, 124_475_904, 1, gigabytes * 1e9, False, "bfloat16", compiled)
    assert choose(4.5) == (2, 8) and choose(4.5, compiled=False) == (2, 8) and choose(8, compiled=False) == (4, 8)
    assert choose(8) == (4, 1) and choose(80) == (64, 1)
    assert choose(20, batch_size=32) == (32, 8) and choose(24, batch_size=32) == (32, 1)
    assert choose(1) == (1, 8) and choose(2, batch_size=64) == (64, 8)  # these do not fit in any way


def test_flags_are_made_from_the_fields_and_only_given_flags_are_returned():
    given = parse_args(["--lr", "0.5", "--dry-run", "--compile", "off"])
    assert given == {"lr": 0.5, "dry_run": True, "compile": "off"}
    for argv in (["--learning-rate", "1"], ["--lr", "x"], ["--preset", "gpt5"], ["--optimizer", "sgd"], ["--max", "3"]):
        with pytest.raises(ValueError, match="--help"):
            parse_args(argv)


def test_the_name_of_a_run_is_that_of_a_folder_in_log_dir():
    assert parse_args(["--exp-name", "my run/"]) == {"exp_name": "my run"}
    for name in ("", " ", ".", "..", "/", "a/b", "/tmp/x", "../x", "-x", " x", "a\nb", "a\x1b[31m", "a\0", "a\udc80"):
        with pytest.raises(ValueError, match="--exp-name .* must be the name of a folder"):
            parse_args([f"--exp-name={name}"])
    for flag in ("--log-dir", "--resume", "--data", "--init-from", "--device", "--hellaswag"):
        with pytest.raises(ValueError, match=f"{flag} ''.* must not be empty"):
            parse_args([flag, ""])


def test_each_text_has_its_own_run_unless_a_preset_or_a_name_is_given(tmp_path, monkeypatch):
    """./train.sh and then ./train.sh --data my_book.txt would otherwise resume Shakespeare's model on another book."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("texts.d/shards")
    open("texts.d/shards/a_train_000001.npy", "w").close()
    names = {"my book.txt": "my book", "texts.d": "texts.d", "texts.d/": "texts.d", ".": tmp_path.name, "-.txt": "shakespeare",
             INPUT_TXT: "shakespeare", "texts.d/shards": "gpt2-124M"}
    assert {path: settings.run_folder({"data": path}) for path in names} == \
        {path: os.path.join("log", name) for path, name in names.items()}
    assert settings.run_folder({"data": "a.txt", "preset": "gpt2-124M"}) == "log/gpt2-124M"
    assert settings.run_folder({"data": "a.txt", "exp_name": "b", "log_dir": "c"}) == "c/b"


def test_epochs_replace_the_max_steps_of_a_preset():
    config, _ = settings.config_from_flags(["--preset", "shakespeare", "--epochs", "3", "--eval-only"])
    assert (config.epochs, config.max_steps) == (3, 0)
    with pytest.raises(ValueError, match="--epochs and --max-steps both set"):
        settings.config_from_flags(["--epochs", "3", "--max-steps", "5"])


def test_the_help_has_the_presets_values_and_examples(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    out = capsys.readouterr().out
    assert re.search(r"gpt2-1558M +gpt2-xl +1048576 +358 +0.0002\n", out)
    assert "shakespeare also has n_layer 2" in out
    assert out.count("train_gpt2.py") == 4 and "the optimizer:" in out  # usage, three examples
    assert "default 0)" not in out.replace("\n", " ").split("--seed")[0].split("--warmup")[0]
    for preset in PRESETS:
        assert f"  {preset} " in out


# The flag that changes each setting of the run `unbroken`, and what a resumed run does with the change: "refused", "forced",
# or where it is read; "" for what does not concern the run's result. A new setting must be added here.
CHANGES = {
    "preset": ("gpt2-124M", "refused"), "init_from": ("gpt2", "refused"), "optimizer": ("adamw", "refused"),
    "init": ("lecture", "refused"),
    "n_layer": ("2", "refused"), "n_head": ("1", "refused"), "n_embd": ("18", "refused"), "block_size": ("32", "refused"),
    "vocab_size": ("50257", "refused"), "sequence_length": ("8", "refused"), "bias": (None, "refused"),
    "total_batch_size": ("64", "forced"), "seed": ("1", "forced"), "shuffle": ("off", "forced"), "dropout": ("0.2", "forced"),
    "dtype": ("bfloat16", "forced"), "data": ("other.txt", "DataLoaderLite.load_state_dict compares it"),
    "exp_name": ("other", "run_folder"), "log_dir": ("other", "run_folder"), "batch_size": ("4", "make_plan"),
    "epochs": ("3", "make_plan"), "max_steps": ("20", "make_plan"), "lr": ("0.1", "get_lr"), "min_lr_ratio": ("0.3", "get_lr"),
    "schedule": ("wsd", "get_lr"), "wsd_decay": ("0.1", "get_lr"), "warmup_steps": ("1", "get_lr"),
    "embd_lr_ratio": ("3", "make_optimizers"), "weight_decay": ("0.3", "make_optimizers"), "beta1": ("0.8", "make_optimizers"),
    "beta2": ("0.9", "make_optimizers"), "grad_clip": ("0", "train_step"), "device": ("mps", ""), "compile": ("on", ""),
    "parallel": ("zero", ""), "activation_checkpointing": (True, ""), "val_every": ("1", "main"), "val_tokens": ("999", "main"),
    "hella_every": ("1", "main"), "hellaswag": ("off", "main"), "sample_every": ("1", "main"), "prompt": ("x", "main"),
    "save_every": ("1", "main"), "keep_last": ("1", "save_and_prune"), "keep_best": (True, "save_and_prune"),
    "tracker": ("tensorboard", ""), "resume": ("never", ""), "force": (True, ""), "timeout": ("1", ""),
    "deterministic": (True, ""), "dry_run": (True, ""), "eval_only": (True, ""), "price": ("2", "make_plan"),
    "tok_per_sec": ("9", "make_plan"),
}


@pytest.fixture
def saved(unbroken):
    """The last Checkpoint of the finished run."""
    return checkpoint.load_latest(unbroken[0])


def test_a_refused_change_is_not_announced_first(saved, monkeypatch, capsys):
    """It printed that the run resumes with changed settings, and then that it does not."""
    monkeypatch.setattr(settings, "load_run", lambda given: saved)
    with pytest.raises(ValueError, match="n_layer cannot change"):
        settings.config_from_flags(["--n-layer", "2"])
    assert capsys.readouterr().out == ""


def test_every_setting_is_refused_or_takes_effect_when_a_run_resumes(saved, monkeypatch):
    monkeypatch.setattr(settings, "load_run", lambda given: saved)
    monkeypatch.setattr(folder, "check_tracker", lambda name: None)
    assert CHANGES.keys() == TrainConfig.__dataclass_fields__.keys()
    assert {name for name, (_, what) in CHANGES.items() if what == "refused"} == {*settings.FIXED, "bias"}
    assert {name for name, (_, what) in CHANGES.items() if what == "forced"} == set(settings.FORCED)
    for name, (value, what) in CHANGES.items():
        flag = ["--" + name.replace("_", "-"), *([value] if value is not True else [])]
        flag += ["--optimizer", "adamw"] if name == "parallel" else []  # muon cannot be sharded
        if name == "bias":
            with pytest.raises(ValueError, match="unrecognized arguments: --bias"):  # it has no flag
                parse_args(["--bias"])
        elif what == "refused":
            with pytest.raises(ValueError, match=f"{name}.* cannot change when a run resumes"):
                settings.config_from_flags([*flag, "--sequence-length", "16"] if name == "block_size" else flag)
        elif what == "forced":
            with pytest.raises(ValueError, match=f"changing {name} makes it a different run"):
                settings.config_from_flags(flag)
            assert str(getattr(settings.config_from_flags([*flag, "--force"])[0], name)) == value
        elif name != "parallel":
            config, _ = settings.config_from_flags(flag)
            assert str(getattr(config, name)) in (str(value), f"{value}.0")


def test_a_resumed_run_keeps_the_settings_that_are_given_again(saved, monkeypatch, capsys):
    monkeypatch.setattr(settings, "load_run", lambda given: saved)
    config, _ = settings.config_from_flags([*TINY, "--exp-name", "x"])
    assert "changed" not in capsys.readouterr().out
    assert (config.preset, config.max_steps, config.log_dir, config.exp_name) == ("shakespeare", 8, "log", "x")
    config, _ = settings.config_from_flags(["--epochs", "3"])
    assert (config.epochs, config.max_steps) == (3, 0)


def test_how_a_run_was_started_is_not_taken_over_when_it_resumes(saved, monkeypatch, capsys):
    """Else a run once resumed with --force would accept every later change."""
    started = {"dry_run": True, "eval_only": True, "force": True, "resume": "never", "price": 2.5, "tok_per_sec": 9.0}
    assert started.keys() == set(settings.STARTED)
    state = {**saved.state, "train_config": {**saved.state["train_config"], **started}}
    monkeypatch.setattr(settings, "load_run", lambda given: saved._replace(state=state))
    config, _ = settings.config_from_flags([])
    assert {name: getattr(config, name) for name in started} == {name: getattr(TrainConfig, name) for name in started}
    settings.config_from_flags(["--price", "3", "--force"])
    assert "changed" not in capsys.readouterr().out


def test_optimizer_settings_and_dropout_of_a_resumed_run_are_the_flags(saved, tmp_path, monkeypatch):
    """They were announced as changed, and the checkpoint's stayed in effect."""
    monkeypatch.setattr(settings, "load_run", lambda given: saved)
    config, _ = settings.config_from_flags(["--weight-decay", "0.3", "--beta1", "0.8", "--beta2", "0.9", "--embd-lr-ratio", "3",
                                   "--dropout", "0.2", "--force", "--log-dir", str(tmp_path), "--exp-name", "x"])
    raw_model = train_gpt2.build_model(config, saved, ALONE)
    optimizers = parallel.make_optimizers(raw_model, config, ALONE)
    train_gpt2.restore(saved, optimizers, torch.amp.GradScaler("cpu", enabled=False), config, ALONE)
    muon, adamw = optimizers
    assert [g["weight_decay"] for g in muon.param_groups + adamw.param_groups] == [0.3, 0.3, 0.0]
    assert [(g["betas"], g["lr_scale"]) for g in adamw.param_groups] == [((0.8, 0.9), 3.0), ((0.8, 0.9), 1.0)]
    assert adamw.state[raw_model.lm_head.weight]["step"] == 8  # the state is the checkpoint's
    block = raw_model.transformer.h[0]
    assert (raw_model.config.dropout, block.attn.dropout, block.mlp.dropout.p, raw_model.transformer.drop.p) == (0.2,) * 4


def test_a_moved_clone_finds_its_input_txt(saved, monkeypatch):
    state = {**saved.state, "train_config": {**saved.state["train_config"], "data": "/no/such/clone/input.txt"}}
    monkeypatch.setattr(settings, "load_run", lambda given: saved._replace(state=state))
    assert settings.config_from_flags([])[0].data == INPUT_TXT
    assert settings.config_from_flags(["--data", "mine.txt"])[0].data == "mine.txt"


def test_restarted_ranks_resume_from_the_named_checkpoint_until_the_run_has_loaded_it(unbroken, tmp_path, monkeypatch):
    """torchrun restarted them before that, and they resumed from the newest checkpoint, which the user had rejected.

    As rank 1, which does not lock the folder.
    """
    run_dir = str(tmp_path / "run")
    shutil.copytree(unbroken[0], run_dir)
    for name, value in {"RANK": "1", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_RUN_ID": "first"}.items():
        monkeypatch.setenv(name, value)
    path = os.path.join(run_dir, "model_00004.pt")

    def step():
        return settings.config_from_flags(["--resume", path])[1].step

    def starts():  # what main does before it trains
        folder.write_config(run_dir, {"resume": path}, "float32", ALONE)
    assert step() == 4
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert step() == 4                                      # config.json is of an earlier run
    starts()
    assert step() == 8                                      # a checkpoint that the run has saved since
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")     # the same command, later
    assert step() == 4
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    starts()
    assert step() == 4
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")          # the job was requeued: torchrun's first start in it
    assert step() == 8
    monkeypatch.delenv("SLURM_RESTART_COUNT")
    assert settings.config_from_flags(["--resume", run_dir])[1].step == 8


def test_restarted_ranks_do_not_touch_the_run_that_resume_never_found(unbroken, tmp_path, monkeypatch):
    """--resume never ended with an error, torchrun restarted the ranks, and these resumed the run."""
    run_dir = str(tmp_path / "run")
    shutil.copytree(unbroken[0], run_dir)
    flags = ["--resume", "never", "--log-dir", str(tmp_path), "--exp-name", "run", "--data", "input.txt"]
    for name, value in {"RANK": "1", "TORCHELASTIC_RESTART_COUNT": "1", "TORCHELASTIC_RUN_ID": "first"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="already holds a run"):
        settings.config_from_flags(flags)
    folder.write_config(run_dir, {"resume": "never"}, "float32", ALONE)  # what main does before it trains
    assert settings.load_run(settings.parse_args(flags)).step == 8


def test_ranks_that_found_other_checkpoints_are_an_error(saved, monkeypatch):
    """DDP sends rank 0's weights to all; the moments, the learning rate and the data's position would differ."""
    steps = [saved.step, saved.step]
    monkeypatch.setattr(parallel, "all_gather", lambda value, ranks: [value, *steps[1:]])
    settings.check_same_step(saved, ALONE)
    steps[1] = 0
    with pytest.raises(ValueError, match=f"rank 0 starts from step {saved.step}, rank 1 from step 0: the run folder"):
        settings.check_same_step(saved, ALONE)
    with pytest.raises(ValueError, match="rank 0 starts from step 0, rank 1 from step 8"):
        steps[1] = 8
        settings.check_same_step(None, ALONE)
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", "--dry-run", "--exp-name", "none"])
    with pytest.raises(ValueError, match="rank 0 starts from step 0, rank 1 from step 8"):
        train_gpt2.main()


def test_the_message_of_a_stop_names_a_command_that_resumes(unbroken):
    """The same command would start over from --resume's file, or be an error after "never"."""
    run_dir = unbroken[0]
    def told(value):
        log_dir, name = os.path.split(str(run_dir))
        return settings.how_to_resume(TrainConfig(resume=value, log_dir=log_dir, exp_name=name))
    assert told("auto") == told(str(run_dir)) == "the same command"
    assert told("never") == told(os.path.join(run_dir, "model_00004.pt")) == f"--resume {run_dir}"


def test_the_plan_of_weights_without_biases_has_none(tmp_path):
    torch.save({**checkpoint.model_contents(tiny_model(bias=False, vocab_size=50257), None), "step": 0}, tmp_path / "m.pt")
    config, _ = settings.config_from_flags(["--init-from", str(tmp_path / "m.pt"), "--data", "x.txt", "--total-batch-size", "64",
                                   "--preset", "shakespeare", "--eval-only"])
    assert not config.bias and not config.gpt_config().bias


def test_weights_and_a_text_are_fine_tuned(tmp_path, monkeypatch, capsys):
    """They had the preset shakespeare: Muon at 0.012, and 8 sequences per micro-step although 1,024 tokens are one."""
    monkeypatch.chdir(tmp_path)
    torch.save({**checkpoint.model_contents(tiny_model(block_size=1024, vocab_size=50257), None), "step": 0}, "m.pt")
    c, saved = settings.config_from_flags(["--init-from", "m.pt", "--data", "my_book.txt"])
    assert (c.preset, c.exp_name, c.optimizer, c.lr, c.n_layer) == ("finetune", "my_book-finetune", "adamw", 3e-5, 2)
    settings.make_plan(c, 10**5, "float32", ALONE)
    assert "100 steps of 8,192 tokens" in capsys.readouterr().out
    for flags, preset, name in ((["--data", "my_book.txt"], "shakespeare", "my_book"),
                                (["--init-from", "m.pt"], "finetune", "finetune"),
                                (["--init-from", "m.pt", "--preset", "gpt2-124M"], "gpt2-124M", "gpt2-124M")):
        c, _ = settings.config_from_flags(flags)
        assert (c.preset, c.exp_name) == (preset, name)
    os.mkdir("edu_fineweb10B")
    open("edu_fineweb10B/edufineweb_train_000001.npy", "w").close()
    assert settings.config_from_flags(["--init-from", "m.pt", "--exp-name", "x"])[0].preset == "gpt2-124M"


def test_a_run_that_does_not_fit_is_refused_unless_forced(monkeypatch, capsys):
    def plan(memory, **changes):
        monkeypatch.setattr(settings, "free_memory", lambda device: memory)
        config = TrainConfig(**{**preset_settings("shakespeare"), "preset": "shakespeare", **changes})
        settings.make_plan(config, 10**6, "float32", ALONE)
        return capsys.readouterr().out
    # with less memory than that the loss is computed in chunks, which needs less
    whole, chunked = (1e9 * float(re.search(r"about ([\d.]+) GB", plan(memory, force=True))[1]) for memory in (None, 1e8))
    assert "FIT" not in plan(None) + plan(1.3 * whole) and "chunks" not in plan(None) + plan(1.3 * whole)
    assert "in 8 chunks to save memory" in plan(whole) and "FIT" not in plan(whole) and chunked < 0.8 * whole
    assert "IT MAY NOT FIT" in plan(0.9 * chunked)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # two processes on this machine share its memory
    assert "IT MAY NOT FIT" in plan(2 * 0.9 * chunked) and "FIT" not in plan(2 * whole)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    with pytest.raises(ValueError, match=r"needs about .* GB per process, of which 0.1 GB are available: .* --force"):
        plan(1e8)
    assert "IT WILL NOT FIT" in plan(1e8, force=True) and "IT WILL NOT FIT" in plan(1e8, dry_run=True)
    start_time = time.time()
    with pytest.raises(ValueError, match="GB per process"):
        plan(1e12, n_embd=100_000, n_head=1, total_batch_size=2**29, max_steps=1)
    assert time.time() - start_time < 5


def test_the_plan_has_the_hours_and_the_cost_where_the_speed_is_known(monkeypatch, capsys):
    """1,000 steps of 524,288 tokens at 100,000 tok/s are 5,243 s."""
    def time_line(peak, W, **changes):
        monkeypatch.setattr(settings, "peak_flops", lambda *args: peak)
        monkeypatch.setattr(settings, "device_name", lambda device: "card")
        monkeypatch.setattr(parallel, "all_gather", lambda value, ranks: [value])
        config = TrainConfig(max_steps=1000, **changes)
        settings.make_plan(config, 10**9, "bfloat16", parallel.Ranks(0, 0, W, "cpu", False))
        return re.search("^time: .*$", capsys.readouterr().out, re.MULTILINE)[0]
    assert time_line(None, 1).startswith("time: unknown on this device, --tok-per-sec gives its speed")
    assert time_line(None, 1, tok_per_sec=1e5) == "time: 1.5 hours at 100,000 tok/s"
    assert time_line(1e14, 2, tok_per_sec=1e5, price=2.5) == "time: 1.5 hours at 100,000 tok/s, 2 x 1.5 x $2.5 = $7.28"
    flops = TrainConfig().gpt_config().flops_per_token(1024) * 1000 * 524288 / 1e14
    assert time_line(1e14, 2, price=2) == (f"time: about {flops / 3600:.1f} hours at half the peak of 2 x card,"
                                           f" 2 x {flops / 3600:.1f} x $2 = ${2 * 2 * flops / 3600:.2f}")


def test_available_memory_of_a_mac_is_what_metal_recommends(monkeypatch):
    """It was unknown there, and the micro-batch as large as on an 80 GB GPU."""
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 11_000_000_000)
    monkeypatch.setattr(torch.mps, "driver_allocated_memory", lambda: 1_000_000_000)
    assert runtime.free_memory("mps") == 10_000_000_000


def test_available_memory_of_a_gpu_includes_what_pytorch_keeps_for_reuse(monkeypatch):
    for name, value in (("mem_get_info", (1_000, 80_000)), ("memory_reserved", 60_000), ("memory_allocated", 20_000)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert runtime.free_memory("cuda:0") == 41_000


def test_available_memory_includes_the_page_cache():
    import psutil
    assert runtime.free_memory("cpu") == pytest.approx(psutil.virtual_memory().available, rel=0.3)


def test_ranks_with_other_data_are_an_error(text, monkeypatch):
    config = TrainConfig(**{**preset_settings("shakespeare"), "preset": "shakespeare", "data": text})
    monkeypatch.setattr(parallel, "all_gather", lambda value, ranks: [value, value])
    assert len(train_gpt2.open_data(config, ALONE)) == 2
    monkeypatch.setattr(parallel, "all_gather", lambda value, ranks: [value, [value[0], "another"]])
    with pytest.raises(ValueError, match=r"holds other data on rank \[1\] than on rank 0"):
        train_gpt2.open_data(config, ALONE)


def test_the_preset_follows_from_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config, saved = settings.config_from_flags([])
    assert config.preset == "shakespeare" and config.data == INPUT_TXT and saved is None
    assert "holds no shards" in capsys.readouterr().out
    os.mkdir("edu_fineweb10B")
    open("edu_fineweb10B/edufineweb_train_000001.npy", "w").close()
    config, _ = settings.config_from_flags([])
    assert (config.preset, config.data) == ("gpt2-124M", "edu_fineweb10B")
    assert settings.config_from_flags(["--preset", "gpt2-350M", "--lr", "1"])[0].lr == 1.0


def test_settings_of_an_older_version_that_no_longer_exist_are_ignored(unbroken, tmp_path, monkeypatch, capsys):
    """A checkpoint of commit 6504f55 has save_minutes and skip_nonfinite in its settings."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unbroken[0], "log/shakespeare")
    for path in glob.glob("log/shakespeare/state_*.pt"):
        state = torch.load(path)
        torch.save({**state, "train_config": {**state["train_config"], "save_minutes": 30.0, "skip_nonfinite": 0}}, path)
    config, saved = settings.config_from_flags(["--exp-name", "shakespeare"])
    assert saved.step == 8 and config.n_embd == 16
    assert "ignored: the run's settings save_minutes, skip_nonfinite, which no longer exist" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# one step

class FixedLoader:
    """Returns the given micro-batches in turn."""

    def __init__(self, batches):
        self.batches, self.position = list(batches), 0

    def next_batch(self):
        self.position += 1
        return self.batches[self.position - 1]


def tiny_model(**changes):
    torch.manual_seed(0)
    return GPT(GPTConfig(**{**dict(block_size=8, vocab_size=64, n_layer=2, n_head=2, n_embd=16), **changes}))


def step_once(model, batches, lr=0.01, optimizer="adamw"):
    """One train_step over the micro-batches; ((loss, norm), the model)."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    optimizers = model.configure_optimizers(lr, 0.1, optimizer=optimizer)
    return train_step(0, model, model, optimizers, scaler, FixedLoader(batches), lr, len(batches), 1.0, "float32", ALONE)[:2]


def test_golden_step():
    """Two optimizer steps give the recorded numbers.

    Update them only for a deliberate change of the initialization, the model or the optimizer, and say so in the commit.
    """
    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 64, (2, 4, 8), generator=generator)
    first, second = step_once(model, [(x, y)]), step_once(model, [(x, y)])
    assert first == pytest.approx(GOLDEN[0], rel=1e-4)
    assert second == pytest.approx(GOLDEN[1], rel=1e-4)


GOLDEN = [(4.15892, 1.99881), (4.00466, 1.35988)]


def test_accumulated_gradients_equal_those_of_one_large_batch():
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 64, (2, 8, 8), generator=generator)
    whole, parts = tiny_model(), tiny_model()
    loss, norm = step_once(whole, [(x, y)])
    accumulated = step_once(parts, [(x[i:i + 2], y[i:i + 2]) for i in range(0, 8, 2)])
    assert accumulated == pytest.approx((loss, norm), rel=1e-5)
    for (name, a), (_, b) in zip(whole.named_parameters(), parts.named_parameters()):
        assert torch.allclose(a.grad, b.grad, atol=1e-6), name


def test_grad_clip_0_turns_clipping_off():
    """As in nanoGPT; it scaled every gradient to 0."""
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 64, (2, 4, 8), generator=generator)
    gradients = []
    for grad_clip in (0.0, 1e9, 0.5):
        model = tiny_model()
        model(x, y)[1].backward()
        norm = parallel.clip_grad_norm(model, grad_clip)
        assert norm.item() == pytest.approx(GOLDEN[0][1], rel=1e-4)
        gradients.append(model.lm_head.weight.grad)
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


def test_a_long_step_reports_its_progress(monkeypatch, capsys):
    """A second per micro-step: after 5 s, then every 5 s."""
    batch = torch.zeros((2, 8), dtype=torch.long), torch.ones((2, 8), dtype=torch.long)
    clock = iter(range(10**6))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    step_once(tiny_model(), [batch] * 20)
    assert capsys.readouterr().out == "".join(f"step     0: {percent}, {left} s left\n" for percent, left in
                                              (("25%", 15), ("50%", 10), ("75%", 5)))
    step_once(tiny_model(), [batch] * 4)
    assert capsys.readouterr().out == ""
    assert [cli.duration(s) for s in (0.2, 59, 90, 4000, 10**6)] == ["0 s", "59 s", "1.5 min", "1.1 h", "277.8 h"]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_one_batch_can_be_overfit(optimizer):
    model = tiny_model()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randint(0, 64, (2, 4, 8), generator=generator)
    optimizers = model.configure_optimizers(0.01, 0.0, optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = [train_step(0, model, model, optimizers, scaler, FixedLoader([(x, y)]), 0.01, 1, 1.0, "float32", ALONE)[0]
              for _ in range(60)]
    assert losses[0] == pytest.approx(math.log(64), abs=0.2) and losses[-1] < 0.3


def test_a_nonfinite_loss_stops_before_the_update():
    model = tiny_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = float("nan")
    before = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFinite, match=r"step 0: non-finite loss nan .*rank \[0\], in windows 0 to 0 .* were not updated"):
        step_once(model, [(torch.zeros((2, 8), dtype=torch.long),) * 2])
    for name, p in model.named_parameters():
        assert torch.equal(p.nan_to_num(), before[name].nan_to_num()), name


def test_a_float16_overflow_skips_the_update_and_halves_the_scale_down_to_one():
    """A simulated overflow: the loss is scaled past float32's largest number."""
    model = tiny_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    optimizers = model.configure_optimizers(0.01, 0.1)
    before = model.lm_head.weight.clone()
    batch = torch.zeros((2, 8), dtype=torch.long), torch.ones((2, 8), dtype=torch.long)

    def step():
        return train_step(0, model, model, optimizers, scaler, FixedLoader([batch]), 0.01, 1, 1.0, "float32", ALONE)
    loss, norm, _ = step()
    assert math.isfinite(loss) and not math.isfinite(norm)
    assert scaler.get_scale() == 2.0**126 and torch.equal(model.lm_head.weight, before)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(NonFinite):
        step()
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0)  # cannot be lowered further
    model = tiny_model()
    optimizers = model.configure_optimizers(0.01, 0.1)
    for p in model.parameters():
        p.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(NonFinite, match="gradient norm"):
        step()


@pytest.mark.parametrize("overflows", ["transformer.h.0.mlp.c_fc.weight", "transformer.wpe.weight"])
def test_a_float16_overflow_skips_all_optimizers(overflows):
    """The scaler decides for each optimizer by itself: of Muon and AdamW, one updated its weights and the other did not."""
    model = tiny_model()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    optimizers = model.configure_optimizers(0.01, 0.1, optimizer="muon")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch, times = (torch.zeros((2, 8), dtype=torch.long), torch.ones((2, 8), dtype=torch.long)), [float("inf"), 1.0]
    dict(model.named_parameters())[overflows].register_hook(lambda grad: grad * times[0])

    def step():
        return train_step(0, model, model, optimizers, scaler, FixedLoader([batch]), 0.01, 1, 1.0, "float32", ALONE)
    step()
    assert scaler.get_scale() == 2.0**9 and all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    times.pop(0)
    step()
    assert scaler.get_scale() == 2.0**9 and not any(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_logits_do_not_outlive_the_forward():
    """train_step kept them, 6.6 GB at B=64 and T=1024, through the backward and the next forward."""
    model, alive = tiny_model(), []
    forward = model.forward

    def watched(x, y):
        assert not alive or alive[-1]() is None, "in the next forward"
        logits, loss = forward(x, y)
        alive.append(weakref.ref(logits))
        loss.register_hook(lambda grad, logits=alive[-1]: freed.append(logits() is None))
        return logits, loss
    model.forward, freed = watched, []
    step_once(model, [(torch.zeros((2, 8), dtype=torch.long), torch.ones((2, 8), dtype=torch.long))] * 3)
    assert freed == [True] * 3


def test_validation_is_the_same_for_any_micro_batch(tmp_path):
    import numpy as np

    import data
    path = str(tmp_path / "a_val_000000.npy")
    data.write_shard(path, np.random.default_rng(0).integers(0, 64, 203).astype(np.uint16))
    stream, model = data.TokenStream([path]), tiny_model()
    losses = [evaluate_loss(model, stream, B, 8, 160, "float32", ALONE) for B in (1, 3, 20)]
    tokens = torch.from_numpy(stream.read(0, 161).astype(np.int64))
    _, whole = model(tokens[:-1].view(20, 8), tokens[1:].view(20, 8))
    assert losses == pytest.approx([whole.item()] * 3, rel=1e-6)


def test_a_stop_request_ends_an_evaluation_at_the_next_batch(tmp_path, monkeypatch):
    import numpy as np

    from run import cli
    import data
    path = str(tmp_path / "a_val_000000.npy")
    data.write_shard(path, np.zeros(203, dtype=np.uint16))
    stream, model, batches = data.TokenStream([path]), tiny_model(), []

    def count_and_stop(module, args, output):
        batches.append(len(args[0]))
        if len(batches) == 2:
            monkeypatch.setattr(cli.StopSignals, "received", "SIGTERM")
    model.register_forward_hook(count_and_stop)
    assert evaluate_loss(model, stream, 1, 8, 160, "float32", ALONE) is None
    assert len(batches) == 2 and model.training


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
    assert sorted(os.listdir(run_dir)) == ["config.json", "log.txt", "loss.png", "model_00004.pt", "model_00008.pt",
                                           "state_00004.pt", "state_00008.pt"]
    losses = [float(line.split()[2]) for line in log_of(run_dir, "val")]
    assert losses[0] == pytest.approx(math.log(50304), abs=0.2) and losses[-1] < losses[0] - 0.1
    assert "published" not in out  # on a text of one's own there is nothing to compare with
    per_byte = [float(line.split()[2]) for line in log_of(run_dir, "val_bpb")]
    # a line has 8 words of 3.6 letters and as many blanks, in 9 tokens
    assert per_byte == pytest.approx([loss / math.log(2) * 9 / (8 * 3.6 + 8) for loss in losses], rel=0.05)
    assert [line.split()[0] for line in log_of(run_dir, "train")] == [str(step) for step in range(8)]
    assert re.search(r"step +0/8 \| loss \d+\.\d{4} \| lr [\d.e+-]+ \| norm [\d.]+ \| dt [\d.]+ms \| tok/sec [\d,]+"
                     r" \| \d+ s left\n", out)
    with open(os.path.join(run_dir, "config.json"), encoding="utf-8") as f:
        description = json.load(f)
    assert description["config"]["n_embd"] == 16 and description["torch"] == torch.__version__


def test_the_last_step_is_saved_and_can_be_evaluated_without_changing_the_run(text, tmp_path, monkeypatch, capsys):
    """--save-every 0 announced samples of a run that had saved nothing. In this process."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *flags])
        with pytest.raises(SystemExit) as e:
            cli.run_main(train_gpt2.main)
            sys.exit(0)
        return e.value.code or 0, capsys.readouterr()
    name = ["--log-dir", "new", "--exp-name", "a/"]
    monkeypatch.setattr(train_gpt2, "peak_flops", lambda *args: 1e9)
    status, (out, _) = run(*TINY, "--data", text, "--save-every", "0", "--max-steps", "2", *name)
    tok_per_sec, mfu = re.search(r"step     1/2 .* \| tok/sec ([\d,]+) \| MFU ([\d.]+)% \|", out).groups()
    flops = GPTConfig(n_layer=1, n_head=2, n_embd=16, block_size=16, vocab_size=50304).flops_per_token(16)
    assert float(mfu) == pytest.approx(100 * flops * int(tok_per_sec.replace(",", "")) / 1e9, rel=0.01)
    assert status == 0 and "samples: python sample.py new/a" in out
    assert folder.saved_steps("new/a") == [2]
    before = {path: (os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in glob.glob("new/**", recursive=True)}
    val = re.search(r"step     2 \| val \d+\.\d{4} \| val_bpb \d+\.\d{4}\n", out)[0]
    for weights in (["--resume", "new/a"], [*TINY, "--data", text, "--init-from", "new/a"]):
        status, (out, err) = run("--eval-only", *weights)
        assert status == 0 and val.replace("step     2", f"step     {2 if '--resume' in weights else 0}") in out, err
    assert run("--eval-only", "--exp-name", "nothing")[0] == 2
    assert before == {path: (os.stat(path).st_mtime_ns, os.stat(path).st_size) for path in glob.glob("new/**", recursive=True)}
    assert os.listdir(tmp_path) == ["new"]


def test_a_finished_run_is_not_changed(unbroken, text):
    run_dir, _ = unbroken
    before = {name: os.stat(os.path.join(run_dir, name)).st_mtime_ns for name in os.listdir(run_dir)}
    again = train(os.path.dirname(os.path.dirname(run_dir)), "--data", text)
    assert again.returncode == 0 and "is finished at step 8" in again.stdout
    assert before == {name: os.stat(os.path.join(run_dir, name)).st_mtime_ns for name in os.listdir(run_dir)}


def test_an_evaluation_that_a_stop_interrupted_is_repeated_when_the_run_resumes(unbroken, text, tmp_path):
    """Here the one after the last step: it is neither in the log nor in the checkpoint."""
    run_dir = tmp_path / "log" / "shakespeare"
    shutil.copytree(unbroken[0], run_dir)
    model, log = torch.load(run_dir / "model_00008.pt"), (run_dir / "log.txt").read_text()
    torch.save({**model, "val_loss": None}, run_dir / "model_00008.pt")
    (run_dir / "log.txt").write_text("".join(line for line in log.splitlines(True) if not line.startswith("8 val")))
    process = train(tmp_path)
    assert process.returncode == 0 and "finished; curves" in process.stdout, process.stderr
    assert (run_dir / "log.txt").read_text() == log
    assert torch.load(run_dir / "model_00008.pt")["val_loss"] == model["val_loss"]


@pytest.mark.slow
def test_a_finished_run_without_curves_draws_them(unbroken, text, tmp_path):
    """A stop after the last evaluation ends the run before its curves are drawn."""
    run_dir = tmp_path / "log" / "shakespeare"
    shutil.copytree(unbroken[0], run_dir)
    os.remove(run_dir / "loss.png")
    process = train(tmp_path)
    assert process.returncode == 0 and "is finished at step 8" in process.stdout and (run_dir / "loss.png").exists()


def test_a_resumed_run_can_give_up_a_tracker_that_is_not_installed(unbroken, tmp_path, monkeypatch):
    import importlib.util
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unbroken[0], "log/shakespeare")
    for path in glob.glob("log/shakespeare/state_*.pt"):
        state = torch.load(path)
        torch.save({**state, "train_config": {**state["train_config"], "tracker": "wandb"}}, path)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    shutil.copytree("log/shakespeare", "log/other")  # this process keeps its lock
    with pytest.raises(ValueError, match="--tracker wandb needs the package wandb"):
        settings.config_from_flags(["--exp-name", "other"])
    assert settings.config_from_flags(["--exp-name", "shakespeare", "--tracker", "none"])[0].tracker == "none"


def kill_when(process, pattern):
    """SIGKILLs a process (group) once its output has a line with pattern."""
    for line in process.stdout:
        if re.search(pattern, line):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(timeout=30)
            return
    raise AssertionError(f"the process ended ({process.wait()}) without printing {pattern!r}")


def start(cwd, *flags, ranks=1, stderr=subprocess.STDOUT):
    return subprocess.Popen(command(*flags, ranks=ranks), cwd=cwd, stdout=subprocess.PIPE, stderr=stderr, text=True,
                            start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_a_killed_run_resumes_bitwise_identical(unbroken, text, tmp_path):
    kill_when(start(tmp_path, "--data", text), "step +6/8")
    process = train(tmp_path)  # data and settings come from the checkpoint
    assert process.returncode == 0 and "from step 4" in process.stdout
    run_dir = tmp_path / "log" / "shakespeare"
    streams = ("train", "val", "norm", "lr")
    assert log_of(run_dir, *streams) == log_of(unbroken[0], *streams)
    ours, theirs = (torch.load(os.path.join(folder, "model_00008.pt"))["model"] for folder in (run_dir, unbroken[0]))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_two_ranks_train_like_one_process(text, tmp_path):
    """Losses and both HellaSwag scores, without dropout, for which each rank draws its own random numbers."""
    endings = ["is king.", "will come to this house.", "is not", "and my lord"]
    with open(tmp_path / "hellaswag.jsonl", "w", encoding="utf-8") as f:
        for label in (0, 1, 2, 3, 1):
            example = {"ctx": f"the queen {label}", "activity_label": "Reigning", "label": label, "endings": endings}
            f.write(json.dumps(example) + "\n")
    flags = ("--data", text, "--dropout", "0", "--max-steps", "6", "--hellaswag", "hellaswag.jsonl", "--hella-every", "3")
    for name, ranks in (("one", 1), ("two", 2)):
        process = train(tmp_path, *flags, "--exp-name", name, ranks=ranks)
        assert process.returncode == 0, process.stderr
    one, two = (log_of(tmp_path / "log" / name, "train", "val", "hella", "hella_lm_eval") for name in ("one", "two"))
    assert len(one) == len(two) == 6 + 3 + 2 * 3
    for a, b in zip(one, two):
        assert a.split()[:2] == b.split()[:2] and float(a.split()[2]) == pytest.approx(float(b.split()[2]), abs=1e-4)


@pytest.mark.slow
def test_torchrun_killed_and_started_again_resumes(text, tmp_path):
    kill_when(start(tmp_path, "--data", text, ranks=2), "step +5/8")
    process = train(tmp_path, ranks=2)
    # the ranks outlive torchrun; rank 0 saves and stops when its stdout is closed, a few steps after its checkpoint of step 4
    assert process.returncode == 0 and re.search("from step [4-8]", process.stdout), process.stderr
    assert [line.split()[0] for line in log_of(tmp_path / "log" / "shakespeare", "train")] == [str(step) for step in range(8)]


def limit_file_size():
    """For a child process: writing a file of more than 2 MB fails, as on a full disk."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000, 2_000_000))


def test_a_full_disk_is_one_line_and_leaves_nothing_half_written(text, tmp_path):
    process = subprocess.run(command("--data", text), cwd=tmp_path, capture_output=True, text=True, timeout=120,
                             preexec_fn=limit_file_size)
    assert process.returncode == 2, process.stderr
    assert process.stderr.startswith("error: cannot write") and process.stderr.count("\n") == 1
    assert sorted(os.listdir(tmp_path / "log" / "shakespeare")) == ["config.json", "log.txt"]


@pytest.mark.parametrize("flags, message", [
    (["--learning-rate", "1"], "unknown flag --learning-rate: did you mean --lr?"),
    (["--n-embd", "18", "--n-head", "4"], "n_head that fit: [1, 2, 3, 6, 9, 18]"),
    (["--sequence-length", "32"], "is over --block-size 16"),
    (["--total-batch-size", "100"], "is not a multiple of the sequence length"),
    (["--batch-size", "3"], "--batch-size that would fit: [1, 2, 4, 8]"),
    (["--data", "nowhere"], "no data at nowhere"),
    (["--device", "cuda"], "device 'cuda' is not available"),
    (["--init-from", "nowhere"], "no checkpoint at nowhere"),
    (["--vocab-size", "100"], "allowed are ids below 100"),
    (["--block-size", "4096", "--total-batch-size", "8192"], "too few for one sequence"),
])
def test_bad_input_is_one_line_with_status_2(flags, message, text, tmp_path, monkeypatch, capsys):
    """In this process, through the main and run_main of the command line."""
    from run import cli
    import train_gpt2
    monkeypatch.chdir(tmp_path)
    argv = [*TINY, "--data", text, *flags]
    monkeypatch.setattr(sys, "argv", ["train_gpt2.py", *argv])
    with pytest.raises(SystemExit) as e:
        cli.run_main(train_gpt2.main)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not os.path.exists("log") or set(os.listdir("log/shakespeare")) <= {"config.json", "log.txt"}


def test_a_shard_with_a_wrong_id_stops_the_run(tmp_path):
    import numpy as np

    import data
    os.mkdir(tmp_path / "shards")
    for split in ("train", "val"):
        data.write_shard(str(tmp_path / "shards" / f"a_{split}_000000.npy"), np.full(4000, 60000, dtype=np.uint16))
    process = train(tmp_path, "--data", "shards")
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and "id 60000" in process.stderr


def test_init_from_starts_from_other_weights(unbroken, text, tmp_path):
    process = train(tmp_path, "--data", text, "--init-from", os.path.join(unbroken[0], "model_00008.pt"), "--max-steps", "1")
    assert process.returncode == 0, process.stderr
    assert float(log_of(tmp_path / "log" / "shakespeare", "val")[0].split()[2]) == \
        pytest.approx(float(log_of(unbroken[0], "val")[-1].split()[2]), abs=1e-5)


def test_dry_run_prints_the_plan_and_writes_nothing(tmp_path, text):
    process = train(tmp_path, "--data", text, "--dry-run")
    assert process.returncode == 0 and os.listdir(tmp_path) == []
    for part in ("parameters", "8 steps of 128 tokens", "4 micro-steps of B=2 x T=16", "GB per process (state", "FLOPs"):
        assert part in process.stdout


@pytest.mark.slow
def test_deterministic_runs_train(text, tmp_path):
    """Every operation of a step, of dropout and of an evaluation has a deterministic implementation; otherwise torch raises."""
    for name in ("a", "b"):
        process = train(tmp_path, "--data", text, "--deterministic", "--exp-name", name)
        assert process.returncode == 0, process.stderr
    assert log_of(tmp_path / "log" / "a", "train", "val", "norm") == log_of(tmp_path / "log" / "b", "train", "val", "norm")


@pytest.mark.slow
def test_keep_best_keeps_the_best_checkpoint(text, tmp_path):
    """With a learning rate that is far too high a later loss is worse than the first."""
    process = train(tmp_path, "--data", text, "--keep-best", "--keep-last", "1", "--save-every", "1", "--val-every", "1",
                    "--lr", "3", "--warmup-steps", "0")
    assert process.returncode == 0, process.stderr
    run_dir = tmp_path / "log" / "shakespeare"
    losses = {int(line.split()[0]): float(line.split()[2]) for line in log_of(run_dir, "val")}
    best = min((step for step in losses if step > 0), key=losses.get)
    steps = sorted(int(name[6:11]) for name in os.listdir(run_dir) if name.startswith("model_"))
    assert steps == sorted({best, 8})
    assert torch.load(run_dir / f"model_{best:05d}.pt")["val_loss"] == pytest.approx(losses[best])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_and_compile_train(dtype, text, tmp_path):
    """float16 uses the GradScaler; with --compile on a failing compilation fails the run."""
    process = train(tmp_path, "--data", text, "--dtype", dtype, "--compile", "on", timeout=300)
    assert process.returncode == 0, process.stderr
    losses = [float(line.split()[2]) for line in log_of(tmp_path / "log" / "shakespeare", "val")]
    assert losses[-1] < losses[0] - 0.1


PLAN = [sys.executable, os.path.join(ROOT, "train_gpt2.py"), "--preset", "gpt2-124M", "--dry-run"]


@pytest.mark.parametrize("rank, printed", [("0", "loading PyTorch\nimported\n"), ("1", "imported\n")])
def test_the_first_line_is_printed_before_torch_is_imported(rank, printed, tmp_path):
    """It took 1.2 s, and minutes on a network file system, with nothing to see. Only rank 0 prints it."""
    (tmp_path / "torch.py").write_text("import sys; print('imported'); sys.exit(0)")  # found before the real one
    process = subprocess.run(PLAN, cwd=tmp_path, capture_output=True, text=True, timeout=60,
                             env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}", "RANK": rank})
    assert (process.returncode, process.stdout, process.stderr) == (0, printed, "")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="libgomp is torch's OpenMP runtime on Linux")
def test_waiting_threads_sleep_soon_unless_the_user_chooses_otherwise(tmp_path):
    """They spun for milliseconds: under other load a step took several times as long. libgomp prints what it has read."""
    for policy, spins in ((None, "3000"), ("ACTIVE", "30000000000")):
        env = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
        env |= {"OMP_DISPLAY_ENV": "verbose", **({"OMP_WAIT_POLICY": policy} if policy else {})}
        process = subprocess.run([*PLAN, "--device", "cpu"], env=env, cwd=tmp_path, capture_output=True, text=True)
        assert process.returncode == 0 and "parameters" in process.stdout
        assert f"GOMP_SPINCOUNT = '{spins}'" in process.stderr
