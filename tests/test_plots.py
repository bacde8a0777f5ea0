"""
Curves show the run at every length; the pictures of weights show the weights, and the attention
that forward computes.

    ./test.sh tests/test_plots.py     # no network, no GPU
"""
import functools
import json
import math
import os

import matplotlib.image
import numpy as np
import pytest
import torch

import plots
from convert import hf_state_dict
from data import get_tokenizer
from model import GPT, SIZES, GPTConfig
from plots import curves_figure, plot_run, short_count, size_of, smooth
from run.checkpoint import save_file
from run.reference import published


def write_log(folder, **streams):
    """Writes log.txt, of streams as {step: value}, and returns its text."""
    lines = [f"{step} {stream} {value}\n" for stream, points in streams.items()
             for step, value in points.items()]
    (folder / "log.txt").write_text("".join(lines))
    return "".join(lines)


@pytest.fixture
def run_dir(tmp_path):
    """A run folder without a config.json, with HellaSwag."""
    folder = tmp_path / "my-run"
    folder.mkdir()
    write_log(folder, train={step: 10 - step / 20 for step in range(100)},
              lr=dict.fromkeys(range(100), 6e-4), val={0: 10.5, 50: 8.0, 100: 5.5},
              hella={0: 0.25, 50: 0.275, 100: 0.3})
    return folder


def test_smooth_is_a_centered_mean_that_starts_at_the_first_value():
    assert smooth([1, 2, 3, 4], 1).tolist() == [1, 2, 3, 3.5]
    assert smooth([5.0, 1.0], 0).tolist() == [5.0, 1.0]
    values = np.random.default_rng(0).normal(size=200)
    want = [np.mean(values[i - min(i, 6):i + min(i, 6) + 1]) for i in range(200)]
    assert np.allclose(smooth(values, 6), want)


def test_large_numbers_are_short():
    """999,999 was 1e+03K."""
    numbers = (0, 0.5, 999, 1024, -2500, 19073, 999_999, 2.5e9, 3e12)
    assert [short_count(n) for n in numbers] == ["0", "0.5", "999", "1.02K", "-2.5K", "19.1K",
                                                 "1M", "2.5B", "3T"]


