"""
Published training curves, and whether the losses of a run agree with them.

    curves/NAME.csv     a published curve: `# key: value` lines (what it is, its source and settings), then step,stream,value
    comparison = Comparison(config)               # in train_gpt2.py, for one line per validation
    print(verdict("log/gpt2-124M"))               # python plots.py RUN --verdict

Two runs are comparable if corpus, model size, tokens per step and validation tokens are the same. docs/reference.md explains
the band within which they agree, and names the sources of the curves.
"""
import csv
import glob
import math
import os
import re
from itertools import combinations
from typing import NamedTuple

import numpy as np

from run.cli import first_line, print0, printable
from run.config import CORPORA
from run.folder import read_config, read_log
from data import load_manifest

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "curves")

# Published results by model size; GPT-3's 760M is under "774M", its 1.3B under "1558M".
# Loss of OpenAI's GPT-2: on FineWeb-Edu val (build-nanogpt's notebook; 124M only), on FineWeb val (llm.c's vislog).
GPT2_LOSS = {"edu": {"124M": 3.2924}, "fineweb": {"124M": 3.4250, "350M": 3.0831, "774M": 3.0006, "1558M": 2.8313}}
# HellaSwag val, acc_norm. GPT-2: completion style (build-nanogpt's hellaswag.py, llm.c's vislog) and lm-eval style
# (lm-evaluation-harness). GPT-3: its paper, appendix H.
GPT2_HELLASWAG = {"124M": 0.2955, "350M": 0.3752, "774M": 0.4320, "1558M": 0.4893}
GPT2_HELLASWAG_LM_EVAL = {"124M": 0.3114, "1558M": 0.5089}
GPT3_HELLASWAG = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}
HELLASWAG_EXAMPLES = 10042  # in val, the split that all of these are scored on


def size_of(config):
    """The key of the published results for a run's settings, the nearest in parameters; "124M" without settings."""
    n_layer, n_embd = config.get("n_layer", 12), config.get("n_embd", 768)
    n = 12 * n_layer * n_embd ** 2 + 50257 * n_embd
    return min(GPT2_HELLASWAG, key=lambda size: abs(math.log(n / (float(size[:-1]) * 1e6))))


# -----------------------------------------------------------------------------
# curves: published ones, and those of runs

class NotComparable(ValueError):
    """The losses of a run and a reference say nothing about each other; the message is the reason."""


class Curve(NamedTuple):
    """A name, facts (the header of a published curve, a run's settings and its corpus), and {stream: {step: value}}."""
    name: str
    facts: dict
    streams: dict


def corpus_of(path):
    """The key in CORPORA of the corpus whose 10B-token sample the shards in folder path are of; None if it is unknown.

    It is in fineweb.py's manifest.json. Without one, the names of the folder (edu_fineweb10B, fineweb10B) and of the shards
    (edufineweb_train_000001.npy), which are build-nanogpt's and llm.c's, decide.
    """
    path = str(path)
    name, files = os.path.basename(os.path.normpath(path)), os.listdir(path) if os.path.isdir(path) else []
    if manifest := load_manifest(path) if files else None:
        source = manifest["source"]
        name, files = f"{source.get('dataset', '')} {source.get('name', '')} {source.get('prepared', '')}", []
        name = re.sub(r"(fineweb(-edu)?) sample-10BT", r"\g<1>10B", name)
    if match := re.search(r"(edu_?)?fineweb[-_]?(edu[-_]?)?10B", name):
        return "edu" if match[1] or match[2] else "fineweb"
    return "edu" if any(file.startswith("edufineweb_train_") for file in files) else None


def published_names():
    """Names of the published curves."""
    return sorted(os.path.basename(path).removesuffix(".csv") for path in glob.glob(os.path.join(glob.escape(FOLDER), "*.csv")))


