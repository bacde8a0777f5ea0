"""
Published training curves, and whether the losses of a run agree with them.

    curves/NAME.csv     a published curve: `# key: value` lines (what it is, its source and
                        settings), then step,stream,value
    python plots.py RUN --verdict     # verdict(run_dir); train_gpt2.py prints a line per validation

A run is compared with a curve of the same corpus, model size and tokens per step, on the tokens
that the published run validated on: the loss depends on which these are. docs/reference.md
explains the band within which two runs agree, and names the sources of the curves.
"""
import csv
import functools
import glob
import json
import math
import os
import re
from dataclasses import dataclass

import numpy as np

from run.cli import command, print0
from run.folder import read_config, read_log
from run.prepare import load_manifest

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "curves")

# A validation also logs val_N, the loss of the first N tokens, for each of these N: the public
# runs validated on so many.
VAL_TOKENS = (327_680, 655_360, 2_621_440)

# Published results by model size, of GPT-3 by the nearest in size.
# Loss of OpenAI's GPT-2: on FineWeb-Edu val (build-nanogpt's notebook; 124M only), on FineWeb val
# (llm.c's vislog).
GPT2_LOSS = {
    "edu": {"124M": 3.2924},
    "fineweb": {"124M": 3.4250, "350M": 3.0831, "774M": 3.0006, "1558M": 2.8313},
}
# HellaSwag val, acc_norm. GPT-2: completion style (build-nanogpt's hellaswag.py, llm.c's vislog)
# and lm-eval style (lm-evaluation-harness). GPT-3: its paper, appendix H.
GPT2_HELLASWAG = {"124M": 0.2955, "350M": 0.3752, "774M": 0.4320, "1558M": 0.4893}
GPT2_HELLASWAG_LM_EVAL = {"124M": 0.3114, "1558M": 0.5089}
GPT3_HELLASWAG = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}
GPT3_SIZES = {"124M": "125M", "350M": "350M", "774M": "760M", "1558M": "1.3B"}
HELLASWAG_EXAMPLES = 10042  # in val, the split that all of these are scored on


def size_of(settings):
    """The key of the published results nearest to a model in parameters: 12, 768 -> "124M"."""
    n_embd = settings.get("n_embd", 768)
    n = 12 * settings.get("n_layer", 12) * n_embd ** 2 + 50257 * n_embd
    return min(GPT2_HELLASWAG, key=lambda size: abs(math.log(n / (float(size[:-1]) * 1e6))))


# -----------------------------------------------------------------------------
# the published curves

@dataclass(frozen=True)
class Curve:
    """A published curve."""
    name: str
    settings: dict  # its header
    streams: dict   # {stream: {step: value}}


def published_names():
    """Names of the published curves."""
    paths = glob.glob(os.path.join(glob.escape(FOLDER), "*.csv"))
    return sorted(os.path.basename(path).removesuffix(".csv") for path in paths)


@functools.cache
def published(name):
    """The published Curve of this name; ValueError if there is none."""
    if name not in published_names():
        raise ValueError(f"--reference {name}: must be the name of a published curve:"
                         f" {', '.join(published_names())}")
    with open(os.path.join(FOLDER, f"{name}.csv"), encoding="utf-8") as f:
        lines = f.read().splitlines()
    settings = {}
    for line in lines:
        if line.startswith("# "):
            key, value = line[2:].split(": ", 1)
            try:
                settings[key] = json.loads(value)  # a number
            except ValueError:
                settings[key] = value
    streams = {}
    for row in csv.DictReader(line for line in lines if not line.startswith("#")):
        streams.setdefault(row["stream"], {})[int(row["step"])] = float(row["value"])
    return Curve(name, settings, streams)


