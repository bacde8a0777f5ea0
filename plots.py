"""
Curves of runs, and pictures of a model's weights and attention.

    python plots.py log/shakespeare                  # writes log/shakespeare/loss.png
    python plots.py log/gpt2-124M --baselines        # a run on FineWeb-Edu, with the loss of OpenAI's GPT-2
    python plots.py log/gpt2-124M --reference        # beside the published curve that fits, or a NAME of reference/
    python plots.py log/gpt2-124M --verdict          # prints whether its losses agree with that curve
    python plots.py log/a log/b --by hours --out comparison.png
    python plots.py --weights log/shakespeare        # writes wpe.png, c_attn.png, norms.png, attention_0.png ... there
    python plots.py --weights gpt2 --out pictures --prompt "The cat sat on the mat because it was tired"

Curves are read from log.txt, one `step stream value` per line. The streams are train, val, val_bpb, hella and hella_lm_eval
(acc_norm in both styles), hella_acc and hella_lm_eval_acc (acc), lr, norm, tok_per_sec and epoch; step is the number of
updates made before the measurement.
"""
import io
import itertools
import math
import os
import warnings

from run.cli import ArgumentParser, first_line, printable, run_main, start
from run.config import CORPORA

AXES = {"step": "step", "tokens": "training tokens", "hours": "hours of training, without evaluations"}  # of --by


def parse_args():
    """The flags; ValueError for an invalid one, and for some that exclude each other."""
    parser = ArgumentParser(description="Draw and compare the curves of runs, or draw a model's weights.")
    parser.add_argument("source", nargs="+", help="run folder, log/<exp-name>; several are drawn into one picture. With"
                        " --weights: a run folder, a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl")
    parser.add_argument("--out", help="picture to write (default: loss.png in the run folder); with --weights: folder for"
                        " the pictures (default: source, if it is a folder)")
    parser.add_argument("--by", choices=list(AXES), help="the horizontal axis (default: step; with --reference tokens, if the"
                        " numbers of tokens per step differ)")
    parser.add_argument("--baselines", nargs="?", const="edu", choices=list(CORPORA), metavar="CORPUS",
                        help="add GPT-2's loss on the run's corpus: edu (FineWeb-Edu, the default) or fineweb")
    parser.add_argument("--reference", nargs="*", metavar="NAME_OR_RUN", help="add published curves, of reference/NAME.csv, or"
                        " those of other runs (default: the published curve that fits the run)")
    parser.add_argument("--verdict", action="store_true", help="print whether the run's losses agree with the published curve"
                        " that fits, or with --reference, instead of drawing")
    parser.add_argument("--weights", action="store_true", help="draw weights and attention instead of curves")
    parser.add_argument("--prompt", help="text for the attention pictures (default: the start of the run's validation data)")
    args = parser.parse_args()
    alone = next((f"--{name}" for name in ("weights", "verdict") if getattr(args, name)), None)
    if len(args.source) > 1 and (alone or args.out is None):
        raise ValueError(f"got {len(args.source)} sources; " + (f"{alone} takes one" if alone else
                         "name their common picture with --out FILE.png"))
    if args.prompt is not None and not args.weights:
        raise ValueError("--prompt is the text of the attention pictures: add --weights")
    if args.out is not None and args.verdict:
        raise ValueError("--out is the name of a picture: --verdict prints text")
    return args


if __name__ == "__main__":
    start(parse_args)

import numpy as np
import torch

from data import EOT, NUM_TOKENS, TokenStream, encode, get_tokenizer, prepare_data
from run.files import atomic_write, check_output
from run.folder import read_config, read_log, saved_steps
from run.reference import (GPT2_HELLASWAG, GPT2_HELLASWAG_LM_EVAL, GPT2_LOSS, GPT3_HELLASWAG, NotComparable, facts_of,
                       find_curves, fitting, size_of, verdict)
from run.weights import load_model

STREAMS = {"lr": "learning rate", "norm": "gradient norm", "tok_per_sec": "tok/s"}  # of the small panels
MIN_SMOOTHED = 200    # points: a shorter curve is drawn without a running mean (choice)
MIN_CUT = 2000        # points: a shorter loss curve is shown from its first value on (choice)
MAX_LABELS = 24       # token labels that are legible along an axis (choice)
MAX_DRAWN = 1e30      # larger values, infinity and NaN are counted instead of drawn: sums of them overflow (choice)


