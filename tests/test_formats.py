"""
Other projects' checkpoints, written here as those projects write them (their documented layouts, spelled out again), read
and converted by ours; files that lie, are cut, or hold code; the command line of checkpoint.py.

    .venv/bin/python -m pytest tests/test_formats.py

Needs nothing but requirements-dev.txt.
"""
import os
import pickle
import struct
import subprocess
import sys
from dataclasses import make_dataclass

import numpy as np
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import checkpoint
import config
import formats
import train_gpt2
from model import GPT, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=61)


def make_model(**changes):
    """A GPT in which every tensor is random, norms and biases too."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def logits_of(model):
    idx = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(idx, idx)[0]


def check_same(model, other):
    assert other.config == model.config and not other.training
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert other.transformer.wte.weight is other.lm_head.weight
    assert torch.equal(logits_of(model), logits_of(other))


# -----------------------------------------------------------------------------
# build-nanogpt

def save_with_config(contents, path, monkeypatch, name="train_gpt2.GPTConfig", write=torch.save, **fields):
    """Writes contents with "config": a pickled object of a class that a script defines under that name."""
    module, name = name.split(".")
    cls = make_dataclass(name, [*SIZES])
    cls.__module__ = module
    monkeypatch.setattr(sys.modules[module], name, cls, raising=False)
    write({"config": cls(**{**SIZES, **fields}), **contents}, path)
    monkeypatch.undo()


@pytest.mark.parametrize("module", ["__main__", "train_gpt2"])
@pytest.mark.parametrize("zipped", [True, False])
def test_build_nanogpts_checkpoint_loads_with_its_pickled_config(tmp_path, monkeypatch, module, zipped):
    model, path = make_model(), str(tmp_path / "model_19072.pt")
    weights = {**model.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12).tril()}
    save_with_config({"model": weights, "step": 19072, "val_loss": 3.07}, path, monkeypatch, f"{module}.GPTConfig",
                     lambda contents, path: torch.save(contents, path, _use_new_zipfile_serialization=zipped))
    loaded, info = checkpoint.load_model(path)
    check_same(model, loaded)
    assert info == {"path": path, "step": 19072, "val_loss": 3.07}


class Run:
    """What runs when it is unpickled: it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda contents, path: path.write_bytes(pickle.dumps(contents, 2))])
@pytest.mark.parametrize("where", ["config", "in the config", "optimizer"])
def test_code_beside_or_in_the_pickled_config_is_refused_and_does_not_run(tmp_path, monkeypatch, where, write):
    path, ran = tmp_path / "model_00001.pt", str(tmp_path / "ran")
    contents = {"model": {}, **({} if where == "in the config" else {where: Run(ran)})}
    save_with_config(contents, path, monkeypatch, write=write, n_layer=Run(ran) if where == "in the config" else 2)
    with pytest.raises(ValueError, match="model_00001.pt.*(could run code|no checkpoint)"):
        checkpoint.load_model(str(path))
    assert not os.path.exists(ran)


def test_another_pickled_class_is_refused_and_the_door_is_shut_again(tmp_path, monkeypatch):
    path = str(tmp_path / "model_00001.pt")
    contents = {"model": make_model().state_dict()}
    save_with_config(contents, path, monkeypatch, "train_gpt2.OtherConfig")
    with pytest.raises(ValueError, match="could run code"):
        checkpoint.load_model(path)
    save_with_config(contents, path, monkeypatch)
    checkpoint.load_model(path)
    with pytest.raises(ValueError, match="could run code"):  # elsewhere, a resumed run say, not even that class
        checkpoint.load_file(path)


# -----------------------------------------------------------------------------
# nanoGPT

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_nanogpts_checkpoint_loads(tmp_path, bias, prefix):
    model, path = make_model(bias=bias, dropout=0.2), str(tmp_path / "ckpt.pt")
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    weights[f"{prefix}transformer.h.1.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "iter_num": 7, "best_val_loss": torch.tensor(2.5),
                "model_args": {**SIZES, "bias": bias, "dropout": 0.2}, "config": {"out_dir": "out"}}, path)
    loaded, info = checkpoint.load_model(path)
    check_same(model, loaded)
    assert info == {"path": path, "step": 7, "val_loss": 2.5}


