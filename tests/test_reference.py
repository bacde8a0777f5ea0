"""
Published curves are what was published, a run is compared with one of them on the same validation
tokens, and a departure is reported.

    ./test.sh tests/test_reference.py     # no network, no GPU

With GPT2_REAL_DATA the files in run/curves/ are compared with the logs that they were made from.
"""
import csv
import json
import math
import os
import re

import numpy as np
import pytest

from common import ROOT
from run import cli
from run.config import CORPORA
from run.reference import (PAIR, VAL_TOKENS, announce_curve, band_at, corpus_of, find_curve,
                           first_losses, is_judged, outcome, print_comparison, print_first_losses,
                           published, published_names, val_stream, verdict)

CONFIG = {"preset": "gpt2-124M", "data": "edu_fineweb10B", "n_layer": 12, "n_head": 12,
          "n_embd": 768, "lr": 6e-4, "total_batch_size": 524288, "val_tokens": 10485760,
          "max_steps": 18787, "shuffle": "on", "warmup_steps": 715, "block_size": 1024,
          "init_from": "", "optimizer": "adamw"}
LECTURE = {**CONFIG, "preset": "gpt2-124M-lecture", "shuffle": "off", "max_steps": 19073,
           "init": "lecture"}
LLMC = {**CONFIG, "data": "fineweb10B", "max_steps": 19560}


def val_of(name):
    """{step: val} of a published curve."""
    return published(name).streams["val"]


def shifted(name, by=0.0):
    """{step: val} of a published curve, moved by a number of nats."""
    return {step: value + by for step, value in val_of(name).items()}


def write_run(folder, config, **streams):
    """Writes a run folder with these streams, {step: value}; returns its path."""
    os.makedirs(folder)
    lines = [f"{step} {stream} {value}\n" for stream, points in streams.items()
             for step, value in points.items()]
    (folder / "log.txt").write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({"config": config}))
    return str(folder)


def verdict_on(folder, config, name=None, **streams):
    """The lines of the verdict on a run with these streams."""
    return verdict(write_run(folder, config, **streams), name).splitlines()


def docs():
    with open(os.path.join(ROOT, "docs", "reference.md"), encoding="utf-8") as f:
        return " ".join(f.read().split())


# -----------------------------------------------------------------------------
# the published curves

def test_every_published_curve_is_complete():
    assert len(published_names()) == 8
    for name in published_names():
        curve = published(name)
        required = {"what", "source", "n_params", "n_layer", "n_embd", "total_batch_size",
                    "max_steps"}
        assert required <= curve.settings.keys(), name
        assert curve.settings["corpus"] in CORPORA
        assert "val_tokens" in curve.settings or "not_compared" in curve.settings
        assert curve.settings.get("val_tokens", 10485760) in (*VAL_TOKENS, 10485760)
        assert len(curve.streams["val"]) > (0 if "1gpu" in name else 50)
        assert max(curve.streams["val"]) <= curve.settings["max_steps"]
    lecture = published("edu-lecture-2xh100").settings
    assert lecture["lr"] == 6e-4 and lecture["n_layer"] == 12 and lecture["optimizer"] == "adamw"


def test_the_public_runs_of_the_lecture_agree_on_the_first_losses():
    """As docs/reference.md says: three on steps 0 to 10, two on the next."""
    names = ("edu-lecture-1gpu", "edu-lecture-2xh100", "edu-lecture-2xh800")
    one, h100, h800 = (published(name).streams["train"] for name in names)
    for step in range(11):
        losses = [one[step], h100[step], h800[step]]
        assert max(losses) - min(losses) <= 4.1e-5
    assert [round(h100[step], 3) for step in (0, 1, 10)] == [10.955, 10.903, 9.876]
    largest = {last: max(abs(h100[step] - h800[step]) for step in h100 if step <= last)
               for last in (49, 189)}
    assert [*h100][:102] == [*h800][:102] == [*range(101), 150]
    assert round(largest[49], 6) == 5.6e-5 and "5.6e-5 on steps 0 to 49" in docs()
    assert largest[189] < 0.013