def published(name):
    """The published Curve of this name; ValueError if its file is not as the top of this file says."""
    path, facts, streams = os.path.join(FOLDER, f"{name}.csv"), {}, {}
    try:
        with open(path, encoding="utf-8", newline="") as f:
            lines = f.read().splitlines()
        for line in (line for line in lines if line.startswith("#")):
            key, value = re.fullmatch(r"# (\w+): (.*)", line).groups()
            facts[key] = next((kind(value) for kind in (int, float) if is_number(value, kind)), value)
        for row in csv.DictReader(line for line in lines if not line.startswith("#")):
            streams.setdefault(row["stream"], {})[int(row["step"])] = float(row["value"])
        if not {"corpus", "n_layer", "n_embd", "total_batch_size"} <= facts.keys() or "val" not in streams:
            raise ValueError("its header or its val values are incomplete")
    except (ValueError, AttributeError, KeyError, TypeError) as e:
        raise ValueError(f"{path} is damaged ({first_line(e)}); restore it, with git checkout run/curves") from e
    return Curve(name, facts, streams)


def is_number(text, kind):
    """Whether a text is a number of this kind, int or float."""
    try:
        return math.isfinite(kind(text))
    except ValueError:
        return False


def curve_of_run(run_dir):
    """The Curve of a run folder; FileNotFoundError without a log.txt."""
    path = os.path.join(run_dir, "log.txt")
    if not os.path.exists(path):
        raise FileNotFoundError(f"{run_dir} has no log.txt; give a run folder, log/<exp-name>")
    streams = {stream: dict(points) for stream, points in read_log(path).items()}
    return Curve(printable(os.path.basename(os.path.abspath(run_dir))), facts_of(read_config(run_dir)), streams)


def facts_of(config):
    """A run's settings, from TrainConfig or config.json, with its corpus."""
    for name, low in (("n_layer", 1), ("n_embd", 1), ("total_batch_size", 1), ("val_tokens", 1), ("max_steps", 0)):
        if type(value := config.get(name, 1)) is not int or not low <= value < 2**53:
            raise ValueError(f"{name} in config.json is {value!r:.100}, must be an integer of {low} or more")
    return {**config, "corpus": corpus_of(config.get("data", ""))}


def find_curves(names):
    """The Curves of --reference's values, names of published curves or run folders; ValueError for another one."""
    curves = []
    for name in names:
        if name not in published_names() and not os.path.isdir(name):
            raise ValueError(f"--reference {name}: neither a run folder nor a published curve, which are"
                             f" {', '.join(published_names()) or f'missing: there is no {FOLDER}'}")
        curves.append(published(name) if name in published_names() else curve_of_run(name))
    return curves


# -----------------------------------------------------------------------------
# which curves a run can be compared with

MIN_VAL_TOKENS = 327_680  # the fewest that a public run read: with fewer its loss is not comparable


def obstacle(run, other):
    """Why the validation losses of two runs, given as facts, are not comparable; None if they are."""
    is_published, who = "source" in other, "the published run" if "source" in other else "the reference"
    where = [os.path.basename(os.path.normpath(str(facts.get("data") or "unknown"))) for facts in (run, other)]
    if is_published and run["corpus"] is None:
        return f"the data, {printable(where[0])}, are not known to be FineWeb's or FineWeb-Edu's sample of 10B tokens"
    if run["corpus"] != other["corpus"] or not run["corpus"] and where[0] != where[1]:
        mine, its = (printable(CORPORA.get(facts["corpus"], place)) for facts, place in zip((run, other), where))
        return f"it trains on {mine}, {who} on {its}"
    names = {"n_layer": "blocks", "n_embd": "channels", "total_batch_size": "tokens per step"}
    for name, unit in names.items():
        if run.get(name) != other.get(name):
            return f"it has {format_setting(run.get(name))} {unit}, {who} {format_setting(other.get(name))}"
    if run.get("val_tokens") != other.get("val_tokens") and (not is_published or run.get("val_tokens", 0) < MIN_VAL_TOKENS):
        mine, its = (format_setting(facts.get("val_tokens")) for facts in (run, other))
        return f"it validates on {mine} tokens, {who} on {its}"
    return None


