"""
Other projects' formats. Files of build-nanogpt, nanoGPT and llm.c, written here in their documented layouts; wrong, truncated
and malicious ones; the command. Hugging Face folders against transformers' models, tokenizers and pipeline, tiktoken, and the
hashes of OpenAI's vocabulary files; uploads against a small fake Hub.

    .venv/bin/python -m pytest tests/test_convert.py

Needs transformers (requirements-dev.txt); no network is used.
"""
import base64
import functools
import hashlib
import http.server
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import threading
from dataclasses import make_dataclass

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from run import checkpoint
import convert
from run import parallel
from run import settings
import train_gpt2
from run.weights import load_model
from data import EOT, get_tokenizer
from model import GPT, GPTConfig
from run import weights

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SIZES = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, vocab_size=61)
tokenizer_files = functools.cache(convert.tokenizer_files)


@pytest.fixture(autouse=True)
def tokenizer_files_made_once(monkeypatch):
    """Finding the 50,000 merges takes a second or two."""
    monkeypatch.setattr(convert, "tokenizer_files", tokenizer_files)


def make_model(**changes):
    """A GPT whose tensors are all random, norms and biases included."""
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
    """Asserts that other is model, loaded: in eval mode, with the same config, weights, tying and logits."""
    assert other.config == model.config and not other.training
    mine, theirs = model.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert other.transformer.wte.weight is other.lm_head.weight
    assert torch.equal(logits_of(model), logits_of(other))


# -----------------------------------------------------------------------------
# our own files, and sources that hold no model

def save_model(folder, step, model):
    """Writes model as a checkpoint of step, with a validation loss of 3.5."""
    checkpoint.save(str(folder), step, checkpoint.model_contents(model, 3.5), {})


def test_load_model_reads_a_run_folder_and_a_file(tmp_path):
    older, newest = make_model(), make_model(n_layer=1)
    save_model(tmp_path, 99999, older)
    save_model(tmp_path, 100000, newest)
    (tmp_path / "config.json").write_text("{}")  # the run's, not Hugging Face's
    (tmp_path / "log.txt").touch()
    model, info = load_model(str(tmp_path))
    check_same(newest, model)
    assert info == {"path": str(tmp_path / "model_100000.pt"), "step": 100000, "val_loss": 3.5}
    model, info = load_model(str(tmp_path / "model_99999.pt"))
    check_same(older, model)
    assert info["step"] == 99999


def test_a_source_without_a_model_is_an_error_that_says_what_is_allowed(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint at .*nowhere.*gpt2-xl"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        load_model(str(tmp_path))
    save_model(tmp_path, 10, make_model())
    with pytest.raises(ValueError, match="state_00010.pt is not a model checkpoint"):
        load_model(str(tmp_path / "state_00010.pt"))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="model.safetensors lacks its config.json"):
        load_model(str(tmp_path / "model.safetensors"))


def test_block_size_and_dropout_can_be_changed_while_loading(tmp_path):
    model = make_model(bias=False, vocab_size=64)
    save_model(tmp_path, 10, model)
    loaded, _ = load_model(str(tmp_path), block_size=8, dropout=0.1)
    assert loaded.config == GPTConfig(**{**SIZES, "vocab_size": 64, "block_size": 8}, bias=False, dropout=0.1)
    assert torch.equal(loaded.transformer.wpe.weight, model.transformer.wpe.weight[:8])
    assert loaded.transformer.wpe.weight.requires_grad and loaded.transformer.drop.p == 0.1
    idx = torch.arange(8)[None]
    assert torch.equal(loaded(idx, idx)[0], model(idx, idx)[0])
    with pytest.raises(ValueError, match="block_size 13 is over the 12 positions"):
        load_model(str(tmp_path), block_size=13)


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
def test_a_checkpoint_of_build_nanogpt_loads_with_its_pickled_config(tmp_path, monkeypatch, module, zipped):
    model, path = make_model(), str(tmp_path / "model_19072.pt")
    weights = {**model.state_dict(), "transformer.h.0.attn.bias": torch.ones(1, 1, 12, 12).tril()}
    save_with_config({"model": weights, "step": 19072, "val_loss": 3.07}, path, monkeypatch, f"{module}.GPTConfig",
                     lambda contents, path: torch.save(contents, path, _use_new_zipfile_serialization=zipped))
    loaded, info = load_model(path)
    check_same(model, loaded)
    assert info == {"path": path, "step": 19072, "val_loss": 3.07}


