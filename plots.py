"""
Pictures of runs: read log.txt, draw loss, HellaSwag, learning rate, norm and speed, beside GPT-2's and GPT-3's figures.

    python plots.py log/shakespeare               # writes log/shakespeare/loss.png
    python plots.py log/gpt2-124M --baselines     # a run on FineWeb-Edu: with GPT-2's loss on it
    python plots.py log/a log/b --by hours --out comparison.png

log.txt has one fact a line, `step stream value`; the streams are train, val, hella (acc_norm, completion
style), hella_lm_eval, lr, norm, tok_per_sec, epoch. A step's number is the number of updates made before it.
"""
import json
import math
import os

import numpy as np

from checkpoint import read_config, read_log
from data import atomic_write

# Figures of others to compare with, by size; "1558M" stands for GPT-3's 1.3B too, "774M" for its 760M.
# Loss of OpenAI's GPT-2: on FineWeb-Edu val (build-nanogpt's notebook; known for 124M alone), on FineWeb val (llm.c's vislog).
GPT2_LOSS = {"edu": {"124M": 3.2924}, "fineweb": {"124M": 3.4250, "350M": 3.0831, "774M": 3.0006, "1558M": 2.8313}}
CORPORA = {"edu": "FineWeb-Edu", "fineweb": "FineWeb"}
# HellaSwag val, acc_norm: GPT-2's completion style (build-nanogpt's hellaswag.py, llm.c's vislog) and lm-eval style
# (lm-evaluation-harness), GPT-3's as its paper has it (appendix H).
GPT2_HELLASWAG = {"124M": 0.2955, "350M": 0.3752, "774M": 0.4320, "1558M": 0.4893}
GPT2_HELLASWAG_LM_EVAL = {"124M": 0.3114, "1558M": 0.5089}
GPT3_HELLASWAG = {"124M": 0.337, "350M": 0.436, "774M": 0.510, "1558M": 0.547}
AXES = {"step": "step", "tokens": "training tokens", "hours": "hours of training (evaluations not counted)"}  # of --by

# -----------------------------------------------------------------------------
# a run's files

def size_of(config):
    """The size whose figures a run is compared with: the nearest of "124M", "350M", "774M", "1558M" in parameters.

    A config that does not tell is taken for 124M, the lecture's.
    """
    if not {"n_layer", "n_embd"} <= config.keys():
        return "124M"
    n = 12 * config["n_layer"] * config["n_embd"] ** 2 + 50257 * config["n_embd"]
    return min(GPT2_HELLASWAG, key=lambda size: abs(math.log(n / (float(size[:-1]) * 1e6))))


def smooth(values, window):
    """Running mean over the last window values, as long as values: smooth([1, 2, 3, 4], 2) -> [1, 1.5, 2.5, 3.5]."""
    means, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - window] if i >= window else 0.0)
        means.append(total / min(i + 1, window))
    return means


def clock(speeds, total_batch_size):
    """(steps, hours): the hours of training gone by when each step began, and when the last one ended.

    speeds: [(step, tokens a second), ...]. Steps that were not logged took as long as the one before them.
    Example: clock([(0, 100), (1, 50)], 3600) -> [0, 1, 2], [0, 0.01, 0.03]
    """
    steps, speeds = (np.array(column) for column in zip(*sorted(speeds)))
    steps = np.append(steps, steps[-1] + 1)
    return steps, np.append(0.0, np.cumsum(np.diff(steps) * total_batch_size / speeds / 3600))


class Curves:
    """What is drawn of one run: its name, its config, and its streams over steps, tokens or hours."""

    def __init__(self, run_dir, by="step"):
        self.run_dir, self.by = run_dir, by
        self.name = os.path.basename(os.path.abspath(run_dir))
        path = os.path.join(run_dir, "log.txt")
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{run_dir} has no log.txt; give the folder of a run, log/<exp-name>")
        self.streams, self.config = read_log(path), read_config(run_dir)
        needed = {"step": [], "tokens": ["total_batch_size"], "hours": ["total_batch_size", "tok_per_sec"]}[by]
        if missing := [name for name in needed if name not in {**self.config, **self.streams}]:
            raise ValueError(f"--by {by} needs {' and '.join(missing)}, which config.json and log.txt in {run_dir} do not"
                             " have; --by step needs neither")

    def __getitem__(self, stream):
        """(x, values) of a stream as arrays, x in the unit of by."""
        steps, values = (np.array(column) for column in zip(*self.streams[stream]))
        if self.by == "tokens":
            steps = steps * self.config["total_batch_size"]
        elif self.by == "hours":
            steps = np.interp(steps, *clock(self.streams["tok_per_sec"], self.config["total_batch_size"]))
        return steps, values

    def __contains__(self, stream):
        return stream in self.streams