# settings that change the loss, the most likely cause first
CAUSES = ("optimizer", "lr", "schedule", "warmup_steps", "max_steps", "min_lr_ratio", "init", "block_size", "val_tokens",
          "weight_decay", "beta1", "beta2", "grad_clip", "dropout", "embd_lr_ratio", "n_head", "shuffle")


def format_setting(value):
    """A setting in a message: 524288 -> "524,288", 0.0012 -> "0.0012"."""
    text = f"{value:,}" if type(value) is int else f"{value:g}" if type(value) is float else str(value)
    return printable(text)[:60]


def differences(run, other):
    """["lr is 0.0012, the published run's is 0.0006", ...] of two runs, given as facts, the most likely cause first."""
    who = "the published run's" if "source" in other else "the reference's"
    found = [f"init_from is {format_setting(run['init_from'])}: it does not start from random weights"
             ] if run.get("init_from", "") != other.get("init_from", "") else []
    for name in (name for name in CAUSES if name in run and name in other and run[name] != other[name]):
        mine, its = run[name], other[name]
        if name == "max_steps" and abs(mine - its) < 0.05 * its:  # a few shards more or less change the schedule little
            continue
        found.append(f"{name} is {format_setting(mine)}, {who} is {format_setting(its)}")
    return found


def fitting(run):
    """The published Curve that fits a run, given as facts; NotComparable if there is none.

    Of those comparable it has the nearest number of validation tokens, the fewest different settings, and the most known ones.
    """
    curves = [curve for curve in map(published, published_names()) if "not_compared" not in curve.facts]
    if not curves:
        raise FileNotFoundError(f"there are no published curves in {FOLDER}; restore it, with git checkout run/curves")
    if comparable := [curve for curve in curves if obstacle(run, curve.facts) is None]:
        return min(comparable, key=lambda curve: (abs(math.log(curve.facts.get("val_tokens", 1) / run["val_tokens"])),
                                                  len(differences(run, curve.facts)), -len(curve.facts)))
    # the reason against the nearest: of its corpus and size, if any is
    raise NotComparable(obstacle(run, min(curves, key=lambda curve: [curve.facts[name] != run.get(name) for name in
                                                                  ("corpus", "n_layer", "n_embd")]).facts))


# -----------------------------------------------------------------------------
# the verdict

# pairs of published runs with the same settings; the first two read different validation tokens
PAIRS = (("edu-lecture-8gpu", "edu-lecture-2xh100"), ("fineweb-llmc-8xh100", "fineweb-llmc-8xa100"))
FIRST_STEP = 250       # of the public runs' validations after step 0, whose loss is that of the seed
MIN_BAND = 0.01        # nats; after step 2000 no difference within a pair is larger (0.0092)
OTHER_TOKENS = 0.022   # nats; by how much the loss changes with the part of the val split that is read, in the public runs


class Verdict(NamedTuple):
    """A validation loss and the reference's, nats: expected, and the band around it, the spread of correct runs."""
    step: int
    val: float
    expected: float
    band: float

    @property
    def outcome(self):
        """"within", "worse" or "better"."""
        if abs(self.val - self.expected) <= self.band:
            return "within"
        return "better" if self.val < self.expected else "worse"


