"""
Published curves are what was published, runs are compared only with comparable ones, and a departure is reported.

    ./test.sh tests/test_reference.py     # no network, no GPU

With GPT2_REAL_DATA the files in reference/ are also compared with the logs that they were made from.
"""
import csv
import json
import math
import os
import shutil

import pytest

from run import reference
from run.config import CORPORA
from run.reference import Comparison, Fingerprint, NotComparable, Reference, corpus_of, facts_of, fitting, interpolate, published, verdict

CONFIG = {"preset": "gpt2-124M", "data": "edu_fineweb10B", "n_layer": 12, "n_head": 12, "n_embd": 768, "lr": 6e-4,
          "total_batch_size": 524288, "val_tokens": 10485760, "max_steps": 18787, "shuffle": "on", "warmup_steps": 715,
          "block_size": 1024, "init_from": "", "optimizer": "adamw"}
LECTURE = {**CONFIG, "preset": "gpt2-124M-lecture", "shuffle": "off", "max_steps": 19073, "init": "lecture"}


def make_run(folder, config, **streams):
    """A run folder with settings, and streams as {step: value}."""
    os.makedirs(folder)
    lines = [f"{step} {stream} {value}\n" for stream, points in streams.items() for step, value in points.items()]
    (folder / "log.txt").write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({"config": config}))
    return str(folder)


def shifted(name, by=0.0):
    """{step: val} of a published curve, moved by a number of nats."""
    return {step: value + by for step, value in published(name).streams["val"].items()}


# -----------------------------------------------------------------------------
# the published curves

def test_every_published_curve_is_complete():
    names = reference.published_names()
    assert len(names) == 8
    for name in names:
        curve = published(name)
        assert {"what", "source", "corpus", "n_params", "total_batch_size", "max_steps"} <= curve.facts.keys(), name
        assert curve.facts["corpus"] in CORPORA and len(curve.streams["val"]) > 50 * ("1gpu" not in name)
        assert max(curve.streams["val"]) <= curve.facts["max_steps"]


def test_three_public_runs_of_the_lecture_agree_within_4e_5_on_the_first_losses():
    curves = [published(f"edu-lecture-{machine}").streams for machine in ("1gpu", "2xh100", "8gpu")]
    for step in range(11):
        losses = [streams["train"][step] for streams in curves]
        assert max(losses) - min(losses) <= 4.1e-5
    assert [round(curves[1]["train"][step], 3) for step in (0, 1, 10)] == [10.955, 10.903, 9.876]


def test_the_curves_are_those_of_the_logs():
    if not os.environ.get("GPT2_REAL_DATA"):
        pytest.skip("GPT2_REAL_DATA is not set")
    with open(os.path.join(os.environ["GPT2_REAL_DATA"], "reference_curves.csv"), encoding="utf-8") as f:
        rows = {(row["source"], row["stream"], row["step"]): float(row["value"]) for row in csv.DictReader(f)}
    for name, source in (("edu-lecture-8gpu", "bn_logbob0401"), ("edu-lecture-2xh100", "bn_csabapalfi_2xH100"),
                         ("edu-lecture-1gpu", "bn_note17097477765_1gpu"), ("edu-lr1.2e-3", "bn_ashegde_lr1.2e-3"),
                         ("edu-lr2e-3", "edu_anw-g01_lr2e-3"), ("fineweb-llmc-8xh100", "llmc_20241013_8xH100"),
                         ("fineweb-llmc-8xa100", "llmc_siddanth_8xA100"), ("fineweb-llmc-350M", "llmc_350M_track2")):
        for stream, points in published(name).streams.items():
            assert all(rows[source, stream, str(step)] == value for step, value in points.items())
            if stream in ("val", "hella"):
                assert len(points) == len([key for key in rows if key[:2] == (source, stream)])