class Run:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", [torch.save, lambda contents, path: path.write_bytes(pickle.dumps(contents, 2))])
@pytest.mark.parametrize("where", ["config", "in the config", "optimizer"])
def test_code_in_a_file_is_an_error_and_does_not_run(tmp_path, monkeypatch, where, write):
    path, ran = tmp_path / "model_00001.pt", str(tmp_path / "ran")
    contents = {"model": {}, **({} if where == "in the config" else {where: Run(ran)})}
    save_with_config(contents, path, monkeypatch, write=write, n_layer=Run(ran) if where == "in the config" else 2)
    with pytest.raises(ValueError, match="model_00001.pt.*(could run code|not a checkpoint)"):
        load_model(str(path))
    assert not os.path.exists(ran)


def test_other_pickled_classes_are_an_error_and_the_config_only_loads_in_convert(tmp_path, monkeypatch):
    path = str(tmp_path / "model_00001.pt")
    contents = {"model": make_model().state_dict()}
    save_with_config(contents, path, monkeypatch, "train_gpt2.OtherConfig")
    with pytest.raises(ValueError, match="could run code"):
        load_model(path)
    save_with_config(contents, path, monkeypatch)
    load_model(path)
    with pytest.raises(ValueError, match="could run code"):  # load_file, which a resumed run uses, allows no class
        weights.load_file(path)


# -----------------------------------------------------------------------------
# nanoGPT

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_nanogpt_loads(tmp_path, bias, prefix):
    model, path = make_model(bias=bias, dropout=0.2), str(tmp_path / "ckpt.pt")
    weights = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    weights[f"{prefix}transformer.h.1.attn.bias"] = torch.ones(1, 1, 12, 12).tril()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save({"model": weights, "optimizer": optimizer.state_dict(), "iter_num": 7, "best_val_loss": torch.tensor(2.5),
                "model_args": {**SIZES, "bias": bias, "dropout": 0.2}, "config": {"out_dir": "out"}}, path)
    loaded, info = load_model(path)
    check_same(model, loaded)
    assert info == {"path": path, "step": 7, "val_loss": 2.5}


@pytest.mark.parametrize("change, words", [
    ({"rope": True}, "the config in .*ckpt.pt is not a GPTConfig.*rope"), ({"n_layer": "2"}, "n_layer='2'"),
    ({"n_head": 3}, "n_head=3"), ({"n_embd": None}, "n_embd=None"),
    ({"block_size": 13}, r"wpe.weight \(12, 16\) for \(13, 16\)"),
])
def test_an_invalid_config_or_one_that_does_not_fit_is_an_error(tmp_path, change, words):
    path = str(tmp_path / "ckpt.pt")
    torch.save({"model": make_model().state_dict(), "model_args": {**SIZES, **change}}, path)
    with pytest.raises(ValueError, match=words):
        load_model(path)


@pytest.mark.parametrize("contents, words", [
    ({"model": {}, "model_args": {"n_layer": 2}}, "a.pt lacks n_head"),
    ({"model": [1], "model_args": SIZES}, "a.pt is not a state dict"),
    ({"model": {}, "model_args": SIZES}, "weights of .*a.pt do not fit this model"),
    ({"transformer.wte.weight": torch.zeros(2)}, "a.pt is not a model checkpoint"),
    (torch.zeros(3), "a.pt is not a model checkpoint"),
])
def test_a_file_that_holds_no_model_is_an_error(tmp_path, contents, words):
    path = str(tmp_path / "a.pt")
    torch.save(contents, path)
    with pytest.raises(ValueError, match=words):
        load_model(path)


def test_an_untied_lm_head_is_an_error(tmp_path):
    weights = {**make_model().state_dict(), "lm_head.weight": torch.zeros(61, 16)}
    torch.save({"model": weights, "model_args": SIZES}, tmp_path / "ckpt.pt")
    with pytest.raises(ValueError, match="ckpt.pt: lm_head.weight and wte.weight differ"):
        load_model(str(tmp_path / "ckpt.pt"))