class Reference:
    """One published Curve, or one or more Curves of runs, as what a run is compared with.

    names: values of --reference; none: the published curve that fits. NotComparable if the run is not.

    The band at a step is 3 times the root mean square of the differences of pairs of runs between step / 2 and 2 x step:
    of public runs with equal settings, at least MIN_BAND, or of the given runs. Of a single run it is a fraction of the
    loss, 1% x sqrt(1000 / step), between 0.33% and 4%: nowhere narrower than that of the public runs, and wider than the
    differences between four seeds of the shakespeare preset with 60 steps, at most 2.9% at step 20 and 2.0% at step 60
    (measured on a CPU). Of two runs it is the wider of both.
    """

    def __init__(self, facts, names=()):
        curves = find_curves(names) or [fitting(facts)]
        for curve in curves:
            if reason := curve.facts.get("not_compared") or obstacle(facts, curve.facts):
                raise NotComparable(reason)
        self.facts, self.curves, self.published = curves[0].facts, curves, "source" in curves[0].facts
        if self.published and len(curves) > 1:
            raise ValueError("--reference takes one published curve, or run folders, for a verdict")
        pairs = combinations(curves, 2)
        if self.published:
            pairs = [(published(a), published(b)) for a, b in PAIRS]
        self.scatter = [point for a, b in pairs for point in scatter(a, b, centered=self.published)]
        self.widened = OTHER_TOKENS if facts.get("val_tokens") != self.facts.get("val_tokens") else 0.0
        self.label = "published" if self.published else curves[0].name if len(curves) == 1 else f"mean of {len(curves)} runs"
        self.last = min(max(curve.streams.get("val", {0: 0})) for curve in curves)

    def band(self, step, expected):
        """Half the width of the band at a step whose expected loss is given."""
        near = [difference for at, difference in self.scatter if step / 2 <= at <= 2 * step]
        band = 3 * float(np.sqrt(np.mean(np.square(near)))) if near else 0.0
        if self.published:
            return max(MIN_BAND, band) + self.widened
        one = min(max(0.01 * math.sqrt(1000 / max(step, 1)), 0.0033), 0.04) * expected
        return max(band, one) if len(self.curves) < 3 else max(band, 0.001)  # a log prints 4 digits

    def verdict(self, step, val):
        """The Verdict on a validation loss; None at a step that the reference does not cover."""
        if not (FIRST_STEP if self.published else 0) <= step <= self.last:
            return None
        points = [interpolate(curve.streams["val"], step) for curve in self.curves if "val" in curve.streams]
        if not points or any(point is None for point in points):
            return None
        expected, error = (float(np.mean(values)) for values in zip(*points))
        return Verdict(step, val, expected, self.band(step, expected) + error)

    def line(self, v):
        """A Verdict as one line."""
        spread = ("the spread of public runs" if self.published else f"the spread of the {len(self.curves)} runs"
                  if len(self.curves) > 1 else "the band around a single run")
        how = {"within": "within", "better": "BETTER than", "worse": "WORSE than"}[v.outcome]
        note = f", {self.widened:g} of it because its validation tokens are not {self.curves[0].name}'s" if self.widened else ""
        return (f"step {v.step}: val {v.val:.3f}, {self.label} {v.expected:.3f} ({v.val - v.expected:+.3f}, {how} {spread},"
                f" ±{v.band:.3f}{note})")


def scatter(a, b, centered):
    """[(step, difference)] of the validation losses of two Curves; centered: without their median from FIRST_STEP on."""
    x, y = a.streams.get("val", {}), b.streams.get("val", {})
    points = [(step, y[step] - x[step]) for step in sorted(x.keys() & y.keys()) if not centered or step >= FIRST_STEP]
    center = float(np.median([difference for _, difference in points])) if centered else 0.0
    return [(step, difference - center) for step, difference in points]


def interpolate(values, step):
    """(value, error) of {step: value} at a step between two of its steps; None outside.

    The value is halfway between the straight lines over the step and over its logarithm, the error their distance.
    """
    steps = sorted(values)
    if not steps or not steps[0] <= step <= steps[-1]:
        return None
    if step in values:
        return values[step], 0.0
    y = [values[s] for s in steps]
    linear = np.interp(step, steps, y)
    logarithmic = np.interp(math.log1p(step), np.log1p(steps), y)
    return float(linear + logarithmic) / 2, float(abs(linear - logarithmic))