@pytest.mark.parametrize("line", ["# corpus edu", "250,val", "250,val,high", "step,value"])
def test_a_damaged_curve_is_an_error_that_names_its_file(line, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "FOLDER", str(tmp_path))
    (tmp_path / "a.csv").write_text(line + "\n# corpus: edu\nstep,stream,value\n250,val,6.1\n" if line != "250,val,high" and
                                    line != "250,val" else f"# corpus: edu\nstep,stream,value\n{line}\n")
    with pytest.raises(ValueError, match="a.csv is damaged .*; restore it"):
        published("a")


# -----------------------------------------------------------------------------
# which curve

def test_the_corpus_is_in_the_manifest_or_in_the_names(tmp_path):
    def corpus(name, source=None, shard="x_train_000001.npy"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / shard).write_bytes(b"")
        if source is not None:
            (folder / "manifest.json").write_text(json.dumps({"version": 1, "source": source, "shards": [], "bad_files": [],
                                                              "next": {"skipped": 0}, "complete": False}))
        return corpus_of(str(folder))

    edu = "HuggingFaceFW/fineweb-edu"
    assert corpus("a", {"dataset": edu, "name": "sample-10BT"}) == "edu"
    assert corpus("b", {"dataset": edu, "name": "sample-100BT"}) is None  # its validation tokens are others
    assert corpus("c", {"dataset": "HuggingFaceFW/fineweb", "name": "sample-10BT"}) == "fineweb"
    assert corpus("d", {"prepared": "kjj0/finewebedu10B-gpt2"}) == "edu"
    assert corpus("e", {"prepared": "kjj0/fineweb10B-gpt2"}) == "fineweb"
    assert corpus("edu_fineweb10B", {"files": ["my.txt"]}) is None  # the manifest decides, not the name
    assert corpus("f", shard="edufineweb_train_000001.npy") == "edu" and corpus("g") is None
    paths = ("gone/edu_fineweb10B/", "fineweb10B", "input.txt", "")
    assert [corpus_of(path) for path in paths] == ["edu", "fineweb", None, None]


@pytest.mark.parametrize("changes, name", [({}, "edu-lecture-8gpu"), ({"val_tokens": 2621440}, "edu-lecture-2xh100"),
                                           ({"val_tokens": 2621440, "lr": 1.2e-3}, "edu-lr1.2e-3"),
                                           ({"data": "fineweb10B"}, "fineweb-llmc-8xh100"),
                                           ({"data": "fineweb10B", "n_layer": 24, "n_embd": 1024}, "fineweb-llmc-350M")])
def test_the_curve_that_fits_has_the_runs_corpus_size_and_validation_tokens(changes, name):
    assert fitting(facts_of({**CONFIG, **changes})).name == name


@pytest.mark.parametrize("changes, reason", [({"data": "input.txt"}, "the data, input.txt, are not known to be FineWeb's"),
                                             ({"n_layer": 24, "n_embd": 1024}, "it has 24 blocks, the published run 12"),
                                             ({"n_embd": 512}, "it has 512 channels, the published run 768"),
                                             ({"total_batch_size": 2**20}, "it has 1,048,576 tokens per step"),
                                             ({"val_tokens": 8192}, "it validates on 8,192 tokens")])
def test_why_a_run_is_not_compared_is_one_line(changes, reason):
    with pytest.raises(NotComparable, match=reason) as e:
        fitting(facts_of({**CONFIG, **changes}))
    assert "\n" not in str(e.value)


# -----------------------------------------------------------------------------
# the band

def outcomes(ref, points):
    """[outcome] of the validations that a Reference covers."""
    return [v.outcome for step, val in points.items() if (v := ref.verdict(step, val))]


def test_a_second_public_run_of_the_same_settings_is_within():
    ref = Reference(facts_of({**CONFIG, "data": "fineweb10B"}))
    assert outcomes(ref, shifted("fineweb-llmc-8xa100")) == ["within"] * 79
    offset = published("edu-lecture-2xh100").streams["val"][19072] - published("edu-lecture-8gpu").streams["val"][19072]
    moved = outcomes(Reference(facts_of(CONFIG)), shifted("edu-lecture-2xh100", -offset))
    assert len(moved) == 77 and moved.count("within") >= 75


