"""
Published curves are what was published, runs are compared only with comparable ones, and a
departure is reported.

    ./test.sh tests/test_reference.py     # no network, no GPU

With GPT2_REAL_DATA the files in run/curves/ are compared with the logs that they were made from.
"""
import csv
import json
import math
import os

import pytest

from run import cli
from run.config import CORPORA
from run.reference import (Comparison, NotComparable, corpus_of, fitting, interpolate, judge,
                           published, published_names, verdict)

CONFIG = {"preset": "gpt2-124M", "data": "edu_fineweb10B", "n_layer": 12, "n_head": 12,
          "n_embd": 768, "lr": 6e-4, "total_batch_size": 524288, "val_tokens": 10485760,
          "max_steps": 18787, "shuffle": "on", "warmup_steps": 715, "block_size": 1024,
          "init_from": "", "optimizer": "adamw"}
LECTURE = {**CONFIG, "preset": "gpt2-124M-lecture", "shuffle": "off", "max_steps": 19073,
           "init": "lecture"}


def shifted(name, by=0.0):
    """{step: val} of a published curve, moved by a number of nats."""
    return {step: value + by for step, value in published(name).streams["val"].items()}


def facts(**changes):
    """The settings and the corpus of a run."""
    return Comparison({**CONFIG, **changes}).run


def verdict_on(folder, config, val, name=None):
    """The lines of the verdict on a run with these validation losses."""
    os.makedirs(folder)
    lines = [f"{step} val {value}\n" for step, value in val.items()]
    (folder / "log.txt").write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({"config": config}))
    return verdict(str(folder), name).splitlines()


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
        assert len(curve.streams["val"]) > (0 if "1gpu" in name else 50)
        assert max(curve.streams["val"]) <= curve.settings["max_steps"]
    lecture = published("edu-lecture-2xh100").settings
    assert lecture["lr"] == 6e-4 and lecture["n_layer"] == 12 and lecture["optimizer"] == "adamw"


def test_three_public_runs_of_the_lecture_agree_within_4e_5_on_the_first_losses():
    curves = [published(f"edu-lecture-{name}").streams for name in ("1gpu", "2xh100", "8gpu")]
    for step in range(11):
        losses = [streams["train"][step] for streams in curves]
        assert max(losses) - min(losses) <= 4.1e-5
    losses = curves[1]["train"]
    assert [round(losses[step], 3) for step in (0, 1, 10)] == [10.955, 10.903, 9.876]


def test_the_curves_are_those_of_the_logs():
    if not os.environ.get("GPT2_REAL_DATA"):
        pytest.skip("GPT2_REAL_DATA is not set")
    path = os.path.join(os.environ["GPT2_REAL_DATA"], "reference_curves.csv")
    with open(path, encoding="utf-8") as f:
        rows = {(row["source"], row["stream"], int(row["step"])): float(row["value"])
                for row in csv.DictReader(f)}
    sources = {"edu-lecture-8gpu": "bn_logbob0401", "edu-lecture-2xh100": "bn_csabapalfi_2xH100",
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


@pytest.mark.parametrize("changes, name", [
    ({}, "edu-lecture-8gpu"), ({"val_tokens": 2621440}, "edu-lecture-2xh100"),
    ({"val_tokens": 2621440, "lr": 1.2e-3}, "edu-lr1.2e-3"),
    ({"data": "fineweb10B"}, "fineweb-llmc-8xh100"),
    ({"data": "fineweb10B", "n_layer": 24, "n_embd": 1024}, "fineweb-llmc-350M")])
def test_the_curve_that_fits_has_the_runs_corpus_size_and_validation_tokens(changes, name):
    assert fitting(facts(**changes)).name == name


@pytest.mark.parametrize("changes, reason", [
    ({"data": "input.txt"}, "the data, input.txt, are not known to be FineWeb's"),
    ({"data": "fineweb10B", "n_embd": 512}, "it has 512 channels, the published run 768"),
    ({"n_layer": 24, "n_embd": 1024}, "it has 24 blocks, the published run 12"),
    ({"total_batch_size": 2**20}, "it has 1,048,576 tokens per step"),
    ({"val_tokens": 8192}, "it validates on 8,192 tokens, public runs on 327,680 or more")])
def test_why_a_run_is_not_compared_is_one_line(changes, reason):
    with pytest.raises(NotComparable, match=reason) as e:
        fitting(facts(**changes))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, reason", [
    ("edu-lr2e-3", "each of its validations reads other tokens"),
    ("fineweb-llmc-8xh100", "it trains on FineWeb-Edu, the published run on FineWeb")])