def explanation(facts, reference, outcome):
    """Lines that say why a run is likely to be outside the band: its settings that differ, then what is left to suspect."""
    causes = differences(facts, reference.facts)
    if outcome == "better":
        causes = causes[:3]
        return ["  these settings differ:", *(f"    {cause}" for cause in causes)] if causes else [
            "  no setting differs: check that no validation text is among the training data"]
    data = printable(str(facts.get("data") or "DATA"))
    text = f"the text: has {os.path.basename(data)} changed?"
    causes = [cause for cause in causes if not cause.startswith("shuffle ")]  # a permutation does not raise the loss
    left = [f"the shards: python fineweb.py --verify {data}" if facts["corpus"] else text,
            "the tokenizer, if another program has made the shards" if facts["corpus"] else "a change to the code",
            "the autocast dtype: does --dtype float32 give the same loss in the first steps?"]
    return ["  most likely, in this order:", *(f"    {cause}" for cause in (causes + left)[:3])]


def verdict(run_dir, names=()):
    """Text that says whether a run agrees with a reference: names are values of --reference, none the published curve
    that fits."""
    run, lines = curve_of_run(run_dir), []
    if has_fingerprint(run.facts):
        fingerprint, train = Fingerprint(run.facts), run.streams.get("train", {})
        texts = [fingerprint(step, train[step], run.streams.get("norm", {}).get(step)) for step in range(11) if step in train]
        lines += [text for text in texts if text]
    try:
        reference = Reference(run.facts, names)
    except NotComparable as e:
        return "\n".join([*lines, f"{run.name} is not compared with {'the reference' if names else 'published runs'}: {e}"])
    judged = [v for step, val in run.streams.get("val", {}).items() if (v := reference.verdict(step, val))]
    if not judged:
        first = f"from step {FIRST_STEP} on" if reference.published else f"up to step {reference.last}"
        return "\n".join([*lines, f"{run.name} has no validation to compare yet: those {first} are"])
    outside = [v for v in judged if v.outcome != "within"]
    lines += [f"compared with {', '.join(curve.name for curve in reference.curves)}: {len(judged) - len(outside)} of"
              f" {len(judged)} validations are within its band"]
    if outside:
        lines += [reference.line(outside[0])] if outside[0] is not judged[-1] else []
    lines += [reference.line(judged[-1])]
    if outside:
        lines += explanation(run.facts, reference, outside[-1].outcome)
    return "\n".join(lines)


# -----------------------------------------------------------------------------
# the first steps of the lecture's run

FINGERPRINT = "edu-lecture-2xh100"  # three public runs, on 1, 2 and 8 GPUs, agree with each other within 4e-5
LECTURE = "gpt2-124M-lecture"       # the preset that repeats it
# nats (choice). The public runs are in bfloat16 autocast; in float32 the losses of steps 0 to 10 change by up to 5e-4 (measured
# with 2,048 tokens per step, on a CPU). A schedule that is one step late, lr 0 at step 0, changes that of step 1 by 0.05
TOLERANCE = 5e-3
NORM_TOLERANCE = 0.05  # of the gradient norm 15.342 at step 0: 0.3% (choice)


def has_fingerprint(facts):
    """Whether a run repeats the lecture's, so that its first losses are known."""
    if facts.get("preset") != LECTURE:
        return False
    known = published(FINGERPRINT).facts
    return obstacle({**facts, "val_tokens": known["val_tokens"]}, known) is None