def corpus_of(path):
    """The key in CORPORA of the corpus whose 10B-token sample is in a folder of shards, or None.

    fineweb.py's manifest.json has the data set. Without one, the names of the shards
    (edufineweb_train_000001.npy) and of the folder (edu_fineweb10B, fineweb10B) decide, which are
    build-nanogpt's and llm.c's.
    """
    name = os.path.basename(os.path.normpath(path))
    if os.path.isdir(path):
        manifest = load_manifest(path)
        if manifest:
            source = manifest["source"]
            name = f"{source.get('dataset')} {source.get('name')} {source.get('prepared')}"
            name = name.replace(" sample-10BT", "10B")
        elif any(file.startswith("edufineweb_train_") for file in os.listdir(path)):
            return "edu"
    match = re.search(r"(edu_?)?fineweb[-_]?(edu[-_]?)?10B", name)
    if match is None:
        return None
    return "edu" if match[1] or match[2] else "fineweb"


# -----------------------------------------------------------------------------
# which curve a run can be compared with

# settings without which a run trains something else
TASK = ("corpus", "n_layer", "n_embd", "total_batch_size")
# what must hold for its validation losses to be comparable; not_compared is a curve's reason
COMPARABLE = (*TASK, "not_compared", "val_tokens")
# settings that change the loss, the most likely cause first
CAUSES = ("init_from", "optimizer", "lr", "schedule", "warmup_steps", "max_steps", "min_lr_ratio",
          "init", "block_size", "weight_decay", "beta1", "beta2", "grad_clip", "dropout",
          "embd_lr_ratio", "n_head", "shuffle")


def differences(settings, curve, names=COMPARABLE):
    """["lr is 0.0012, the published run's is 0.0006", ...]: how a run differs from a published one.

    settings: the run's, a dict. names: of the settings to compare, of which either may lack some.
    Without differences in COMPARABLE, the run's validation losses are comparable with the curve's.
    """
    data = settings.get("data") or "unknown"
    run = {**settings, "corpus": corpus_of(data)}
    found = []
    for name in names:
        value, expected = run.get(name), curve.settings.get(name)
        if name == "corpus" and value is None:
            found.append(f"the data, {os.path.basename(os.path.normpath(data))}, are not known to"
                         " be FineWeb's or FineWeb-Edu's sample of 10B tokens")
        elif name == "not_compared" and expected:
            found.append(expected)
        elif name == "init_from" and value:
            found.append(f"init_from is {value}: it does not start from random weights")
        elif value is None or expected is None:
            continue
        elif name == "val_tokens":
            if value < expected:
                found.append(f"it validates on {value:,} tokens, the published run on {expected:,}")
        elif name == "max_steps" and abs(value - expected) < 0.05 * expected:
            continue  # a few shards more or less change the schedule little
        elif value != expected:
            found.append(f"{name} is {value}, the published run's is {expected}")
    return found


def val_stream(settings, curve):
    """The stream of log.txt that has a run's loss on the validation tokens of a curve."""
    val_tokens = curve.settings["val_tokens"]
    return "val" if settings["val_tokens"] == val_tokens else f"val_{val_tokens}"


def find_curve(settings, name=None):
    """(curve, reason): the published Curve that fits a run, or None and why there is none.

    Of the comparable ones it has the fewest different settings, the most validation tokens and the
    most known settings. name: compare with this curve only.
    """
    curves = [published(n) for n in ([name] if name else published_names())]
    comparable = [curve for curve in curves if not differences(settings, curve)]
    if not comparable:
        reasons = [differences(settings, curve) for curve in curves]
        return None, min(reasons, key=len)[0]  # of the nearest curve

    def distance(curve):
        known = curve.settings
        return len(differences(settings, curve, CAUSES)), -known["val_tokens"], -len(known)
    return min(comparable, key=distance), None


# -----------------------------------------------------------------------------
# the band around a published curve

# The only public runs with the same settings and the same validation tokens. The curves on
# FineWeb-Edu have one run each, and get the band of this pair.
PAIR = ("fineweb-llmc-8xh100", "fineweb-llmc-8xa100")
FIRST_STEP = 250   # of the public runs' validations after step 0, whose loss is the seed's
MIN_BAND = 0.01    # nats; after step 2,000 no difference within PAIR is larger (0.0087)