def test_the_curves_are_those_of_the_logs():
    if not os.environ.get("GPT2_REAL_DATA"):
        pytest.skip("GPT2_REAL_DATA is not set")
    path = os.path.join(os.environ["GPT2_REAL_DATA"], "reference_curves.csv")
    with open(path, encoding="utf-8") as f:
        rows = {(row["source"], row["stream"], int(row["step"])): float(row["value"])
                for row in csv.DictReader(f)}
    sources = {"edu-lecture-2xh800": "bn_logbob0401", "edu-lecture-2xh100": "bn_csabapalfi_2xH100",
               "edu-lecture-1gpu": "bn_note17097477765_1gpu",
               "edu-lr1.2e-3": "bn_ashegde_lr1.2e-3", "edu-lr2e-3": "edu_anw-g01_lr2e-3",
               "fineweb-llmc-8xh100": "llmc_20241013_8xH100",
               "fineweb-llmc-8xa100": "llmc_siddanth_8xA100",
               "fineweb-llmc-350M": "llmc_350M_track2"}
    for name, source in sources.items():
        for stream, points in published(name).streams.items():
            assert all(rows[source, stream, step] == value for step, value in points.items())
            if stream in ("val", "hella"):
                assert len(points) == len([key for key in rows if key[:2] == (source, stream)])


def test_the_tables_of_the_documentation_are_those_of_the_curves():
    """docs/reference.md's table of curves, and README's of the lecture's run."""
    with open(os.path.join(ROOT, "docs", "reference.md"), encoding="utf-8") as f:
        text = f.read()
    for name in published_names():
        curve = published(name)
        row = re.search(rf"\| `{re.escape(name)}` .*", text)[0]
        tokens, val, hella = (cell.strip() for cell in row.split("|")[4:7])
        val_tokens = curve.settings.get("val_tokens")
        assert tokens == (f"{val_tokens:,}" if val_tokens else "not known")
        losses = curve.streams["val"]
        assert val == f"{losses[max(losses)]:.4f}"
        scores = curve.streams.get("hella")
        assert hella == (f"{scores[max(scores)]:.4f}" if scores else "-")
    with open(os.path.join(ROOT, "README.md"), encoding="utf-8") as f:
        readme = f.read()
    assert "2 x H800, 655,360 validation tokens" in readme
    steps = (250, 1000, 2000, 5000, 10000, 15000, 19072)
    streams = published("edu-lecture-2xh800").streams
    losses = [f"{streams['val'][step]:.2f}" for step in steps[:-1]] + ["3.053"]
    assert f"| validation loss | {' | '.join(losses)} |" in readme
    scores = [f"{streams['hella'][step]:.3f}"[1:] for step in steps]
    assert f"| HellaSwag acc_norm | {' | '.join(scores)} |" in readme


# -----------------------------------------------------------------------------
# which curve

def test_the_corpus_is_in_the_manifest_or_in_the_names(tmp_path):
    def corpus(name, source=None, shard="x_train_000001.npy"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / shard).write_bytes(b"")
        if source is not None:
            manifest = {"version": 1, "source": source, "shards": [], "next": {},
                        "complete": False}
            (folder / "manifest.json").write_text(json.dumps(manifest))
        return corpus_of(str(folder))

    edu, fineweb = "HuggingFaceFW/fineweb-edu", "HuggingFaceFW/fineweb"
    assert corpus("a", {"dataset": edu, "name": "sample-10BT"}) == "edu"
    assert corpus("b", {"dataset": edu, "name": "sample-100BT"}) is None  # other val tokens
    assert corpus("c", {"dataset": fineweb, "name": "sample-10BT"}) == "fineweb"
    assert corpus("d", {"prepared": "kjj0/finewebedu10B-gpt2"}) == "edu"  # of earlier versions
    assert corpus("edu_fineweb10B", {"files": ["my.txt"]}) is None  # the manifest decides
    assert corpus("f", shard="edufineweb_train_000001.npy") == "edu"
    assert corpus("g") is None
    paths = ("gone/edu_fineweb10B/", "fineweb10B", "input.txt", "")
    assert [corpus_of(path) for path in paths] == ["edu", "fineweb", None, None]


