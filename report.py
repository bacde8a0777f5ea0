"""
The report of a run: its scores, how it was trained, what it cost, and whether its curve is as expected.

    python plots.py log/gpt2-124M --report --price 2.50   # writes report.md and loss.png into the run folder

convert.py writes the same scores and settings into the model card of an exported model.
"""
import json
import math
import os
import shlex
from dataclasses import fields

import numpy as np

from checkpoint import TRAINING_STREAMS, read_config, read_log
from cli import printable
from config import CORPORA
from files import atomic_write
from model import GPTConfig
from reference import GPT2_HELLASWAG, GPT2_LOSS, HELLASWAG_EXAMPLES, corpus_of, size_of, verdict

SCORES = {"val": "validation loss (nats per token)", "val_bpb": "validation loss (bits per byte)",
          "hella": "HellaSwag acc_norm, completion style", "hella_acc": "HellaSwag acc, completion style",
          "hella_lm_eval": "HellaSwag acc_norm, lm-evaluation-harness style",
          "hella_lm_eval_acc": "HellaSwag acc, lm-evaluation-harness style"}
# of config.json's settings; the others do not change the result, or have rows of their own
SETTINGS = ("optimizer", "lr", "schedule", "warmup_steps", "min_lr_ratio", "weight_decay", "grad_clip", "dropout", "init",
            "shuffle", "total_batch_size", "sequence_length", "seed")


def clock(steps, speeds, total_batch_size):
    """(steps, hours): hours of training before each step, and after the last one.

    speeds: tokens per second of each step. A step that was not logged counts as long as the logged step before it.
    Example: clock([0, 1], [100, 50], 3600) -> [0, 1, 2], [0, 0.01, 0.03]
    """
    steps = np.append(steps, steps[-1] + 1)
    return steps, np.append(0.0, np.cumsum(np.diff(steps) * total_batch_size / speeds / 3600))


def with_error(score):
    """A HellaSwag score with its standard error, sqrt(p (1 - p) / n): "0.2955 ± 0.0046".

    The log does not contain n: a score that is no multiple of 1 / HELLASWAG_EXAMPLES is of fewer examples, or was rounded.
    """
    count = score * HELLASWAG_EXAMPLES
    if not 0 <= score <= 1:  # NaN: the activations overflowed
        return f"{score:.4f}"
    if abs(count - round(count)) > 1e-6 * HELLASWAG_EXAMPLES:
        return f"{score:.4f} (rounded, or of fewer than the set's {HELLASWAG_EXAMPLES:,} examples)"
    return f"{score:.4f} ± {math.sqrt(score * (1 - score) / HELLASWAG_EXAMPLES):.4f}"


def read_streams(run_dir, step=None):
    """{stream: [(step, value), ...]} of a run's log.txt up to the checkpoint of a step (None: all); {} without the file."""
    path = os.path.join(run_dir, "log.txt")
    log = read_log(path) if os.path.isfile(path) else {}
    if step is not None:  # the update of the step itself comes after its checkpoint
        log = {stream: [point for point in points if point[0] < step + (stream not in TRAINING_STREAMS)]
               for stream, points in log.items()}
    return {stream: points for stream, points in log.items() if points}


def read_description(run_dir):
    """All of a run's config.json, a dict; {} without the file, ValueError if it is not a run's."""
    if not read_config(run_dir):
        return {}
    with open(os.path.join(run_dir, "config.json"), encoding="utf-8") as f:
        return json.load(f)


def run_scores(run_dir, step=None):
    """{name: text} of the last scores in a run's log.txt up to a step (None: of all steps); {} without the file."""
    streams = read_streams(run_dir, step)
    return {name: (with_error if "hella" in stream else "{:.4f}".format)(streams[stream][-1][1])
            for stream, name in SCORES.items() if stream in streams}


def run_settings(run_dir, step=None, price=None):
    """{name: value} of how the model of a step was trained (None: of the last one), without paths or the command.

    price: dollars per hour of one device, which adds the cost.
    """
    run, streams, settings = read_description(run_dir), read_streams(run_dir, step), {}
    config = dict(run["config"]) if run else {}
    batch, processes = (value if type(value) is int and value > 0 else None
                        for value in (config.get("total_batch_size"), run.get("world_size", 1)))
    if "data" in config:
        settings["training data"] = os.path.basename(os.path.normpath(str(config["data"])))
    if "train" in streams and batch:
        settings["training tokens"] = f"{(streams['train'][-1][0] + 1) * batch:,}"
    if run.get("device"):
        settings["hardware"] = f"{processes} x {run['device']}" if processes != 1 else run["device"]
    speeds = streams.get("tok_per_sec", [])
    if batch and speeds and min(speed for _, speed in speeds) > 0:
        hours = float(clock(*np.array(speeds).T, batch)[1][-1])
        settings["time"] = (f"{hours:.1f} hours" if hours >= 1 else f"{hours * 60:.1f} minutes") + " (evaluations not counted)"
        if price is not None and processes:
            settings["cost"] = f"${hours * processes * price:,.2f}: {hours * processes:.2f} device-hours at ${price:.2f}"
    for name in SETTINGS:
        if name in config:
            unit = ", tokens" if name.endswith(("size", "length")) else ""
            settings[name.replace("_", " ") + unit] = config[name]
    return settings | {name: run[name] for name in ("dtype", "torch", "python", "commit") if run.get(name)}