# -----------------------------------------------------------------------------
# llm.c

def llmc_bytes(model, version, rows):
    """The contents of a model_*.bin: its header, then each tensor in the documented order."""
    config = model.config
    out = struct.pack("<256i", *[20240326, version, config.block_size, config.vocab_size, config.n_layer, config.n_head,
                                 config.n_embd, rows], *[0] * 248)
    h = model.transformer.h
    padding = torch.full((rows - config.vocab_size, config.n_embd), 9.0)  # must be ignored
    tensors = [model.transformer.wte.weight, padding, model.transformer.wpe.weight]
    for kind in (lambda b: b.ln_1, lambda b: b.attn.c_attn, lambda b: b.attn.c_proj, lambda b: b.ln_2, lambda b: b.mlp.c_fc,
                 lambda b: b.mlp.c_proj):
        tensors += [kind(block).weight for block in h] + [kind(block).bias for block in h]
    tensors += [model.transformer.ln_f.weight, model.transformer.ln_f.bias]
    for tensor in tensors:
        array = tensor.detach().numpy()
        if version == 3:
            out += array.astype("<f4").tobytes()
        else:  # bfloat16 is the upper half of a float32; these weights are exact in it
            out += (array.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    return out


def bfloat16_model():
    """A float32 model whose weights are exact in bfloat16."""
    model = make_model()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.bfloat16())
    return model


@pytest.mark.parametrize("version, dtype", [(3, "float32"), (5, "bfloat16")])
def test_a_file_of_llmc_is_read_and_written_in_its_layout(tmp_path, version, dtype):
    model, path = bfloat16_model(), tmp_path / "model_00010.bin"
    path.write_bytes(llmc_bytes(model, version, 128))
    check_same(model, load_model(str(path))[0])
    checkpoint.save_file(model, str(tmp_path / "ours.bin"), lambda model, f: convert.write_llmc(model, f, dtype))
    ours = (tmp_path / "ours.bin").read_bytes()
    size = 4 if version == 3 else 2
    begin, end = 1024 + 61 * 16 * size, 1024 + 128 * 16 * size
    theirs = llmc_bytes(model, version, 128)
    assert ours[:begin] == theirs[:begin] and ours[end:] == theirs[end:] and set(ours[begin:end]) == {0}


def test_a_padded_vocabulary_is_cut_to_gpt2s_for_llmc(tmp_path):
    model, path = make_model(vocab_size=50304, n_embd=4), str(tmp_path / "model.bin")
    checkpoint.save_file(model, path, convert.write_llmc)
    assert np.fromfile(path, "<i4", 8).tolist() == [20240326, 3, 12, 50257, 2, 2, 4, 50304]
    loaded, _ = load_model(path)
    assert loaded.config.vocab_size == 50257
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight[:50257])


def test_missing_biases_are_zeros_for_llmc(tmp_path):
    model, path = make_model(bias=False), str(tmp_path / "model.bin")
    checkpoint.save_file(model, path, convert.write_llmc)
    assert torch.equal(logits_of(load_model(path)[0]), logits_of(model))


@pytest.mark.parametrize("where, value, words", [
    (0, 20240520, "not an llm.c model.*20240520"), (1, 1, "version 1"), (2, 13, "its header"), (4, -1, "n_layer=-1"),
    (4, 2**31 - 1, "its header"), (5, 3, "n_head=3"), (7, 60, "padded_vocab_size 60"),
])
def test_an_invalid_header_of_llmc_is_an_error(tmp_path, where, value, words):
    path = tmp_path / "model.bin"
    contents = bytearray(llmc_bytes(make_model(), 3, 128))
    contents[4 * where:4 * where + 4] = struct.pack("<i", value)
    path.write_bytes(contents)
    with pytest.raises(ValueError, match=f"model.bin.*{words}"):
        load_model(str(path))


@pytest.mark.parametrize("length", [0, 3, 100, 1024, -1])
def test_a_truncated_file_of_llmc_is_an_error(tmp_path, length):
    path = tmp_path / "model.bin"
    path.write_bytes(llmc_bytes(make_model(), 3, 128)[:length])
    with pytest.raises(ValueError, match="model.bin"):
        load_model(str(path))


# -----------------------------------------------------------------------------
# fine-tuning: train_gpt2.py --init-from

