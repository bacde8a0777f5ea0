"""
Other projects' formats. Files of build-nanogpt, nanoGPT and llm.c, written here in their documented
layouts, and malicious ones; the command. Hugging Face folders against transformers' models,
tokenizers and pipeline, tiktoken, and the hashes of OpenAI's vocabulary files.

    .venv/bin/python -m pytest tests/test_convert.py

Needs transformers (requirements-dev.txt); no network is used. Invalid files are in
tests/test_bad_input.py.
"""
import functools
import hashlib
import json
import os
import random
import struct
import sys
from dataclasses import make_dataclass, replace
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_model as save_tied
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config,
                          GPT2ForSequenceClassification, GPT2LMHeadModel, pipeline)
from transformers.activations import ACT2FN

import convert
import train_gpt2
from common import ONE, tiny_model
from data import EOT, get_tokenizer
from run import checkpoint, settings, weights
from run.weights import load_model

tokenizer_files = functools.cache(convert.tokenizer_files)
SIZES = ("n_layer", "n_head", "n_embd", "block_size", "vocab_size")


@pytest.fixture(autouse=True)
def tokenizer_files_made_once(monkeypatch):
    """Finding the 50,000 merges takes a second or two."""
    monkeypatch.setattr(convert, "tokenizer_files", tokenizer_files)


# all of its tensors are random, norms and biases included
random_model = functools.partial(tiny_model, std=0.3)


def logits_of(model):
    idx = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    return model(idx, idx)[0]


def check_same(model, loaded):
    """Asserts that loaded has model's config, weights, tying and logits, and is in eval mode."""
    assert loaded.config == model.config and not loaded.training
    loaded_weights = loaded.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded_weights.pop(name), tensor), name
    assert not loaded_weights
    assert loaded.transformer.wte.weight is loaded.lm_head.weight
    assert torch.equal(logits_of(model), logits_of(loaded))


def save_model(folder, step, model):
    """Writes model as a checkpoint of step, with a validation loss of 3.5."""
    checkpoint.save(str(folder), step, checkpoint.model_contents(model, 3.5), {})


# -----------------------------------------------------------------------------
# our own files

def test_load_model_reads_a_run_folder_and_a_file(tmp_path):
    older, newest = random_model(), random_model(n_layer=1)
    save_model(tmp_path, 99999, older)
    save_model(tmp_path, 100000, newest)
    (tmp_path / "config.json").write_text("{}")  # the run's, not Hugging Face's
    model, info = load_model(str(tmp_path))
    check_same(newest, model)
    path = str(tmp_path / "model_100000.pt")
    assert info == {"path": path, "step": 100000, "val_loss": 3.5}
    model, info = load_model(str(tmp_path / "model_99999.pt"))
    check_same(older, model)
    assert info["step"] == 99999


def test_block_size_and_dropout_can_be_changed_while_loading(tmp_path):
    model = random_model(bias=False)
    save_model(tmp_path, 10, model)
    loaded, _ = load_model(str(tmp_path), block_size=9, dropout=0.1)
    assert loaded.config == replace(model.config, block_size=9, dropout=0.1)
    assert torch.equal(loaded.transformer.wpe.weight, model.transformer.wpe.weight[:9])
    assert loaded.transformer.wpe.weight.requires_grad and loaded.transformer.drop.p == 0.1
    assert torch.equal(logits_of(loaded), logits_of(model))


# -----------------------------------------------------------------------------
# build-nanogpt

def save_with_config(contents, path, monkeypatch, name="train_gpt2.GPTConfig", **fields):
    """Writes contents with "config": a pickled object of a class that a script defines as name."""
    module, _, name = name.rpartition(".")
    config = tiny_model().config
    values = {**{size: getattr(config, size) for size in SIZES}, **fields}
    cls = make_dataclass(name, values)
    cls.__module__ = module
    for part in ("gpt", module):  # pickle imports the module, and its package
        monkeypatch.setitem(sys.modules, part, sys.modules.get(part, ModuleType(part)))
    monkeypatch.setattr(sys.modules[module], name, cls, raising=False)
    torch.save({"config": cls(**values), **contents}, path)
    monkeypatch.undo()


