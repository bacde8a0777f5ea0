"""
Published training curves, and whether the losses of a run agree with them.

    curves/NAME.csv     a published curve: `# key: value` lines (what it is, its source and
                        settings), then step,stream,value
    comparison = Comparison(config)               # in train_gpt2.py, for one line per validation
    print(verdict("log/gpt2-124M"))               # python plots.py RUN --verdict

Two runs are comparable if corpus, model size, tokens per step and validation tokens are the same.
docs/reference.md explains the band within which they agree, and names the sources of the curves.
"""
import csv
import functools
import glob
import math
import os
import re
from typing import NamedTuple

import numpy as np

from run.cli import command, print0
from run.config import CORPORA
from run.folder import read_config, read_log
from data import load_manifest

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "curves")

# Published results by model size; GPT-3's 760M is under "774M", its 1.3B under "1558M".
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
HELLASWAG_EXAMPLES = 10042  # in val, the split that all of these are scored on


def size_of(settings):
    """The key of the published results nearest to a model in parameters: 12, 768 -> "124M"."""
    n_embd = settings.get("n_embd", 768)
    n = 12 * settings.get("n_layer", 12) * n_embd ** 2 + 50257 * n_embd
    return min(GPT2_HELLASWAG, key=lambda size: abs(math.log(n / (float(size[:-1]) * 1e6))))


# -----------------------------------------------------------------------------
# the published curves

class Curve(NamedTuple):
    """A published curve: its name, its header as a dict, and {stream: {step: value}}."""
    name: str
    settings: dict
    streams: dict


def published_names():
    """Names of the published curves."""
    paths = glob.glob(os.path.join(glob.escape(FOLDER), "*.csv"))
    return sorted(os.path.basename(path).removesuffix(".csv") for path in paths)