def test_twice_the_learning_rate_is_better_and_a_tenth_of_a_nat_more_is_worse():
    assert outcomes(Reference(facts_of({**CONFIG, "val_tokens": 2621440})), shifted("edu-lr1.2e-3"))[-20:] == ["better"] * 20
    assert set(outcomes(Reference(facts_of(CONFIG)), shifted("edu-lecture-8gpu", 0.1))) == {"worse"}
    assert set(outcomes(Reference(facts_of(CONFIG)), shifted("edu-lecture-8gpu", math.nan))) == {"worse"}


def test_other_validation_tokens_widen_the_band():
    same, other = (Reference(facts_of({**CONFIG, "val_tokens": tokens})) for tokens in (10485760, 5242880))
    assert same.verdict(19072, 3.0).band == 0.01 and other.verdict(19072, 3.0).band == pytest.approx(0.032)
    assert "0.022 of it because its validation tokens are not" in other.line(other.verdict(19072, 3.0))
    # hence all three public runs of the lecture, which read 0.3, 2.6 and 10.5M tokens, agree with the middle one
    ref = Reference(facts_of({**CONFIG, "val_tokens": 327681}), ["edu-lecture-8gpu"])
    assert outcomes(ref, {19072: published("edu-lecture-1gpu").streams["val"][19072]}) == ["within"]
    assert outcomes(ref, shifted("edu-lecture-2xh100"))[-40:] == ["within"] * 40


def test_only_steps_that_the_published_run_covers_are_compared():
    ref = Reference(facts_of(CONFIG))
    assert [step for step in (0, 249, 250, 251, 19072, 19073) if ref.verdict(step, 3.0)] == [250, 251, 19072]


def test_between_logged_steps_the_error_of_interpolation_is_in_the_band():
    """Twice the distance between logged steps has about four times the error: it is measured without every other step."""
    ref, values = Reference(facts_of(CONFIG)), published("edu-lecture-8gpu").streams["val"]
    for step in range(500, 19000, 250):
        value, _ = interpolate({s: v for s, v in values.items() if s != step}, step)
        assert abs(value - values[step]) / 4 <= min(ref.verdict(step - 125, 3.0).band, ref.verdict(step + 125, 3.0).band)
    assert ref.verdict(375, 5.7).band > ref.verdict(500, 5.2).band + 0.05
    assert interpolate(values, 750) == (values[750], 0.0) and interpolate(values, 20000) is None


def test_the_band_of_a_single_run_is_nowhere_narrower_than_that_of_the_public_runs(tmp_path):
    run = make_run(tmp_path / "a", CONFIG, val=shifted("edu-lecture-8gpu"))
    one, public = Reference(facts_of(CONFIG), [run]), Reference(facts_of(CONFIG))
    assert all(one.verdict(step, 3.0).band >= public.verdict(step, 3.0).band for step in range(250, 19001, 250))
    assert one.verdict(0, 11.0).band == pytest.approx(0.04 * 10.9514)


def test_several_runs_have_the_band_of_their_own_spread(tmp_path):
    config = {**CONFIG, "data": "input.txt", "n_layer": 1}
    runs = [make_run(tmp_path / f"{i}", config, val={20: 6.0 + i * 0.1, 200: 5.0 + i * 0.001}) for i in range(3)]
    ref = Reference(facts_of(config), runs)
    early, late = ref.verdict(20, 6.1), ref.verdict(200, 5.001)
    assert (early.expected, late.expected) == (pytest.approx(6.1), pytest.approx(5.001))
    assert early.band == pytest.approx(3 * math.sqrt((0.1**2 + 0.1**2 + 0.2**2) / 3))
    assert late.band == pytest.approx(3 * math.sqrt((0.001**2 + 0.001**2 + 0.002**2) / 3))
    assert "mean of 3 runs 5.001" in ref.line(late) and "the spread of the 3 runs" in ref.line(late)


