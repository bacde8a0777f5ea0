"""
The report of a run says what was trained, how well and at what cost, and gives only numbers that its log contains.

    ./test.sh tests/test_report.py     # no network, no GPU
"""
import json
import os

import pytest

import report
from reference import published
from report import clock, run_scores, run_settings, write_report

CONFIG = {"preset": "gpt2-124M", "data": "/home/me/edu_fineweb10B", "n_layer": 12, "n_head": 12, "n_embd": 768, "lr": 6e-4,
          "block_size": 1024, "vocab_size": 50304, "total_batch_size": 524288, "val_tokens": 10485760, "max_steps": 500}


@pytest.fixture
def run_dir(tmp_path):
    """A run of 500 steps on 8 GPUs at 524,288 tokens per second, a step a second, with the published losses."""
    folder, values = tmp_path / "mine", published("edu-lecture-8gpu").streams["val"]
    folder.mkdir()
    lines = [f"{step} train 5.0\n{step} tok_per_sec 524288\n" for step in range(500)]
    for step, score in ((0, 2500), (250, 2550), (500, 2600)):
        lines += [f"{step} val {values[step]}\n{step} val_bpb {values[step] / 3:.4f}\n{step} hella {score / 10042}\n"]
    (folder / "log.txt").write_text("".join(lines))
    (folder / "config.json").write_text(json.dumps({
        "config": CONFIG, "command": ["/home/me/train_gpt2.py", "--exp-name", "my run"], "world_size": 8, "dtype": "bfloat16",
        "device": "NVIDIA H100", "torch": "2.9.0", "python": "3.12.3", "commit": "abc"}))
    return str(folder)


def test_the_clock_counts_steps_that_were_not_logged():
    steps, hours = clock([0, 4], [100.0, 50.0], 3600)
    assert steps.tolist() == [0, 4, 5] and hours.tolist() == pytest.approx([0, 0.04, 0.06])


def test_a_stranger_learns_what_was_trained_how_well_and_at_what_cost(run_dir):
    path = write_report(run_dir, price=3.0)
    with open(path, encoding="utf-8") as f:
        text = f.read()
    assert text.startswith("# mine\n\nA GPT-2 of 124,475,904 parameters (12 layers, 12 heads, 768 channels), trained for 500"
                           " steps on 262,144,000 tokens of edu_fineweb10B, on 8 x NVIDIA H100, in 8.3 minutes (evaluations not"
                           " counted).\n")
    for words in ("- validation loss (nats per token): 5.2742 (OpenAI's GPT-2 124M on FineWeb-Edu: 3.2924)\n",
                  "- HellaSwag acc_norm, completion style: 0.2589 ± 0.0044 (chance 0.25, OpenAI's GPT-2 124M: 0.2955)\n",
                  "bits per byte): 1.7581\n", "](loss.png)",
                  "compared with edu-lecture-8gpu: 2 of 2 validations are within its band",
                  "| cost | $3.33: 1.11 device-hours at $3.00 |", "| dtype | bfloat16 |", "| commit | abc |",
                  "python /home/me/train_gpt2.py --exp-name 'my run'\n```\n\ntorchrun started it on 8 processes."):
        assert words in text, words
    assert sorted(os.listdir(run_dir)) == ["config.json", "log.txt", "report.md"]


def test_a_standard_error_is_given_only_for_the_full_set():
    assert report.with_error(2967 / 10042) == "0.2955 ± 0.0046"
    for score in (62 / 250, 0.3022):  # of 250 examples; rounded
        assert report.with_error(score) == f"{score:.4f} (rounded, or of fewer than the set's 10,042 examples)"
    assert report.with_error(float("nan")) == "nan"


def test_scores_and_time_are_those_of_the_checkpoint(run_dir):
    assert run_scores(run_dir, 250)["validation loss (nats per token)"] == "6.1443"
    settings = run_settings(run_dir, 250, price=36)
    assert settings["training tokens"] == "131,072,000" and settings["time"].startswith("4.2 minutes")
    assert settings["cost"].startswith("$20.00: 0.56 device-hours")
    assert "cost" not in run_settings(run_dir) and not any("/home" in str(value) for value in settings.values())


def test_a_log_without_settings_has_a_report_too(tmp_path):
    (tmp_path / "log.txt").write_text("0 train 5.0\n1 train 4.0\n2 val 3.5\n")
    with open(write_report(str(tmp_path)), encoding="utf-8") as f:
        text = f.read()
    assert "A GPT-2, trained for 2 steps.\n\n- validation loss (nats per token): 3.5000\n" in text
    assert "is not compared with published runs: the data, unknown, are not known" in text and "None" not in text
    with pytest.raises(FileNotFoundError, match="has no log.txt"):
        write_report(str(tmp_path / "nowhere"))


def test_a_setting_cannot_break_the_tables(tmp_path):
    (tmp_path / "log.txt").write_text("0 val 5.0\n")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"lr": "a | b\n# c"}, "device": "\x1b[31m GPU"}))
    with open(write_report(str(tmp_path)), encoding="utf-8") as f:
        text = f.read()
    assert "\n# c" not in text and r"| lr | a \| b # c |" in text and "\x1b" not in text