def table(rows):
    """Lines of a Markdown table of {name: value}."""
    def cell(value):
        return printable(" ".join(str(value).split())).replace("|", "\\|")
    return ["| | |", "| --- | --- |", *(f"| {name} | {cell(value)} |" for name, value in rows.items()), ""]


def sections(run_dir, step=None, price=None, scores=None):
    """Lines of the sections "Scores" and "Training" of a report or a model card; scores: more of them, or other values."""
    lines, settings = [], {"step": f"{step:,}"} if step is not None else {}
    settings |= run_settings(run_dir, step, price)
    for title, rows in (("Scores", run_scores(run_dir, step) | (scores or {})), ("Training", settings)):
        lines += [f"## {title}", "", *table(rows)] if rows else []
    return lines


def parameters(config):
    """Number of parameters of the model of a run's settings, None if they do not describe one."""
    try:
        return GPTConfig(**{f.name: config[f.name] for f in fields(GPTConfig) if f.name in config}).num_params()
    except (ValueError, TypeError):
        return None


def introduction(run_dir):
    """Lines that say what was trained, on what, and how good it is."""
    run, streams, settings = read_description(run_dir), read_streams(run_dir), run_settings(run_dir)
    config = dict(run["config"]) if run else {}
    count, scores, size = parameters(config) if config else None, run_scores(run_dir), size_of(config)
    text = "A GPT-2" + (f" of {count:,} parameters ({config.get('n_layer')} layers, {config.get('n_head')} heads,"
                        f" {config.get('n_embd')} channels)" if count else "")
    if "train" in streams:
        done, planned = streams["train"][-1][0] + 1, config.get("max_steps")
        text += f", trained for {done:,} steps"
        text += f" of {planned:,} planned" if type(planned) is int and planned > done else ""
        text += f" on {settings['training tokens']} tokens" if "training tokens" in settings else ""
    text += f" of {settings['training data']}" if "training data" in settings else ""
    text += "".join(f", {word} {settings[name]}" for word, name in (("on", "hardware"), ("in", "time")) if name in settings)
    lines = [printable(text) + ".", ""]
    corpus = corpus_of(config.get("data", ""))
    known = {"val": f" (OpenAI's GPT-2 {size} on {CORPORA.get(corpus)}: {GPT2_LOSS.get(corpus, {}).get(size)})"
             if size in GPT2_LOSS.get(corpus, {}) else "",
             "hella": f" (chance 0.25, OpenAI's GPT-2 {size}: {GPT2_HELLASWAG[size]})", "val_bpb": ""}
    told = [f"- {label}: {scores[label]}{known[stream]}" for stream, label in SCORES.items()
            if stream in known and label in scores]
    return lines + told + [""] * bool(told)


def report(run_dir, names=(), price=None):
    """The text of report.md; names are values of --reference, for the verdict. FileNotFoundError without a log.txt."""
    checked, run = verdict(run_dir, names), read_description(run_dir)
    lines = [f"# {printable(os.path.basename(os.path.abspath(run_dir)))}", "", *introduction(run_dir),
             "![loss and other curves](loss.png)", "", "## Is the curve right?", "",
             "Its validation losses compared with those of correct runs; docs/reference.md explains the band (±).", "",
             "```", checked, "```", "", *sections(run_dir, price=price)]
    if isinstance(run.get("command"), list):
        processes = run.get("world_size", 1)
        lines += ["## Command", "", "```", "python " + printable(shlex.join(map(str, run["command"]))), "```", "",
                  *([f"torchrun started it on {processes} processes."] if processes != 1 else []),
                  "All settings are in config.json, all values in log.txt."]
    return "\n".join(lines).rstrip() + "\n"


def write_report(run_dir, names=(), price=None):
    """Writes report.md into a run folder, atomically; returns its path."""
    text, path = report(run_dir, names, price), os.path.join(run_dir, "report.md")
    with atomic_write(path, "w") as f:
        f.write(text)
    return path