def test_init_from_takes_the_shape_of_the_weights(tmp_path, monkeypatch):
    model, path = make_model(bias=False, vocab_size=64), str(tmp_path / "ckpt.pt")
    torch.save({"model": model.state_dict(), "model_args": {**SIZES, "vocab_size": 64, "bias": False, "dropout": 0.0}}, path)
    monkeypatch.chdir(tmp_path)
    made, saved = settings.config_from_flags(["--init-from", path, "--block-size", "8", "--dropout", "0.1",
                                            "--total-batch-size", "64", "--sample-every", "0"])
    assert saved is None and (made.n_layer, made.n_embd, made.vocab_size, made.block_size) == (2, 16, 64, 8)
    built = train_gpt2.build_model(made, None, parallel.Ranks(0, 0, 1, "cpu", False))
    assert built.training and built.config == GPTConfig(**{**SIZES, "vocab_size": 64, "block_size": 8}, bias=False, dropout=0.1)
    assert torch.equal(built.transformer.h[1].mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight)


def test_init_from_with_a_longer_context_or_another_shape_is_an_error(tmp_path):
    save_model(tmp_path, 10, make_model())
    with pytest.raises(ValueError, match="--block-size 13 is over the 12 positions"):
        settings.shape_of_weights({"init_from": str(tmp_path), "block_size": 13})
    with pytest.raises(ValueError, match="n_layer=2"):
        settings.shape_of_weights({"init_from": str(tmp_path), "n_layer": 3})


# -----------------------------------------------------------------------------
# the command