@functools.cache
def band_at(step):
    """Half the width of the band at a step, in nats.

    3 times the root mean square of the differences within PAIR between step / 2 and 2 x step, but
    at least MIN_BAND.
    """
    a, b = (published(name).streams["val"] for name in PAIR)
    near = [b[s] - a[s] for s in a if s in b and s >= FIRST_STEP and step / 2 <= s <= 2 * step]
    if not near:
        return MIN_BAND
    return max(MIN_BAND, 3 * float(np.sqrt(np.mean(np.square(near)))))


def is_judged(curve, step):
    """Whether a run's validation at a step is compared: the published run has one there too."""
    return step >= FIRST_STEP and step in curve.streams["val"]


def outcome(curve, step, val):
    """"within" the band, "WORSE than" or "BETTER than" it; NaN is worse."""
    difference = val - curve.streams["val"][step]
    if abs(difference) <= band_at(step):
        return "within"
    return "BETTER than" if difference < 0 else "WORSE than"


def comparison_line(settings, curve, step, val):
    """The line on a validation loss, that of val_stream."""
    expected = curve.streams["val"][step]
    return (f"step {step}: {val_stream(settings, curve)} {val:.3f}, published {expected:.3f}"
            f" ({val - expected:+.3f}, {outcome(curve, step, val)} the spread of public runs,"
            f" ±{band_at(step):.3f})")


def likely_causes(settings, curve, worse):
    """Up to three likely causes why a run is outside the band, worse or better."""
    causes = differences(settings, curve, CAUSES)
    if worse:
        # a permutation does not raise the loss
        causes = [cause for cause in causes if not cause.startswith("shuffle ")]
        causes += [f"the shards: {command('fineweb.py', '--verify', settings['data'])}",
                   "the tokenizer, if another program has made the shards",
                   "the autocast dtype: does --dtype float32 give the same loss in the first"
                   " steps?"]
    return causes[:3] or ["validation text among the training data"]


# -----------------------------------------------------------------------------
# the first steps of the lecture's run

LECTURE = "gpt2-124M-lecture"       # the preset that repeats it
FINGERPRINT = "edu-lecture-2xh100"  # has the losses of steps 0 to 100 and 150
LAST_STEP = 189    # from the next step on the order of the data depends on the number of GPUs
# nats (choice). The two full public logs agree within 5.6e-5 for 50 steps and 0.013 for 189. They
# are in bfloat16 autocast; in float32 the losses of steps 0 to 10 change by up to 5e-4 (measured
# with 2,048 tokens per step, on a CPU). A schedule that is one step late, lr 0 at step 0, changes
# that of step 1 by 0.05.
SAME_STEPS, TOLERANCE = 50, 1e-3    # "as published"
LATE_TOLERANCE = 0.02               # of the steps after these
NORM_TOLERANCE = 0.05  # of the gradient norm 15.342 at step 0: 0.3% (choice)
HINT_AT_0 = ("the shards (fineweb.py --verify), the tokenizer, the order of the data (--shuffle"
             " off) or the initial weights (--init lecture, --seed 1337)")
HINT_LATER = ("step 0 agrees, so data and initial weights are right: the learning rate, its warmup,"
              " the optimizer, gradient clipping, or the data of the later steps")