@pytest.mark.parametrize("change, words", [
    ({"rope": True}, "ckpt.pt is not a GPTConfig's.*rope"), ({"n_layer": "2"}, "n_layer='2'"), ({"n_head": 3}, "n_head=3"),
    ({"n_embd": None}, "n_embd=None"), ({"block_size": 13}, r"wpe.weight \(12, 16\) for \(13, 16\)"),
])
def test_a_config_that_is_none_or_does_not_fit_is_named(tmp_path, change, words):
    path = str(tmp_path / "ckpt.pt")
    torch.save({"model": make_model().state_dict(), "model_args": {**SIZES, **change}}, path)
    with pytest.raises(ValueError, match=words):
        checkpoint.load_model(path)


@pytest.mark.parametrize("contents, words", [
    ({"model": {}, "model_args": {"n_layer": 2}}, "lacks n_head"), ({"model": [1], "model_args": SIZES}, "no state dict"),
    ({"transformer.wte.weight": torch.zeros(2)}, "no model checkpoint"), (torch.zeros(3), "no model checkpoint"),
])
def test_a_file_that_holds_no_model_is_named(tmp_path, contents, words):
    path = str(tmp_path / "a.pt")
    torch.save(contents, path)
    with pytest.raises(ValueError, match=f"a.pt.*{words}|{words}"):
        checkpoint.load_model(path)


def test_an_lm_head_of_its_own_is_refused(tmp_path):
    weights = {**make_model().state_dict(), "lm_head.weight": torch.zeros(61, 16)}
    torch.save({"model": weights, "model_args": SIZES}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt: lm_head.weight and wte.weight differ"):
        checkpoint.load_model(str(tmp_path / "ckpt.pt"))


# -----------------------------------------------------------------------------
# llm.c

def llmc_bytes(model, version, rows):
    """A model_*.bin spelled out: the header, then each tensor as the issue of the format lists them."""
    config = model.config
    out = struct.pack("<256i", *[20240326, version, config.block_size, config.vocab_size, config.n_layer, config.n_head,
                                 config.n_embd, rows], *[0] * 248)
    h = model.transformer.h
    padding = torch.full((rows - config.vocab_size, config.n_embd), 9.0)  # never to be looked at
    tensors = [model.transformer.wte.weight, padding, model.transformer.wpe.weight]
    for kind in (lambda b: b.ln_1, lambda b: b.attn.c_attn, lambda b: b.attn.c_proj, lambda b: b.ln_2, lambda b: b.mlp.c_fc,
                 lambda b: b.mlp.c_proj):
        tensors += [kind(block).weight for block in h] + [kind(block).bias for block in h]
    tensors += [model.transformer.ln_f.weight, model.transformer.ln_f.bias]
    for tensor in tensors:
        array = tensor.detach().numpy()
        if version == 3:
            out += array.astype("<f4").tobytes()
        else:  # bfloat16 is the upper half of a float32; these numbers fit in it
            out += (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return out


def bfloat16_model():
    model = make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


@pytest.mark.parametrize("version, dtype", [(3, "float32"), (5, "bfloat16")])
def test_llmcs_file_is_read_and_written_as_it_is_laid_out(tmp_path, version, dtype):
    model, path = bfloat16_model(), tmp_path / "model_00010.bin"
    path.write_bytes(llmc_bytes(model, version, 128))
    check_same(model, checkpoint.load_model(str(path))[0])
    checkpoint.save_file(model, str(tmp_path / "ours.bin"), lambda model, f: formats.write_llmc(model, f, dtype))
    ours = (tmp_path / "ours.bin").read_bytes()
    size = 4 if version == 3 else 2
    begin, end = 1024 + 61 * 16 * size, 1024 + 128 * 16 * size
    theirs = llmc_bytes(model, version, 128)
    assert ours[:begin] == theirs[:begin] and ours[end:] == theirs[end:] and set(ours[begin:end]) == {0}


def test_a_padded_vocabulary_goes_to_llmc_cut_to_gpt2s(tmp_path):
    model, path = make_model(vocab_size=50304, n_embd=4), str(tmp_path / "model.bin")
    checkpoint.save_file(model, path, formats.write_llmc)
    assert np.fromfile(path, "<i4", 8).tolist() == [20240326, 3, 12, 50257, 2, 2, 4, 50304]
    loaded, _ = checkpoint.load_model(path)
    assert loaded.config.vocab_size == 50257
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight[:50257])


def test_a_model_without_biases_goes_to_llmc_with_zeros(tmp_path):
    model, path = make_model(bias=False), str(tmp_path / "model.bin")
    checkpoint.save_file(model, path, formats.write_llmc)
    assert torch.equal(logits_of(checkpoint.load_model(path)[0]), logits_of(model))


@pytest.mark.parametrize("where, value, words", [
    (0, 20240520, "no model of llm.c.*20240520"), (1, 1, "version 1"), (2, 13, "its header"), (4, -1, "n_layer=-1"),
    (4, 2**31 - 1, "its header"), (5, 3, "n_head=3"), (7, 60, "padded_vocab_size 60"),
])
def test_a_header_of_llmc_that_lies_is_named(tmp_path, where, value, words):
    path = tmp_path / "model.bin"
    contents = bytearray(llmc_bytes(make_model(), 3, 128))
    contents[4 * where:4 * where + 4] = struct.pack("<i", value)
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"model.bin.*{words}"):
        checkpoint.load_model(str(path))


