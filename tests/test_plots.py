"""
log.txt read back, running means, and pictures with something in them.

    .venv/bin/python -m pytest tests/test_plots.py

Needs nothing but requirements-dev.txt.
"""
import json
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from model import SIZES
from plots import clock, curves_figure, main, plot_run, read_log, size_of, smooth

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    lines = [f"{step} train {10 - step / 20}\n{step} lr 6e-04\n" for step in range(100)]
    lines += [f"{step} val {10 - step / 20}\n{step} hella {0.25 + step / 2000}\n" for step in (0, 50, 100)]
    (folder / "log.txt").write_text("".join(lines))
    return folder


def test_a_log_is_read_into_its_streams(tmp_path):
    path = tmp_path / "log.txt"
    path.write_text("0 val 10.95\n0 train 10.9\n0 lr 8.39e-07\n1 train 10.5\n250 hella 0.2463\n")
    assert read_log(str(path)) == {"val": [(0, 10.95)], "train": [(0, 10.9), (1, 10.5)], "lr": [(0, 8.39e-07)],
                                   "hella": [(250, 0.2463)]}


def test_a_log_is_what_the_lectures_notebook_reads(run_dir):
    streams = {}
    for line in (run_dir / "log.txt").read_text().splitlines():  # the notebook's cell
        step, stream, val = line.strip().split()
        if stream not in streams:
            streams[stream] = {}
        streams[stream][int(step)] = float(val)
    assert {name: dict(points) for name, points in read_log(str(run_dir / "log.txt")).items()} == streams


@pytest.mark.parametrize("line", ["1 train", "1 train 2 3", "one train 2.0", "1 train high", "", "1.5 train 2.0"])
def test_a_line_that_is_no_fact_is_named(tmp_path, line):
    (tmp_path / "log.txt").write_text(f"0 train 3.0\n{line}\n2 train 1.0\n")
    with pytest.raises(ValueError, match="log.txt, line 2: expected `step stream value`"):
        read_log(str(tmp_path / "log.txt"))


def test_smooth_is_the_mean_of_the_last_values():
    assert smooth([1, 2, 3, 4], 2) == [1, 1.5, 2.5, 3.5]
    assert smooth([5.0, 1.0], 1) == [5.0, 1.0] and smooth([], 3) == []
    values = np.random.default_rng(0).normal(size=200).tolist()
    want = [np.mean(values[max(0, i - 6):i + 1]) for i in range(200)]
    assert np.allclose(smooth(values, 7), want)