@pytest.mark.parametrize("changes, name, stream", [
    ({}, "edu-lecture-2xh100", "val_2621440"),
    ({"val_tokens": 2621440}, "edu-lecture-2xh100", "val"),
    ({"val_tokens": 2621439}, "edu-lecture-2xh800", "val_655360"),
    ({"val_tokens": 655360}, "edu-lecture-2xh800", "val"),
    ({"val_tokens": 327680}, "edu-lecture-1gpu", "val"),
    ({"lr": 1.2e-3}, "edu-lr1.2e-3", "val_2621440"),
    ({"data": "fineweb10B"}, "fineweb-llmc-8xh100", "val")])
def test_a_run_is_compared_on_the_curves_own_validation_tokens(changes, name, stream):
    """Default runs were judged on 10.5M tokens by a curve that is of 655,360."""
    settings = {**CONFIG, **changes}
    curve, reason = find_curve(settings)
    assert (curve.name, reason) == (name, None)
    assert val_stream(settings, curve) == stream


@pytest.mark.parametrize("changes, reason", [
    ({"data": "input.txt"}, "the data, input.txt, are not known to be FineWeb's"),
    ({"data": "fineweb10B", "n_embd": 512}, "n_embd is 512, the published run's is 768"),
    ({"n_layer": 24, "n_embd": 1024}, "n_layer is 24, the published run's is 12"),
    ({"data": "fineweb10B", "n_layer": 24, "n_embd": 1024}, "the number of its validation tokens"),
    ({"total_batch_size": 2**20}, "total_batch_size is 1048576, the published run's is 524288"),
    ({"val_tokens": 8192}, "it validates on 8,192 tokens, the published run on 327,680")])
def test_why_a_run_is_not_compared_is_one_line(changes, reason):
    curve, found = find_curve({**CONFIG, **changes})
    assert curve is None and found.startswith(reason) and "\n" not in found


@pytest.mark.parametrize("name, reason", [
    ("edu-lr2e-3", "each of its validations reads other tokens"),
    ("fineweb-llmc-8xh100", "corpus is edu, the published run's is fineweb")])
def test_a_curve_given_by_name_must_be_comparable(name, reason):
    assert find_curve(CONFIG, name) == (None, reason)
    assert find_curve(CONFIG, "edu-lr1.2e-3")[0].name == "edu-lr1.2e-3"
    with pytest.raises(ValueError, match="--reference nope: must be .* curve: edu-lecture-1gpu, "):
        find_curve(CONFIG, "nope")


# -----------------------------------------------------------------------------
# the band

def outcomes(points, name):
    """The outcomes of validations against a curve, in the order of the steps."""
    curve = published(name)
    return [outcome(curve, step, val) for step, val in points.items() if is_judged(curve, step)]


def first_outside(points, name):
    """The outcome of the first validation outside a curve's band; "within" if there is none."""
    return next((found for found in outcomes(points, name) if found != "within"), "within")


def test_the_band_and_its_sentences_follow_from_the_pair_of_public_runs():
    a, b = (val_of(name) for name in PAIR)
    assert {published(name).settings["val_tokens"] for name in PAIR} == {10485760}
    steps = np.array([step for step in a if step in b and step >= 250])
    differences = np.array([b[step] - a[step] for step in steps])
    largest = f"{abs(differences[steps > 2000]).max():.4f}"
    for path in ("docs/reference.md", "run/reference.py"):
        with open(os.path.join(ROOT, path), encoding="utf-8") as f:
            assert f"after step 2,000 no difference within PAIR is larger ({largest})" in " ".join(
                f.read().replace("the pair", "PAIR").split()), path
    assert float(largest) <= 0.01
    bands = {}
    for step in (250, 500, 1000, 2000, 4000, 8000):
        near = differences[(step / 2 <= steps) & (steps <= 2 * step)]
        bands[step] = max(0.01, 3 * math.sqrt((near ** 2).mean()))
        assert band_at(step) == pytest.approx(bands[step])
    row = " | ".join(f"±{band:.3f}" for band in bands.values())
    assert f"| band, nats | {row} |" in docs()
    assert band_at(10**9) == 0.01


