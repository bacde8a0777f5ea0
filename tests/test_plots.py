"""
Curves show the run at every length; the pictures of weights show the weights, and the attention that forward computes.

    ./test.sh tests/test_plots.py     # no network, no GPU
"""
import json
import math
import os
import subprocess
import sys

import matplotlib.image
import numpy as np
import pytest
import torch

import plots
from run.folder import read_log
from run.checkpoint import save_file
from run.cli import run_main
from convert import hf_state_dict
from model import SIZES
from data import get_tokenizer
from model import GPT, GPTConfig
from plots import curves_figure, plot_run, short_count, size_of, smooth

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

# -----------------------------------------------------------------------------
# the log


@pytest.fixture
def run_dir(tmp_path):
    folder = tmp_path / "my-run"
    folder.mkdir()
    lines = [f"{step} train {10 - step / 20}\n{step} lr 6e-04\n" for step in range(100)]
    lines += [f"{step} val {10.5 - step / 20}\n{step} hella {0.25 + step / 2000}\n" for step in (0, 50, 100)]
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
def test_an_invalid_line_of_a_log_is_an_error_with_its_number(tmp_path, line):
    (tmp_path / "log.txt").write_text(f"0 train 3.0\n{line}\n2 train 1.0\n")
    with pytest.raises(ValueError, match="log.txt, line 2: expected `step stream value`"):
        read_log(str(tmp_path / "log.txt"))


def test_smooth_is_a_centered_mean_that_starts_at_the_first_value():
    assert smooth([1, 2, 3, 4], 1).tolist() == [1, 2, 3, 3.5]
    assert smooth([5.0, 1.0], 0).tolist() == [5.0, 1.0] and smooth([], 3).tolist() == []
    values = np.random.default_rng(0).normal(size=200)
    want = [np.mean(values[i - min(i, 6):i + min(i, 6) + 1]) for i in range(200)]
    assert np.allclose(smooth(values, 6), want)


def test_large_numbers_are_short():
    assert [short_count(n) for n in (0, 0.5, 999, 1024, -2500, 19073, 2.5e9, 3e12)] == \
        ["0", "0.5", "999", "1.02K", "-2.5K", "19.1K", "2.5B", "3T"]