def run(monkeypatch, capsys, *arguments):
    """What `python convert.py arguments` prints, in this process."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    convert.main()
    return capsys.readouterr().out


def test_a_conversion_through_all_formats_loses_nothing(tmp_path, monkeypatch, capsys):
    model = make_model(vocab_size=50257, n_embd=4)
    (tmp_path / "log").mkdir()
    save_model(tmp_path / "log", 30, model)
    chain = [tmp_path / name for name in ("log", "a.bin", "hf", "b.pt", "hf2", "c.bin", "d.pt")]
    for source, out in zip(chain, chain[1:]):
        assert f"wrote {out}: {model.num_params():,} parameters, float32" in run(monkeypatch, capsys, "convert", source, out)
        check_same(model, load_model(str(out))[0])
    run(monkeypatch, capsys, "convert", tmp_path / "log", tmp_path / "e.pt")
    assert load_model(str(tmp_path / "e.pt"))[1] == {"path": str(tmp_path / "e.pt"), "step": 30, "val_loss": 3.5}
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_info_describes_each_file(tmp_path, monkeypatch, capsys):
    model = make_model(bias=False, vocab_size=65)
    torch.save({"model": model.state_dict(), "model_args": {**SIZES, "vocab_size": 65, "bias": False, "dropout": 0.0},
                "iter_num": 7, "best_val_loss": 2.5}, tmp_path / "ckpt.pt")
    out = run(monkeypatch, capsys, "info", tmp_path / "ckpt.pt")
    for words in ("a checkpoint of nanoGPT", "2 layers, 2 heads, 16 channels, context 12, without biases",
                  f"{model.num_params():,}, float32", "65 (not GPT-2's)", "step        7", "val loss    2.5"):
        assert words in out
    (tmp_path / "model.bin").write_bytes(llmc_bytes(make_model(), 5, 128))
    out = run(monkeypatch, capsys, "info", tmp_path / "model.bin")
    assert "a checkpoint of llm.c" in out and "bfloat16" in out and "with biases" in out and "step" not in out
    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=50257)).save_pretrained(tmp_path / "hf")
    out = run(monkeypatch, capsys, "info", tmp_path / "hf")
    assert "a checkpoint of Hugging Face" in out and "50257 (GPT-2's)" in out
    save_model(tmp_path, 9, make_model(vocab_size=50304, n_embd=4))
    out = run(monkeypatch, capsys, "info", tmp_path)
    assert "a checkpoint of this project" in out and "50304 (GPT-2's 50257, padded)" in out


def test_existing_files_are_overwritten_only_with_the_flag(tmp_path, monkeypatch, capsys):
    first, second = make_model(), make_model(n_embd=4, vocab_size=50257)
    for name, model in (("first.pt", first), ("second.pt", second)):
        checkpoint.save_file({"model": model.state_dict(), "config": vars(model.config)}, str(tmp_path / name))
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    for out in ("first.pt", "hf"):
        with pytest.raises(ValueError, match=f"{out} exists already; --overwrite"):
            run(monkeypatch, capsys, "convert", tmp_path / "second.pt", tmp_path / out)
    for out in ("first.pt", "hf"):
        run(monkeypatch, capsys, "convert", tmp_path / "second.pt", tmp_path / out, "--overwrite")
        check_same(second, load_model(str(tmp_path / out))[0])
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"
    save_model(tmp_path, 1, second)
    with pytest.raises(ValueError, match="is a run folder"):
        run(monkeypatch, capsys, "export", tmp_path / "second.pt", tmp_path, "--overwrite")


def test_export_replaces_nothing_that_it_did_not_write(tmp_path, monkeypatch, capsys):
    """A folder my.tmp was removed by `export RUN my`; the temporary folder now has a name that did not exist."""
    model = make_model(n_embd=4, vocab_size=50257)
    checkpoint.save_file({"model": model.state_dict(), "config": vars(model.config)}, str(tmp_path / "a.pt"))
    for name in ("my.tmp", f"my.{os.getpid()}.tmp"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path)
    before = set(os.listdir())
    run(monkeypatch, capsys, "export", "a.pt", "my")
    assert set(os.listdir()) == before | {"my"} and all(os.listdir(name) == ["notes.txt"] for name in before if "my" in name)
    (tmp_path / "link").symlink_to("my")
    monkeypatch.chdir(tmp_path / "my")
    os.remove("vocab.json")
    os.rename("README.md", "notes.md")
    run(monkeypatch, capsys, "export", "../a.pt", ".", "--overwrite")
    run(monkeypatch, capsys, "convert", "../a.pt", "../link/", "--overwrite")
    assert (tmp_path / "link").is_symlink() and "# my" in (tmp_path / "my" / "README.md").read_text()
    assert set(os.listdir()) == {*convert.HF_FILES, convert.HF_WEIGHTS, "notes.md"}
    check_same(model, load_model(".")[0])


def test_exported_files_have_the_permissions_of_the_umask(tmp_path):
    """safetensors creates its file for the owner only."""
    old = os.umask(0o027)
    try:
        convert.write_hf(make_model(n_embd=4, vocab_size=50257), str(tmp_path / "hf"))
    finally:
        os.umask(old)
    assert {oct((tmp_path / "hf" / name).stat().st_mode) for name in os.listdir(tmp_path / "hf")} == {"0o100640"}
    assert oct((tmp_path / "hf").stat().st_mode) == "0o40750"


def test_the_printed_number_of_parameters_is_that_of_the_file(tmp_path, monkeypatch, capsys):
    model = make_model(n_embd=4, vocab_size=50304, bias=False)
    save_model(tmp_path, 1, model)
    for out, bias, vocab_size in (("a.pt", False, 50304), ("a.bin", True, 50257), ("hf", True, 50257)):
        count = sum(p.numel() for p in make_model(n_embd=4, vocab_size=vocab_size, bias=bias).parameters())
        assert f": {count:,} parameters" in run(monkeypatch, capsys, "convert", tmp_path, tmp_path / out)
        assert f"{count:,}, float32" in run(monkeypatch, capsys, "info", tmp_path / out)


def test_help_lists_the_flags_of_the_subcommands(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "--help")
    out = capsys.readouterr().out
    assert all(words in out for words in ("usage: convert.py export", "--push USER/NAME", "--dtype", "--overwrite", "source "))


def test_nan_weights_are_not_taken_for_an_untied_lm_head(tmp_path):
    model = make_model(vocab_size=50257, n_embd=4)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    torch.save({"model": {name: t.clone() for name, t in model.state_dict().items()}, "model_args": vars(model.config)},
               tmp_path / "ckpt.pt")
    convert.write_hf(model, str(tmp_path / "hf"))
    for path in (tmp_path / "ckpt.pt", tmp_path / "hf"):
        rows = weights.read_model(str(path))[1]["lm_head.weight"]
        assert rows[3].isnan().all() and rows[4].isfinite().all()


def test_openais_repositories_on_the_hub_are_names_of_their_models(monkeypatch):
    assert weights.is_hf("gpt2-xl") and weights.is_hf("openai-community/gpt2-xl") and not weights.is_hf("someone/gpt2")
    asked = []
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", asked.append)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda repo, name, **kwargs: asked.append(repo) or os.devnull)
    for source in ("gpt2", "openai-community/gpt2"):
        with pytest.raises(ValueError, match="not the null of a GPT-2"):
            load_model(source)
    assert asked[1] == asked[3] == "openai-community/gpt2"


@pytest.mark.parametrize("step, val_loss", [(None, None), (7, 2), (torch.tensor(7), torch.tensor([2.5])), (0, float("nan"))])
def test_info_prints_steps_and_losses_of_every_kind(tmp_path, monkeypatch, capsys, step, val_loss):
    torch.save({"model": make_model().state_dict(), "config": SIZES, "step": step, "val_loss": val_loss}, tmp_path / "a.pt")
    out = run(monkeypatch, capsys, "info", tmp_path / "a.pt")
    assert ("\n  step " in out) == (step is not None) and ("\n  val loss " in out) == (val_loss is not None)


def test_a_conversion_that_is_not_possible_is_an_error_and_writes_nothing(tmp_path, monkeypatch, capsys):
    checkpoint.save_file({"model": make_model().state_dict(), "config": SIZES}, str(tmp_path / "a.pt"))
    for arguments, words in ((("b.safetensors",), "give a folder"), (("b.pt", "--dtype", "bfloat16"), "our own files"),
                             (("hf",), "vocabulary of 61, GPT-2's is 50257")):
        with pytest.raises(ValueError, match=words):
            run(monkeypatch, capsys, "convert", tmp_path / "a.pt", tmp_path / arguments[0], *arguments[1:])
    assert os.listdir(tmp_path) == ["a.pt"]


def start(*arguments, **environment):
    """`python convert.py arguments` as a finished process, offline unless environment changes that."""
    return subprocess.run([sys.executable, "convert.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})


# -----------------------------------------------------------------------------
# an exported Hugging Face folder: the tokenizer

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our model with a padded vocabulary, the folder that `convert.py export` wrote from its run folder)"""
    run_dir, folder = tmp_path_factory.mktemp("log") / "run", tmp_path_factory.mktemp("out") / "hf"
    run_dir.mkdir()
    model = make_model(block_size=32, vocab_size=50304)
    save_model(run_dir, 20, model)
    (run_dir / "log.txt").write_text(f"10 val 4.0\n20 val 3.5\n20 hella {2967 / 10042}\n30 hella 0.9\n")
    (run_dir / "config.json").write_text(json.dumps({"config": {"data": "/home/me/secret/books", "lr": 0.002},
                                                     "command": ["/home/me/train_gpt2.py"], "device": "a CPU"}))
    done = start("export", run_dir, folder)
    assert done.returncode == 0, done.stderr
    return model, folder