def test_a_run_is_not_compared_with_a_run_on_other_text(tmp_path):
    mine, other = ({**CONFIG, "data": f"/tmp/{name}.txt"} for name in "ab")
    run = make_run(tmp_path / "a", other, val={20: 6.0})
    with pytest.raises(NotComparable, match="it trains on a.txt, the reference on b.txt"):
        Reference(facts_of(mine), [run])


# -----------------------------------------------------------------------------
# the verdict on a run

def test_the_verdict_on_a_right_run_is_short(tmp_path):
    run = make_run(tmp_path / "a", CONFIG, val=shifted("edu-lecture-8gpu", 0.004))
    assert verdict(run) == ("compared with edu-lecture-8gpu: 77 of 77 validations are within its band\n"
                            "step 19072: val 3.057, published 3.053 (+0.004, within the spread of public runs, ±0.010)")


def test_a_run_outside_the_band_gets_the_settings_that_differ_in_order(tmp_path):
    changed = {**CONFIG, "lr": 1.2e-3, "warmup_steps": 100, "init_from": "gpt2"}
    lines = verdict(make_run(tmp_path / "a", changed, val=shifted("edu-lecture-8gpu", 0.1))).splitlines()
    assert lines[0].endswith("0 of 77 validations are within its band") and "WORSE than the spread" in lines[2]
    assert lines[3:] == ["  most likely, in this order:", "    init_from is gpt2: it does not start from random weights",
                         "    lr is 0.0012, the published run's is 0.0006",
                         "    warmup_steps is 100, the published run's is 715"]
    lines = verdict(make_run(tmp_path / "b", changed, val=shifted("edu-lecture-8gpu", -0.1))).splitlines()
    assert "BETTER than" in lines[2] and lines[3] == "  these settings differ:" and "lr is 0.0012" in lines[5]


def test_a_run_outside_the_band_with_the_right_settings_gets_what_is_left_to_suspect(tmp_path):
    text = verdict(make_run(tmp_path / "a", CONFIG, val=shifted("edu-lecture-8gpu", 0.1)))
    assert text.splitlines()[-3:] == ["    the shards: python fineweb.py --verify edu_fineweb10B",
                                      "    the tokenizer, if another program has made the shards",
                                      "    the autocast dtype: does --dtype float32 give the same loss in the first steps?"]


def test_a_run_that_has_no_comparable_validation_is_told_why(tmp_path):
    run = make_run(tmp_path / "a", {**CONFIG, "data": "input.txt"}, val={250: 5.0})
    assert verdict(run).startswith("a is not compared with published runs: the data, input.txt, are not known")
    run = make_run(tmp_path / "b", CONFIG, val={0: 10.95})
    assert verdict(run) == "b has no validation to compare yet: those from step 250 on are"
    with pytest.raises(ValueError, match="--reference nope: neither a run folder nor a published curve, which are edu-lecture"):
        verdict(run, ["nope"])
    with pytest.raises(ValueError, match="n_layer in config.json is 'x'"):
        verdict(make_run(tmp_path / "c", {"n_layer": "x"}, val={0: 1.0}))


# -----------------------------------------------------------------------------
# the first steps

def first_steps(change=lambda step, loss: loss, config=LECTURE, norm=15.342):
    """[line] that a Fingerprint returns for the published losses, changed."""
    fingerprint, train = Fingerprint(facts_of(config)), published("edu-lecture-8gpu").streams["train"]
    return [line for step in range(11) if (line := fingerprint(step, change(step, train[step]), norm if step == 0 else 1.0))]


def test_the_lectures_first_losses_are_recognized():
    assert first_steps() == ["steps 0 to 10: as published, losses within 0.0000 of public runs on 1, 2 and 8 GPUs"]
    assert first_steps(lambda step, loss: loss + 0.004) == [
        "steps 0 to 10: as published, losses within 0.0040 of public runs on 1, 2 and 8 GPUs"]


