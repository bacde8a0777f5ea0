"""
Curves of runs, and pictures of a model's weights and attention.

    python plots.py log/shakespeare               # writes log/shakespeare/loss.png
    python plots.py log/gpt2-124M --baselines     # on FineWeb-Edu, with OpenAI's GPT-2
    python plots.py log/gpt2-124M --reference     # beside the published curve that fits
    python plots.py log/gpt2-124M --verdict       # prints whether its losses agree with that curve
    python plots.py log/a log/b --by hours --out comparison.png
    python plots.py --weights log/shakespeare     # writes wpe.png, c_attn.png, norms.png,
                                                  # attention_0.png ... there
    python plots.py --weights gpt2 --out pictures --prompt "The cat sat on the mat because it was"

Curves are read from log.txt, one `step stream value` per line. The streams are train, val, val_bpb,
val_655360 (of the first 655,360 validation tokens), hella and hella_lm_eval (acc_norm in both
styles), lr, norm, tok_per_sec and epoch, among others; step is the number of updates made before
the measurement.
"""
import itertools
import math
import os
import warnings
from dataclasses import dataclass

from run.cli import ArgumentParser, first_line, run_main, start
from run.config import CORPORA

# of --by
AXES = {"step": "step", "tokens": "training tokens",
        "hours": "hours of training, without evaluations"}


def parse_args():
    """The flags; ValueError for an invalid one, and for some that exclude each other."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("source", nargs="+", help="run folder, log/<exp-name>; several are drawn into one picture."
        " With --weights: a run folder, a checkpoint, a Hugging Face folder, or gpt2 ... gpt2-xl")
    add("--out", help="picture to write (default: loss.png in the run folder); with --weights:"
        " folder for the pictures (default: source, if it is a folder)")
    add("--by", choices=list(AXES), help="the horizontal axis (default: step; with --reference"
        " tokens, if the numbers of tokens per step differ)")
    add("--baselines", nargs="?", const="", choices=["", *CORPORA], metavar="CORPUS",
        help="add GPT-2's loss on a corpus, edu (FineWeb-Edu) or fineweb (default: the run's)")
    add("--reference", nargs="?", const="", metavar="NAME", help="add a published curve,"
        " run/curves/NAME.csv (default: the one that fits the run)")
    add("--verdict", action="store_true", help="print whether the run's losses agree with the"
        " published curve that fits, or with --reference, instead of drawing")
    add("--weights", action="store_true", help="draw weights and attention instead of curves")
    add("--prompt", help="text for the attention pictures (default: the start of the run's"
        " validation data)")
    args = parser.parse_args()
    if len(args.source) > 1 and (args.weights or args.verdict):
        raise ValueError(f"got {len(args.source)} sources; --weights and --verdict take one")
    if len(args.source) > 1 and args.out is None:
        raise ValueError(f"got {len(args.source)} sources; name their common picture with --out"
                         " FILE.png")
    if args.prompt is not None and not args.weights:
        raise ValueError("--prompt is the text of the attention pictures: add --weights")
    if args.by == "hours" and args.reference is not None:
        raise ValueError("--by hours: the hours of --reference's curve are not known; use --by"
                         " tokens")
    return args


if __name__ == "__main__":
    start(parse_args)

import numpy as np
import torch

from data import EOT, TokenStream
from run.files import atomic_write, check_output
from run.folder import read_config, read_log, saved_steps
from run.prepare import prepare_data
from run.reference import (GPT2_HELLASWAG, GPT2_HELLASWAG_LM_EVAL, GPT2_LOSS, GPT3_HELLASWAG,
                           GPT3_SIZES, band_at, corpus_of, differences, find_curve, is_judged,
                           published, size_of, val_stream, verdict)
from run.tokenizer import GPT2, load_tokenizer
from run.weights import load_model

# of the small panels
STREAMS = {"lr": "learning rate", "norm": "gradient norm", "tok_per_sec": "tok/s"}
MIN_SMOOTHED = 200    # points: a shorter curve is drawn without a running mean (choice)
MAX_LABELS = 24       # token labels that are legible along an axis (choice)


def new_figure(width, height, dpi=80):
    """An empty matplotlib Figure, width and height in inches."""
    from matplotlib.figure import Figure  # not pyplot: no backend, no window, nothing to close
    return Figure(figsize=(width, height), layout="constrained", dpi=dpi)


def write_figure(figure, path):
    """Writes a figure to path atomically, in the format of its suffix, and returns path."""
    with warnings.catch_warnings(), atomic_write(path) as f:
        # the name of a run may be in a script that the font does not have
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(f, format=os.path.splitext(path)[1].lstrip(".") or "png")
    return path


def as_label(name):
    """A name for a title or legend: dollar signs begin no mathematics, and _name is not hidden."""
    name = name.replace("$", r"\$")
    return f" {name}" if name.startswith("_") else name


# -----------------------------------------------------------------------------
# curves

def smooth(values, half):
    """Centered running mean over each value and `half` values on each side. Same length as values.

    Near the start the window shrinks on both sides, which keeps the first value of a steep curve;
    near the end, on the right only. Example: smooth([1, 2, 3, 4], 1) -> [1, 2, 3, 3.5]
    """
    sums = np.cumsum([0.0, *values])
    i = np.arange(len(values))
    half = np.minimum(i, half)
    starts = i - half
    ends = np.minimum(i + half + 1, len(values))
    return (sums[ends] - sums[starts]) / (ends - starts)


def clock(steps, speeds, total_batch_size):
    """(steps, hours): hours of training before each step, and after the last one.

    speeds: tokens per second of each step. A step that was not logged counts as long as the logged
    step before it. Example: clock([0, 1], [100, 50], 3600) -> [0, 1, 2], [0, 0.01, 0.03]
    """
    steps = np.append(steps, steps[-1] + 1)
    hours = np.diff(steps) * total_batch_size / speeds / 3600
    return steps, np.append(0.0, np.cumsum(hours))


@dataclass
class Curves:
    """A run's curves; made by read_curves."""
    run_dir: str
    name: str      # in the legend
    config: dict   # the run's settings
    color: str
    streams: dict  # {stream: (x, values)}, arrays; values are finite
    val: str = "val"  # the stream of the validation losses to draw: val or val_N