@pytest.mark.parametrize("length", [0, 3, 100, 1024, -1])
def test_a_cut_file_of_llmc_is_named(tmp_path, length):
    path = tmp_path / "model.bin"
    path.write_bytes(llmc_bytes(make_model(), 3, 128)[:length])
    with pytest.raises(ValueError, match="model.bin"):
        checkpoint.load_model(str(path))


# -----------------------------------------------------------------------------
# fine-tuning from any of them

def test_init_from_takes_over_the_shape_crops_the_context_and_keeps_no_bias(tmp_path):
    model, path = make_model(bias=False, vocab_size=64), str(tmp_path / "ckpt.pt")
    torch.save({"model": model.state_dict(), "model_args": {**SIZES, "vocab_size": 64, "bias": False, "dropout": 0.0}}, path)
    given = {"init_from": path, "block_size": 8, "dropout": 0.1, "log_dir": str(tmp_path), "total_batch_size": 64}
    made, _ = config.make_config(given)
    assert (made.n_layer, made.n_embd, made.vocab_size, made.block_size) == (2, 16, 64, 8)
    built = train_gpt2.build_model(made, None, "cpu")
    assert built.training and built.config == GPTConfig(**{**SIZES, "vocab_size": 64, "block_size": 8}, bias=False, dropout=0.1)
    assert torch.equal(built.transformer.wpe.weight, model.transformer.wpe.weight[:8])
    assert built.transformer.wpe.weight.requires_grad and built.transformer.drop.p == 0.1
    built.eval()
    idx = torch.arange(8)[None]
    assert torch.equal(built(idx, idx)[0], model(idx, idx)[0])


def test_init_from_refuses_a_longer_context_and_another_shape(tmp_path):
    path = str(tmp_path / "ckpt.pt")
    torch.save({"model": make_model().state_dict(), "model_args": SIZES}, path)
    with pytest.raises(ValueError, match="--block-size 13 is over the 12 positions"):
        config.shape_of_weights({"init_from": path, "block_size": 13})
    with pytest.raises(ValueError, match="n_layer=2"):
        config.shape_of_weights({"init_from": path, "n_layer": 3})
    with pytest.raises(ValueError, match="block_size 13 is over the 12"):
        checkpoint.load_model(path, block_size=13)


# -----------------------------------------------------------------------------
# the command line

def run(monkeypatch, capsys, *arguments):
    """What checkpoint.py prints for its arguments."""
    monkeypatch.setattr(sys, "argv", ["checkpoint.py", *map(str, arguments)])
    checkpoint.main()
    return capsys.readouterr().out