def colors(path):
    """{(r, g, b): pixels} of a picture, 8 bits each."""
    pixels = (matplotlib.image.imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    found, counts = np.unique(pixels, axis=0, return_counts=True)
    return {tuple(color): count for color, count in zip(found.tolist(), counts.tolist())}


# tab:blue (train), tab:orange (val), tab:red (GPT-2)
BLUE, ORANGE, RED = (31, 119, 180), (255, 127, 14), (214, 39, 40)


def test_a_picture_shows_train_and_val_and_hellaswag_only_where_there_is_some(run_dir):
    path = plot_run(str(run_dir))
    assert path == str(run_dir / "loss.png")
    seen = colors(path)
    assert seen[BLUE] > 50 and seen[ORANGE] > 50 and RED in seen
    width = matplotlib.image.imread(path).shape[1]
    lines = (run_dir / "log.txt").read_text().splitlines(True)
    (run_dir / "log.txt").write_text("".join(line for line in lines if "hella" not in line))
    plot_run(str(run_dir))
    seen = colors(path)
    assert seen[BLUE] > 50 and seen[ORANGE] > 50 and RED not in seen
    assert matplotlib.image.imread(path).shape[1] < width
    assert RED in colors(plot_run(str(run_dir), baselines=True))
    assert sorted(os.listdir(run_dir)) == ["log.txt", "loss.png"]


# -----------------------------------------------------------------------------
# the contents of a figure of curves, read from its lines

def make_run(folder, n_layer=12, n_embd=768, total_batch_size=100, **streams):
    """A run folder with config.json and a log of three steps; further streams as {step: value}."""
    os.makedirs(folder)
    defaults = {"train": {0: 9.0, 1: 8.0, 2: 7.0}, "val": {0: 9.5, 3: 6.5},
                "lr": {0: 0.1, 1: 0.2, 2: 0.3}, "tok_per_sec": {0: 10.0, 1: 20.0, 2: 5.0}}
    write_log(folder, **{**defaults, **streams})
    settings = {"n_layer": n_layer, "n_embd": n_embd, "total_batch_size": total_batch_size}
    (folder / "config.json").write_text(json.dumps({"config": settings}))
    return str(folder)


def lines_of(figure, panel=0):
    """[(label, x, y)] of the lines in a panel."""
    return [(line.get_label(), np.asarray(line.get_xdata()).tolist(),
             np.asarray(line.get_ydata()).tolist()) for line in figure.axes[panel].lines]


def legend_of(figure, panel=0):
    return [text.get_text() for text in figure.axes[panel].get_legend().get_texts()]


def texts_of(figure, panel):
    """The texts in and beside a panel."""
    return " | ".join(text.get_text() for text in figure.axes[panel].texts)


def levels_of(figure, panel):
    """Heights of the horizontal lines in a panel, the published results."""
    return sorted(y[0] for _, x, y in lines_of(figure, panel) if x == [0, 1] and y[0] == y[1])


@pytest.mark.parametrize("by, train_x, val_x", [
    ("step", [0, 1, 2], [0, 3]), ("tokens", [0, 100, 200], [0, 300]),
    ("hours", [0, 10 / 3600, 15 / 3600], [0, 35 / 3600])])
def test_by_is_the_unit_of_every_curve(tmp_path, by, train_x, val_x):
    figure = curves_figure([make_run(tmp_path / "a")], by)
    drawn = {label.split(" (")[0]: x for label, x, _ in lines_of(figure)}
    assert drawn["train, every step"] == pytest.approx(train_x)
    assert drawn["val"] == pytest.approx(val_x)
    assert lines_of(figure, 1)[0][1] == pytest.approx(train_x)  # the learning rate's
    assert by in figure.axes[0].get_xlabel()


def test_several_runs_have_distinct_names(tmp_path):
    runs = [make_run(tmp_path / "old" / "a"), make_run(tmp_path / "b", val={0: 9.0, 3: 5.25})]
    assert legend_of(curves_figure(runs)) == ["a (last 6.500)", "b (last 5.250)"]
    runs.append(make_run(tmp_path / "new" / "a"))
    assert legend_of(curves_figure(runs)) == [f"{runs[0]} (last 6.500)", f"{runs[1]} (last 5.250)",
                                              f"{runs[2]} (last 6.500)"]


@pytest.mark.parametrize("size, name", [
    ("gpt2", "124M"), ("gpt2-medium", "350M"), ("gpt2-large", "774M"), ("gpt2-xl", "1558M"),
    ("gpt3-small", "124M"), ("gpt3-medium", "350M"), ("gpt3-large", "774M"), ("gpt3-xl", "1558M")])
def test_a_run_is_compared_with_models_of_its_size(size, name):
    n_layer, _, n_embd, _ = SIZES[size]
    assert size_of({"n_layer": n_layer, "n_embd": n_embd}) == name
    assert size_of({}) == "124M"


def test_hellaswag_is_beside_gpt2_and_gpt3_of_the_runs_sizes(tmp_path):
    small = make_run(tmp_path / "small", hella={0: 0.25, 3: 0.3}, hella_lm_eval={0: 0.25, 3: 0.31})
    large = make_run(tmp_path / "large", n_layer=24, n_embd=1024, hella={0: 0.25, 3: 0.40})
    figure = curves_figure([small])
    assert levels_of(figure, 1) == [0.25, 0.2955, 0.3114, 0.337]
    assert legend_of(figure, 1) == ["completion (last 0.3000)", "lm-eval (last 0.3100)"]
    assert levels_of(curves_figure([large]), 1) == [0.25, 0.3752, 0.436]
    both = curves_figure([small, large])
    assert levels_of(both, 1) == [0.25, 0.2955, 0.337, 0.3752, 0.436]  # completion style only
    assert legend_of(both, 1) == ["small (last 0.3000)", "large (last 0.4000)"]
    texts = texts_of(both, 1)
    assert "GPT-3 125M\n0.337" in texts and "GPT-3 350M\n0.436" in texts
    assert "GPT-2 124M, completion\n0.2955" in texts


def test_the_loss_of_gpt2_is_drawn_for_the_corpus_it_was_measured_on(tmp_path):
    small = make_run(tmp_path / "s", val_bpb={0: 3.0, 3: 1.25})
    large = make_run(tmp_path / "l", n_layer=24, n_embd=1024)
    for runs, baselines, levels in (
            ([small], None, []), ([small], "edu", [3.2924]), ([small], "fineweb", [3.425]),
            ([small, large], "fineweb", [3.0831, 3.425]), ([large], "edu", [])):  # not published
        assert levels_of(curves_figure(runs, baselines=baselines), 0) == levels
    assert "val (last 6.500, 1.250 bits per byte)" in legend_of(curves_figure([small]))


def noisy_fall(steps):
    """A training loss that falls from 11 to 3 within the first steps, with some noise."""
    noise = np.random.default_rng(0).normal(scale=0.1, size=steps)
    noise[0] = 0
    return {step: 3.0 + 8.0 * 0.7 ** step + noise[step] for step in range(steps)}


@pytest.mark.parametrize("steps", [1, 2, 100])
def test_a_short_run_is_drawn_whole_and_without_smoothing(tmp_path, steps):
    """The curve of a short run was once drawn as a "running mean" over one or two steps."""
    fall = noisy_fall(steps)
    run = make_run(tmp_path / "a", train=fall, norm=fall, val={0: 11.2, steps: 3.0})
    figure = curves_figure([run])
    lines = lines_of(figure)
    labels = [f"train, every step (last {fall[steps - 1]:.3f})", "val (last 3.000)"]
    assert [label for label, *_ in lines] == labels
    assert lines[0][1:] == ([*fall], [*fall.values()])
    assert lines_of(figure, 2)[0][2] == [*fall.values()]
    low, high = figure.axes[0].get_ylim()
    assert low < min(3.0, *fall.values()) and high > 11.2 and texts_of(figure, 0) == ""
    if steps <= 2:  # the line of a single point is invisible without a marker
        assert figure.axes[0].lines[0].get_marker() == "."
        assert all(tick % 1 == 0 for panel in figure.axes for tick in panel.get_xticks())


@pytest.mark.parametrize("steps, first_val, window, cut", [
    (600, 100, 13, True), (600, 400, 13, False), (19000, 250, 381, True)])
def test_a_long_run_has_a_running_mean_and_omits_the_first_fall(
        tmp_path, steps, first_val, window, cut):
    """The loss of step 0 took four fifths of the height of the Shakespeare curve."""
    fall = noisy_fall(steps)
    run = make_run(tmp_path / "a", train=fall, lr=fall, val={0: 11.2, first_val: 3.1, steps: 3.0})
    figure = curves_figure([run])
    raw, mean, _ = lines_of(figure)
    assert raw[2] == [*fall.values()] and mean[2][0] == fall[0]
    assert np.std(mean[2][steps // 2:]) < 0.04
    assert mean[0] == f"train, mean of {window} steps (last {mean[2][-1]:.3f})"
    low, high = figure.axes[0].get_ylim()
    assert low < min(fall.values()) and (high < 4 if cut else high > 11.2)
    assert texts_of(figure, 0) == ("↑ from 11.20" if cut else "")
    # the learning rate is not noisy
    assert [line[2] for line in lines_of(figure, 1)] == [[*fall.values()]]


@pytest.mark.filterwarnings("error::RuntimeWarning")
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_non_finite_norms_of_a_float16_run_are_skipped(tmp_path, value):
    """An infinite norm once made the axis limits and every later mean invalid."""
    norms = {step: value if step % 10 == 0 else 1.0 for step in range(300)}
    figure = curves_figure([make_run(tmp_path / "a", norm=norms)])
    raw, mean = lines_of(figure, 2)
    assert len(raw[1]) == 270 and mean[2] == pytest.approx([1.0] * 270)
    assert figure.axes[2].get_ylim() == (0, pytest.approx(1.15))
    assert figure.axes[2].get_title() == "gradient norm (median 1)"
    # no panel without a value
    assert len(curves_figure([make_run(tmp_path / "b", norm={0: value})]).axes) == 3


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", ["$x_{ $", "_hidden", "模型"])
def test_every_name_of_a_run_is_drawn_as_it_is(tmp_path, name):
    """"$x_{ $" was parsed as mathematics, which failed; "_a" had no entry in the legend."""
    figure = curves_figure([make_run(tmp_path / name), make_run(tmp_path / "b")])
    figure.set_dpi(40)
    plots.write_figure(figure, str(tmp_path / "a.png"))
    texts = figure.axes[0].get_legend().get_texts()
    entries = [text._preprocess_math(text.get_text()) for text in texts]
    assert len(entries) == 2 and not any(is_math for _, is_math in entries)
    assert entries[0][0].strip() == f"{name} (last 6.500)"


def test_a_picture_that_cannot_be_drawn_or_written_fails_no_run(run_dir, monkeypatch):
    (run_dir / "loss.png").mkdir()
    assert plot_run(str(run_dir)).startswith("not drawn, IsADirectoryError: ")
    (run_dir / "log.txt").write_text("a note\n")
    assert plot_run(str(run_dir)).startswith("not drawn, ValueError: ")

    def fail(*_, **__):
        raise RuntimeError("In FT2Font: could not load glyph")
    monkeypatch.setattr(plots, "curves_figure", fail)
    assert plot_run(str(run_dir)) == "not drawn, RuntimeError: In FT2Font: could not load glyph"


def test_a_published_curve_is_drawn_up_to_the_end_of_the_run(tmp_path):
    run = make_run(tmp_path / "a", total_batch_size=524288, val={0: 10.9, 500: 5.3},
                   hella={0: 0.25, 500: 0.25})
    for by, factor in (("step", 1), ("tokens", 524288)):
        figure = curves_figure([run], by, None, published("edu-lecture-2xh800"))
        x, y = [0, 250 * factor, 500 * factor], [10.9514, 6.1443, 5.2742]
        assert lines_of(figure)[0] == ("edu-lecture-2xh800 (last 5.274)", x, y)
        assert lines_of(figure, 1)[0][0] == "edu-lecture-2xh800 (last 0.2382)"


FINEWEB_EDU = {"n_layer": 12, "n_embd": 768, "total_batch_size": 524288, "val_tokens": 10485760,
               "data": "edu_fineweb10B"}


def make_fineweb_edu_run(folder, **streams):
    """A run folder with the settings of gpt2-124M on FineWeb-Edu."""
    run = make_run(folder, **streams)
    (folder / "config.json").write_text(json.dumps({"config": FINEWEB_EDU}))
    return run


def test_the_difference_to_a_published_curve_has_a_panel(tmp_path):
    """A band of 0.01 nats cannot be seen on an axis of 3 nats."""
    curve = published("edu-lecture-2xh800")
    losses = {step: curve.streams["val"][step] for step in (250, 500, 19000)}
    run = make_fineweb_edu_run(
        tmp_path / "a", val={step: loss + 0.2 for step, loss in losses.items()},
        val_655360={0: 10.9, **{step: loss + 0.004 for step, loss in losses.items()}, 300: 6.0})
    for by, factor in (("step", 1), ("tokens", 524288)):
        figure = curves_figure([run], by, None, curve)
        assert "val_655360 (last 6.000)" in legend_of(figure)  # drawn on the curve's tokens
        panel = figure.axes[1]
        assert panel.get_title() == "val_655360 minus edu-lecture-2xh800"
        _, x, y = lines_of(figure, 1)[0]
        assert x == [step * factor for step in losses] and y == pytest.approx([0.004] * 3)
        band = panel.collections[0].get_paths()[0].vertices
        assert abs(band[band[:, 0] == 19000 * factor, 1]) == pytest.approx(0.01)
        low, high = panel.get_ylim()
        assert -0.1 < low < -0.01 and 0.01 < high < 0.1
    # no panel for another corpus, and for the log of an earlier version
    other = make_run(tmp_path / "b", total_batch_size=524288)
    old = make_fineweb_edu_run(tmp_path / "c")
    for run in (other, old):
        panels = curves_figure([run], "step", None, curve).axes
        assert panels[1].get_title() == "learning rate (peak 3.00e-01)"


@pytest.fixture
def drawn(monkeypatch):
    """The arguments of the calls of curves_figure, which draws nothing."""
    calls = []

    def curves_figure(*args):
        calls.append(args)
        return plots.new_figure(1, 1)
    monkeypatch.setattr(plots, "curves_figure", curves_figure)
    return calls


def test_a_finished_run_is_drawn_beside_the_published_curve_that_fits_it(tmp_path, drawn):
    run = make_run(tmp_path / "a", total_batch_size=524288)
    assert plots.fitting_curve(run) is None  # on an unknown corpus
    (tmp_path / "a" / "config.json").write_text(json.dumps({"config": FINEWEB_EDU}))
    assert plot_run(run) == f"{run}/loss.png"
    assert [curve.name for *_, curve in drawn] == ["edu-lecture-2xh100"]


# -----------------------------------------------------------------------------
# the contents of a figure of weights

PROMPT = "The king and his queen"


@pytest.fixture(scope="module")
def model():
    """A small GPT whose attention is far from uniform."""
    torch.manual_seed(0)
    sizes = dict(block_size=32, vocab_size=50304, n_layer=2, n_head=3, n_embd=12)
    model = GPT(GPTConfig(**sizes)).eval()
    for block in model.transformer.h:
        block.attn.c_attn.weight.data *= 40
    return model


def encoded(text):
    """Tokens of a text, (T,) int64."""
    return torch.tensor(get_tokenizer().encode_ordinary(text))


def images_of(figure):
    """[(title, array)] of the images in a figure's panels, without color bars."""
    return [(panel.get_title(), panel.images[0].get_array()) for panel in figure.axes
            if panel.images]


def has_color_bar(figure):
    return any(hasattr(panel, "_colorbar") for panel in figure.axes)


def test_attention_weights_are_those_that_forward_mixes_values_with(model):
    idx = encoded(PROMPT)
    T = len(idx)
    seen, attn = {}, model.transformer.h[1].attn
    handle = attn.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        model(idx[None, :])
    handle.remove()
    weights = plots.attention_weights(model, idx, 1)
    assert weights.shape == (3, T, T) and weights.std() > 0.1
    assert torch.equal(weights, weights.tril())
    assert torch.allclose(weights.sum(dim=-1), torch.ones(3, T))
    v = attn.c_attn(seen["x"])[0, :, 24:].view(T, 3, 4).transpose(0, 1)        # (nh, T, hs)
    y = attn.c_proj((weights @ v).transpose(0, 1).reshape(T, 12))
    assert torch.allclose(y, seen["y"][0], atol=1e-5)


def test_the_attention_of_each_head_is_drawn_with_the_tokens_beside_it(model):
    figure = plots.attention_figure(model, PROMPT, layer=1)
    weights = plots.attention_weights(model, encoded(PROMPT), 1)
    images = images_of(figure)
    assert [title for title, _ in images] == [f"block 1, head {head}" for head in range(3)]
    assert has_color_bar(figure)
    tokens = ["The", " king", " and", " his", " queen"]
    for head, (_, image) in enumerate(images):
        assert np.array_equal(image, weights[head])
        assert [label.get_text() for label in figure.axes[head].get_xticklabels()] == tokens
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == tokens


def test_a_long_prompt_is_cut_to_the_context_and_keeps_legible_labels(model):
    """Prompts of more than 24 tokens once had no labels."""
    panel = plots.attention_figure(model, "to be or\nnot " * 20).axes[0]
    assert panel.images[0].get_array().shape == (32, 32)
    labels = [label.get_text() for label in panel.get_xticklabels()]
    assert labels[:3] == ["to", " or", "not"]
    assert len(labels) == len(panel.get_xticks()) == 16


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
    labels = [line.get_label() for line in columns.lines]
    assert labels == ["channel 2", "channel 3", "channel 4"]
    assert np.array_equal(columns.lines[1].get_ydata(), wpe[:, 3])


def test_the_padding_of_the_vocabulary_is_marked(model):
    tokens, padding = plots.norms_figure(model).axes[0].lines
    norms = model.transformer.wte.weight.detach().norm(dim=1)
    assert np.allclose(tokens.get_ydata(), norms[:50257])
    assert np.allclose(padding.get_ydata(), norms[50257:])
    assert padding.get_xdata()[0] == 50257 and padding.get_label() == "padding"


def save_run(folder, model, **settings):
    """A run folder with a checkpoint of step 1, and settings in its config.json."""
    os.makedirs(folder)
    contents = {"model": model.state_dict(), "config": vars(model.config), "step": 1,
                "val_loss": None}
    save_file(contents, str(folder / "model_00001.pt"))
    save_file({"step": 1}, str(folder / "state_00001.pt"))
    (folder / "config.json").write_text(json.dumps({"config": settings}))
    return str(folder)


def test_the_default_prompt_is_of_the_runs_own_validation_data(model, tmp_path):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Training text only.\n\n" * 20 + "A last line, for validation.")
    run = save_run(tmp_path / "run", model, data=str(corpus))
    for source in (run, os.path.join(run, "model_00001.pt")):
        assert plots.default_prompt(source) == "Training text only.\n\nA last line, for validation."
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

@pytest.fixture
def run_plots(run_script):
    """Function of plots.py's arguments that runs it: (exit status, stdout, stderr)."""
    return functools.partial(run_script, plots)


@pytest.mark.parametrize("name, magic", [("both.png", b"\x89PNG"), ("both.pdf", b"%PDF")])
def test_several_runs_go_into_one_picture_in_the_format_of_its_name(run_dir, tmp_path, run_plots,
                                                                    name, magic):
    out = tmp_path / name
    assert run_plots(run_dir, run_dir, "--out", out) == (0, f"wrote {out}\n", "")
    assert out.read_bytes()[:4] == magic
    assert run_plots(run_dir) == (0, f"wrote {run_dir}/loss.png\n", "")


def test_weights_writes_a_picture_of_each_kind_and_block(model, tmp_path, run_plots, monkeypatch):
    run = save_run(tmp_path / "run", model)
    names = ["wpe.png", "c_attn.png", "norms.png", "attention_0.png", "attention_1.png"]
    out = tmp_path / "out"
    expected = "".join(f"wrote {out / name}\n" for name in names)
    arguments = ["--weights", run, "--out", out, "--prompt", "to be or not " * 10]
    assert run_plots(*arguments) == (0, expected, "")
    assert all(matplotlib.image.imread(str(out / name)).std() > 0.05 for name in names)
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: path)
    assert run_plots("--weights", run)[1] == expected.replace(str(out), run)


def test_reference_is_over_tokens_if_the_batches_differ(tmp_path, run_plots, drawn):
    for size in (524288, 100):
        run = make_run(tmp_path / str(size), total_batch_size=size)
        assert run_plots(run, "--reference", "edu-lecture-2xh100")[0] == 0
    assert [by for _, by, *_ in drawn] == ["step", "tokens"]
    status, out, _ = run_plots(run, "--verdict")
    assert status == 0
    assert out.startswith("100 is not compared with published runs: the data, unknown, are not")


def test_baselines_are_those_of_the_runs_corpus(tmp_path, run_plots, drawn):
    """--baselines drew FineWeb-Edu's line on a Shakespeare run."""
    run, edu = make_run(tmp_path / "a"), make_fineweb_edu_run(tmp_path / "b")
    status, _, err = run_plots(run, "--baselines")
    assert status == 2 and f"--baselines: {run} is not known to be trained on FineWeb-Edu" in err
    assert run_plots(run, "--baselines", "fineweb")[0] == run_plots(edu, "--baselines")[0] == 0
    assert [baselines for _, _, baselines, _ in drawn] == ["fineweb", "edu"]


@pytest.mark.parametrize("flag", ["--reference", "--verdict", "--baselines"])
def test_a_run_that_does_not_exist_is_named(tmp_path, run_plots, flag):
    """--reference said that its data, unknown, are not known to be FineWeb's."""
    status, _, err = run_plots(tmp_path / "none", flag)
    assert status == 2 and err == (f"error: {tmp_path}/none has no log.txt; give a run folder,"
                                   " log/<exp-name>\n")


def test_a_reference_value_above_the_axis_is_shown(tmp_path):
    """The notebook adds one to the panel of the losses, whose axis omits the first fall."""
    panel = plots.new_figure(4, 3).subplots()
    panel.plot([5.0, 4.0])
    panel.set_ylim(4.0, 5.0)
    plots.draw_reference(panel, 6.5, "token frequencies", "tab:red")
    assert panel.get_ylim() == (4.0, 6.5)