def test_vocabulary_and_merges_equal_openais_files(exported):
    for name, sha256 in (("vocab.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),   # encoder.json
                         ("merges.txt", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")):  # vocab.bpe
        assert hashlib.sha256((exported[1] / name).read_bytes()).hexdigest() == sha256, name


def hard_texts():
    """Texts on which tokenizers are likely to differ."""
    draw = random.Random(0)
    every_character = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))
    yield from ["", " ", "\n", "  \n\t \r\n", "a" * 300, " " * 1000 + "x", "\t" * 77, "I'll don't WE'VE 'tis it'S ''s",
                "1234567 3.14e-10", "def f(x):\n    return {\n        'a': x ** 2,  # ...\n    }\n\n\n",
                "naïve café ÀÉ ß ﬁ", "你好，世界。こんにちは",
                "👩‍👩‍👧‍👦🏳️‍🌈 🤷🏽‍♂️",
                "\u200b\u200d\ufeff\u00a0\u2028\u3000 x\u00a0\u00a0y", "e\u0301\u0301 Z\u0351\u036b", "<|endoftext|>",
                "a<|endoftext|><|endoftext|> b <|endoftext", "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" * 3,
                bytes(range(256)).decode("latin-1"), bytes(range(256)).decode("utf-8", "replace")]
    for _ in range(200):
        yield "".join(draw.choice(every_character[:0x3000] + "  \n\n''") for _ in range(40))
    yield from (every_character[i:i + 5000] for i in range(0, 0x11000, 5000))


def test_token_ids_of_hard_text_equal_tiktokens_and_decode_to_it(exported):
    theirs, ours = AutoTokenizer.from_pretrained(exported[1]), get_tokenizer()
    count = 0
    for text in hard_texts():
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text, allowed_special="all"), repr(text[:60])
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        count += len(ids)
    assert count > 200_000
    assert [theirs.eos_token_id, theirs.bos_token_id, len(theirs), theirs.model_max_length] == [EOT, EOT, EOT + 1, 32]