def test_a_curve_given_by_name_must_be_comparable(name, reason):
    comparison = Comparison(CONFIG, name)
    assert comparison.curve is None and comparison.reason == reason
    assert Comparison(CONFIG, "edu-lr1.2e-3").curve.name == "edu-lr1.2e-3"
    with pytest.raises(ValueError, match="--reference nope: must be .* curve: edu-lecture-1gpu, "):
        Comparison(CONFIG, "nope")


# -----------------------------------------------------------------------------
# the band

def outcomes(config, points, name="edu-lecture-8gpu"):
    """[outcome] of the validations that a published curve covers."""
    verdicts = [judge(config, published(name), step, val) for step, val in points.items()]
    return [v.outcome for v in verdicts if v]


def test_a_second_public_run_of_the_same_settings_is_within():
    run = facts(data="fineweb10B")
    name = fitting(run).name
    assert outcomes({**run, "val_tokens": published(name).settings.get("val_tokens")},
                    shifted("fineweb-llmc-8xa100"), name) == ["within"] * 79
    # the lecture's two runs validate on other tokens
    offset = shifted("edu-lecture-2xh100")[19072] - shifted("edu-lecture-8gpu")[19072]
    moved = outcomes(CONFIG, shifted("edu-lecture-2xh100", -offset))
    assert len(moved) == 77 and moved.count("within") >= 75


def test_twice_the_learning_rate_is_better_and_a_tenth_of_a_nat_more_is_worse():
    run = {**CONFIG, "val_tokens": 2621440}
    found = outcomes(run, shifted("edu-lr1.2e-3"), "edu-lecture-2xh100")
    assert found[-20:] == ["better"] * 20
    for more in (0.1, math.nan):
        assert set(outcomes(CONFIG, shifted("edu-lecture-8gpu", more))) == {"worse"}


def test_the_band_is_that_of_docs_reference_md_and_other_validation_tokens_widen_it():
    curve = published("edu-lecture-8gpu")
    bands = {250: 0.044, 500: 0.048, 1000: 0.036, 2000: 0.014, 4000: 0.011, 5000: 0.010}
    assert {step: round(judge(CONFIG, curve, step, 3.0).band, 3) for step in bands} == bands
    run = {**CONFIG, "val_tokens": 5242880}
    assert judge(run, curve, 19000, 3.0).band == pytest.approx(0.032)
    # hence the three public runs of the lecture, which read 0.3, 2.6 and 10.5M tokens, agree
    assert outcomes(run, {19072: shifted("edu-lecture-1gpu")[19072]}) == ["within"]
    assert outcomes(run, shifted("edu-lecture-2xh100"))[-40:] == ["within"] * 40


def test_only_steps_that_the_published_run_covers_are_compared():
    curve = published("edu-lecture-8gpu")
    covered = [step for step in (0, 249, 250, 251, 19072, 19073) if judge(CONFIG, curve, step, 3.0)]
    assert covered == [250, 251, 19072]


def test_between_logged_steps_the_error_of_interpolation_is_in_the_band():
    """Twice the distance between logged steps has about four times the error.

    It is measured without every other step.
    """
    curve = published("edu-lecture-8gpu")
    values = curve.streams["val"]

    def band(step):
        return judge(CONFIG, curve, step, 3.0).band
    for step in range(500, 19000, 250):
        others = {s: value for s, value in values.items() if s != step}
        error = abs(interpolate(others, step)[0] - values[step])
        assert error / 4 <= min(band(step - 125), band(step + 125))
    assert band(375) > band(500) + 0.05
    assert interpolate(values, 750) == (values[750], 0.0) and interpolate(values, 20000) is None


# -----------------------------------------------------------------------------
# the verdict on a run

def test_the_verdict_on_a_right_run_is_short(tmp_path):
    assert verdict_on(tmp_path / "a", CONFIG, shifted("edu-lecture-8gpu", 0.004)) == [
        "compared with edu-lecture-8gpu: 77 of 77 validations are within its band",
        "step 19072: val 3.057, published 3.053 (+0.004, within the spread of public runs, ±0.010)"]
    run = {**CONFIG, "val_tokens": 5242880}
    last = verdict_on(tmp_path / "b", run, shifted("edu-lecture-8gpu"))[-1]
    assert "0.022 of it because its validation tokens are not edu-lecture-2xh100's" in last


def test_a_run_outside_the_band_gets_the_settings_that_differ_in_order(tmp_path):
    changed = {**CONFIG, "lr": 1.2e-3, "warmup_steps": 100, "init_from": "gpt2"}
    lines = verdict_on(tmp_path / "a", changed, shifted("edu-lecture-8gpu", 0.1))
    assert lines[0].endswith("0 of 77 validations are within its band")
    assert lines[1].startswith("step 250:") and "WORSE than the spread" in lines[2]
    causes = ["    init_from is gpt2: it does not start from random weights",
              "    lr is 0.0012, the published run's is 0.0006",
              "    warmup_steps is 100, the published run's is 715"]
    assert lines[3:] == ["  most likely, in this order:", *causes]
    lines = verdict_on(tmp_path / "b", changed, shifted("edu-lecture-8gpu", -0.1))
    assert "BETTER than" in lines[2] and lines[3:] == ["  these settings differ:", *causes]