@pytest.mark.parametrize("module", ["__main__", "train_gpt2"])
def test_a_checkpoint_of_build_nanogpt_loads_with_its_pickled_config(
        tmp_path, monkeypatch, module):
    model, path = random_model(), str(tmp_path / "model_19072.pt")
    mask = {"transformer.h.0.attn.bias": torch.ones(1, 1, 16, 16).tril()}
    contents = {"model": {**model.state_dict(), **mask}, "step": 19072, "val_loss": 3.07}
    save_with_config(contents, path, monkeypatch, f"{module}.GPTConfig")
    loaded, info = load_model(path)
    check_same(model, loaded)
    assert info == {"path": path, "step": 19072, "val_loss": 3.07}


def test_a_checkpoint_of_a_fork_loads(tmp_path, monkeypatch, capsys):
    """Its GPTConfig is of another module, with other fields; NumPy's scalars are plain values.

    A file with NumPy's random state, an array, was refused.
    """
    model, path = random_model(), str(tmp_path / "model_19072.pt")
    contents = {"model": model.state_dict(), "step": np.int64(7), "val_loss": np.float32(3.5),
                "done": np.bool_(True), "big_endian": np.dtype(">f8").type(2),
                "rng": np.random.get_state()}
    save_with_config(contents, path, monkeypatch, "gpt.model.GPTConfig", n_layer=np.int32(2),
                     device=torch.device("cpu"), dtype=torch.float32)
    loaded, info = load_model(path)
    check_same(model, loaded)
    assert info == {"path": path, "step": 7, "val_loss": 3.5}
    assert [type(info[name]) for name in ("step", "val_loss")] == [int, float]
    assert capsys.readouterr() == (
        "", f"{path}: ignoring fields of its config that GPT-2 lacks: device, dtype\n")