def test_each_token_of_the_vocabulary_has_tiktokens_bytes(exported):
    """Incomplete characters too: no text contains those tokens, but a model may sample them."""
    with open(exported[1] / "vocab.json", encoding="utf-8") as f:
        vocab = json.load(f)
    letters = {letter: byte for byte, letter in convert.bytes_to_unicode().items()}
    assert len(letters) == 256 and vocab["!"] == 0 and vocab["Ġ"] == 220
    for word, rank in vocab.items():
        if rank != EOT:
            assert bytes(letters[letter] for letter in word) == get_tokenizer().decode_single_token_bytes(rank)


# -----------------------------------------------------------------------------
# an exported Hugging Face folder: the model

def test_transformers_computes_the_same_logits(exported):
    model, folder = exported
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "GPT2LMHeadModel" and theirs.dtype == torch.float32
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    idx = torch.randint(50257, (3, 32))
    assert (theirs(idx).logits - model(idx, idx)[0][..., :50257]).abs().max() < 1e-4
    again, _ = load_model(str(folder))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight[:50257])


def test_the_text_generation_pipeline_generates_the_same_text(exported):
    generate = pipeline("text-generation", model=str(exported[1]))
    text = generate("Hello, I'm", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    tokens = get_tokenizer().encode_ordinary("Hello, I'm")
    for _ in range(5):
        tokens.append(exported[0](torch.tensor([tokens]))[0][0, -1, :50257].argmax().item())
    assert text == get_tokenizer().decode(tokens)


def test_save_pretrained_writes_the_same_tensors_and_tokenizer(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported[1]).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(exported[1]).save_pretrained(tmp_path)
    first, second = (safe_open(folder / "model.safetensors", "pt") for folder in (exported[1], tmp_path))
    assert set(first.keys()) == set(second.keys()) and "lm_head.weight" not in first.keys()
    assert all(torch.equal(first.get_tensor(name), second.get_tensor(name)) for name in first.keys())
    text = "Ünï côdé 👋 <|endoftext|> x\n\n  y"
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == AutoTokenizer.from_pretrained(exported[1])(text)
    loaded, _ = load_model(str(tmp_path))
    assert torch.equal(loaded.lm_head.weight, exported[0].lm_head.weight[:50257])


def test_bfloat16_halves_the_file_and_rounds_the_weights_once(exported, tmp_path):
    model = exported[0]
    convert.write_hf(model, str(tmp_path / "hf"), "bfloat16")
    sizes = [os.path.getsize(folder / "model.safetensors") for folder in (exported[1], tmp_path / "hf")]
    assert sizes[1] < 0.51 * sizes[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.transformer.h[0].attn.c_attn.weight, model.transformer.h[0].attn.c_attn.weight.t().bfloat16())
    assert torch.equal(load_model(str(tmp_path / "hf"))[0].transformer.wpe.weight,
                       model.transformer.wpe.weight.bfloat16().float())


def test_a_model_without_biases_computes_the_same_in_transformers(tmp_path):
    model = make_model(n_layer=1, n_embd=8, block_size=8, vocab_size=50257, bias=False)
    convert.write_hf(model, str(tmp_path / "hf"))
    idx = torch.randint(50257, (2, 8))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.allclose(theirs(idx).logits, model(idx, idx)[0], atol=1e-4)


def test_weights_that_transformers_split_over_several_files_load(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported[1]).save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").exists() and not (tmp_path / "model.safetensors").exists()
    split, single = load_model(str(tmp_path))[0], load_model(str(exported[1]))[0]
    assert all(torch.equal(p, q) for p, q in zip(split.parameters(), single.parameters(), strict=True))


def test_a_folder_that_transformers_saved_loads(tmp_path):
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=31)).eval()
    theirs.save_pretrained(tmp_path)
    model, info = load_model(str(tmp_path))
    idx = torch.arange(8)[None]
    assert info == {} and torch.allclose(model(idx, idx)[0], theirs(idx).logits, atol=1e-4)