def parse_value(text):
    """A value of a header: "19073" -> 19073, "0.0006" -> 0.0006, "cosine" -> "cosine"."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


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
            settings[key] = parse_value(value)
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

class NotComparable(ValueError):
    """The losses of a run and of a published curve are not comparable; the message says why."""


MIN_VAL_TOKENS = 327_680  # the fewest that a public run read: with fewer its loss is not comparable

# settings that change the loss, the most likely cause first
CAUSES = ("optimizer", "lr", "schedule", "warmup_steps", "max_steps", "min_lr_ratio", "init",
          "block_size", "val_tokens", "weight_decay", "beta1", "beta2", "grad_clip", "dropout",
          "embd_lr_ratio", "n_head", "shuffle")


def format_setting(value):
    """A setting in a message: 524288 -> "524,288", 0.0012 -> "0.0012"."""
    if type(value) is int:
        return f"{value:,}"
    return f"{value:g}" if type(value) is float else str(value)


def not_comparable(run, curve):
    """Why a run's validation losses are not comparable with a curve's; None if they are.

    run: the run's settings and its corpus, a dict.
    """
    published = curve.settings
    if run["corpus"] is None:
        data = os.path.basename(os.path.normpath(run.get("data") or "unknown"))
        return (f"the data, {data}, are not known to be FineWeb's or FineWeb-Edu's sample of 10B"
                " tokens")
    if run["corpus"] != published["corpus"]:
        return (f"it trains on {CORPORA[run['corpus']]},"
                f" the published run on {CORPORA[published['corpus']]}")
    for name, unit in (("n_layer", "blocks"), ("n_embd", "channels"),
                       ("total_batch_size", "tokens per step")):
        if run.get(name) != published[name]:
            return (f"it has {format_setting(run.get(name))} {unit},"
                    f" the published run {format_setting(published[name])}")
    val_tokens = run.get("val_tokens", 0)
    if val_tokens < MIN_VAL_TOKENS:
        return f"it validates on {val_tokens:,} tokens, public runs on {MIN_VAL_TOKENS:,} or more"
    return published.get("not_compared")


def differences(run, curve):
    """["lr is 0.0012, the published run's is 0.0006", ...], the most likely cause first."""
    found = []
    if run.get("init_from"):
        found.append(f"init_from is {run['init_from']}: it does not start from random weights")
    for name in CAUSES:
        if name not in run or name not in curve.settings:
            continue
        value, expected = run[name], curve.settings[name]
        # a few shards more or less change the schedule little
        near = name == "max_steps" and abs(value - expected) < 0.05 * expected
        if value != expected and not near:
            found.append(f"{name} is {format_setting(value)}, the published run's is"
                         f" {format_setting(expected)}")
    return found


def fitting(run):
    """The published Curve that fits a run's settings and corpus; NotComparable if none does.

    Of the comparable ones it has the nearest number of validation tokens, the fewest different
    settings, and the most known ones.
    """
    curves = [published(name) for name in published_names()]
    comparable = [curve for curve in curves if not_comparable(run, curve) is None]
    if not comparable:
        # the reason against the nearest, which has the run's corpus and size if any has
        names = ("corpus", "n_layer", "n_embd")
        nearest = min(curves, key=lambda curve: [curve.settings[n] != run.get(n) for n in names])
        raise NotComparable(not_comparable(run, nearest))

    def distance(curve):
        ratio = curve.settings.get("val_tokens", 1) / run["val_tokens"]
        return abs(math.log(ratio)), len(differences(run, curve)), -len(curve.settings)
    return min(comparable, key=distance)


# -----------------------------------------------------------------------------
# the band around a published curve

# pairs of published runs with the same settings; the first two read different validation tokens
PAIRS = (("edu-lecture-8gpu", "edu-lecture-2xh100"), ("fineweb-llmc-8xh100", "fineweb-llmc-8xa100"))
FIRST_STEP = 250       # of the public runs' validations after step 0, whose loss is the seed's
MIN_BAND = 0.01        # nats; after step 2000 no difference within a pair is larger (0.0092)
OTHER_TOKENS = 0.022   # nats; by how much the loss changes with the part of the val split that is
#                        read, in the public runs


class Verdict(NamedTuple):
    """A validation loss, the published one, and the band around it, the spread of correct runs."""
    step: int
    val: float
    expected: float
    band: float

    @property
    def outcome(self):
        """"within", "worse" or "better"; NaN is worse."""
        if abs(self.val - self.expected) <= self.band:
            return "within"
        return "better" if self.val < self.expected else "worse"


@functools.cache
def pair_differences():
    """(steps, differences) of the validation losses within PAIRS, without each pair's median."""
    all_steps, all_differences = [], []
    for names in PAIRS:
        a, b = (published(name).streams["val"] for name in names)
        steps = [step for step in sorted(a.keys() & b.keys()) if step >= FIRST_STEP]
        points = np.array([b[step] - a[step] for step in steps])
        all_steps += steps
        all_differences += (points - np.median(points)).tolist()
    return np.array(all_steps), np.array(all_differences)


def band_at(step):
    """Half the width of the band at a step, in nats.

    3 times the root mean square of the differences within PAIRS between step / 2 and 2 x step,
    but at least MIN_BAND.
    """
    steps, points = pair_differences()
    near = points[(step / 2 <= steps) & (steps <= 2 * step)]
    if len(near) == 0:
        return MIN_BAND
    return max(MIN_BAND, 3 * float(np.sqrt(np.mean(np.square(near)))))


def interpolate(values, step):
    """(value, error) of {step: value} at a step between two of its steps; None outside.

    The value is halfway between the straight lines over the step and over its logarithm, the error
    their distance.
    """
    if step in values:
        return values[step], 0.0
    steps = sorted(values)
    if not steps[0] <= step <= steps[-1]:
        return None
    y = [values[s] for s in steps]
    linear = np.interp(step, steps, y)
    logarithmic = np.interp(math.log1p(step), np.log1p(steps), y)
    return float(linear + logarithmic) / 2, float(abs(linear - logarithmic))


def judge(run, curve, step, val):
    """The Verdict on a run's validation loss; None at a step that the curve does not cover."""
    point = interpolate(curve.streams["val"], step)
    if step < FIRST_STEP or point is None:
        return None
    expected, error = point
    return Verdict(step, val, expected, band_at(step) + widening(run, curve) + error)