class Code:
    """An object whose unpickling creates a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("where", ["config", "in the config", "optimizer"])
def test_code_in_a_file_is_an_error_and_does_not_run(tmp_path, monkeypatch, where):
    path = str(tmp_path / "model_00001.pt")
    code = Code(str(tmp_path / "ran"))
    if where == "in the config":
        save_with_config({"model": {}}, path, monkeypatch, n_layer=code)
    else:
        save_with_config({"model": {}, where: code}, path, monkeypatch)
    for load in (load_model, weights.load_file):
        with pytest.raises(ValueError, match="model_00001.pt.*could run code"):
            load(path)
    assert os.listdir(tmp_path) == ["model_00001.pt"]


def test_no_other_class_is_loaded(tmp_path, monkeypatch):
    path = str(tmp_path / "model_00001.pt")
    contents = {"model": random_model().state_dict()}
    save_with_config(contents, path, monkeypatch, "train_gpt2.OtherConfig")
    with pytest.raises(ValueError, match="contains train_gpt2.OtherConfig.*could run code"):
        load_model(path)


# -----------------------------------------------------------------------------
# nanoGPT

@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("prefix", ["", "_orig_mod.", "module._orig_mod."])
def test_a_checkpoint_of_nanogpt_loads(tmp_path, bias, prefix):
    model, path = random_model(bias=bias, dropout=0.2), str(tmp_path / "ckpt.pt")
    state_dict = {prefix + name: tensor for name, tensor in model.state_dict().items()}
    state_dict[f"{prefix}transformer.h.1.attn.bias"] = torch.ones(1, 1, 16, 16).tril()
    optimizer = torch.optim.AdamW(model.parameters())
    torch.save({"model": state_dict, "optimizer": optimizer.state_dict(), "iter_num": 7,
                "model_args": vars(model.config), "best_val_loss": torch.tensor(2.5),
                "config": {"out_dir": "out"}}, path)
    loaded, info = load_model(path)
    check_same(model, loaded)
    assert info == {"path": path, "step": 7, "val_loss": 2.5}


def test_init_from_takes_the_shape_of_the_weights(tmp_path, monkeypatch):
    model, path = random_model(bias=False), str(tmp_path / "ckpt.pt")
    torch.save({"model": model.state_dict(), "model_args": vars(model.config)}, path)
    monkeypatch.chdir(tmp_path)
    config, saved = settings.config_from_flags([
        "--init-from", path, "--block-size", "8", "--dropout", "0.1", "--total-batch-size", "64",
        "--sample-every", "0"])
    assert saved is None
    built = train_gpt2.build_model(config, None, ONE)
    assert built.training
    assert built.config == replace(model.config, block_size=8, dropout=0.1)
    c_fc = model.transformer.h[1].mlp.c_fc
    assert torch.equal(built.transformer.h[1].mlp.c_fc.weight, c_fc.weight)


def test_nan_weights_are_not_taken_for_an_untied_lm_head(tmp_path):
    model = random_model(vocab_size=50257, n_embd=4)
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    untied = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.save({"model": untied, "model_args": vars(model.config)}, tmp_path / "ckpt.pt")
    convert.write_hf(model, str(tmp_path / "hf"))
    for path in (tmp_path / "ckpt.pt", tmp_path / "hf"):
        rows = weights.read_model(str(path))[1]["lm_head.weight"]
        assert rows[3].isnan().all() and rows[4].isfinite().all()


# -----------------------------------------------------------------------------
# llm.c

def llmc_bytes(model, version, padded_vocab_size):
    """The contents of a model_*.bin: its header, then each tensor in the documented order."""
    config = model.config
    out = struct.pack("<8i", 20240326, version, config.block_size, config.vocab_size,
                      config.n_layer, config.n_head, config.n_embd, padded_vocab_size)
    out += bytes(4 * 248)
    rows = padded_vocab_size - config.vocab_size
    padding = torch.full((rows, config.n_embd), 9.0)  # must be ignored
    tensors = [model.transformer.wte.weight, padding, model.transformer.wpe.weight]
    for name in ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj"):
        modules = [block.get_submodule(name) for block in model.transformer.h]
        tensors += [module.weight for module in modules]
        tensors += [module.bias for module in modules]
    tensors += [model.transformer.ln_f.weight, model.transformer.ln_f.bias]
    for tensor in tensors:
        array = tensor.detach().numpy().astype("<f4")
        if version == 5:  # bfloat16 is the upper half of a float32; these weights are exact in it
            array = (array.view("<u4") >> 16).astype("<u2")
        out += array.tobytes()
    return out


@pytest.mark.parametrize("version, dtype", [(3, "float32"), (5, "bfloat16")])
def test_a_file_of_llmc_is_read_and_written_in_its_layout(tmp_path, version, dtype):
    model = random_model(vocab_size=61).bfloat16().float()
    expected = llmc_bytes(model, version, 128)
    (tmp_path / "model_00010.bin").write_bytes(expected)
    loaded, _ = load_model(str(tmp_path / "model_00010.bin"))
    assert loaded.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    checkpoint.save_file(model, str(tmp_path / "ours.bin"),
                         lambda model, f: convert.write_llmc(model, f, dtype))
    ours = (tmp_path / "ours.bin").read_bytes()
    size = 4 if version == 3 else 2
    begin, end = 1024 + 61 * 16 * size, 1024 + 128 * 16 * size  # the padding
    assert ours[:begin] == expected[:begin] and ours[end:] == expected[end:]
    assert set(ours[begin:end]) == {0}


def test_a_padded_vocabulary_is_cut_to_gpt2s_for_llmc(tmp_path):
    model, path = random_model(vocab_size=50304, n_embd=4), str(tmp_path / "model.bin")
    checkpoint.save_file(model, path, convert.write_llmc)
    header = np.fromfile(path, "<i4", 8)
    assert header.tolist() == [20240326, 3, 16, 50257, 2, 2, 4, 50304]
    loaded, _ = load_model(path)
    assert loaded.config.vocab_size == 50257
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight[:50257])


def test_missing_biases_are_zeros_for_llmc(tmp_path):
    model, path = random_model(bias=False), str(tmp_path / "model.bin")
    checkpoint.save_file(model, path, convert.write_llmc)
    assert torch.equal(logits_of(load_model(path)[0]), logits_of(model))


# -----------------------------------------------------------------------------
# Hugging Face folders of other people

def gpt2(**changes):
    """A GPT2LMHeadModel of random weights, biases and norms."""
    torch.manual_seed(0)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=64)
    theirs = GPT2LMHeadModel(GPT2Config(**{**sizes, "eos_token_id": 0, "bos_token_id": 0,
                                           **changes})).eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return theirs


def check_logits(folder, theirs=None):
    """Asserts that the model of a folder has the logits of transformers', or of theirs."""
    if theirs is None:
        theirs = GPT2LMHeadModel.from_pretrained(folder)
    ours = load_model(str(folder))[0]
    idx = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours(idx, idx)[0], theirs(idx).logits, atol=1e-4, rtol=1e-4)