def read_curves(run_dir, by="step", color="tab:blue"):
    """The Curves of a run folder, over `by`, a key of AXES."""
    path = os.path.join(run_dir, "log.txt")
    config = read_config(run_dir)
    streams = {}
    for stream, points in read_log(path).items():
        steps, values = np.array(points).T
        finite = np.isfinite(values)  # a float16 run logs infinite gradient norms
        if finite.any():
            streams[stream] = steps[finite], values[finite]
    if "train" not in streams and "val" not in streams:
        raise ValueError(f"{path} has no losses yet; draw the run after its first step")
    size = config.get("total_batch_size")  # tokens per step
    has_size = isinstance(size, int)
    if (by != "step" and not has_size) or (by == "hours" and "tok_per_sec" not in streams):
        raise ValueError(f"--by {by} needs total_batch_size in {run_dir}/config.json, and hours"
                         f" need tok_per_sec in {path} too; use --by step")
    if by == "hours":
        clock_steps, hours = clock(*streams["tok_per_sec"], size)
    for stream, (steps, values) in streams.items():
        if by == "tokens":
            streams[stream] = steps * size, values
        elif by == "hours":
            streams[stream] = np.interp(steps, clock_steps, hours), values
    name = as_label(os.path.basename(os.path.abspath(run_dir)))
    return Curves(run_dir, name, config, color, streams)


def short_count(n):
    """A large number with its unit: 2500000000 -> "2.5B", 1024 -> "1.02K"."""
    for unit in ("", "K", "M", "B"):
        if abs(n) < 999.5:  # 999.9 has the three digits of 1K
            return f"{n:.3g}{unit}"
        n /= 1000
    return f"{n:.3g}T"