def widening(run, curve):
    """Nats to add to the band because the run reads other validation tokens."""
    return OTHER_TOKENS if run["val_tokens"] != curve.settings.get("val_tokens") else 0.0


# -----------------------------------------------------------------------------
# the first steps of the lecture's run

FINGERPRINT = "edu-lecture-2xh100"  # three public runs, on 1, 2 and 8 GPUs, agree within 4e-5
LECTURE = "gpt2-124M-lecture"       # the preset that repeats it
# nats (choice). The public runs are in bfloat16 autocast; in float32 the losses of steps 0 to 10
# change by up to 5e-4 (measured with 2,048 tokens per step, on a CPU). A schedule that is one step
# late, lr 0 at step 0, changes that of step 1 by 0.05
TOLERANCE = 5e-3
NORM_TOLERANCE = 0.05  # of the gradient norm 15.342 at step 0: 0.3% (choice)


def repeats_lecture(run):
    """Whether a run repeats the lecture's, so that its first losses are known."""
    if run.get("preset") != LECTURE:
        return False
    curve = published(FINGERPRINT)
    return not_comparable({**run, "val_tokens": curve.settings["val_tokens"]}, curve) is None


def causes_of_departure(run, step, stream):
    """What is likely to be wrong if a run departs from the lecture's first at this step."""
    settings = [cause for cause in differences(run, published(FINGERPRINT))
                if not cause.startswith("val_tokens ")][:3]
    if stream == "norm":
        rest = ("the loss agrees, so it is the backward pass: gradient accumulation, or the mean"
                " over ranks")
    elif step == 0:
        rest = (f"the shards ({command('fineweb.py', '--verify', run['data'])}), the tokenizer,"
                " the order of the data (--shuffle off) or the initial weights (--init lecture,"
                " --seed 1337)")
    else:
        rest = ("step 0 agrees, so data and initial weights are right: the learning rate, its"
                " warmup, the optimizer, gradient clipping, or the data of the later steps")
    return "; ".join([*settings, rest])


# -----------------------------------------------------------------------------
# a run beside the published ones