@pytest.mark.parametrize("first, cause", [(0, "the shards (python fineweb.py --verify edu_fineweb10B), the tokenizer"),
                                          (3, "step 0 agrees, so data and initial weights are right: the learning rate")])
def test_where_a_run_departs_from_the_lectures_is_said_at_once_and_once(first, cause):
    line, = first_steps(lambda step, loss: loss + 0.04 * (step >= first))
    expected = {0: "step 0: loss 10.9950, published 10.9550", 3: "step 3: loss 10.7021, published 10.6621"}[first]
    assert line.startswith(expected + ": departs from the published runs") and cause in line


def test_a_nan_a_wrong_norm_and_a_changed_setting_are_departures_too():
    assert first_steps(lambda step, loss: math.nan)[0].startswith("step 0: loss nan")
    assert "the loss agrees, so it is the backward pass" in first_steps(norm=30.68)[0]
    line, = first_steps(lambda step, loss: loss + 0.1 * (step > 0), {**LECTURE, "lr": 1.2e-3})
    assert "most likely: lr is 0.0012, the published run's is 0.0006; step 0 agrees" in line


# -----------------------------------------------------------------------------
# during training

def test_training_prints_a_line_per_validation_and_the_causes_once():
    comparison = Comparison({**CONFIG, "lr": 1.2e-3})
    texts = [comparison(step, val=val) for step, val in shifted("edu-lecture-8gpu", 0.1).items()]
    assert texts[0] is None
    assert texts[1].splitlines()[0].endswith("; the published run is edu-lecture-8gpu, see docs/reference.md")
    assert "    lr is 0.0012, the published run's is 0.0006" in texts[1]
    assert all("WORSE" in text and "\n" not in text and len(text) < 128 for text in texts[2:])
    assert comparison(0, train=10.95, norm=15.3) is None  # not the lecture's preset


def test_training_of_the_lectures_preset_checks_the_first_losses():
    train = published("edu-lecture-8gpu").streams["train"]
    for first_step, lines in ((0, 1), (5, 0)):  # a resumed run has other first steps
        comparison = Comparison(LECTURE)
        texts = [comparison(step, train=train[step], norm=15.342 if step == 0 else 1.0) for step in range(first_step, 11)]
        assert len([text for text in texts if text]) == lines
    comparison = Comparison({**LECTURE, "val_tokens": 8192})  # too few to compare validations
    assert comparison(0, val=10.95).startswith("not compared with published runs: it validates on 8,192 tokens")
    assert comparison(0, train=11.5, norm=15.342).startswith("step 0: loss 11.5000, published 10.9550: departs")
    assert Comparison({**LECTURE, "n_layer": 2})(0, train=9.0, norm=1.0) is None


def test_whatever_is_wrong_with_the_reference_training_gets_one_line(tmp_path, monkeypatch):
    comparison = Comparison({**CONFIG, "data": "my_shards"})
    assert [bool(comparison(step, val=4.0)) for step in (0, 250, 500)] == [True, False, False]
    curves = reference.FOLDER
    (tmp_path / "text.txt").write_text("to be")
    assert Comparison({**CONFIG, "data": str(tmp_path / "text.txt")})(0, val=4.0) is None
    monkeypatch.setattr(reference, "FOLDER", str(tmp_path / "missing"))
    text = Comparison(CONFIG)(250, val=6.1)
    assert text.startswith("not compared with published runs: FileNotFoundError: there are no published curves")
    shutil.copytree(curves, tmp_path / "edited")
    (tmp_path / "edited" / "edu-lecture-8gpu.csv").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(reference, "FOLDER", str(tmp_path / "edited"))
    text = Comparison(CONFIG)(250, val=6.1)
    assert "edu-lecture-8gpu.csv is damaged" in text and "\n" not in text
    monkeypatch.undo()
    text = Comparison({**CONFIG, "val_tokens": None})(250, val=6.1)
    assert text.startswith("not compared with published runs: val_tokens in")