def right_run(val_tokens, seed):
    """The streams of a right run with this --val-tokens: the lecture's published losses and noise.

    Nobody has published the loss on another number of tokens: on those it is 0.02 above the loss
    on the next smaller published number, as the published ones are among themselves.
    """
    noise = np.random.default_rng(seed)
    names = {327680: "edu-lecture-1gpu", 655360: "edu-lecture-2xh800",
             2621440: "edu-lecture-2xh100"}
    streams = {}
    for tokens, name in names.items():
        if tokens <= val_tokens:
            losses = {step: val + noise.normal(scale=0.002) for step, val in val_of(name).items()}
            streams["val" if tokens == val_tokens else f"val_{tokens}"] = losses
    if "val" not in streams:
        streams["val"] = {step: val + 0.02 for step, val in losses.items()}
    return streams


@pytest.mark.parametrize("val_tokens", [327680, 400000, 655360, 10**6, 2621440, 10485760])
def test_a_right_run_is_within_at_each_validation_whatever_its_val_tokens(val_tokens, tmp_path):
    """It was WORSE in 71 of 77 validations, because the curve's number of tokens was wrong."""
    for seed in range(3):
        lines = verdict_on(tmp_path / str(seed), {**LECTURE, "val_tokens": val_tokens},
                           **right_run(val_tokens, seed))
        n = 1 if val_tokens < 655360 else 77
        assert lines[0].endswith(f": {n} of {n} validations are within its band")
        assert len(lines) == 2 and "(" in lines[1] and "within the spread" in lines[1]


# every public run of a curve's settings on its validation tokens
@pytest.mark.parametrize("config, name, public_run, num_validations", [
    (LECTURE, "edu-lecture-1gpu", "edu-lecture-1gpu", 1),
    (LECTURE, "edu-lecture-2xh800", "edu-lecture-2xh800", 77),
    (LECTURE, "edu-lecture-2xh100", "edu-lecture-2xh100", 77),
    ({**LECTURE, "lr": 1.2e-3}, "edu-lr1.2e-3", "edu-lr1.2e-3", 77),
    (LLMC, "fineweb-llmc-8xh100", "fineweb-llmc-8xa100", 78),
    (LLMC, "fineweb-llmc-8xa100", "fineweb-llmc-8xh100", 78)])
def test_no_public_run_is_worse_than_a_curve_of_its_settings(
        config, name, public_run, num_validations, tmp_path):
    val_tokens = published(public_run).settings["val_tokens"]
    lines = verdict_on(tmp_path / "a", {**config, "val_tokens": val_tokens}, name,
                       val=val_of(public_run))
    n = num_validations
    assert lines[0] == f"compared with {name}: {n} of {n} validations are within its band"


def test_the_lectures_two_runs_differ_by_a_constant_and_less_than_the_band():
    """They validate on other tokens. Without the constant, they are a second pair of equal runs."""
    a, b = val_of("edu-lecture-2xh800"), val_of("edu-lecture-2xh100")
    constant = np.median([b[step] - a[step] for step in b if step >= 250])
    assert round(constant, 3) == 0.021 and "by a constant, 0.021," in docs()
    moved = shifted("edu-lecture-2xh100", -constant)
    assert outcomes(moved, "edu-lecture-2xh800") == ["within"] * 77


@pytest.mark.parametrize("points, name, found", [
    # half the learning rate: the public pair of 6e-4 and 1.2e-3, which is better
    (shifted("edu-lecture-2xh100"), "edu-lr1.2e-3", "WORSE than"),
    # twice the learning rate
    (shifted("edu-lr1.2e-3"), "edu-lecture-2xh100", "BETTER than"),
    # half the tokens per step, if the loss follows from the number of tokens
    ({2 * step: val for step, val in val_of("edu-lecture-2xh800").items()}, "edu-lecture-2xh800",
     "WORSE than"),
    # a public run that ended at 3.397, of which only that is known
    ({19072: 3.397}, "edu-lecture-2xh100", "WORSE than"),
    ({250: math.nan}, "edu-lecture-2xh100", "WORSE than")])