def write_sharded_bin(theirs, folder):
    """Writes pytorch_model-0000x-of-00002.bin and their index, as transformers did."""
    state_dict = theirs.state_dict()
    weight_map = {}
    for i, half in enumerate((list(state_dict)[::2], list(state_dict)[1::2]), start=1):
        name = f"pytorch_model-0000{i}-of-00002.bin"
        torch.save({key: state_dict[key] for key in half}, folder / name)
        weight_map |= dict.fromkeys(half, name)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("layout", ["zip", "before PyTorch 1.6", "float16", "GPT2Model", "sharded"])
def test_a_pytorch_model_bin_loads(tmp_path, layout):
    """As every fine-tuned GPT-2 before 2023 has."""
    theirs = gpt2()
    theirs.config.save_pretrained(tmp_path)
    state_dict = theirs.state_dict()
    # old files hold the causal masks
    state_dict["transformer.h.0.attn.bias"] = torch.ones(1, 1, 32, 32, dtype=torch.uint8).tril()
    state_dict["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
    if layout == "float16":
        theirs = theirs.half().float()
        state_dict = theirs.half().state_dict()
        theirs = theirs.float()
    elif layout == "GPT2Model":
        state_dict = theirs.transformer.state_dict()
    if layout == "sharded":
        write_sharded_bin(theirs, tmp_path)
    else:
        torch.save(state_dict, tmp_path / "pytorch_model.bin",
                   _use_new_zipfile_serialization=layout != "before PyTorch 1.6")
    check_logits(tmp_path, theirs)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pytorch_model_bin_does_not_run(tmp_path, zipped):
    gpt2().config.save_pretrained(tmp_path)
    torch.save({"wte.weight": Code(str(tmp_path / "ran"))}, tmp_path / "pytorch_model.bin",
               _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="pytorch_model.bin.*could run code"):
        load_model(str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kept", ["lm_head.weight", "transformer.wte.weight"])
def test_either_name_of_the_tied_weight_is_enough(tmp_path, kept):
    theirs = gpt2()
    theirs.save_pretrained(tmp_path)
    save_tied(theirs, tmp_path / "model.safetensors")  # keeps one name of shared tensors
    assert "lm_head.weight" in safe_open(tmp_path / "model.safetensors", "pt").keys()
    if kept != "lm_head.weight":
        theirs.save_pretrained(tmp_path)
    check_logits(tmp_path)


def test_equal_weights_of_a_model_that_is_not_tied_load(tmp_path):
    theirs = gpt2(tie_word_embeddings=False)
    theirs.lm_head.weight.data.copy_(theirs.transformer.wte.weight)
    theirs.save_pretrained(tmp_path)
    assert {"lm_head.weight", "transformer.wte.weight"} <= set(
        safe_open(tmp_path / "model.safetensors", "pt").keys())
    check_logits(tmp_path)
    theirs.lm_head.weight.data[0] += 1
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="an untied lm_head"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("rounded", ["lm_head.weight", "transformer.wte.weight"])
def test_an_lm_head_in_another_dtype_is_tied(tmp_path, rounded):
    """It was refused as an untied one. The more precise of the two is kept."""
    model, path = random_model(), str(tmp_path / "ckpt.pt")
    state_dict = model.state_dict()
    state_dict[rounded] = state_dict[rounded].bfloat16()
    torch.save({"model": state_dict, "model_args": vars(model.config)}, path)
    check_same(model, load_model(path)[0])
    state_dict[rounded] = state_dict[rounded] * 2
    torch.save({"model": state_dict, "model_args": vars(model.config)}, path)
    with pytest.raises(ValueError, match="an untied lm_head"):
        load_model(path)


def test_a_classifier_is_named_by_its_head(tmp_path):
    """The hint was that the checkpoint may have another n_layer."""
    GPT2ForSequenceClassification(gpt2().config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=": score.weight are missing, unexpected") as error:
        load_model(str(tmp_path))
    assert "n_layer" not in str(error.value)


@pytest.mark.parametrize("changes, omitted", [
    # the other names of GPT2Config.attribute_map
    ({GPT2Config.attribute_map[name]: None for name in GPT2Config.attribute_map}, []),
    ({}, ["vocab_size", "n_positions", "layer_norm_epsilon", "n_inner", "activation_function"]),
    *[({"activation_function": name}, []) for name in sorted(ACT2FN)],
])
def test_a_config_json_means_what_it_means_to_transformers(tmp_path, changes, omitted):
    """Activations that are not GPT-2's tanh approximation are errors."""
    sizes = {"vocab_size": 50257, "n_positions": 1024} if omitted else {}
    theirs = gpt2(**sizes)
    theirs.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    if None in changes.values():
        for alias, name in GPT2Config.attribute_map.items():
            config[alias] = config.pop(name)
        changes = {}
    config = {name: value for name, value in {**config, **changes}.items() if name not in omitted}
    (tmp_path / "config.json").write_text(json.dumps(config))
    x = torch.linspace(-5, 5, 1001)
    difference = ACT2FN["gelu_new"](x) - ACT2FN[config.get("activation_function", "gelu_new")](x)
    if difference.abs().max() < 1e-5:
        check_logits(tmp_path)
    else:
        with pytest.raises(ValueError, match="its config has activation_function="):
            load_model(str(tmp_path))


# -----------------------------------------------------------------------------
# the command

def run(monkeypatch, capsys, *arguments):
    """What `python convert.py arguments` prints, in this process."""
    monkeypatch.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
    convert.main()
    return capsys.readouterr().out


def test_a_conversion_through_all_formats_loses_nothing(tmp_path, monkeypatch, capsys):
    model = random_model(vocab_size=50257, n_embd=4)
    (tmp_path / "log").mkdir()
    save_model(tmp_path / "log", 30, model)
    names = ["log", "e.pt", "a.bin", "hf", "b.pt", "hf2", "c.bin", "d.pt"]
    chain = [tmp_path / name for name in names]
    for source, out in zip(chain, chain[1:]):
        assert run(monkeypatch, capsys, "convert", source, out) == f"wrote {out}\n"
        check_same(model, load_model(str(out))[0])
    info = load_model(str(tmp_path / "e.pt"))[1]
    assert info == {"path": str(tmp_path / "e.pt"), "step": 30, "val_loss": 3.5}
    assert sorted(os.listdir(tmp_path)) == sorted(names)


@pytest.mark.parametrize("out", ["a.pt", "a.bin", "hf"])
def test_bfloat16_rounds_the_weights_once(tmp_path, monkeypatch, capsys, out):
    model = random_model(vocab_size=50257, n_embd=4)
    save_model(tmp_path, 30, model)
    run(monkeypatch, capsys, "convert", tmp_path, tmp_path / out, "--dtype", "bfloat16")
    assert ", bfloat16, " in run(monkeypatch, capsys, "info", tmp_path / out)
    if out == "hf":
        assert AutoModelForCausalLM.from_pretrained(tmp_path / out).dtype == torch.bfloat16
    check_same(model.bfloat16().float(), load_model(str(tmp_path / out))[0])


def test_info_describes_each_kind_of_file(tmp_path, monkeypatch, capsys):
    model = random_model(bias=False)
    contents = {"model": model.state_dict(), "model_args": vars(model.config), "iter_num": 7,
                "best_val_loss": 2.5}
    torch.save(contents, tmp_path / "ckpt.pt")
    assert run(monkeypatch, capsys, "info", tmp_path / "ckpt.pt").splitlines() == [
        str(tmp_path / "ckpt.pt"),
        "  kind        a checkpoint of nanoGPT",
        "  model       2 layers, 2 heads, 16 channels, context 16, without biases",
        f"  parameters  {model.num_params():,}, float32, 0.0 MB",
        "  vocabulary  64 (not GPT-2's)",
        "  step        7",
        "  val loss    2.5000"]
    (tmp_path / "model.bin").write_bytes(llmc_bytes(random_model(), 5, 128))
    out = run(monkeypatch, capsys, "info", tmp_path / "model.bin")
    assert "a checkpoint of llm.c" in out and "bfloat16" in out
    assert "with biases" in out and "step" not in out
    config = GPT2Config(n_layer=1, n_head=2, n_embd=8, n_positions=8, vocab_size=50257)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    out = run(monkeypatch, capsys, "info", tmp_path / "hf")
    assert "a checkpoint of Hugging Face" in out and "50257 (GPT-2's)" in out
    save_model(tmp_path, 9, random_model(vocab_size=50304, n_embd=4))
    out = run(monkeypatch, capsys, "info", tmp_path)
    assert "a checkpoint of this project" in out and "50304 (GPT-2's 50257, padded)" in out


def test_existing_files_are_overwritten_only_with_the_flag(tmp_path, monkeypatch, capsys):
    first = random_model(seed=1, n_embd=4, vocab_size=50257)
    second = random_model(seed=2, n_embd=4, vocab_size=50257)
    for folder, model in (("first", first), ("second", second)):
        (tmp_path / folder).mkdir()
        save_model(tmp_path / folder, 1, model)
    for out in ("a.pt", "hf"):
        run(monkeypatch, capsys, "convert", tmp_path / "first", tmp_path / out)
    (tmp_path / "hf" / "notes.txt").write_text("mine")
    for out in ("a.pt", "hf"):
        arguments = "convert", tmp_path / "second", tmp_path / out
        with pytest.raises(ValueError, match=f"{out} exists already; --overwrite"):
            run(monkeypatch, capsys, *arguments)
        check_same(first, load_model(str(tmp_path / out))[0])
        run(monkeypatch, capsys, *arguments, "--overwrite")
        check_same(second, load_model(str(tmp_path / out))[0])
    assert (tmp_path / "hf" / "notes.txt").read_text() == "mine"


def test_a_folder_without_a_tokenizer_is_exported_without_one(tmp_path, monkeypatch, capsys):
    """It was refused, although transformers loads it."""
    theirs = gpt2()
    theirs.save_pretrained(tmp_path / "source")
    monkeypatch.setattr(sys, "argv", ["convert.py", "export", str(tmp_path / "source"),
                                      str(tmp_path / "out")])
    convert.main()
    assert "source has no tokenizer, and its vocabulary is not GPT-2's" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path / "out")) == ["README.md", "config.json",
                                                    "generation_config.json", "model.safetensors"]
    check_logits(tmp_path / "source", GPT2LMHeadModel.from_pretrained(tmp_path / "out"))