def test_the_model_card_has_the_scores_of_its_step(exported):
    card = (exported[1] / "README.md").read_text()
    for words in ("library_name: transformers", "2 layers, 2 heads, 16 channels", "| validation loss (nats per token) | 3.5000 |",
                  "| HellaSwag acc_norm, completion style | 0.2955 |"):
        assert words in card
    assert "0.9" not in card  # of a later step


def test_an_interrupted_export_leaves_nothing(exported, tmp_path, monkeypatch):
    def interrupt(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert.write_hf(exported[0], str(tmp_path / "hf"))
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# the Hugging Face Hub

class Hub(http.server.BaseHTTPRequestHandler):
    """The part of the Hub that an upload needs: creates a repository, stores large files by LFS, small ones in the commit."""

    def answer(self, contents, status=200):
        body = json.dumps(contents).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def body(self):
        return self.rfile.read(int(self.headers["Content-Length"]))

    def do_GET(self):
        self.answer({"error": "none"}, 404)

    def do_PUT(self):
        body = self.body()
        self.server.large[hashlib.sha256(body).hexdigest()] = body
        self.answer({})

    def do_POST(self):
        self.server.tokens.add(self.headers.get("Authorization"))
        body, url = self.body(), f"http://127.0.0.1:{self.server.server_port}"
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{url}/me/mine"})
        elif self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            self.answer({"files": [{"path": f["path"], "shouldIgnore": False, "oid": None,
                                    "uploadMode": "lfs" if f["path"].endswith("safetensors") else "regular"} for f in files]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [{**o, "actions": {"upload": {"href": f"{url}/upload"}}}
                                                          for o in json.loads(body)["objects"]]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    self.server.files[line["value"]["path"]] = self.server.large[line["value"]["oid"]]
            self.answer({"commitUrl": f"{url}/me/mine/commit/1", "commitOid": "1", "pullRequestUrl": None})
        else:
            self.answer({"errors": [], "warnings": []})

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.created, server.large, server.files, server.tokens = [], {}, {}, set()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.mark.slow
def test_push_uploads_the_folder(exported, hub, tmp_path):
    out = tmp_path / "hf"
    done = start("export", exported[1], out, "--push", "me/mine", HF_HUB_OFFLINE="0", HF_TOKEN="hf_secret",
                 HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["name"] == "mine" and hub.tokens == {"Bearer hf_secret"}
    assert hub.files == {name: (out / name).read_bytes() for name in os.listdir(out)} and len(hub.files) == 8
    assert "hf_secret" not in done.stdout + done.stderr


NOWHERE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}


def test_push_without_a_token_is_an_error_and_writes_nothing(exported, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="hf auth login"):
        run(monkeypatch, capsys, "export", exported[1], tmp_path / "hf", "--push", "me/mine")
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow  # huggingface_hub retries
def test_push_without_a_connection_is_an_error_and_keeps_the_folder(exported, tmp_path):
    done = start("export", exported[1], tmp_path / "hf", "--push", "me/mine", HF_TOKEN="hf_x", HF_HOME=str(tmp_path), **NOWHERE)
    assert done.returncode == 2 and "error: could not push to me/mine" in done.stderr.splitlines()[-1]
    assert (tmp_path / "hf" / "model.safetensors").exists()


def test_a_pipe_as_output_is_refused_under_its_own_name(tmp_path):
    """realpath of a pipe is no path: the message named a temporary file below /proc."""
    reader, writer = os.pipe()
    try:
        with pytest.raises(ValueError, match=rf"^/dev/fd/{writer} is not a folder"):
            convert.check_out(str(tmp_path / "in.pt"), f"/dev/fd/{writer}", "float32", True, True)
    finally:
        os.close(reader)
        os.close(writer)