def draw_reference(panel, value, label, color, linestyle="--"):
    """A horizontal line, with its label and value to the right of the panel."""
    panel.axhline(value, color=color, linestyle=linestyle, linewidth=1.2, zorder=1)
    low, high = panel.get_ylim()
    if not low < value < high:  # draw_loss limits the axis
        panel.set_ylim(min(low, value), max(high, value))
    panel.annotate(f"{label}\n{value}", (1, value), (4, 0), panel.get_yaxis_transform(),
                   "offset points", va="center", fontsize=8, color=color, annotation_clip=False)


def draw_curve(panel, x, values, color, name=None, raw=True, noisy=True):
    """Draws a running mean over the faint values, or only the values.

    A curve that is not noisy, or has fewer than MIN_SMOOTHED values, gets no running mean. name:
    legend entry, to which the window and the last value drawn are added; None for no entry.
    raw: draw the values too.
    """
    drawn, kind = values, "every step"
    if noisy and len(values) >= MIN_SMOOTHED:
        half = max(5, len(values) // 100)
        drawn, kind = smooth(values, half), f"mean of {2 * half + 1} steps"
        if raw:
            panel.plot(x, values, color=color, alpha=0.25, linewidth=0.8)
    label = f"{name}, {kind} (last {drawn[-1]:.3f})" if name else None
    panel.plot(x, drawn, color=color, linewidth=1.2, alpha=1.0 if raw else 0.5, label=label,
               marker="." if len(values) <= 20 else None)


def draw_published(panel, curve, stream, by, end):
    """A stream of a published Curve up to x = end."""
    points = curve.streams.get(stream, {})
    factor = curve.settings["total_batch_size"] if by == "tokens" else 1
    x = [step * factor for step in points if step * factor <= end]
    if x:
        values = list(points.values())[:len(x)]
        panel.plot(x, values, color="0.25", linestyle="--", linewidth=1.3, zorder=2.5,
                   label=f"{curve.name} (last {values[-1]:.4g})")


def axis_start(run):
    """The x from which on a run's losses are within the axis; see draw_loss."""
    end = max(run.streams[name][0][-1] for name in ("train", "val") if name in run.streams)
    start = end / 40
    if "val" in run.streams:
        validations = run.streams["val"][0]
        start = max([start, *validations[validations > 0][:1]])
    # of a run that is not validated in its first half, the whole curve
    return start if start <= end / 2 else 0


def sizes_of(runs):
    """The sizes of the runs' models, keys of the published results, each once."""
    return list(dict.fromkeys(size_of(run.config) for run in runs))


def draw_difference(panel, runs, curve, by):
    """Validation losses of runs minus those of a published Curve, and the band of correct runs.

    Of the runs whose log has the loss on the curve's validation tokens.
    """
    factor = curve.settings["total_batch_size"] if by == "tokens" else 1
    steps = [step for step in curve.streams["val"] if is_judged(curve, step)]
    last = 0
    for run in runs:
        x, values = run.streams[run.val]
        losses = dict(zip((x / factor).round().astype(int).tolist(), values))
        drawn = [step for step in steps if step in losses]
        panel.plot([step * factor for step in drawn],
                   [losses[step] - curve.streams["val"][step] for step in drawn],
                   color=run.color, marker="o", markersize=3, linewidth=1.2)
        last = max([last, *drawn])
    steps = [step for step in steps if step <= last]
    band = np.array([band_at(step) for step in steps])
    panel.fill_between([step * factor for step in steps], -band, band, color="0.85", zorder=0,
                       label="spread of public runs")
    panel.axhline(0, color="0.25", linestyle="--", linewidth=1.2, zorder=1)
    panel.set(ylabel="nats", title=f"{runs[0].val} minus {curve.name}")


def draw_loss(panel, runs, baselines):
    """Training and validation loss of each run; GPT-2's loss on the corpus baselines, if given.

    The axis begins at the loss of the first validation after step 0, or 1/40 of the run: the first
    steps would compress the rest of the curve.
    """
    single = len(runs) == 1
    tops = []  # losses that have to be within the axis
    for run in runs:
        if "train" in run.streams:
            x, values = run.streams["train"]
            name = None if "val" in run.streams else run.name  # one legend entry per run
            draw_curve(panel, x, values, run.color, "train" if single else name, raw=single)
            tops += values[x >= axis_start(run)].tolist()
        if single and "epoch" in run.streams:
            panel.vlines(run.streams["epoch"][0], 0, 1, "0.6", "--", label="new epoch",
                         transform=panel.get_xaxis_transform(), linewidth=0.8)
        if "val" in run.streams:
            x, values = run.streams[run.val]
            last = f"last {values[-1]:.3f}"
            if single and run.val == "val" and "val_bpb" in run.streams:
                last += f", {run.streams['val_bpb'][1][-1]:.3f} bits per byte"
            panel.plot(x, values, color="tab:orange" if single else run.color, marker="o",
                       markersize=3, linewidth=1.5,
                       label=f"{run.val if single else run.name} ({last})")
            tops += values[x >= axis_start(run)].tolist()
    for size in sizes_of(runs):
        value = GPT2_LOSS.get(baselines, {}).get(size)
        if value:
            draw_reference(panel, value, f"GPT-2 {size}\n{CORPORA[baselines]} val", "tab:red")
    low, high = panel.dataLim.intervaly
    top = max(tops, default=high)
    if top < high:
        margin = 0.06 * (top - low)
        panel.set_ylim(low - margin, top + margin)
        panel.annotate(f"↑ from {high:.2f}", (0.01, 0.985), xycoords="axes fraction", va="top",
                       fontsize=8, bbox=dict(facecolor="white", edgecolor="none", alpha=0.8, pad=1))
    panel.set(ylabel="loss, nats per token",
              title=runs[0].name if single else "loss: val (dots), train (faint)")


def draw_hellaswag(panel, runs):
    """HellaSwag's acc_norm, with chance and GPT-2 and GPT-3 of the runs' sizes.

    A single run in both styles, several runs in completion style only.
    """
    single = len(runs) == 1
    styles = [("hella", "completion", "-")]
    if single:
        styles.append(("hella_lm_eval", "lm-eval", ":"))
    for run in runs:
        for stream, style, linestyle in styles:
            if stream in run.streams:
                x, values = run.streams[stream]
                panel.plot(x, values, color=run.color, linestyle=linestyle, markersize=3,
                           linewidth=1.5, marker="o",
                           label=f"{style if single else run.name} (last {values[-1]:.4f})")
    for size in sizes_of(runs):
        draw_reference(panel, GPT2_HELLASWAG[size], f"GPT-2 {size}, completion", "tab:red")
        draw_reference(panel, GPT3_HELLASWAG[size], f"GPT-3 {GPT3_SIZES[size]}", "tab:green")
        lm_eval = GPT2_HELLASWAG_LM_EVAL.get(size)
        if lm_eval and single and "hella_lm_eval" in runs[0].streams:
            draw_reference(panel, lm_eval, f"GPT-2 {size}, lm-eval", "tab:red", ":")
    draw_reference(panel, 0.25, "chance", "0.5", "-")
    panel.set(ylabel="acc_norm", title="HellaSwag val" + ("" if single else ", completion style"))
    panel.margins(y=0.08)


def draw_stream(panel, runs, stream):
    """One of STREAMS of each run; a single run's peak learning rate or median is in the title."""
    for run in runs:
        draw_curve(panel, *run.streams[stream], run.color, noisy=stream != "lr")
    values = np.concatenate([run.streams[stream][1] for run in runs])
    panel.set_ylim(0, 1.15 * np.quantile(values, 0.99) or 1)  # clips rare spikes
    title = STREAMS[stream]
    if len(runs) == 1 and stream == "lr":
        title += f" (peak {values.max():.2e})"
    elif len(runs) == 1:
        title += f" (median {short_count(np.median(values))})"
    panel.set_title(title, fontsize=10)
    if stream == "tok_per_sec":
        panel.yaxis.set_major_formatter(lambda value, _: short_count(value))


def curves_figure(run_dirs, by="step", baselines=None, curve=None):
    """A matplotlib Figure of one or more run folders over "step", "tokens" or "hours".

    baselines: "edu" or "fineweb" adds GPT-2's loss on that corpus, which is comparable only to runs
    on it. curve: a published Curve, drawn up to the end of the runs; not over hours.
    """
    colors = itertools.cycle(["tab:blue", "tab:orange", "tab:purple", "tab:brown", "tab:pink",
                              "tab:olive", "tab:cyan", "tab:gray"])
    runs = [read_curves(run_dir, by, color) for run_dir, color in zip(run_dirs, colors)]
    if len({run.name for run in runs}) < len(runs):  # a/gpt2-124M and b/gpt2-124M
        for run in runs:
            run.name = as_label(run.run_dir)
    small = [stream for stream in STREAMS if any(stream in run.streams for run in runs)]
    has_hella = any("hella" in run.streams or "hella_lm_eval" in run.streams for run in runs)
    compared = []  # the runs whose losses are comparable with the curve's
    for run in runs:
        if curve and not differences(run.config, curve):
            stream = val_stream(run.config, curve)
            if stream in run.streams:
                run.val = stream
                compared.append(run)

    # loss, the difference to the curve and HellaSwag above, the small panels below
    num_large = 1 + bool(compared) + has_hella
    figure = new_figure(4 + 4.5 * num_large, 6.1 if small else 4.2)
    top = figure
    if small:
        top, bottom = figure.subfigures(2, 1, height_ratios=[2.2, 1])
    large_panels = top.subplots(1, num_large, squeeze=False)[0]
    small_panels = bottom.subplots(1, len(small), squeeze=False)[0] if small else []
    if curve:
        end = 1.01 * max(x[-1] for run in runs for x, _ in run.streams.values())
        draw_published(large_panels[0], curve, "val", by, end)
        if has_hella:
            draw_published(large_panels[-1], curve, "hella", by, end)
    draw_loss(large_panels[0], runs, baselines)
    if compared:
        draw_difference(large_panels[1], compared, curve, by)
    if has_hella:
        draw_hellaswag(large_panels[-1], runs)
    for panel in large_panels:
        panel.set_xlabel(AXES[by])
        # losses fall, scores rise
        is_hella = has_hella and panel is large_panels[-1]
        panel.legend(fontsize=8, loc="lower right" if is_hella else "upper right", borderaxespad=1)
    for panel, stream in zip(small_panels, small):
        draw_stream(panel, [run for run in runs if stream in run.streams], stream)
    for panel in [*large_panels, *small_panels]:
        panel.grid(alpha=0.3)
        panel.xaxis.get_major_locator().set_params(integer=by == "step", min_n_ticks=1)
        panel.xaxis.set_major_formatter(lambda value, _: short_count(value))
    return figure


def fitting_curve(run_dir):
    """The published Curve that fits a run; None if none does."""
    return find_curve(read_config(run_dir))[0]


def plot_run(run_dir, baselines=False):
    """Draws a run's curves into loss.png in its folder, with the published curve that fits.

    baselines: add GPT-2's loss on FineWeb-Edu. Returns the path, or why it was not drawn, instead
    of raising: the run that calls it is complete.
    """
    try:
        baselines = "edu" if baselines else None
        figure = curves_figure([run_dir], "step", baselines, fitting_curve(run_dir))
        return write_figure(figure, os.path.join(run_dir, "loss.png"))
    except Exception as e:  # a full disk, a log.txt that was edited, whatever matplotlib raises
        return f"not drawn, {first_line(e)}"


# -----------------------------------------------------------------------------
# weights and attention

def wpe_figure(model):
    """Figure of the position embeddings: wpe as an image, and three of its columns."""
    wpe = model.transformer.wpe.weight.detach().float().cpu().numpy()      # (block_size, C)
    figure = new_figure(11, 3.6)
    left, right = figure.subplots(1, 2)
    limit = np.quantile(abs(wpe), 0.99)
    image = left.imshow(wpe, "RdBu", aspect="auto", interpolation="nearest", vmin=-limit,
                        vmax=limit)
    figure.colorbar(image, ax=left)
    left.set(title="wpe, the position embeddings", xlabel="channel", ylabel="position")
    for tenths in (2, 3, 4):
        channel = wpe.shape[1] * tenths // 10
        right.plot(wpe[:, channel], linewidth=1, label=f"channel {channel}")
    right.set(title="three columns of wpe", xlabel="position")
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    return figure


def c_attn_figure(model, layer=1):
    """Figure of a block's c_attn weights that compute q, k and v, on one scale.

    Each is (in, out), as in OpenAI's checkpoints.
    """
    weight = model.transformer.h[layer].attn.c_attn.weight      # (3C, C): (out, in)
    weight = weight.detach().float().cpu().numpy()
    figure = new_figure(11, 3.9, dpi=160)
    panels = figure.subplots(1, 3, sharey=True)
    limit = 3 * weight.std()
    for panel, name, part in zip(panels, "qkv", np.split(weight, 3)):
        image = panel.imshow(part.T, cmap="gray", vmin=-limit, vmax=limit)
        ticks = range(0, len(part), math.ceil(len(part) / 4))
        panel.set(title=name, xlabel=f"channel of {name}", xticks=ticks)
    panels[0].set_ylabel("input channel")
    figure.colorbar(image, ax=panels, label="weight", fraction=0.05)
    figure.suptitle(f"h.{layer}.attn.c_attn.weight", fontsize=11)
    return figure


def norms_figure(model, num_tokens=GPT2.num_tokens):
    """Figure of the norm of each token's embedding, by token id.

    Ids are in the order in which the tokenizer's merges were learned: low ids are frequent. Ids
    from num_tokens on are padding.
    """
    norms = model.transformer.wte.weight.detach().float().norm(dim=1).cpu()
    figure = new_figure(11, 3.4)
    panel = figure.subplots()
    panel.plot(norms[:num_tokens], ".", markersize=1, alpha=0.4)
    if len(norms) > num_tokens:
        panel.plot(range(num_tokens, len(norms)), norms[num_tokens:], "o", markersize=3,
                   color="tab:red", label="padding")
        panel.legend(fontsize=8)
    panel.set(title="norm of each token's row in wte", xlabel="token id", ylabel="norm",
              ylim=(0, None))
    panel.grid(alpha=0.3)
    return figure


def default_prompt(source):
    """The start of the validation data of the run that a model belongs to, or a fixed sentence."""
    run_dir = source if os.path.isdir(source) else os.path.dirname(source)
    path = read_config(run_dir).get("data", "") if saved_steps(run_dir) else ""
    if not os.path.exists(path):
        return "Hello, I'm a language model, and I know what I said"
    val_stream = TokenStream(prepare_data(path)[1])
    tokens = val_stream.read(0, min(MAX_LABELS, len(val_stream)))
    return GPT2.decode(tokens[tokens != EOT].tolist())


@torch.no_grad()
def attention_weights(model, idx, layer):
    """(nh, T, T) float32, softmax(q k^T / sqrt(hs)) of each head of a block.

    idx: the tokens, (T,) int64. forward never materializes this matrix: it uses flash attention.
    """
    T = len(idx)
    attn = model.transformer.h[layer].attn
    x = model.transformer.wte(idx[None, :]) + model.transformer.wpe.weight[:T]  # (1, T, C)
    for block in model.transformer.h[:layer]:
        x = block(x)
    x = attn.c_attn(model.transformer.h[layer].ln_1(x)).float()                 # (1, T, 3C)
    q, k, _ = x[0].chunk(3, dim=1)                                              # (T, C)
    q = q.view(T, attn.n_head, -1).transpose(0, 1)                              # (nh, T, hs)
    k = k.view(T, attn.n_head, -1).transpose(0, 1)                              # (nh, T, hs)
    scores = q @ k.transpose(1, 2) / k.size(-1) ** 0.5                          # (nh, T, T)
    future = torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1)
    return scores.masked_fill(future, float("-inf")).softmax(dim=-1)