def colors(path):
    """{(r, g, b): pixels} of a picture, 8 bits each."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(color): count for color, count in zip(found.tolist(), counts.tolist())}


BLUE, ORANGE, RED = (31, 119, 180), (255, 127, 14), (214, 39, 40)  # tab:blue (train), tab:orange (val), tab:red (GPT-2)


def test_a_picture_shows_train_and_val_and_hellaswag_only_where_there_is_some(run_dir):
    path = plot_run(str(run_dir))
    assert path == str(run_dir / "loss.png")
    seen = colors(path)
    assert seen[BLUE] > 50 and seen[ORANGE] > 50 and RED in seen
    with_hella = matplotlib.image.imread(path).shape
    text = (run_dir / "log.txt").read_text()
    (run_dir / "log.txt").write_text("".join(line for line in text.splitlines(True) if "hella" not in line))
    plot_run(str(run_dir))
    seen = colors(path)
    assert seen[BLUE] > 50 and seen[ORANGE] > 50 and RED not in seen
    assert matplotlib.image.imread(path).shape[1] < with_hella[1]
    assert sorted(os.listdir(run_dir)) == ["log.txt", "loss.png"]


def test_baselines_add_gpt2s_line(run_dir):
    (run_dir / "log.txt").write_text("0 train 10.0\n1 train 4.0\n2 train 3.0\n")
    assert RED not in colors(plot_run(str(run_dir)))
    assert RED in colors(plot_run(str(run_dir), baselines=True))


# -----------------------------------------------------------------------------
# the contents of a figure of curves, read from its lines

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
    """The texts in and beside a panel."""
    return " | ".join(text.get_text() for text in figure.axes[panel].texts)


def levels_of(figure, panel):
    """Heights of the horizontal lines in a panel, the published results."""
    return sorted(y[0] for _, x, y in lines_of(figure, panel) if x == [0, 1] and y[0] == y[1])


@pytest.mark.parametrize("by, train_x, val_x", [("step", [0, 1, 2], [0, 3]), ("tokens", [0, 100, 200], [0, 300]),
                                                ("hours", [0, 10 / 3600, 15 / 3600], [0, 35 / 3600])])
def test_by_is_the_unit_of_every_curve(tmp_path, by, train_x, val_x):
    figure = curves_figure([make_run(tmp_path / "a")], by)
    drawn = {label.split(" (")[0]: x for label, x, _ in lines_of(figure)}
    assert drawn["train, every step"] == pytest.approx(train_x) and drawn["val"] == pytest.approx(val_x)
    assert lines_of(figure, 1)[0][1] == pytest.approx(train_x)  # the learning rate's
    assert by.split()[0] in figure.axes[0].get_xlabel()


def test_several_runs_have_distinct_names(tmp_path):
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


def test_a_run_without_a_config_is_compared_with_124M():
    assert size_of({}) == "124M"


def test_hellaswag_is_beside_gpt2_and_gpt3_of_the_runs_sizes(tmp_path):
    small = make_run(tmp_path / "small", hella={0: 0.25, 3: 0.30}, hella_lm_eval={0: 0.25, 3: 0.31})
    large = make_run(tmp_path / "large", n_layer=24, n_embd=1024, hella={0: 0.25, 3: 0.40})
    assert levels_of(curves_figure([small]), 1) == [0.25, 0.2955, 0.3114, 0.337]
    assert levels_of(curves_figure([large]), 1) == [0.25, 0.3752, 0.436]
    both = curves_figure([small, large])
    assert levels_of(both, 1) == [0.25, 0.2955, 0.337, 0.3752, 0.436]  # completion style only
    assert "GPT-3 350M\n0.436" in texts_of(both, 1) and "GPT-2 124M, completion\n0.2955" in texts_of(both, 1)


def test_both_accuracies_of_a_single_run_are_drawn_in_both_styles(tmp_path):
    scores = {"hella": 0.30, "hella_acc": 0.28, "hella_lm_eval": 0.31, "hella_lm_eval_acc": 0.29}
    run = make_run(tmp_path / "a", **{stream: {0: 0.25, 3: score} for stream, score in scores.items()})

    def legend_of(*runs):
        return {text.get_text() for text in curves_figure(list(runs)).axes[1].get_legend().get_texts()}
    assert {"completion (last 0.3000)", "completion, acc (last 0.2800)", "lm-eval (last 0.3100)",
            "lm-eval, acc (last 0.2900)"} <= legend_of(run)
    assert legend_of(run, make_run(tmp_path / "b")) == {"a (last 0.3000)"}


def test_the_loss_of_gpt2_is_drawn_for_the_corpus_it_was_measured_on(tmp_path):
    small, large = make_run(tmp_path / "s"), make_run(tmp_path / "l", n_layer=24, n_embd=1024)
    assert levels_of(curves_figure([small]), 0) == []
    assert levels_of(curves_figure([small], baselines="edu"), 0) == [3.2924]
    assert levels_of(curves_figure([small], baselines="fineweb"), 0) == [3.425]
    assert levels_of(curves_figure([small, large], baselines="fineweb"), 0) == [3.0831, 3.425]
    assert levels_of(curves_figure([large], baselines="edu"), 0) == []  # not published


def noisy_fall(steps):
    """A training loss that falls from 11 to 3 within the first steps, with some noise."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=steps)
    return {step: 3.0 + 8.0 * 0.7 ** step + (noise[step] if step else 0.0) for step in range(steps)}


@pytest.mark.parametrize("steps", [1, 2, 8, 50, 100])
def test_a_short_run_is_drawn_whole_and_without_smoothing(tmp_path, steps):
    """The curve of a short run was once drawn as a "running mean" over one or two steps."""
    fall = noisy_fall(steps)
    figure = curves_figure([make_run(tmp_path / "a", train=fall, norm=fall, val={0: 11.2, steps: 3.0})])
    lines = lines_of(figure)
    assert [label for label, *_ in lines] == [f"train, every step (last {fall[steps - 1]:.3f})", "val (last 3.000)"]
    assert lines[0][1:] == ([*fall], [*fall.values()]) and lines_of(figure, 2)[0][2] == [*fall.values()]
    low, high = figure.axes[0].get_ylim()
    assert low < min(3.0, *fall.values()) and high > 11.2 and texts_of(figure, 0) == ""
    if steps <= 2:  # the line of a single point is invisible without a marker
        assert figure.axes[0].lines[0].get_marker() == "."
        assert all(float(tick).is_integer() for panel in figure.axes for tick in panel.get_xticks())


