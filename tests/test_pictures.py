"""
The pictures of weights show the weights, and the attention in them is the attention that forward computes.

    ./test.sh tests/test_pictures.py     # no network, no GPU
"""
import sys

import matplotlib.image
import numpy as np
import pytest
import torch

import pictures
from checkpoint import save_file
from data import get_tokenizer
from model import GPT, GPTConfig

PROMPT = "The king and his queen"


@pytest.fixture(scope="module")
def model():
    """A small GPT whose attention is far from even."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=16, vocab_size=50304, n_layer=2, n_head=3, n_embd=12)).eval()
    for block in model.transformer.h:
        block.attn.c_attn.weight.data *= 40
    return model


def test_attention_weights_are_those_that_forward_mixes_values_with(model):
    idx = torch.tensor(get_tokenizer().encode_ordinary(PROMPT))
    seen, attn = {}, model.transformer.h[1].attn
    handle = attn.register_forward_hook(lambda module, args, out: seen.update(x=args[0], y=out))
    with torch.no_grad():
        model(idx[None, :])
    handle.remove()
    weights = pictures.attention_weights(model, idx, 1)
    assert weights.shape == (3, len(idx), len(idx)) and weights.std() > 0.1
    assert torch.equal(weights, weights.tril()) and torch.allclose(weights.sum(dim=-1), torch.ones(3, len(idx)))
    v = attn.c_attn(seen["x"])[0, :, 24:].view(len(idx), 3, 4).transpose(0, 1)        # (nh, T, hs)
    y = attn.c_proj((weights @ v).transpose(0, 1).reshape(len(idx), 12))
    assert torch.allclose(y, seen["y"] if seen["y"].dim() == 2 else seen["y"][0], atol=1e-5)
    assert not any(block.attn._forward_pre_hooks for block in model.transformer.h)  # nothing is left behind


def test_the_attention_of_each_head_is_drawn_with_the_tokens_beside_it(model):
    figure = pictures.attention_figure(model, PROMPT, layer=1)
    weights = pictures.attention_weights(model, torch.tensor(get_tokenizer().encode_ordinary(PROMPT)), 1)
    assert len(figure.axes) == 3
    for head, panel in enumerate(figure.axes):
        assert np.array_equal(panel.images[0].get_array(), weights[head])
        assert [label.get_text() for label in panel.get_xticklabels()] == ["The", " king", " and", " his", " queen"]


def test_wpe_and_c_attn_are_drawn_as_they_are(model):
    figure = pictures.wpe_figure(model, columns=(0.5, 0.99))
    heat_map, columns = figure.axes[:2]
    wpe = model.transformer.wpe.weight.detach().numpy()
    assert np.array_equal(heat_map.images[0].get_array(), wpe)
    assert [line.get_label() for line in columns.lines] == ["channel 6", "channel 11"]
    assert np.array_equal(columns.lines[1].get_ydata(), wpe[:, 11])
    image = pictures.c_attn_figure(model, layer=1, size=20).axes[0].images[0]
    # laid out (in, out), as OpenAI's files have it
    theirs = model.hf_state_dict()["transformer.h.1.attn.c_attn.weight"]
    assert np.array_equal(image.get_array(), theirs[:20, :20]) and image.get_array().shape == (12, 20)


def test_the_padding_of_the_vocabulary_is_told_apart(model):
    tokens, positions = pictures.norms_figure(model).axes
    norms = model.transformer.wte.weight.detach().norm(dim=1)
    assert np.allclose(tokens.lines[0].get_ydata(), norms[:50257]) and np.allclose(tokens.lines[1].get_ydata(), norms[50257:])
    assert len(positions.lines[0].get_ydata()) == 16


def test_the_command_line_writes_a_picture_of_each_kind_and_block(model, tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "model_00001.pt")
    save_file({"model": model.state_dict(), "config": vars(model.config), "step": 1, "val_loss": None}, path)
    names = ["wpe.png", "c_attn.png", "norms.png", "attention_0.png", "attention_1.png"]
    monkeypatch.setattr(sys, "argv", ["pictures.py", path, "--out", str(tmp_path / "out"), "--prompt", "to be or not " * 10])
    pictures.main()
    assert capsys.readouterr().out == "".join(f"wrote {tmp_path / 'out' / name}\n" for name in names)
    assert all(matplotlib.image.imread(str(tmp_path / "out" / name)).std() > 0.05 for name in names)
    monkeypatch.setattr(sys, "argv", ["pictures.py", path])
    with pytest.raises(ValueError, match="is no folder: say with --out"):
        pictures.main()
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path)])
    monkeypatch.setattr(pictures, "write_figure", lambda figure, path: path)
    pictures.main()  # into the run's own folder
    assert capsys.readouterr().out == "".join(f"wrote {tmp_path / name}\n" for name in names)