def test_a_wrong_run_is_outside_the_band(points, name, found):
    assert first_outside(points, name) == found


def test_a_schedule_that_is_one_step_late_shows_in_the_first_losses():
    """Its learning rate is 0 at step 0: each loss is that of one update less.

    No validation shows it: the loss changes less in one step than the band is wide.
    """
    losses = published("edu-lecture-2xh800").streams["train"]
    late = {0: losses[0], **{step + 1: losses[step] for step in range(50)}}
    (step, line), = first_losses(LECTURE, {"train": late.items(), "norm": [(0, 15.342)]})
    assert step == 1 and "departs from the public runs (±0.001)" in line
    vals = val_of("edu-lecture-2xh800")
    fall_per_step = (vals[250] - vals[500]) / 250
    assert fall_per_step < band_at(250) / 10


def test_only_validations_at_the_steps_of_the_published_run_are_compared():
    curve = published("edu-lecture-2xh800")
    steps = [step for step in (0, 249, 250, 251, 500, 19072, 19073) if is_judged(curve, step)]
    assert steps == [250, 500, 19072]


# -----------------------------------------------------------------------------
# the verdict on a run

def test_a_run_outside_the_band_gets_the_settings_that_differ_in_order(tmp_path):
    changed = {**CONFIG, "lr": 1.2e-3, "warmup_steps": 100, "init_from": "gpt2",
               "val_tokens": 655360}
    lines = verdict_on(tmp_path / "a", changed, val=shifted("edu-lecture-2xh800", 0.1))
    assert lines[0].endswith("0 of 77 validations are within its band")
    assert lines[1].startswith("step 250:") and "WORSE than the spread" in lines[2]
    causes = ["    init_from is gpt2: it does not start from random weights",
              "    lr is 0.0012, the published run's is 0.0006",
              "    warmup_steps is 100, the published run's is 715"]
    assert lines[3:] == ["  most likely, in this order:", *causes]
    lines = verdict_on(tmp_path / "b", changed, val=shifted("edu-lecture-2xh800", -0.1))
    assert "BETTER than" in lines[2] and lines[3:] == ["  most likely, in this order:", *causes]


def test_a_run_outside_the_band_with_the_right_settings_gets_what_is_left_to_suspect(tmp_path):
    lines = verdict_on(tmp_path / "a", CONFIG, val_2621440=shifted("edu-lecture-2xh100", 0.1))
    assert lines[-3:] == [
        f"    the shards: {cli.command('fineweb.py', '--verify', 'edu_fineweb10B')}",
        "    the tokenizer, if another program has made the shards",
        "    the autocast dtype: does --dtype float32 give the same loss in the first steps?"]
    lines = verdict_on(tmp_path / "b", {**LECTURE, "val_tokens": 655360},
                       val=shifted("edu-lecture-2xh800", -0.1))
    assert lines[-1] == "    validation text among the training data"


def test_the_verdict_on_a_run_without_a_comparable_validation_is_the_reason(tmp_path):
    line, = verdict_on(tmp_path / "a", {**CONFIG, "data": "input.txt"}, val={250: 5.0})
    assert line.startswith("a is not compared with published runs: the data, input.txt, are not")
    # before the first validation, or of a version that did not log val_N
    line, = verdict_on(tmp_path / "b", CONFIG, val={0: 10.95, 250: 6.0})
    assert line == "b has no val_2621440 at a step of edu-lecture-2xh100's validations yet"


# -----------------------------------------------------------------------------
# during training

def first_lines(change=lambda step, loss: loss, config=LECTURE, norm=15.342, last=189):
    """The lines on the published first losses, changed."""
    train = {step: change(step, loss)
             for step, loss in published("edu-lecture-2xh800").streams["train"].items()
             if step <= last}
    return [line for _, line in first_losses(config, {"train": train.items(), "norm": [(0, norm)]})]