def first_losses(settings, log):
    """[(step, line), ...] on the first losses of a run that repeats the lecture's; [] for others.

    The lines: that they are as published, at step 49, and the first departure. log: read_log's.
    """
    curve = published(FINGERPRINT)
    if settings.get("preset") != LECTURE or differences(settings, curve, TASK):
        return []
    train, norm = dict(log.get("train", [])), dict(log.get("norm", []))
    lines = []
    largest = 0.0
    for step, expected in curve.streams["train"].items():
        if step > LAST_STEP or step not in train:
            break
        tolerance = TOLERANCE if step < SAME_STEPS else LATE_TOLERANCE
        difference = abs(train[step] - expected)
        if not difference <= tolerance:  # NaN too
            hint = HINT_AT_0 if step == 0 else HINT_LATER
            causes = [*differences(settings, curve, CAUSES)[:3], hint]
            lines.append((step, f"step {step}: loss {train[step]:.4f}, published {expected:.4f}:"
                          f" departs from the public runs (±{tolerance:g})\n"
                          f"  most likely: {'; '.join(causes)}"))
            break
        expected_norm = curve.streams["norm"][0]
        if step == 0 and 0 in norm and not abs(norm[0] - expected_norm) <= NORM_TOLERANCE:
            lines.append((0, f"step 0: gradient norm {norm[0]:.4f}, published {expected_norm:.4f}:"
                          " departs from the public runs\n  most likely: the loss agrees, so it is"
                          " the backward pass: gradient accumulation, or the mean over ranks"))
            break
        largest = max(largest, difference)
        if step == SAME_STEPS - 1:
            lines.append((step, f"steps 0 to {step}: as published, losses within {largest:.1e}"))
    return lines


# -----------------------------------------------------------------------------
# what train_gpt2.py and plots.py print

def announce_curve(settings):
    """Prints which published curve a run will be compared with, or why none; returns it or None."""
    curve, reason = find_curve(settings)
    if curve:
        print0(f"validations are compared with {curve.name}, a public run: docs/reference.md")
    elif not os.path.isfile(settings["data"]):  # nobody expects a comparison for a text file
        print0(f"not compared with published runs: {reason}")
    return curve


def print_comparison(settings, curve, step, losses):
    """Prints the line on a validation; losses is what evaluate_loss returned."""
    if curve is None or not is_judged(curve, step):
        return
    val = losses.get(val_stream(settings, curve))
    if val is None:  # the validation split is shorter
        return
    hint = ""
    if outcome(curve, step, val) == "WORSE than":
        hint = "; plots.py --verdict lists likely causes"
    print0(comparison_line(settings, curve, step, val) + hint)


def print_first_losses(run_dir, settings, step):
    """Prints the line of first_losses that is due after a step's update, if any."""
    if settings["preset"] == LECTURE and step <= LAST_STEP:
        log = read_log(os.path.join(run_dir, "log.txt"))
        for line_step, line in first_losses(settings, log):
            if line_step == step:
                print0(line)


def verdict(run_dir, name=None):
    """Text that says whether a run agrees with a published curve; None: the one that fits."""
    log = read_log(os.path.join(run_dir, "log.txt"))
    settings = read_config(run_dir)
    run_name = os.path.basename(os.path.abspath(run_dir))
    lines = [line for _, line in first_losses(settings, log)]
    curve, reason = find_curve(settings, name)
    if curve is None:
        lines.append(f"{run_name} is not compared with published runs: {reason}")
        return "\n".join(lines)
    stream = val_stream(settings, curve)
    judged = [(step, val) for step, val in log.get(stream, []) if is_judged(curve, step)]
    if not judged:
        lines.append(f"{run_name} has no {stream} at a step of {curve.name}'s validations yet")
        return "\n".join(lines)
    outside = [(step, val) for step, val in judged if outcome(curve, step, val) != "within"]
    lines.append(f"compared with {curve.name}: {len(judged) - len(outside)} of {len(judged)}"
                 " validations are within its band")
    if outside and outside[0] != judged[-1]:
        lines.append(comparison_line(settings, curve, *outside[0]))
    lines.append(comparison_line(settings, curve, *judged[-1]))
    if outside:
        worse = outcome(curve, *outside[-1]) == "WORSE than"
        causes = likely_causes(settings, curve, worse)
        lines += ["  most likely, in this order:", *(f"    {cause}" for cause in causes)]
    return "\n".join(lines)