def test_a_run_outside_the_band_with_the_right_settings_gets_what_is_left_to_suspect(tmp_path):
    lines = verdict_on(tmp_path / "a", CONFIG, shifted("edu-lecture-8gpu", 0.1))
    assert lines[-3:] == [
        f"    the shards: {cli.command('fineweb.py', '--verify', 'edu_fineweb10B')}",
        "    the tokenizer, if another program has made the shards",
        "    the autocast dtype: does --dtype float32 give the same loss in the first steps?"]


def test_the_verdict_on_a_run_without_a_comparable_validation_is_the_reason(tmp_path):
    line, = verdict_on(tmp_path / "a", {**CONFIG, "data": "input.txt"}, {250: 5.0})
    assert line.startswith("a is not compared with published runs: the data, input.txt, are not")
    line, = verdict_on(tmp_path / "b", CONFIG, {0: 10.95})
    assert line == "b has no validation to compare yet: those from step 250 on are"


# -----------------------------------------------------------------------------
# during training

def first_lines(change=lambda step, loss: loss, config=LECTURE, norm=15.342, first_step=0):
    """The lines on the published first losses, changed."""
    comparison = Comparison(config)
    train = published("edu-lecture-8gpu").streams["train"]
    lines = [comparison.on_update(step, change(step, train[step]), norm if step == 0 else 1.0)
             for step in range(first_step, 11)]
    return [line for line in lines if line]


def test_the_lectures_first_losses_are_recognized():
    text = "steps 0 to 10: as published, losses within {} of public runs on 1, 2 and 8 GPUs"
    assert first_lines() == [text.format("0.0000")]
    assert first_lines(lambda step, loss: loss + 0.004) == [text.format("0.0040")]
    # validations on few tokens are not compared, the first losses are
    assert first_lines(config={**LECTURE, "val_tokens": 8192}) == [text.format("0.0000")]


def test_the_first_losses_of_other_runs_are_not_compared():
    assert first_lines(first_step=5) == []  # resumed
    assert first_lines(config=CONFIG) == []
    assert first_lines(config={**LECTURE, "n_layer": 2}) == []


@pytest.mark.parametrize("first, expected, cause", [
    (0, "step 0: loss 10.9950, published 10.9550",
     "--verify edu_fineweb10B), the tokenizer"),
    (3, "step 3: loss 10.7021, published 10.6621",
     "step 0 agrees, so data and initial weights are right: the learning rate")])
def test_where_a_run_departs_from_the_lectures_is_printed_once(first, expected, cause):
    line, = first_lines(lambda step, loss: loss + (0.04 if step >= first else 0))
    assert line.startswith(f"{expected}: departs from the published runs") and cause in line


def test_a_nan_a_wrong_norm_and_a_changed_setting_are_departures_too():
    assert first_lines(lambda step, loss: math.nan)[0].startswith("step 0: loss nan")
    assert "the loss agrees, so it is the backward pass" in first_lines(norm=30.68)[0]
    changed = {**LECTURE, "lr": 1.2e-3}
    line, = first_lines(lambda step, loss: loss + (0.1 if step > 0 else 0), changed)
    assert "most likely: lr is 0.0012, the published run's is 0.0006; step 0 agrees" in line


def test_training_prints_a_line_per_validation_and_the_causes_once(capsys):
    comparison = Comparison({**CONFIG, "lr": 1.2e-3})
    for step, val in shifted("edu-lecture-8gpu", 0.1).items():
        comparison.print(step, val=val)
        comparison.print(step, train=val, norm=1.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("step 250:")
    assert lines[0].endswith("; the published run is edu-lecture-8gpu, see docs/reference.md")
    assert lines[2] == "    lr is 0.0012, the published run's is 0.0006"
    assert len(lines) == 77 + 4 and all("WORSE" in line for line in lines[5:])


def test_the_reason_why_a_run_is_not_compared_is_printed_once(tmp_path):
    comparison = Comparison({**CONFIG, "data": "my_shards"})
    lines = [comparison.on_validation(step, 4.0) for step in (0, 250, 500)]
    assert lines[0].startswith("not compared with published runs: the data, my_shards, are not")
    assert lines[1:] == [None, None]
    (tmp_path / "text.txt").write_text("to be")  # nobody expects a comparison for a text file
    assert Comparison({**CONFIG, "data": str(tmp_path / "text.txt")}).on_validation(0, 4.0) is None