def attention_figure(model, prompt, layer=0, tokenizer=GPT2):
    """Figure of a block's attention weights on a prompt, one panel per head.

    The color scale is the square root of the weight: small weights are visible.
    """
    from matplotlib.colors import PowerNorm
    tokens = (tokenizer.encode(prompt).tolist() or [tokenizer.eot])[:model.config.block_size]
    idx = torch.tensor(tokens, device=model.lm_head.weight.device)
    weights = attention_weights(model, idx, layer).cpu().numpy()
    ticks = range(0, len(tokens), math.ceil(len(tokens) / MAX_LABELS))
    labels = [tokenizer.decode([tokens[i]]).replace("\n", "\\n").replace("$", r"\$") for i in ticks]
    columns = max(n for n in range(1, 6) if len(weights) % n == 0)
    rows = len(weights) // columns
    figure = new_figure(3 * columns + 1.2, 3.3 * rows + 0.4)
    panels = figure.subplots(rows, columns, squeeze=False)
    for head, panel in enumerate(panels.flat):
        image = panel.imshow(weights[head], cmap="Blues", norm=PowerNorm(0.5, 0, 1))
        panel.set_title(f"block {layer}, head {head}", fontsize=9)
        panel.set_xticks(ticks, labels, rotation=90, fontsize=7)
        is_left = head % columns == 0
        panel.set_yticks(ticks, labels if is_left else [""] * len(labels), fontsize=7)
    figure.supxlabel("key", fontsize=10)
    figure.supylabel("query", fontsize=10)
    figure.colorbar(image, ax=panels, label="attention weight", ticks=[0, 0.05, 0.2, 0.5, 1],
                    aspect=20 * rows, fraction=0.05)
    return figure


