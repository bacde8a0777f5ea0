"""
What a run starts from: its settings, by the flags, and the checkpoint from which it resumes.

A value comes from the first source that sets it: the command line, the checkpoint that the run resumes from, the weights
of --init-from, the preset, the field's default in config.py.

When a run resumes, FIXED settings cannot change and FORCED ones only with --force; all others take effect.
"""
import contextlib
import json
import os
from argparse import ArgumentTypeError
from dataclasses import asdict

import checkpoint
import convert
import data
import parallel
from cli import is_rank0, print0, printable
from config import FINEWEB_DIR, INPUT_TXT, PRESETS, TrainConfig, parse_args, run_name


def choose_preset(given):
    """(preset, data, reason): those of the flags; by default gpt2-124M for shards, for text finetune or shakespeare."""
    def holds_shards(folder):
        return os.path.isdir(folder) and bool(data.find_shards(folder, "train"))

    for_text = "finetune" if given.get("init_from") else "shakespeare"
    if "preset" in given:
        default = INPUT_TXT if given["preset"] in ("shakespeare", "finetune") else FINEWEB_DIR
        return given["preset"], given.get("data", default), "chosen by --preset"
    if "data" in given:
        if holds_shards(given["data"]):
            return "gpt2-124M", given["data"], "--data is a folder of shards"
        return for_text, given["data"], "--data is not a folder of shards"
    if holds_shards(FINEWEB_DIR):
        return "gpt2-124M", FINEWEB_DIR, f"{FINEWEB_DIR}/ holds shards"
    return for_text, INPUT_TXT, f"{FINEWEB_DIR}/ holds no shards (python fineweb.py creates them)"


def shape_of_weights(given):
    """The model's fields of --init-from's weights, a dict; ValueError if the flags differ from them."""
    if not given.get("init_from"):
        return {}
    if "init" in given:
        raise ValueError(f"--init {given['init']} is for random weights, and --init-from loads others: omit one of them")
    shape = asdict(convert.read_model(given["init_from"])[0])
    shape = {name: value for name, value in shape.items() if name in TrainConfig.__dataclass_fields__ and name != "dropout"}
    if given.get("block_size", shape["block_size"]) > shape["block_size"]:
        raise ValueError(f"--block-size {given['block_size']} is over the {shape['block_size']} positions of --init-from's"
                         " weights; use that many or fewer")
    shape["block_size"] = given.get("block_size", shape["block_size"])
    if wrong := [name for name in shape if given.get(name, shape[name]) != shape[name]]:
        raise ValueError(f"--init-from's weights have {', '.join(f'{n}={shape[n]}' for n in wrong)}: omit these flags")
    return shape


def run_folder(given):
    """The run's folder: that of --resume, if it names a folder or a file in one, else log/<exp-name>."""
    resume = given.get("resume", "auto")
    if resume not in ("auto", "never"):
        if "exp_name" in given or "log_dir" in given:
            raise ValueError(f"--resume {resume} names the run: omit --exp-name and --log-dir")
        if not os.path.exists(resume):
            raise FileNotFoundError(f"--resume {resume} does not exist; allowed are auto, never, a run folder, or a model_*.pt"
                                    " in one")
        if os.path.isdir(resume) and not checkpoint.steps_of(resume, "model"):
            raise FileNotFoundError(f"--resume {resume}: there is no checkpoint")
        folder = os.path.normpath(resume if os.path.isdir(resume) else os.path.dirname(resume) or ".")
        return folder if os.path.basename(folder) not in (".", "..") else os.path.abspath(folder)
    return os.path.join(given.get("log_dir", TrainConfig.log_dir), given.get("exp_name", default_name(given)))


def default_name(given):
    """The run's name without --exp-name: of the text that --data names, so that each text has its own run, or the preset."""
    preset, source, _ = choose_preset(given)
    is_text = "preset" not in given and preset in ("shakespeare", "finetune")
    if is_text and os.path.realpath(source) != os.path.realpath(INPUT_TXT):
        name = os.path.basename(os.path.abspath(source))
        with contextlib.suppress(ArgumentTypeError):  # no name for a folder: "-.txt"
            name = run_name(name if os.path.isdir(source) else os.path.splitext(name)[0])
            return name if preset == "shakespeare" else f"{name}-{preset}"
    return preset


def load_run(given):
    """The Checkpoint to resume from, or None for a new run. Rank 0 locks the run folder before it is read."""
    if given.get("eval_only") and "init_from" in given:
        return None
    run_dir, resume = run_folder(given), given.get("resume", "auto")
    is_file = resume not in ("auto", "never") and not os.path.isdir(resume)
    step = checkpoint.step_of(resume) if is_file else None
    if is_rank0() and not (given.get("dry_run") or given.get("eval_only")):
        checkpoint.lock_run(run_dir)
    # a restarted process resumes from what its run has saved since
    started = has_started(run_dir, resume)
    if resume == "never" and checkpoint.steps_of(run_dir, "model") and not started:
        raise ValueError(f"{run_dir} already holds a run; choose another --exp-name, or move that folder away")
    if is_file and not started:
        return checkpoint.Checkpoint(*checkpoint.load_pair(run_dir, step), [])
    return checkpoint.load_latest(run_dir)