def colours(path):
    """{(r, g, b): pixels} of a picture, 8 bits each."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(colour): count for colour, count in zip(found.tolist(), counts.tolist())}


BLUE, ORANGE, RED = (31, 119, 180), (255, 127, 14), (214, 39, 40)  # tab:blue (train), tab:orange (val), tab:red (GPT-2)


def test_a_picture_shows_train_and_val_and_hellaswag_only_where_there_is_some(run_dir):
    path = plot_run(str(run_dir))
    assert path == str(run_dir / "loss.png")
    seen = colours(path)
    assert seen[BLUE] > 50 and seen[ORANGE] > 50 and RED in seen
    with_hella = matplotlib.image.imread(path).shape
    text = (run_dir / "log.txt").read_text()
    (run_dir / "log.txt").write_text("".join(line for line in text.splitlines(True) if "hella" not in line))
    plot_run(str(run_dir))
    seen = colours(path)
    assert seen[BLUE] > 50 and seen[ORANGE] > 50 and RED not in seen
    assert matplotlib.image.imread(path).shape[1] < with_hella[1]
    assert sorted(os.listdir(run_dir)) == ["log.txt", "loss.png"]


def test_baselines_add_gpt2s_line_and_out_says_where_to(run_dir, tmp_path):
    (run_dir / "log.txt").write_text("0 train 10.0\n1 train 4.0\n2 train 3.0\n")
    out = str(tmp_path / "picture.png")
    assert RED not in colours(plot_run(str(run_dir), out))
    assert RED in colours(plot_run(str(run_dir), out, baselines=True))
    assert not os.path.exists(run_dir / "loss.png")


# -----------------------------------------------------------------------------
# what is in a figure, read back from its lines

def make_run(folder, n_layer=12, n_embd=768, total_batch_size=100, speeds=(10.0, 20.0, 5.0), **streams):
    """A run folder with config.json and a log of three steps; further streams as {step: value}."""
    os.makedirs(folder)
    streams = {"train": {0: 9.0, 1: 8.0, 2: 7.0}, "val": {0: 9.5, 3: 6.5}, "lr": {0: 0.1, 1: 0.2, 2: 0.3},
               "tok_per_sec": dict(enumerate(speeds)), **streams}
    lines = [f"{step} {stream} {value}\n" for stream, points in streams.items() for step, value in points.items()]
    (folder / "log.txt").write_text("".join(lines))
    settings = {"n_layer": n_layer, "n_embd": n_embd, "total_batch_size": total_batch_size}
    (folder / "config.json").write_text(json.dumps({"config": settings}))
    return str(folder)


def lines_of(figure, panel=0):
    """[(label, x, y)] of the lines in a panel."""
    return [(line.get_label(), np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist())
            for line in figure.axes[panel].lines]


def texts_of(figure, panel):
    """What is written beside and in a panel."""
    return " | ".join(text.get_text() for text in figure.axes[panel].texts)


def levels_of(figure, panel):
    """Heights of the horizontal lines in a panel, the figures of others."""
    return sorted(y[0] for _, x, y in lines_of(figure, panel) if x == [0, 1] and y[0] == y[1])


def test_the_clock_adds_up_what_each_step_took():
    steps, hours = clock([(0, 100.0), (1, 50.0)], 3600)
    assert steps.tolist() == [0, 1, 2] and hours.tolist() == pytest.approx([0, 0.01, 0.03])
    # steps 1 to 3 are not in the log: they took as long as step 0
    steps, hours = clock([(0, 100.0), (4, 50.0)], 3600)
    assert steps.tolist() == [0, 4, 5] and hours.tolist() == pytest.approx([0, 0.04, 0.06])


@pytest.mark.parametrize("by, train_x, val_x", [("step", [0, 1, 2], [0, 3]), ("tokens", [0, 100, 200], [0, 300]),
                                                ("hours", [0, 10 / 3600, 15 / 3600], [0, 35 / 3600])])
def test_by_is_the_unit_of_every_curve(tmp_path, by, train_x, val_x):
    figure = curves_figure([make_run(tmp_path / "a")], by)
    drawn = {label.split(" (")[0]: x for label, x, _ in lines_of(figure)}
    assert drawn["train, running mean"] == pytest.approx(train_x) and drawn["val"] == pytest.approx(val_x)
    assert lines_of(figure, 1)[0][1] == pytest.approx(train_x)  # the learning rate's
    assert by.split()[0] in figure.axes[0].get_xlabel()


def test_several_runs_are_told_apart(tmp_path):
    runs = [make_run(tmp_path / "old" / "a"), make_run(tmp_path / "new" / "b", val={0: 9.0, 3: 5.25})]
    labels = [label for label, *_ in lines_of(curves_figure(runs)) if not label.startswith("_")]
    assert labels == ["a (last 6.500)", "b (last 5.250)"]
    runs.append(make_run(tmp_path / "new" / "a"))
    labels = [label for label, *_ in lines_of(curves_figure(runs)) if not label.startswith("_")]
    assert labels == [f"{run} (last {last})" for run, last in zip(runs, ("6.500", "5.250", "6.500"))]


@pytest.mark.parametrize("size, name", [("gpt2", "124M"), ("gpt2-medium", "350M"), ("gpt2-large", "774M"), ("gpt2-xl", "1558M"),
                                        ("gpt3-small", "124M"), ("gpt3-medium", "350M"), ("gpt3-large", "774M"),
                                        ("gpt3-xl", "1558M")])
def test_a_run_is_compared_with_models_of_its_size(size, name):
    n_layer, n_head, n_embd, block_size = SIZES[size]
    assert size_of({"n_layer": n_layer, "n_head": n_head, "n_embd": n_embd, "block_size": block_size}) == name


def test_a_run_without_a_config_is_taken_for_the_lectures():
    assert size_of({}) == "124M"


def test_hellaswag_is_beside_gpt2_and_gpt3_of_the_runs_sizes(tmp_path):
    small = make_run(tmp_path / "small", hella={0: 0.25, 3: 0.30}, hella_lm_eval={0: 0.25, 3: 0.31})
    large = make_run(tmp_path / "large", n_layer=24, n_embd=1024, hella={0: 0.25, 3: 0.40})
    assert levels_of(curves_figure([small]), 1) == [0.25, 0.2955, 0.3114, 0.337]
    assert levels_of(curves_figure([large]), 1) == [0.25, 0.3752, 0.436]
    both = curves_figure([small, large])
    assert levels_of(both, 1) == [0.25, 0.2955, 0.337, 0.3752, 0.436]  # one style: GPT-2's lm-eval score is left out
    assert "GPT-3 350M\n0.436" in texts_of(both, 1) and "GPT-2 124M, completion\n0.2955" in texts_of(both, 1)


def test_the_loss_of_gpt2_is_drawn_for_the_corpus_it_was_measured_on(tmp_path):
    small, large = make_run(tmp_path / "s"), make_run(tmp_path / "l", n_layer=24, n_embd=1024)
    assert levels_of(curves_figure([small]), 0) == []
    assert levels_of(curves_figure([small], baselines=True), 0) == [3.2924]
    assert levels_of(curves_figure([small], baselines="fineweb"), 0) == [3.425]
    assert levels_of(curves_figure([small, large], baselines="fineweb"), 0) == [3.0831, 3.425]
    assert levels_of(curves_figure([large], baselines="edu"), 0) == []  # nobody published it


def test_a_first_fall_that_is_cut_off_is_said(tmp_path):
    fall = {step: 3.0 + 8.0 * 0.7 ** step for step in range(400)}
    figure = curves_figure([make_run(tmp_path / "a", train=fall, val={0: 11.0, 200: 3.1, 400: 3.0})])
    assert figure.axes[0].get_ylim()[1] < 6 and "from 11.00" in texts_of(figure, 0)


def test_the_command_line_draws_in_a_process_of_its_own(run_dir):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "plots.py"), str(run_dir)], capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {run_dir}/loss.png\n", "")


@pytest.fixture
def run_plots(monkeypatch, capsys):
    """Function of plots.py's arguments that runs its main; (exit status, what it printed, its errors)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, arguments)])
        try:
            main()
            status = 0
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()
    return run


def test_several_runs_go_into_one_picture_with_a_name(run_dir, tmp_path, run_plots):
    out = tmp_path / "both.png"
    assert run_plots(run_dir, run_dir, "--out", out) == (0, f"wrote {out}\n", "")
    assert colours(out)[BLUE] > 50
    assert run_plots(run_dir, run_dir) == (2, "", "error: 2 runs go into one picture: name it with --out FILE.png\n")


def test_errors_of_the_command_line_are_one_line(run_dir, tmp_path, run_plots):
    status, _, error = run_plots(tmp_path)
    assert status == 2 and error == f"error: {tmp_path} has no log.txt; give the folder of a run, log/<exp-name>\n"
    status, _, error = run_plots(run_dir, "--output", "x.png")
    assert (status, error) == (2, "error: unrecognized arguments: --output x.png; --help lists what is allowed\n")
    status, _, error = run_plots(run_dir, "--by", "hours")  # no config.json, no speeds
    assert status == 2 and "--by hours needs total_batch_size and tok_per_sec" in error and error.count("\n") == 1
    (run_dir / "config.json").write_text("{")
    status, _, error = run_plots(run_dir)
    assert status == 2 and "config.json is not the config.json of a run" in error and error.count("\n") == 1