def draw_weights(source, folder, prompt):
    """Writes the pictures of a model's weights and attention into a folder, or into the source."""
    if folder is None and not os.path.isdir(source):
        raise ValueError(f"{source} is not a folder; name a folder for the pictures with --out")
    folder = folder or source
    model, _ = load_model(source)
    os.makedirs(folder, exist_ok=True)
    prompt = prompt or default_prompt(source)
    num_blocks = model.config.n_layer

    def write(name, figure):
        print("wrote", write_figure(figure, os.path.join(folder, f"{name}.png")))
    write("wpe", wpe_figure(model))
    write("c_attn", c_attn_figure(model, min(1, num_blocks - 1)))
    tokenizer = load_tokenizer(source, model.config.vocab_size)
    write("norms", norms_figure(model, tokenizer.num_tokens))
    for layer in range(num_blocks):
        write(f"attention_{layer}", attention_figure(model, prompt, layer, tokenizer))


def draw_curves(run_dirs, path, by, baselines, reference):
    """Writes the picture of the runs' curves.

    baselines: None, a corpus, or "" for the first run's; reference: None, the name of a curve, or
    "" for the one that fits the first run.
    """
    if path is None:
        path = os.path.join(run_dirs[0], "loss.png")
    check_output(path)
    settings = read_config(run_dirs[0])
    curve = published(reference) if reference else None
    if reference == "":
        curve, reason = find_curve(settings)
        if curve is None:
            raise ValueError(f"--reference: no published curve fits {run_dirs[0]}: {reason}")
    if baselines == "":
        baselines = corpus_of(settings.get("data", ""))
        if baselines is None:
            raise ValueError(f"--baselines: {run_dirs[0]} is not known to be trained on FineWeb-Edu"
                             " or FineWeb; name the corpus of its validation data, edu or fineweb")
    if by is None:
        sizes = {read_config(run_dir).get("total_batch_size") for run_dir in run_dirs}
        by = "tokens" if curve and sizes != {curve.settings["total_batch_size"]} else "step"
    figure = curves_figure(run_dirs, by, baselines, curve)
    print("wrote", write_figure(figure, path))


def main():
    args = parse_args()
    if args.weights:
        draw_weights(args.source[0], args.out, args.prompt)
        return
    for run_dir in args.source:
        if not os.path.exists(os.path.join(run_dir, "log.txt")):
            raise FileNotFoundError(f"{run_dir} has no log.txt; give a run folder, log/<exp-name>")
    if args.verdict:
        print(verdict(args.source[0], args.reference))
    else:
        draw_curves(args.source, args.out, args.by, args.baselines, args.reference)


if __name__ == "__main__":
    run_main(main)