def test_the_lectures_first_losses_are_recognized():
    assert first_lines() == ["steps 0 to 49: as published, losses within 5.6e-05"]
    assert first_lines(lambda step, loss: loss + 0.0009) == [
        "steps 0 to 49: as published, losses within 9.6e-04"]
    assert first_lines(last=48) == []  # not yet
    # validations on few tokens are not compared, the first losses are
    assert len(first_lines(config={**LECTURE, "val_tokens": 8192})) == 1


def test_the_first_losses_of_other_runs_are_not_compared():
    assert first_lines(config=CONFIG) == []
    assert first_lines(config={**LECTURE, "n_layer": 2}) == []


@pytest.mark.parametrize("first, expected, cause", [
    (0, "step 0: loss 10.9950, published 10.9550", "the shards (fineweb.py --verify)"),
    (3, "step 3: loss 10.7021, published 10.6621",
     "step 0 agrees, so data and initial weights are right: the learning rate"),
    (150, "step 150: loss 6.7117, published 6.6659", "step 0 agrees")])
def test_the_first_departure_from_the_lectures_losses_is_reported(first, expected, cause):
    *before, line = first_lines(lambda step, loss: loss + (0.04 if step >= first else 0))
    assert line.startswith(expected) and "departs from the public runs" in line and cause in line
    assert [line[:30] for line in before] == (["steps 0 to 49: as published, l"] * (first > 49))


def test_after_50_steps_the_lectures_losses_may_differ_by_two_hundredths():
    """The two public runs differ by 0.013."""
    assert len(first_lines(lambda step, loss: loss + (0.01 if step >= 50 else 0))) == 1
    line, = first_lines(lambda step, loss: loss + (0.0012 if step == 49 else 0))
    assert line.startswith("step 49:")


def test_a_nan_a_wrong_norm_and_a_changed_setting_are_departures_too():
    assert first_lines(lambda step, loss: math.nan)[0].startswith("step 0: loss nan")
    assert "the loss agrees, so it is the backward pass" in first_lines(norm=30.68)[0]
    changed = {**LECTURE, "lr": 1.2e-3}
    line, = first_lines(lambda step, loss: loss + (0.1 if step > 0 else 0), changed)
    assert "most likely: lr is 0.0012, the published run's is 0.0006; step 0 agrees" in line


def test_training_prints_the_line_on_the_first_losses_at_its_step(tmp_path, capsys):
    train = {step: loss for step, loss in published("edu-lecture-2xh800").streams["train"].items()}
    run_dir = write_run(tmp_path / "a", LECTURE, norm={0: 15.342}, train=train)
    for step in range(1, 200):
        print_first_losses(run_dir, LECTURE, step)
        print_first_losses(run_dir, CONFIG, step)
    assert capsys.readouterr().out == "steps 0 to 49: as published, losses within 5.6e-05\n"


def test_training_prints_the_curve_and_a_line_per_validation(capsys):
    config = {**CONFIG, "lr": 1.2e-3}
    curve = announce_curve(config)
    for step, val in shifted("edu-lr1.2e-3", 0.1).items():
        print_comparison(config, curve, step, {"val": 1.0, "val_2621440": val})
    print_comparison(config, curve, 250, {"val": 1.0})  # the validation split is shorter
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == ("validations are compared with edu-lr1.2e-3, a public run:"
                        " docs/reference.md")
    assert lines[1].startswith("step 250: val_2621440 6.") and len(lines) == 78
    assert all(line.endswith("WORSE than the spread of public runs, ±0.010);"
                             " plots.py --verdict lists likely causes") for line in lines[-40:])


def test_the_reason_why_a_run_is_not_compared_is_printed_once(tmp_path, capsys):
    assert announce_curve({**CONFIG, "data": "my_shards"}) is None
    line = "not compared with published runs: the data, my_shards, are not known"
    assert capsys.readouterr().out.startswith(line)
    print_comparison(CONFIG, None, 250, {"val": 4.0})
    (tmp_path / "text.txt").write_text("to be")  # nobody expects a comparison for a text file
    assert announce_curve({**CONFIG, "data": str(tmp_path / "text.txt")}) is None
    assert capsys.readouterr().out == ""