def has_started(run_dir, resume):
    """Whether torchrun or Slurm has restarted this process after it had begun to train: then config.json is its own.

    Before that, newer checkpoints than that of --resume, and those of a run that --resume never must not touch, are not its
    own. torchrun restarts its processes after one has died, Slurm a job that was requeued (train.sbatch).
    """
    if not any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")):
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(os.path.join(run_dir, "config.json")) as f:
        started = json.load(f)
        return (started["config"]["resume"], started["torchrun_id"]) == (resume, os.environ.get("TORCHELASTIC_RUN_ID"))
    return False


def check_same_step(saved, ranks):
    """ValueError if the ranks have loaded checkpoints of different steps: DDP would train on without noticing."""
    steps = parallel.all_gather(saved.step if saved else 0, ranks)
    if wrong := [rank for rank, step in enumerate(steps) if step != steps[0]]:
        raise ValueError(f"rank 0 starts from step {steps[0]}, rank {wrong[0]} from step {steps[wrong[0]]}: the run folder must"
                         " be the same on every machine; if it is shared, start again")


def how_to_resume(config):
    """The command that resumes a run that was stopped."""
    if config.resume == "auto" or os.path.isdir(config.resume):
        return "the same command"
    return f"--resume {config.run_dir}"  # the same command would start over from --resume's file, or raise for "never"


# What cannot change when a run resumes, and what changes its result, which --force allows.
FIXED = ["preset", "init_from", "init", "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "sequence_length",
         "optimizer"]
FORCED = ["total_batch_size", "seed", "shuffle", "dropout", "dtype"]
# How a process was started, which the next one does not take over.
STARTED = ["dry_run", "eval_only", "force", "resume", "price", "tok_per_sec"]


def config_from_flags(argv=None):
    """(TrainConfig, the Checkpoint to resume from or None) of the command line; the run folder is locked."""
    given = parse_args(argv)
    if "epochs" in given:  # replaces the max_steps of the preset or of the run
        if given.get("max_steps"):
            raise ValueError("--epochs and --max-steps both set the length of the run: give one of them")
        given["max_steps"] = 0
    preset, source, reason = choose_preset(given)
    saved = load_run(given)
    log_dir, exp_name = os.path.split(run_folder(given))
    # a resumed run may give up a tracker that is not installed on this machine
    checkpoint.check_tracker(given.get("tracker", saved.state["train_config"].get("tracker", "none") if saved else "none"))
    if not saved:
        print0(f"preset {preset}, data {source}: {reason}; --preset and --data choose others ({', '.join(PRESETS)})")
        return TrainConfig(**{**PRESETS[preset], **shape_of_weights(given), **given, "preset": preset, "data": source,
                              "log_dir": log_dir, "exp_name": exp_name}), None
    # the run's settings, with defaults for flags that are newer than the run
    settings = {**saved.state["train_config"], **saved.model["config"]}
    known = {name: value for name, value in settings.items() if name in TrainConfig.__dataclass_fields__}
    if unknown := saved.state["train_config"].keys() - known.keys():  # of another version of this file
        print0(printable(f"  ignored: the run's settings {', '.join(sorted(map(str, unknown)))}, which no longer exist"))
    base = TrainConfig(**{**known, **{name: getattr(TrainConfig, name) for name in STARTED}})
    if os.path.basename(base.data) == "input.txt" and not os.path.exists(base.data):
        base.data = INPUT_TXT  # this clone has been moved; the data's fingerprint is compared later
    # the run's folder may have been moved, too
    config = TrainConfig(**{**asdict(base), **given, "log_dir": log_dir, "exp_name": exp_name})
    changed = [name for name in given if getattr(base, name) != getattr(config, name)]
    if wrong := [name for name in changed if name in FIXED]:
        raise ValueError(f"{', '.join(wrong)} cannot change when a run resumes; choose another --exp-name")
    if (wrong := [name for name in changed if name in FORCED]) and not config.force:
        raise ValueError(f"changing {', '.join(wrong)} makes it a different run; --force resumes anyway, another --exp-name"
                         " starts over")
    print0("\n".join([*saved.messages, f"resuming {run_folder(given)} from step {saved.step}, with its settings"]))
    for name in changed:
        if name not in (*STARTED, "exp_name", "log_dir"):
            print0(f"  changed: {name} was {getattr(base, name)!r}, is {getattr(config, name)!r}")
    return config, saved