def test_help_lists_the_flags_of_the_subcommands(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, "--help")
    out = capsys.readouterr().out
    for words in ("usage: convert.py export", "--dtype", "--overwrite", "source "):
        assert words in out


def test_openais_repositories_on_the_hub_are_names_of_their_models(tmp_path, monkeypatch):
    save = random_model(vocab_size=50257, n_embd=4)
    convert.write_hf(save, str(tmp_path))
    repositories = []

    def download(repo, name, local_files_only):
        repositories.append(repo)
        return str(tmp_path / name)

    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    for source in ("gpt2", "openai-community/gpt2"):
        check_same(save, load_model(source)[0])
    assert repositories == ["openai-community/gpt2"] * 4
    with pytest.raises(FileNotFoundError, match="no checkpoint at someone/gpt2"):
        load_model("someone/gpt2")


# -----------------------------------------------------------------------------
# an exported Hugging Face folder: the tokenizer

@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our model with a padded vocabulary, the folder that export wrote from its run folder)"""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "run").mkdir()
    model = random_model(vocab_size=50304)
    save_model(folder / "run", 20, model)
    log = f"10 val 4.0\n20 val 3.5\n20 hella {2967 / 10042}\n30 hella 0.9\n"
    (folder / "run" / "log.txt").write_text(log)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(convert, "tokenizer_files", tokenizer_files)
        patch.setattr(sys, "argv", ["convert.py", "export", f"{folder}/run", f"{folder}/hf"])
        convert.main()
    return model, folder / "hf"


@pytest.mark.parametrize("name, sha256", [
    ("vocab.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),
    ("merges.txt", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5"),
])
def test_vocabulary_and_merges_equal_openais_encoder_json_and_vocab_bpe(exported, name, sha256):
    assert hashlib.sha256((exported[1] / name).read_bytes()).hexdigest() == sha256


def hard_texts():
    """Texts on which tokenizers are likely to differ."""
    draw = random.Random(0)
    every_character = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x30000)]))
    yield from [
        "", " ", "\n", "  \n\t \r\n", "a" * 300, " " * 1000 + "x", "\t" * 77,
        "I'll don't WE'VE 'tis it'S ''s", "1234567 3.14e-10",
        "def f(x):\n    return {\n        'a': x ** 2,  # ...\n    }\n\n\n",
        "naïve café ÀÉ ß ﬁ", "你好，世界。こんにちは", "👩‍👩‍👧‍👦🏳️‍🌈 🤷🏽‍♂️",
        "\u200b\u200d\ufeff\u00a0\u2028\u3000 x\u00a0\u00a0y", "e\u0301\u0301 Z\u0351\u036b",
        "<|endoftext|>", "a<|endoftext|><|endoftext|> b <|endoftext",
        "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~" * 3,
        bytes(range(256)).decode("latin-1"), bytes(range(256)).decode("utf-8", "replace")]
    for _ in range(200):
        yield "".join(draw.choice(every_character[:0x3000] + "  \n\n''") for _ in range(40))
    for i in range(0, 0x11000, 5000):
        yield every_character[i:i + 5000]


def test_token_ids_of_hard_text_equal_tiktokens_and_decode_to_it(exported):
    theirs, ours = AutoTokenizer.from_pretrained(exported[1]), get_tokenizer()
    count = 0
    for text in hard_texts():
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text, allowed_special="all"), repr(text[:60])
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        count += len(ids)
    assert count > 200_000
    assert theirs.eos_token_id == theirs.bos_token_id == EOT
    assert len(theirs) == EOT + 1 and theirs.model_max_length == 16


# -----------------------------------------------------------------------------
# an exported Hugging Face folder: the model

def test_transformers_computes_the_same_logits(exported):
    model, folder = exported
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "GPT2LMHeadModel" and theirs.dtype == torch.float32
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    idx = torch.randint(50257, (3, 16))
    assert (theirs(idx).logits - model(idx, idx)[0][..., :50257]).abs().max() < 1e-4
    loaded, _ = load_model(str(folder))
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight[:50257])


def test_the_text_generation_pipeline_generates_the_same_text(exported):
    generate = pipeline("text-generation", model=str(exported[1]))
    text = generate("Hello, I'm", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    tokens = get_tokenizer().encode_ordinary("Hello, I'm")
    for _ in range(5):
        logits = exported[0](torch.tensor([tokens]))[0][0, -1, :50257]
        tokens.append(logits.argmax().item())
    assert text == get_tokenizer().decode(tokens)


def test_save_pretrained_writes_the_same_tensors(exported, tmp_path):
    _, folder = exported
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path)
    ours = safe_open(folder / "model.safetensors", "pt")
    theirs = safe_open(tmp_path / "model.safetensors", "pt")
    assert set(ours.keys()) == set(theirs.keys()) and "lm_head.weight" not in ours.keys()
    for name in ours.keys():
        assert torch.equal(ours.get_tensor(name), theirs.get_tensor(name)), name


def test_weights_that_transformers_split_over_several_files_load(exported, tmp_path):
    model, folder = exported
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    theirs.save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert not (tmp_path / "model.safetensors").exists()
    split, single = load_model(str(tmp_path))[0], load_model(str(folder))[0]
    for p, q in zip(split.parameters(), single.parameters(), strict=True):
        assert torch.equal(p, q)


def test_the_model_card_has_the_scores_of_its_step(exported):
    card = (exported[1] / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n") and "\n# hf\n" in card
    assert "2 layers, 2 heads, 16 channels" in card
    # not the 0.9 of a later step
    assert card.endswith("| validation loss (nats per token) | 3.5000 |\n"
                         "| HellaSwag acc_norm, completion style | 0.2955 |\n")