@pytest.mark.parametrize("steps, window, cut", [(600, 13, False), (19000, 381, True)])
def test_a_long_run_has_a_running_mean_and_a_very_long_one_omits_the_first_fall(tmp_path, steps, window, cut):
    fall = noisy_fall(steps)
    figure = curves_figure([make_run(tmp_path / "a", train=fall, lr=fall, val={0: 11.2, 250: 3.1, steps: 3.0})])
    raw, mean, _ = lines_of(figure)
    assert raw[2] == [*fall.values()] and np.std(mean[2][steps // 2:]) < 0.04 and mean[2][0] == fall[0]
    assert mean[0] == f"train, mean of {window} steps (last {mean[2][-1]:.3f})"
    low, high = figure.axes[0].get_ylim()
    assert low < min(fall.values()) and (high < 4 if cut else high > 11.2)
    assert texts_of(figure, 0) == ("↑ from 11.20" if cut else "")
    assert [line[2] for line in lines_of(figure, 1)] == [[*fall.values()]]  # the learning rate is not noisy


def test_infinite_norms_of_a_float16_run_are_skipped(tmp_path):
    """An infinite norm once made the axis limits and every later mean invalid."""
    norms = {step: math.inf if step % 10 == 0 else 1.0 for step in range(300)}
    figure = curves_figure([make_run(tmp_path / "a", norm=norms)])
    assert len(lines_of(figure, 2)[0][1]) == 270 and lines_of(figure, 2)[1][2] == pytest.approx([1.0] * 270)
    assert figure.axes[2].get_ylim() == (0, pytest.approx(1.15))
    assert figure.axes[2].get_title() == "gradient norm (median 1), 30 non-finite"
    assert len(curves_figure([make_run(tmp_path / "b", norm={0: math.inf})]).axes) == 3  # no panel without a value


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", [math.inf, math.nan, 1e308])
def test_values_that_cannot_be_drawn_fail_no_picture(tmp_path, value):
    """From 1% of infinite values on, the finished run once exited with status 2; with fewer the mean curve vanished."""
    for share in (1000, 100, 2):
        values = {step: value if step % share == 1 else 1.0 for step in range(1000)}
        figure = curves_figure([make_run(tmp_path / f"{share}", train=values, norm=values)])
        assert np.isfinite(lines_of(figure, 2)[1][2]).all() and np.isfinite(lines_of(figure, 0)[1][2]).all()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$x_{ $", "_{hidden}", r"\$\frac{$", "\x1b[31m\n", "模型"])
def test_every_name_of_a_run_is_drawn_as_it_is(tmp_path, name, capfd):
    """"$x_{ $" was once parsed as mathematics, which failed after the whole training; "_a" had no entry in the legend."""
    runs = [make_run(tmp_path / name), make_run(tmp_path / "b")]
    figure = curves_figure(runs)
    figure.set_dpi(40)
    plots.write_figure(figure, str(tmp_path / "a.png"))
    entries = [text._preprocess_math(text.get_text()) for text in figure.axes[0].get_legend().get_texts()]
    assert len(entries) == 2 and not any(is_math for _, is_math in entries)
    shown = name.replace("\n", " ").replace("\x1b", r"\x1b")
    assert entries[0][0].strip() == f"{shown} (last 6.500)" and capfd.readouterr().err == ""


def test_a_picture_that_cannot_be_drawn_or_written_fails_no_run(run_dir, monkeypatch):
    (run_dir / "loss.png").mkdir()
    assert plot_run(str(run_dir)).startswith("not drawn, IsADirectoryError: ")
    (run_dir / "log.txt").write_text("a note\n")
    assert plot_run(str(run_dir)).startswith("not drawn, ValueError: ")

    def fail(*_, **__):
        raise RuntimeError("In FT2Font: could not load glyph")
    monkeypatch.setattr(plots, "curves_figure", fail)
    assert plot_run(str(run_dir)) == "not drawn, RuntimeError: In FT2Font: could not load glyph"


def test_published_curves_are_drawn_in_gray_up_to_the_end_of_the_run(tmp_path):
    run = make_run(tmp_path / "a", total_batch_size=524288, val={0: 10.9, 500: 5.3}, hella={0: 0.25, 500: 0.25})
    curve, = plots.find_curves(["edu-lecture-8gpu"])
    for by, factor in (("step", 1), ("tokens", 524288)):
        figure = curves_figure([run], by, None, [curve])
        x, y = [0, 250 * factor, 500 * factor], [10.9514, 6.1443, 5.2742]
        assert lines_of(figure)[0] == ("edu-lecture-8gpu val (last 5.274)", x, y)
        assert lines_of(figure, 1)[0][0] == "edu-lecture-8gpu (last 0.2382)"


def test_bits_per_byte_are_in_the_legend(tmp_path):
    labels = [label for label, *_ in lines_of(curves_figure([make_run(tmp_path / "a", val_bpb={0: 3.0, 3: 1.25})]))]
    assert "val (last 6.500, 1.250 bits per byte)" in labels


def test_a_finished_run_is_drawn_beside_the_published_curve_that_fits_it(tmp_path, monkeypatch):
    run = make_run(tmp_path / "a", total_batch_size=524288, val={0: 10.9, 500: 5.3})
    assert plots.fitting_references(run) == []  # on an unknown corpus
    settings = {"n_layer": 12, "n_embd": 768, "total_batch_size": 524288, "val_tokens": 10485760, "data": "edu_fineweb10B"}
    (tmp_path / "a" / "config.json").write_text(json.dumps({"config": settings}))
    drawn, figure_of = [], plots.curves_figure
    monkeypatch.setattr(plots, "curves_figure", lambda *args: drawn.append(args[-1]) or figure_of(*args))
    assert plot_run(run) == f"{run}/loss.png" and [curve.name for curve in drawn[0]] == ["edu-lecture-8gpu"]


# -----------------------------------------------------------------------------
# the contents of a figure of weights

PROMPT = "The king and his queen"


@pytest.fixture(scope="module")
def model():
    """A small GPT whose attention is far from uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=32, vocab_size=50304, n_layer=2, n_head=3, n_embd=12)).eval()
    for block in model.transformer.h:
        block.attn.c_attn.weight.data *= 40
    return model


def encoded(text):
    """Tokens of a text, (T,) int64."""
    return torch.tensor(get_tokenizer().encode_ordinary(text))


def images_of(figure):
    """[(title, array)] of the images in a figure's panels, without color bars."""
    return [(panel.get_title(), panel.images[0].get_array()) for panel in figure.axes if panel.images]


def has_color_bar(figure):
    return any(hasattr(panel, "_colorbar") for panel in figure.axes)


def test_attention_weights_are_those_that_forward_mixes_values_with(model):
    idx = encoded(PROMPT)
    seen, attn = {}, model.transformer.h[1].attn
    handle = attn.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        model(idx[None, :])
    handle.remove()
    weights = plots.attention_weights(model, idx, 1)
    assert weights.shape == (3, len(idx), len(idx)) and weights.std() > 0.1
    assert torch.equal(weights, weights.tril()) and torch.allclose(weights.sum(dim=-1), torch.ones(3, len(idx)))
    v = attn.c_attn(seen["x"])[0, :, 24:].view(len(idx), 3, 4).transpose(0, 1)        # (nh, T, hs)
    y = attn.c_proj((weights @ v).transpose(0, 1).reshape(len(idx), 12))
    assert torch.allclose(y, seen["y"][0], atol=1e-5)


def test_the_attention_of_each_head_is_drawn_with_the_tokens_beside_it(model):
    figure = plots.attention_figure(model, PROMPT, layer=1)
    weights = plots.attention_weights(model, encoded(PROMPT), 1)
    images = images_of(figure)
    assert [title for title, _ in images] == [f"block 1, head {head}" for head in range(3)] and has_color_bar(figure)
    for head, (_, image) in enumerate(images):
        assert np.array_equal(image, weights[head])
        labels = [label.get_text() for label in figure.axes[head].get_xticklabels()]
        assert labels == ["The", " king", " and", " his", " queen"]
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == labels


def test_a_long_prompt_is_cut_to_the_context_and_keeps_legible_labels(model):
    """Prompts of more than 24 tokens once had no labels."""
    panel = plots.attention_figure(model, "to be or\nnot " * 20).axes[0]
    assert panel.images[0].get_array().shape == (32, 32)
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert len(labels) == 16 and labels[:3] == ["to", " or", "not"] and len(panel.get_xticks()) == 16


def test_q_k_and_v_are_drawn_whole_side_by_side_in_one_scale(model):
    """Once only the first 300 columns of c_attn were drawn: for GPT-2, a part of q."""
    figure = plots.c_attn_figure(model, layer=1)
    images = images_of(figure)
    assert [title for title, _ in images] == ["q", "k", "v"] and has_color_bar(figure)
    # laid out (in, out), as OpenAI's files have it
    theirs = hf_state_dict(model)["transformer.h.1.attn.c_attn.weight"]
    assert np.array_equal(np.concatenate([image for _, image in images], axis=1), theirs)
    assert len({panel.images[0].get_clim() for panel in figure.axes[:3]}) == 1
    assert figure.get_suptitle() == "h.1.attn.c_attn.weight"


def test_wpe_is_drawn_without_changes(model):
    image, columns = plots.wpe_figure(model).axes[:2]
    wpe = model.transformer.wpe.weight.detach().numpy()
    assert np.array_equal(image.images[0].get_array(), wpe)
    assert [line.get_label() for line in columns.lines] == ["channel 2", "channel 3", "channel 4"]
    assert np.array_equal(columns.lines[1].get_ydata(), wpe[:, 3])


def test_the_padding_of_the_vocabulary_is_marked(model):
    tokens, padding = plots.norms_figure(model).axes[0].lines
    norms = model.transformer.wte.weight.detach().norm(dim=1)
    assert np.allclose(tokens.get_ydata(), norms[:50257]) and np.allclose(padding.get_ydata(), norms[50257:])
    assert padding.get_xdata()[0] == 50257 and padding.get_label() == "padding"


def save_run(folder, model, **settings):
    """A run folder with a checkpoint of step 1, and settings in its config.json."""
    os.makedirs(folder)
    save_file({"model": model.state_dict(), "config": vars(model.config), "step": 1, "val_loss": None},
              str(folder / "model_00001.pt"))
    save_file({"step": 1}, str(folder / "state_00001.pt"))
    (folder / "config.json").write_text(json.dumps({"config": settings}))
    return str(folder)


def test_the_default_prompt_is_of_the_runs_own_validation_data(model, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Training text only.\n\n" * 20 + "A last line, for validation.")
    run = save_run(tmp_path / "run", model, data=str(corpus))
    assert plots.default_prompt(run) == plots.default_prompt(os.path.join(run, "model_00001.pt"))
    assert plots.default_prompt(run) == "Training text only.\n\nA last line, for validation."
    corpus.write_text("word " * 1000)
    assert plots.default_prompt(run) == "word" + " word" * 22  # and the <|endoftext|> before it
    fixed = "Hello, I'm a language model, and I know what I said"
    corpus.unlink()
    (tmp_path / "hugging-face").mkdir()
    (tmp_path / "hugging-face" / "config.json").write_text('{"model_type": "gpt2"}')
    for source in (run, "gpt2", str(tmp_path / "hugging-face"), str(tmp_path / "model.bin")):
        assert plots.default_prompt(source) == fixed


# -----------------------------------------------------------------------------
# the command line

def test_the_command_line_draws_in_a_new_process(run_dir):
    done = subprocess.run([sys.executable, os.path.join(ROOT, "plots.py"), str(run_dir)], capture_output=True, text=True,
                          timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"wrote {run_dir}/loss.png\n", "")


@pytest.fixture
def run_plots(monkeypatch, capsys):
    """Function of plots.py's arguments that runs its main; (exit status, what it printed, its errors)."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["plots.py", *map(str, arguments)])
        try:
            run_main(plots.main)
            status = 0
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()
    return run


def test_several_runs_go_into_one_picture_with_a_name(run_dir, tmp_path, run_plots):
    out = tmp_path / "both.png"
    assert run_plots(run_dir, run_dir, "--out", out) == (0, f"wrote {out}\n", "")
    assert colors(out)[BLUE] > 50
    assert run_plots(run_dir, run_dir) == (2, "", "error: got 2 sources; name their common picture with --out FILE.png\n")


def test_errors_of_the_command_line_are_one_line(run_dir, tmp_path, run_plots):
    status, _, error = run_plots(tmp_path)
    assert status == 2 and error == f"error: {tmp_path} has no log.txt; give a run folder, log/<exp-name>\n"
    status, _, error = run_plots(run_dir, "--output", "x.png")
    assert (status, error) == (2, "error: unknown flag --output: did you mean --out?; --help lists what is allowed\n")
    status, _, error = run_plots(run_dir, "--by", "hours")  # no config.json, no speeds
    assert status == 2 and "--by hours needs total_batch_size and tok_per_sec" in error and error.count("\n") == 1
    (tmp_path / "log.txt").write_text("")
    assert run_plots(tmp_path) == (2, "", f"error: {tmp_path}/log.txt has no values yet; draw the run after its first step\n")
    (run_dir / "config.json").write_text("{")
    status, _, error = run_plots(run_dir)
    assert status == 2 and "config.json is not the config.json of a run" in error and error.count("\n") == 1


def test_weights_writes_a_picture_of_each_kind_and_block(model, tmp_path, run_plots):
    run = save_run(tmp_path / "run", model)
    names = ["wpe.png", "c_attn.png", "norms.png", "attention_0.png", "attention_1.png"]
    expected = "".join(f"wrote {tmp_path / 'out' / name}\n" for name in names)
    assert run_plots("--weights", run, "--out", tmp_path / "out", "--prompt", "to be or not " * 10) == (0, expected, "")
    assert all(matplotlib.image.imread(str(tmp_path / "out" / name)).std() > 0.05 for name in names)
    assert run_plots("--weights", run)[1] == "".join(f"wrote {run}/{name}\n" for name in names)
    path = os.path.join(run, "model_00001.pt")
    error = f"error: {path} is not a folder; name a folder for the pictures with --out\n"
    assert run_plots("--weights", path) == (2, "", error)
    assert run_plots("--weights", run, run) == (2, "", "error: got 2 sources; --weights takes one\n")


def test_verdict_of_the_command_line(tmp_path, run_plots):
    run = make_run(tmp_path / "a", total_batch_size=524288)
    status, out, _ = run_plots(run, "--verdict")
    assert status == 0 and out.startswith("a is not compared with published runs: the data, unknown, are not known")
    status, out, _ = run_plots(run, "--verdict", "--reference", run)
    assert status == 0 and out.startswith("compared with a: 2 of 2 validations are within its band\n")


def test_reference_is_over_tokens_if_the_batches_differ(tmp_path, run_plots, monkeypatch):
    drawn, figure_of = [], plots.curves_figure
    monkeypatch.setattr(plots, "curves_figure", lambda *args: drawn.append(args) or figure_of(*args))
    for size in (524288, 100):
        assert run_plots(make_run(tmp_path / str(size), total_batch_size=size), "--reference", "edu-lecture-8gpu")[0] == 0
    assert [by for _, by, *_ in drawn] == ["step", "tokens"]


@pytest.mark.parametrize("arguments, words", [
    (["--reference", "nope"], "--reference nope: neither a run folder nor a published curve, which are edu-lecture-1gpu,"),
    (["--reference"], "the data, unknown, are not known to be FineWeb's"),
    (["--reference", "edu-lecture-8gpu", "--by", "hours"], "the hours of --reference's curves are not known"),
    (["--verdict", "--out", "a.png"], "--verdict prints text")])
def test_flags_that_do_not_go_together_are_one_line(tmp_path, run_plots, arguments, words):
    run = make_run(tmp_path / "a")
    status, out, error = run_plots(run, *arguments)
    assert status == 2 and out == "" and words in error and error.count("\n") == 1
    assert sorted(os.listdir(run)) == ["config.json", "log.txt"]