def test_convert_goes_round_all_formats_and_loses_nothing(tmp_path, monkeypatch, capsys):
    model = make_model(vocab_size=50257, n_embd=4)
    (tmp_path / "log").mkdir()
    checkpoint.save(str(tmp_path / "log"), 30, {"model": model.state_dict(), "config": vars(model.config), "val_loss": 2.5}, {})
    chain = [tmp_path / name for name in ("log", "a.bin", "hf", "b.pt", "hf2", "c.bin", "d.pt")]
    for source, out in zip(chain, chain[1:]):
        assert f"wrote {out}" in run(monkeypatch, capsys, "convert", source, out)
        check_same(model, checkpoint.load_model(str(out))[0])
    run(monkeypatch, capsys, "convert", tmp_path / "log", tmp_path / "e.pt")
    assert checkpoint.load_model(str(tmp_path / "e.pt"))[1] == {"path": str(tmp_path / "e.pt"), "step": 30, "val_loss": 2.5}
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_info_tells_what_each_file_is(tmp_path, monkeypatch, capsys):
    model = make_model(bias=False, vocab_size=65)
    torch.save({"model": model.state_dict(), "model_args": {**SIZES, "vocab_size": 65, "bias": False, "dropout": 0.0},
                "iter_num": 7, "best_val_loss": 2.5}, tmp_path / "ckpt.pt")
    out = run(monkeypatch, capsys, "info", tmp_path / "ckpt.pt")
    for words in ("nanoGPT", "2 layers, 2 heads, 16 channels, context 12, without biases", f"{model.num_params():,}, float32",
                  "65 (not GPT-2's)", "step        7", "val loss    2.5"):
        assert words in out
    (tmp_path / "model.bin").write_bytes(llmc_bytes(make_model(), 5, 128))
    out = run(monkeypatch, capsys, "info", tmp_path / "model.bin")
    assert "llm.c" in out and "bfloat16" in out and "with biases" in out and "step" not in out
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=50257)).save_pretrained(tmp_path / "hf")
    out = run(monkeypatch, capsys, "info", tmp_path / "hf")
    assert "Hugging Face" in out and "50257 (GPT-2's)" in out


def test_what_is_there_is_not_overwritten_unless_told(tmp_path, monkeypatch, capsys):
    first, second = make_model(), make_model(n_embd=4, vocab_size=50257)
    for name, model in (("first.pt", first), ("second.pt", second)):
        checkpoint.save_file({"model": model.state_dict(), "config": vars(model.config)}, str(tmp_path / name))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    for out in ("first.pt", "hf"):
        with pytest.raises(ValueError, match=f"{out} is there already; --overwrite"):
            run(monkeypatch, capsys, "convert", tmp_path / "second.pt", tmp_path / out)
    for out in ("first.pt", "hf"):
        run(monkeypatch, capsys, "convert", tmp_path / "second.pt", tmp_path / out, "--overwrite")
        check_same(second, checkpoint.load_model(str(tmp_path / out))[0])
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"
    checkpoint.save(str(tmp_path), 1, {"model": second.state_dict(), "config": vars(second.config)}, {})
    with pytest.raises(ValueError, match="is a run folder"):
        run(monkeypatch, capsys, "export", tmp_path / "second.pt", tmp_path, "--overwrite")


def test_convert_refuses_what_it_cannot_write_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    checkpoint.save_file({"model": make_model().state_dict(), "config": SIZES}, str(tmp_path / "a.pt"))
    for arguments, words in ((("b.safetensors",), "give a folder"), (("b.pt", "--dtype", "bfloat16"), "our own files"),
                             (("hf",), "vocabulary of 61, GPT-2's is 50257")):
        with pytest.raises(ValueError, match=words):
            run(monkeypatch, capsys, "convert", tmp_path / "a.pt", tmp_path / arguments[0], *arguments[1:])
    assert os.listdir(tmp_path) == ["a.pt"]


def test_a_damaged_or_foreign_file_is_one_line_on_the_command_line(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    done = subprocess.run([sys.executable, "checkpoint.py", "info", str(tmp_path / "notes.txt")], cwd=ROOT, capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "notes.txt" in done.stderr and done.stderr.count("\n") == 1