# -----------------------------------------------------------------------------
# panels: each draws the runs, a list of (Curves, colour), into one pair of axes

def short_count(n):
    """A large number as people say it: 2500000000 -> "2.5B", 1024 -> "1.02K"."""
    for unit, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if abs(n) >= unit:
            return f"{n / unit:.3g}{letter}"
    return f"{n:g}"


def draw_figure_of_others(panel, value, label, color, linestyle="--"):
    """A horizontal line with its name and value beside it, outside the panel, where no curve is."""
    panel.axhline(value, color=color, linestyle=linestyle, linewidth=1.2, zorder=1)
    panel.annotate(f"{label}\n{value}", (1, value), (4, 0), panel.get_yaxis_transform(), "offset points", va="center",
                   fontsize=8, color=color, annotation_clip=False)


def draw_loss(panel, runs, baselines):
    """train, raw and smoothed, and val; GPT-2's loss on the corpus baselines names, if any."""
    alone, tops, lows, firsts = len(runs) == 1, [], [], []
    for run, color in runs:
        if "train" in run:
            x, values = run["train"]
            smoothed = smooth(values.tolist(), max(1, len(values) // 50))
            name = "train, running mean" if alone else None if "val" in run else run.name  # a run is in the legend once
            if alone:
                panel.plot(x, values, color=color, alpha=0.25, linewidth=0.8)
            panel.plot(x, smoothed, color=color, linewidth=1.2, alpha=1 if alone else 0.5,
                       label=name and f"{name} (last {smoothed[-1]:.3f})")
            tops.append(smoothed[len(smoothed) // 40])  # where the first fall is over
            lows.append(np.quantile(values, 0.02))
            firsts.append(values[0])
            for step in (step for step, _ in run.streams.get("epoch", []) if alone):
                panel.axvline(np.interp(step, [s for s, _ in run.streams["train"]], x), color="0.8", linewidth=0.8, zorder=0)
        if "val" in run:
            x, values = run["val"]
            panel.plot(x, values, color="tab:orange" if alone else color, marker="o", markersize=3, linewidth=1.5,
                       label=f"{'val' if alone else run.name} (last {values[-1]:.3f})")
            tops.append(values[min(1, len(values) - 1)])
            lows.append(values.min())
            firsts.append(values[0])
    for size in dict.fromkeys(size_of(run.config) for run, _ in runs):
        if value := GPT2_LOSS.get(baselines, {}).get(size):
            draw_figure_of_others(panel, value, f"GPT-2 {size}\n{CORPORA[baselines]} val", "tab:red")
            lows.append(value)
    if lows and min(lows) < max(tops):  # the first steps' fall would press the rest of the run flat
        room = 0.06 * (max(tops) - min(lows))
        panel.set_ylim(min(lows) - room, max(tops) + room)
        if max(firsts) > max(tops) + room:
            panel.annotate(f"↑ from {max(firsts):.2f}", (0.01, 0.985), xycoords="axes fraction", va="top", fontsize=8,
                           bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1))
    panel.set(ylabel="loss, nats a token", title=runs[0][0].name if alone else "loss: val (dots), train's running mean (faint)")


def draw_hellaswag(panel, runs):
    """HellaSwag's acc_norm with chance, GPT-2 and GPT-3 of the runs' sizes; of several runs the completion style alone."""
    styles = [("hella", "completion", "-"), ("hella_lm_eval", "lm-eval", ":")][:2 if len(runs) == 1 else 1]
    for run, color in runs:
        for stream, style, linestyle in styles:
            if stream in run:
                x, values = run[stream]
                panel.plot(x, values, color=color, linestyle=linestyle, marker="o", markersize=3,
                           label=f"{style if len(runs) == 1 else run.name} (last {values[-1]:.4f})")
    for size in dict.fromkeys(size_of(run.config) for run, _ in runs):
        draw_figure_of_others(panel, GPT2_HELLASWAG[size], f"GPT-2 {size}, completion", "tab:red")
        draw_figure_of_others(panel, GPT3_HELLASWAG[size], f"GPT-3 {size}", "tab:green")
        if len(runs) == 1 and "hella_lm_eval" in runs[0][0] and size in GPT2_HELLASWAG_LM_EVAL:
            draw_figure_of_others(panel, GPT2_HELLASWAG_LM_EVAL[size], f"GPT-2 {size}, lm-eval", "tab:red", ":")
    draw_figure_of_others(panel, 0.25, "chance", "0.5", "-")
    panel.set(ylabel="acc_norm", title="HellaSwag val" + (", completion style" if len(runs) > 1 else ""))
    panel.margins(y=0.08)


def draw_stream(panel, runs, stream, title):
    """One stream of each run, the last or median value in the title when there is one run."""
    for run, color in runs:
        if stream in run:
            x, values = run[stream]
            if stream == "lr":
                panel.plot(x, values, color=color, linewidth=1.2)
                continue
            panel.plot(x, values, color=color, alpha=0.25, linewidth=0.8)
            panel.plot(x, smooth(values.tolist(), max(1, len(values) // 50)), color=color, linewidth=1.2)
    drawn = np.concatenate([run[stream][1] for run, _ in runs if stream in run])
    if stream != "lr":  # one spike of a hundred must not hide the other ninety-nine
        panel.set_ylim(0, 1.15 * np.quantile(drawn, 0.99) or 1)
    title += f" (median {np.median(drawn):,.{0 if stream == 'tok_per_sec' else 2}f})" if stream != "lr" else \
             f" (peak {drawn.max():.2e})"
    panel.set_title(title if len(runs) == 1 else title.split(" (")[0], fontsize=10)


def curves_figure(run_dirs, by="step", baselines=False):
    """A matplotlib Figure of one or more run folders over "step", "tokens" or "hours".

    baselines: "edu" (or True) or "fineweb" adds GPT-2's loss on that corpus, which means something for runs on it alone.
    """
    from matplotlib.figure import Figure  # not pyplot: no window, no backend, nothing to close
    baselines = "edu" if baselines is True else baselines
    colors = ["tab:blue", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:gray"]
    runs = [(Curves(run_dir, by), colors[i % len(colors)]) for i, run_dir in enumerate(run_dirs)]
    if len({run.name for run, _ in runs}) < len(runs):  # a/gpt2-124M and b/gpt2-124M
        for run, _ in runs:
            run.name = run.run_dir
    small = {stream: title for stream, title in (("lr", "learning rate"), ("norm", "gradient norm"), ("tok_per_sec", "tok/s"))
             if any(stream in run for run, _ in runs)}
    has_hella = any(stream in run for run, _ in runs for stream in ("hella", "hella_lm_eval"))
    figure = Figure(figsize=(13 if has_hella else 8.5, 4.2 + 1.9 * bool(small)), layout="constrained", dpi=110)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.2, 1]) if small else (figure, None)
    panels = dict(zip(["loss", "hella"], top.subplots(1, 1 + has_hella, squeeze=False)[0]))
    draw_loss(panels["loss"], runs, baselines)
    if has_hella:
        draw_hellaswag(panels["hella"], runs)
    for name, panel in panels.items():
        panel.set_xlabel(AXES[by])
        panel.legend(fontsize=8, loc="upper right" if name == "loss" else "lower right", borderaxespad=1)
    if small:
        panels.update(zip(small, bottom.subplots(1, len(small), squeeze=False)[0]))
    for stream, title in small.items():
        draw_stream(panels[stream], runs, stream, title)
    for name, panel in panels.items():
        panel.grid(alpha=0.3)
        for axis in (panel.xaxis, *([panel.yaxis] if name == "tok_per_sec" else [])):
            axis.set_major_formatter(lambda value, _: short_count(value))
    return figure


def plot_run(run_dir, out=None, baselines=False):
    """Draws a run folder's curves into out (default: loss.png in it) and returns that path."""
    return write_figure(curves_figure([run_dir], baselines=baselines), out or os.path.join(run_dir, "loss.png"))


def write_figure(figure, path):
    """Writes a figure as path, a .png, whole or not at all, and returns path."""
    with atomic_write(path) as f:
        figure.savefig(f, dpi=110, format="png")
    return path


def main():
    from runtime import ArgumentParser, run_main  # they need torch, and reading or drawing a log does not

    def plot():
        parser = ArgumentParser(description="Draw the curves of one or more runs.", allow_abbrev=False)
        parser.add_argument("run_dir", nargs="+", help="run folder, log/<exp-name>; several are drawn in one picture")
        parser.add_argument("--out", help="picture to write (default for one run: loss.png in its folder)")
        parser.add_argument("--by", choices=list(AXES), default="step", help="the horizontal axis (default step)")
        parser.add_argument("--baselines", nargs="?", const="edu", choices=list(GPT2_LOSS), metavar="CORPUS",
                            help="add GPT-2's loss on the corpus of the run: edu (FineWeb-Edu, if none is said) or fineweb")
        args = parser.parse_args()
        if len(args.run_dir) > 1 and not args.out:
            raise ValueError(f"{len(args.run_dir)} runs go into one picture: name it with --out FILE.png")
        figure = curves_figure(args.run_dir, args.by, args.baselines)
        print(f"wrote {write_figure(figure, args.out or os.path.join(args.run_dir[0], 'loss.png'))}")
    run_main(plot)


if __name__ == "__main__":
    main()
