"""
log.txt read back, running means, and pictures with something in them.

    .venv/bin/python -m pytest tests/test_plots.py

Needs nothing but requirements-dev.txt.
"""
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest

from plots import plot_run, read_log, smooth

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
    assert seen[BLUE] > 100 and seen[ORANGE] > 100 and seen[RED] > 100
    with_hella = matplotlib.image.imread(path).shape
    text = (run_dir / "log.txt").read_text()
    (run_dir / "log.txt").write_text("".join(line for line in text.splitlines(True) if "hella" not in line))
    plot_run(str(run_dir))
    seen = colours(path)
    assert seen[BLUE] > 100 and seen[ORANGE] > 100 and RED not in seen
    assert matplotlib.image.imread(path).shape[1] < with_hella[1]
    assert sorted(os.listdir(run_dir)) == ["log.txt", "loss.png"]


def test_baselines_add_gpt2s_line_and_out_says_where_to(run_dir, tmp_path):
    (run_dir / "log.txt").write_text("0 train 10.0\n1 train 4.0\n2 train 3.0\n")
    out = str(tmp_path / "picture.png")
    assert RED not in colours(plot_run(str(run_dir), out))
    assert colours(plot_run(str(run_dir), out, baselines=True))[RED] > 100
    assert not os.path.exists(run_dir / "loss.png")


def run_plots(*arguments):
    return subprocess.run([sys.executable, os.path.join(ROOT, "plots.py"), *map(str, arguments)], capture_output=True,
                          text=True, timeout=120)


def test_the_command_line_draws_and_its_errors_are_one_line(run_dir, tmp_path):
    done = run_plots(run_dir)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout == f"wrote {run_dir}/loss.png\n"
    done = run_plots(tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "log.txt" in done.stderr
    assert done.stderr.count("\n") == 1
    done = run_plots(run_dir, "--output", "x.png")
    assert done.returncode == 2
    assert done.stderr == "error: unrecognized arguments: --output x.png; --help lists what is allowed\n"