def new_figure(width, height, dpi=80):
    """An empty matplotlib Figure, width and height in inches."""
    from matplotlib.figure import Figure  # not pyplot: no backend, no window, nothing to close
    return Figure(figsize=(width, height), layout="constrained", dpi=dpi)


def write_figure(figure, path):
    """Writes a figure to path, a .png of 256 colors (a third of the size of full color), atomically, and returns path."""
    from PIL import Image  # Pillow, which matplotlib requires
    png = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in a script that the font does not have
        figure.savefig(png, format="png")
    image = Image.open(png).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    with atomic_write(path) as f:
        image.save(f, "PNG", optimize=True)
    return path


def as_label(name):
    """name for a title or legend: without mathematics between dollar signs, and not hidden for a leading underscore."""
    return " " * name.startswith("_") + printable(name.replace("\n", " ")).replace("$", r"\$")


# -----------------------------------------------------------------------------
# curves

def smooth(values, half):
    """Centered running mean over each value and `half` values on each side. Same length as values.

    Near the start the window shrinks on both sides, which keeps the first value of a steep curve; near the end, on the
    right only. Example: smooth([1, 2, 3, 4], 1) -> [1, 2, 3, 3.5]
    """
    sums, i = np.cumsum([0.0, *values]), np.arange(len(values))
    starts, ends = i - np.minimum(i, half), np.minimum(i + np.minimum(i, half) + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def clock(steps, speeds, total_batch_size):
    """(steps, hours): hours of training before each step, and after the last one.

    speeds: tokens per second of each step. A step that was not logged counts as long as the logged step before it.
    Example: clock([0, 1], [100, 50], 3600) -> [0, 1, 2], [0, 0.01, 0.03]
    """
    steps = np.append(steps, steps[-1] + 1)
    return steps, np.append(0.0, np.cumsum(np.diff(steps) * total_batch_size / speeds / 3600))


class Curves(dict):
    """A run's name, settings and {stream: (x, values)} as arrays, x in the unit of by, a key of AXES.

    Non-finite values are skipped, and counted in skipped, {stream: number}: a float16 run logs infinite gradient norms.
    """

    def __init__(self, run_dir, by="step", color="tab:blue"):
        self.run_dir, self.color, self.config = run_dir, color, read_config(run_dir)
        self.name, path = as_label(os.path.basename(os.path.abspath(run_dir))), os.path.join(run_dir, "log.txt")
        self.skipped = {}
        if not os.path.exists(path):
            raise FileNotFoundError(f"{run_dir} has no log.txt; give a run folder, log/<exp-name>")
        for name in ("n_layer", "n_embd", "total_batch_size"):
            if not (isinstance(value := self.config.get(name, 1), int) and 0 < value < 2**53):
                raise ValueError(f"{name} in {run_dir}/config.json is {value!r:.100}, must be a positive integer")
        log = read_log(path)
        for stream, points in log.items():
            drawn = np.array([point for point in points if abs(point[1]) < MAX_DRAWN])
            self.skipped[stream] = len(points) - len(drawn)
            if len(drawn):
                self[stream] = drawn[:, 0], drawn[:, 1]
        if not log:
            raise ValueError(f"{path} has no values yet; draw the run after its first step")
        if not ("train" in self or "val" in self):
            raise ValueError(f"{path} has no finite loss, train or val, to draw; its streams are {', '.join(log)}")
        needed = {"step": [], "tokens": ["total_batch_size"], "hours": ["total_batch_size", "tok_per_sec"]}[by]
        if missing := [name for name in needed if name not in (self if name in STREAMS else self.config)]:
            raise ValueError(f"--by {by} needs {' and '.join(missing)}, missing from config.json and log.txt in {run_dir};"
                             " use --by step")
        if by == "hours" and self["tok_per_sec"][1].min() <= 0:
            raise ValueError(f"{path} has a tok_per_sec of 0 or less; use --by step")
        hours = clock(*self["tok_per_sec"], self.config["total_batch_size"]) if by == "hours" else None
        for stream, (steps, values) in self.items():
            x = np.interp(steps, *hours) if hours else steps * self.config["total_batch_size"] if by == "tokens" else steps
            self[stream] = x, values


def short_count(n):
    """A large number with its unit: 2500000000 -> "2.5B", 1024 -> "1.02K"."""
    thousands = sum(abs(n) >= 1000 ** i for i in (1, 2, 3, 4))
    return f"{n / 1000 ** thousands:.3g}{['', 'K', 'M', 'B', 'T'][thousands]}"


def draw_reference(panel, value, label, color, linestyle="--"):
    """A horizontal line, with its label and value to the right of the panel."""
    panel.axhline(value, color=color, linestyle=linestyle, linewidth=1.2, zorder=1)
    panel.annotate(f"{label}\n{value}", (1, value), (4, 0), panel.get_yaxis_transform(), "offset points", va="center",
                   fontsize=8, color=color, annotation_clip=False)


def draw_curve(panel, x, values, color, name=None, raw=True, noisy=True):
    """Draws a running mean over the faint values, or only the values if not noisy or fewer than MIN_SMOOTHED.

    name: legend entry, to which the window and the last value drawn are added; None for no entry. raw: draw the values.
    """
    half = max(5, len(values) // 100) if noisy and len(values) >= MIN_SMOOTHED else 0
    if half and raw:
        panel.plot(x, values, color=color, alpha=0.25, linewidth=0.8)
    drawn, kind = (smooth(values, half), f"mean of {2 * half + 1} steps") if half else (values, "every step")
    panel.plot(x, drawn, color=color, linewidth=1.2, alpha=1.0 if raw else 0.5, marker="." if len(values) <= 20 else None,
               label=name and f"{name}, {kind} (last {drawn[-1]:.3f})")


def draw_published(panel, curves, stream, by, end):
    """A stream of Curves of reference.py up to x = end, in shades of gray."""
    for curve, color, linestyle in zip(curves, itertools.cycle(("0.25", "0.45", "0.65")), itertools.cycle(("--", "-.", ":"))):
        factor = curve.facts["total_batch_size"] if by == "tokens" else 1
        points = [(step * factor, value) for step, value in curve.streams.get(stream, {}).items() if step * factor <= end]
        if points:
            last = f" val (last {points[-1][1]:.3f})" if stream == "val" else f" (last {points[-1][1]:.4f})"
            panel.plot(*zip(*points), color=color, linestyle=linestyle, linewidth=1.3, zorder=2.5,
                       label=as_label(curve.name) + last)


def draw_loss(panel, runs, baselines):
    """Training and validation loss of each run; GPT-2's loss on the corpus baselines, if given."""
    single, tops = len(runs) == 1, []
    for run in runs:
        if "train" in run:
            x, values = run["train"]
            name = "train" if single else None if "val" in run else run.name  # one legend entry per run
            draw_curve(panel, x, values, run.color, name, raw=single)
            tops.append(values[len(values) // 40:].max() if len(values) >= MIN_CUT else math.inf)
            if single and "epoch" in run:
                panel.vlines(run["epoch"][0], 0, 1, "0.6", "--", label="new epoch", transform=panel.get_xaxis_transform(),
                             linewidth=0.8)
        if "val" in run:
            x, values = run["val"]
            bits = f", {run['val_bpb'][1][-1]:.3f} bits per byte" if single and "val_bpb" in run else ""
            panel.plot(x, values, color="tab:orange" if single else run.color, marker="o", markersize=3, linewidth=1.5,
                       label=f"{'val' if single else run.name} (last {values[-1]:.3f}{bits})")
    for size in dict.fromkeys(size_of(run.config) for run in runs):
        if value := GPT2_LOSS.get(baselines, {}).get(size):
            draw_reference(panel, value, f"GPT-2 {size}\n{CORPORA[baselines]} val", "tab:red")
    (low, high), top = panel.dataLim.intervaly, max(tops, default=math.inf)
    if top < high:  # in a long run the first steps would compress the rest of the curve
        panel.set_ylim(low - 0.06 * (top - low), top + 0.06 * (top - low))
        panel.annotate(f"↑ from {high:.2f}", (0.01, 0.985), xycoords="axes fraction", va="top", fontsize=8,
                       bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1))
    panel.set(ylabel="loss, nats per token", title=runs[0].name if single else "loss: val (dots), train (faint)")


def draw_hellaswag(panel, runs):
    """HellaSwag's acc_norm with chance, GPT-2 and GPT-3 of the runs' sizes; several runs: completion style only.

    A single run's acc, of which there are fewer published values, is drawn thinner.
    """
    single = len(runs) == 1
    streams = (("hella", "completion", "-"), ("hella_lm_eval", "lm-eval", ":"), ("hella_acc", "completion, acc", "-"),
               ("hella_lm_eval_acc", "lm-eval, acc", ":"))
    for run in runs:
        for stream, style, linestyle in streams if single else streams[:1]:
            if stream in run:
                (x, values), thin = run[stream], stream.endswith("acc")
                panel.plot(x, values, color="tab:purple" if thin else run.color, linestyle=linestyle, markersize=3,
                           linewidth=0.8 if thin else 1.5, marker=None if thin else "o",
                           label=f"{style if single else run.name} (last {values[-1]:.4f})")
    for size in dict.fromkeys(size_of(run.config) for run in runs):
        draw_reference(panel, GPT2_HELLASWAG[size], f"GPT-2 {size}, completion", "tab:red")
        draw_reference(panel, GPT3_HELLASWAG[size], f"GPT-3 {size}", "tab:green")
        if single and "hella_lm_eval" in runs[0] and size in GPT2_HELLASWAG_LM_EVAL:
            draw_reference(panel, GPT2_HELLASWAG_LM_EVAL[size], f"GPT-2 {size}, lm-eval", "tab:red", ":")
    draw_reference(panel, 0.25, "chance", "0.5", "-")
    panel.set(ylabel="acc_norm (thin: acc)" if single else "acc_norm",
              title="HellaSwag val" if single else "HellaSwag val, completion style")
    panel.margins(y=0.08)


def draw_stream(panel, runs, stream):
    """One of STREAMS of each run; in the title a single run's peak learning rate or median, and the values not drawn."""
    for run in runs:
        draw_curve(panel, *run[stream], run.color, noisy=stream != "lr")
    values = np.concatenate([run[stream][1] for run in runs])
    panel.set_ylim(0, 1.15 * np.quantile(values, 0.99) or 1)  # clips rare spikes
    summary = f" (peak {values.max():.2e})" if stream == "lr" else f" (median {short_count(np.median(values))})"
    skipped = sum(run.skipped[stream] for run in runs)
    panel.set_title(STREAMS[stream] + (summary if len(runs) == 1 else "") + f", {skipped} non-finite" * (skipped > 0),
                    fontsize=10)


def curves_figure(run_dirs, by="step", baselines=None, references=()):
    """A matplotlib Figure of one or more run folders over "step", "tokens" or "hours".

    baselines: "edu" or "fineweb" adds GPT-2's loss on that corpus, which is comparable only to runs on it. references:
    Curves of reference.py, drawn up to the end of the runs; not over hours.
    """
    colors = ["tab:blue", "tab:orange", "tab:purple", "tab:brown", "tab:pink", "tab:olive", "tab:cyan", "tab:gray"]
    runs = [Curves(run_dir, by, color) for run_dir, color in zip(run_dirs, itertools.cycle(colors))]
    if len({run.name for run in runs}) < len(runs):  # a/gpt2-124M and b/gpt2-124M
        for run in runs:
            run.name = as_label(run.run_dir)
    small = {stream: with_it for stream in STREAMS if (with_it := [run for run in runs if stream in run])}
    has_hella = any("hella" in run or "hella_lm_eval" in run for run in runs)
    figure = new_figure(13 if has_hella else 8.5, 4.2 + 1.9 * bool(small), dpi=110)
    top, bottom = figure.subfigures(2, 1, height_ratios=[2.2, 1]) if small else (figure, None)
    panels = dict(zip(["loss", "hella"], top.subplots(1, 1 + has_hella, squeeze=False)[0]))
    end = 1.01 * max(x[-1] for run in runs for x, _ in run.values())
    draw_published(panels["loss"], references, "val", by, end)
    draw_loss(panels["loss"], runs, baselines)
    if has_hella:
        draw_published(panels["hella"], references, "hella", by, end)
        draw_hellaswag(panels["hella"], runs)
    for name, panel in panels.items():
        panel.set_xlabel(AXES[by])
        panel.legend(fontsize=8, loc="upper right" if name == "loss" else "lower right", borderaxespad=1)
    if small:
        panels.update(zip(small, bottom.subplots(1, len(small), squeeze=False)[0]))
    for stream, with_it in small.items():
        draw_stream(panels[stream], with_it, stream)
    for name, panel in panels.items():
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=by == "step", min_n_ticks=1)
        for axis in (panel.xaxis, *([panel.yaxis] if name == "tok_per_sec" else [])):
            axis.set_major_formatter(lambda value, _: short_count(value))
    return figure


def fitting_references(run_dir):
    """The published Curve that fits a run, in a list; [] if none does."""
    try:
        return [fitting(facts_of(read_config(run_dir)))]
    except NotComparable:
        return []


def plot_run(run_dir, baselines=False):
    """Draws a run's curves into loss.png in its folder, with the published curve that fits; returns the path.

    baselines: add GPT-2's loss on FineWeb-Edu. If drawing fails it returns the reason instead, because the run it is called
    from is complete.
    """
    try:
        figure = curves_figure([run_dir], "step", "edu" if baselines else None, fitting_references(run_dir))
        return write_figure(figure, os.path.join(run_dir, "loss.png"))
    except Exception as e:  # a full disk, a log.txt that was edited, whatever matplotlib raises
        return f"not drawn, {first_line(e)}"


# -----------------------------------------------------------------------------
# weights and attention

def wpe_figure(model):
    """Figure of the position embeddings: wpe as an image, and three of its columns over the positions."""
    wpe = model.transformer.wpe.weight.detach().float().cpu().numpy()      # (block_size, C)
    figure = new_figure(11, 3.6)
    left, right = figure.subplots(1, 2)
    limit = np.quantile(abs(wpe), 0.99)
    figure.colorbar(left.imshow(wpe, "RdBu", aspect="auto", interpolation="nearest", vmin=-limit, vmax=limit), ax=left)
    left.set(title="wpe, the position embeddings", xlabel="channel", ylabel="position")
    for channel in (wpe.shape[1] * tenths // 10 for tenths in (2, 3, 4)):
        right.plot(wpe[:, channel], linewidth=1, label=f"channel {channel}")
    right.set(title="three columns of wpe", xlabel="position")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    return figure


def c_attn_figure(model, layer=1):
    """Figure of a block's c_attn weights that compute q, k and v, each (in, out) as in OpenAI's checkpoints, on one scale."""
    weight = model.transformer.h[layer].attn.c_attn.weight.detach().float().cpu().numpy()            # (3C, C): (out, in)
    figure = new_figure(11, 3.9, dpi=160)
    panels = figure.subplots(1, 3, sharey=True)
    limit = 3 * weight.std()
    for panel, name, part in zip(panels, "qkv", np.split(weight, 3)):
        image = panel.imshow(part.T, cmap="gray", vmin=-limit, vmax=limit)
        panel.set(title=name, xlabel=f"channel of {name}", xticks=range(0, len(part), -(-len(part) // 4)))
    panels[0].set_ylabel("input channel")
    figure.colorbar(image, ax=panels, label="weight", fraction=0.05)
    figure.suptitle(f"h.{layer}.attn.c_attn.weight", fontsize=11)
    return figure


def norms_figure(model):
    """Figure of the norm of each token's embedding, by token id.

    Ids are in the order in which the tokenizer's merges were learned: low ids are frequent. Ids from 50257 on are padding.
    """
    norms = model.transformer.wte.weight.detach().float().norm(dim=1).cpu()
    figure = new_figure(11, 3.4)
    panel = figure.subplots()
    panel.plot(norms[:NUM_TOKENS], ".", markersize=1, alpha=0.4)
    if len(norms) > NUM_TOKENS:
        panel.plot(range(NUM_TOKENS, len(norms)), norms[NUM_TOKENS:], "o", markersize=3, color="tab:red", label="padding")
        panel.legend(fontsize=8)
    panel.set(title="norm of each token's row in wte", xlabel="token id", ylabel="norm", ylim=(0, None))
    panel.grid(alpha=0.3)
    return figure


def default_prompt(source):
    """The start of the validation data of the run that a model's source belongs to; a fixed sentence if there is none."""
    run_dir = source if os.path.isdir(source) else os.path.dirname(source)
    path = read_config(run_dir).get("data", "") if saved_steps(run_dir) else ""
    if not os.path.exists(path):
        return "Hello, I'm a language model, and I know what I said"
    val_stream = TokenStream(prepare_data(path)[1])
    tokens = val_stream.read(0, min(MAX_LABELS, len(val_stream)))
    return get_tokenizer().decode(tokens[tokens != EOT].tolist())


@torch.no_grad()
def attention_weights(model, idx, layer):
    """(nh, T, T) float32, softmax(q k^T / sqrt(hs)) of each head of a block, for the tokens idx (T,) int64.

    forward never materializes this matrix, since it uses flash attention.
    """
    T, attn = len(idx), model.transformer.h[layer].attn
    x = model.transformer.wte(idx[None, :]) + model.transformer.wpe.weight[:T]         # (1, T, C)
    for block in model.transformer.h[:layer]:
        x = block(x)
    x = attn.c_attn(model.transformer.h[layer].ln_1(x)).float()                        # (1, T, 3C)
    q, k, _ = (t.view(T, attn.n_head, -1).transpose(0, 1) for t in x.chunk(3, dim=2))  # 3 x (nh, T, hs)
    scores = q @ k.transpose(1, 2) / k.size(-1) ** 0.5                                 # (nh, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)


def attention_figure(model, prompt, layer=0):
    """Figure of a block's attention weights on a prompt, one panel per head.

    The color scale is the square root of the weight: small weights are visible.
    """
    from matplotlib.colors import PowerNorm
    tokenizer = get_tokenizer()
    tokens = (encode(prompt).tolist() or [EOT])[:model.config.block_size]
    weights = attention_weights(model, torch.tensor(tokens, device=model.lm_head.weight.device), layer).cpu().numpy()
    ticks = range(0, len(tokens), -(-len(tokens) // MAX_LABELS))
    labels = [tokenizer.decode([tokens[i]]).replace("\n", "\\n").replace("$", r"\$") for i in ticks]
    columns = max(n for n in range(1, 6) if len(weights) % n == 0)
    rows = len(weights) // columns
    figure = new_figure(3 * columns + 1.2, 3.3 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False)
    for head, panel in enumerate(panels.flat):
        image = panel.imshow(weights[head], cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        panel.set_title(f"block {layer}, head {head}", fontsize=9)
        panel.set_xticks(ticks, labels, rotation=90, fontsize=7)
        panel.set_yticks(ticks, labels if head % columns == 0 else [""] * len(labels), fontsize=7)
    figure.supxlabel("key", fontsize=10)
    figure.supylabel("query", fontsize=10)
    figure.colorbar(image, ax=panels, label="attention weight", ticks=[0, 0.05, 0.2, 0.5, 1], aspect=20 * rows, fraction=0.05)
    return figure


def draw_weights(source, folder, prompt):
    """Writes the pictures of a model's weights and attention into a folder, by default the source itself."""
    if folder is None and not os.path.isdir(source):
        raise ValueError(f"{source} is not a folder; name a folder for the pictures with --out")
    folder = source if folder is None else folder
    existing = folder
    while not os.path.exists(existing):
        existing = os.path.dirname(existing) or "."
    check_output(os.path.join(existing, "wpe.png") if folder else folder)
    if prompt:
        encode(prompt)  # an invalid prompt raises before the model is loaded
    model, _ = load_model(source)
    prompt, blocks = prompt or default_prompt(source), len(model.transformer.h)
    figures = [("wpe", wpe_figure(model)), ("c_attn", c_attn_figure(model, min(1, blocks - 1))), ("norms", norms_figure(model))]
    attention = ((f"attention_{layer}", attention_figure(model, prompt, layer)) for layer in range(blocks))
    os.makedirs(folder, exist_ok=True)
    for name, figure in itertools.chain(figures, attention):
        print("wrote", write_figure(figure, os.path.join(folder, f"{name}.png")))


def main():
    args = parse_args()
    source = args.source[0]
    if args.weights:
        return draw_weights(source, args.out, args.prompt)
    if args.verdict:
        return print(verdict(source, args.reference or ()))
    if args.by == "hours" and args.reference is not None:
        raise ValueError("--by hours: the hours of --reference's curves are not known; use --by tokens")
    path = os.path.join(source, "loss.png") if args.out is None else args.out
    if args.out is not None:
        check_output(path)
        if not os.path.realpath(path).endswith(".png"):
            raise ValueError(f"--out {path}: pictures are PNG files; choose a name that ends in .png")
    references = find_curves(args.reference or ())
    if args.reference == []:
        references = [fitting(facts_of(read_config(source)))]
    sizes = {curve.facts.get("total_batch_size") for curve in references}
    if None in sizes:
        raise ValueError("--reference: the config.json of a run lacks total_batch_size")
    sizes |= {read_config(run_dir).get("total_batch_size") for run_dir in args.source}
    by = args.by or ("tokens" if references and len(sizes) > 1 else "step")
    figure = curves_figure(args.source, by, args.baselines, references)
    print("wrote", write_figure(figure, path))


if __name__ == "__main__":
    run_main(main)