class Fingerprint:
    """Takes the training losses of steps 0 to 10 in order, and the norm of step 0; returns the line to print, or None."""

    def __init__(self, facts):
        self.facts, self.curve = facts, published(FINGERPRINT)
        self.largest, self.next_step = 0.0, 0  # None once a line was returned

    def __call__(self, step, train, norm=None):
        if self.next_step is None or step != self.next_step:
            self.next_step = None  # resumed: the first losses are not all known
            return None
        self.next_step += 1
        known = {"loss": (train, self.curve.streams["train"][step], TOLERANCE)}
        if step == 0 and norm is not None:
            known["gradient norm"] = norm, self.curve.streams["norm"][0], NORM_TOLERANCE
        for name, (value, expected, tolerance) in known.items():
            if not abs(value - expected) <= tolerance:  # NaN too
                self.next_step = None
                return (f"step {step}: {name} {value:.4f}, published {expected:.4f}: departs from the published runs"
                        f" (±{tolerance:g})\n  most likely: {self.causes(step, name)}")
        self.largest = max(self.largest, abs(train - known["loss"][1]))
        if step < 10:
            return None
        self.next_step = None
        return f"steps 0 to 10: as published, losses within {self.largest:.4f} of public runs on 1, 2 and 8 GPUs"

    def causes(self, step, name):
        """What is likely to be wrong if a run departs first at this step."""
        known = {key: value for key, value in self.curve.facts.items() if key != "val_tokens"}
        settings = "".join(f"{difference}; " for difference in differences(self.facts, known)[:3])
        if name != "loss":
            return settings + "the loss agrees, so it is the backward pass: gradient accumulation, or the mean over ranks"
        if step == 0:
            data = printable(str(self.facts.get("data") or "DATA"))
            return (settings + f"the shards (python fineweb.py --verify {data}), the tokenizer, the order of the data"
                    " (--shuffle off) or the initial weights (--init lecture, --seed 1337)")
        return settings + ("step 0 agrees, so data and initial weights are right: the learning rate, its warmup, the optimizer,"
                           " gradient clipping, or the data of the later steps")


class Comparison:
    """What train_gpt2.py prints about a run beside the published ones; config is TrainConfig as a dict.

        comparison = Comparison(asdict(config))
        comparison.print(step, val=3.34)                  # at a validation
        comparison.print(step, train=loss, norm=norm)     # after an update

    It never raises: a run on shards that is not comparable, and whatever fails (a damaged or missing reference/, an edited
    manifest.json), is one line, at the first validation. Prints nothing for a run on a text file.
    """

    def __init__(self, config):
        self.reference = self.fingerprint = self.reason = None
        self.outcome = None  # of the last validation
        self.facts = config
        try:
            self.facts = facts_of(config)
            if has_fingerprint(self.facts):
                self.fingerprint = Fingerprint(self.facts)
            self.reference = Reference(self.facts)
        except Exception as e:
            self.fail(e)

    def fail(self, error):
        """Ends the comparison; the next validation says why."""
        self.reference = None
        if not os.path.isfile(str(self.facts.get("data", ""))):
            self.reason = f"not compared with published runs: {error if isinstance(error, ValueError) else first_line(error)}"

    def __call__(self, step, val=None, train=None, norm=None):
        try:
            if train is not None and self.fingerprint:
                return self.fingerprint(step, train, norm)
            if val is not None and self.reference:
                return self.judge(step, val)
        except Exception as e:
            self.fingerprint = None
            self.fail(e)
        if val is not None:
            reason, self.reason = self.reason, None
            return reason
        return None

    def print(self, step, **values):
        """Prints what there is to say about the values of a step, on rank 0; values as in a call, which returns it."""
        if text := self(step, **values):
            print0(text)

    def judge(self, step, val):
        """The line of a validation; with its likely causes where the run leaves the band."""
        v = self.reference.verdict(step, val)
        if v is None:
            return None
        first, left, self.outcome = self.outcome is None, v.outcome not in ("within", self.outcome), v.outcome
        note = f"; the published run is {self.reference.curves[0].name}, see docs/reference.md" if first else ""
        return "\n".join([self.reference.line(v) + note,
                          *(explanation(self.facts, self.reference, v.outcome) if left else [])])