class Comparison:
    """What train_gpt2.py prints about a run; config is TrainConfig as a dict.

        comparison = Comparison(asdict(config))
        comparison.print(step, val=3.34)                  # at a validation
        comparison.print(step, train=loss, norm=norm)     # after an update

    name: of the published curve; None: the one that fits. Of a run that is not comparable, the
    first validation prints the reason, unless its data are a text file.
    """

    def __init__(self, config, name=None):
        self.run = {**config, "corpus": corpus_of(config.get("data", ""))}
        self.curve = None    # the published one
        self.reason = None   # why there is none
        try:
            curve = published(name) if name else fitting(self.run)
            self.reason = not_comparable(self.run, curve)
            if self.reason is None:
                self.curve = curve
        except NotComparable as e:
            self.reason = str(e)
        self.reason_printed = os.path.isfile(config.get("data", ""))
        self.outcome = None  # of the last validation
        # the first steps of the lecture's run: those whose losses agree, and the largest difference
        self.checks_first_steps = repeats_lecture(self.run)
        self.steps_checked = 0
        self.largest_difference = 0.0

    def print(self, step, val=None, train=None, norm=None):
        """Prints what there is to say about the values of a step, on rank 0."""
        text = self.on_update(step, train, norm) if val is None else self.on_validation(step, val)
        if text:
            print0(text)

    def on_validation(self, step, val):
        """The line of a validation; with its likely causes where the run leaves the band."""
        if self.curve is None:
            if self.reason_printed:
                return None
            self.reason_printed = True
            return f"not compared with published runs: {self.reason}"
        v = judge(self.run, self.curve, step, val)
        if v is None:
            return None
        text = self.line(v)
        if self.outcome is None:
            text += f"; the published run is {self.curve.name}, see docs/reference.md"
        if v.outcome not in ("within", self.outcome):
            text = "\n".join([text, *self.explanation(v.outcome)])
        self.outcome = v.outcome
        return text

    def on_update(self, step, train, norm):
        """The line on the first losses of a run that repeats the lecture's; None for others.

        It comes at the step that departs from the published losses, or after step 10.
        """
        if step != self.steps_checked:
            self.checks_first_steps = False  # resumed: the first losses are not all known
        if not self.checks_first_steps:
            return None
        self.steps_checked += 1
        streams = published(FINGERPRINT).streams
        checks = [("train", "loss", train, TOLERANCE)]
        if step == 0 and norm is not None:
            checks.append(("norm", "gradient norm", norm, NORM_TOLERANCE))
        for stream, label, value, tolerance in checks:
            expected = streams[stream][step]
            if not abs(value - expected) <= tolerance:  # NaN too
                self.checks_first_steps = False
                return (f"step {step}: {label} {value:.4f}, published {expected:.4f}: departs from"
                        f" the published runs (±{tolerance:g})\n"
                        f"  most likely: {causes_of_departure(self.run, step, stream)}")
        difference = abs(train - streams["train"][step])
        self.largest_difference = max(self.largest_difference, difference)
        if step < 10:
            return None
        self.checks_first_steps = False
        return (f"steps 0 to 10: as published, losses within {self.largest_difference:.4f} of"
                " public runs on 1, 2 and 8 GPUs")

    def line(self, v):
        """A Verdict as one line."""
        words = {"within": "within", "better": "BETTER than", "worse": "WORSE than"}
        note = ""
        widened = widening(self.run, self.curve)
        if widened:
            note = (f", {widened:g} of it because its validation tokens are not"
                    f" {self.curve.name}'s")
        return (f"step {v.step}: val {v.val:.3f}, published {v.expected:.3f}"
                f" ({v.val - v.expected:+.3f}, {words[v.outcome]} the spread of public runs,"
                f" ±{v.band:.3f}{note})")

    def explanation(self, outcome):
        """Lines that say why the run is likely to be outside the band.

        They are its settings that differ, then what is left to suspect.
        """
        causes = differences(self.run, self.curve)
        if outcome == "better":
            if not causes:
                return ["  no setting differs: check that no validation text is among the training"
                        " data"]
            return ["  these settings differ:", *(f"    {cause}" for cause in causes[:3])]
        # a permutation does not raise the loss
        causes = [cause for cause in causes if not cause.startswith("shuffle ")]
        causes += [f"the shards: {command('fineweb.py', '--verify', self.run['data'])}",
                   "the tokenizer, if another program has made the shards",
                   "the autocast dtype: does --dtype float32 give the same loss in the first"
                   " steps?"]
        return ["  most likely, in this order:", *(f"    {cause}" for cause in causes[:3])]


def verdict(run_dir, name=None):
    """Text that says whether a run agrees with a published curve; None: the one that fits."""
    log = read_log(os.path.join(run_dir, "log.txt"))
    comparison = Comparison(read_config(run_dir), name)
    norms = dict(log.get("norm", []))
    lines = []
    for step, loss in log.get("train", []):
        line = comparison.on_update(step, loss, norms.get(step))
        if line:
            lines.append(line)
    run_name = os.path.basename(os.path.abspath(run_dir))
    if comparison.curve is None:
        lines.append(f"{run_name} is not compared with published runs: {comparison.reason}")
        return "\n".join(lines)
    verdicts = [judge(comparison.run, comparison.curve, *point) for point in log.get("val", [])]
    judged = [v for v in verdicts if v]
    if not judged:
        lines.append(f"{run_name} has no validation to compare yet: those from step {FIRST_STEP} on"
                     " are")
        return "\n".join(lines)
    outside = [v for v in judged if v.outcome != "within"]
    lines.append(f"compared with {comparison.curve.name}: {len(judged) - len(outside)} of"
                 f" {len(judged)} validations are within its band")
    if outside and outside[0] is not judged[-1]:
        lines.append(comparison.line(outside[0]))
    lines.append(comparison.line(judged[-1]))
    if outside:
        lines += comparison.explanation(outside[-1].outcome)
    return "\n".join(lines)
