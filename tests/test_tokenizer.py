"""
Models with a tokenizer of their own, as other people save them: BPEs trained here on Swedish
sentences, other kinds, GPT-2's with added tokens. What is sampled, scored and exported is compared
with transformers' AutoTokenizer, generate and logits.

    .venv/bin/python -m pytest tests/test_tokenizer.py

Needs transformers (requirements-dev.txt); no network is used.
"""
import contextlib
import json
import os
import shutil
import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel,
                          PreTrainedTokenizerFast)

import convert
import hellaswag
import plots
import sample
from common import tiny_model
from run import checkpoint, settings
from run.tokenizer import GPT2, find_tokenizer, load_tokenizer

SWEDISH = ["Hej på dig, världen!", "Det var en gång en räv som bodde i skogen.",
           "Räven raskar över isen, får vi lov, får vi lov att sjunga flickornas visa?",
           "Så går de tillsammans genom skogen och över ängen, där sjön ligger blå.",
           "I dag är det 24 grader, och barnen badar i sjön hela dagen."] * 3
PROMPT = "Räven går över sjön"
EOT = "<|endoftext|>"


def byte_level(add_prefix_space=False):
    """GPT-2's kind of tokenizer, as ByteLevelBPETokenizer trains it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[EOT], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(SWEDISH, trainer)
    return tokenizer


def unigram():
    """SentencePiece's kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>", "</s>"],
                                      unk_token="<unk>", show_progress=False)
    tokenizer.train_from_iterator(SWEDISH, trainer)
    return tokenizer


def word_piece():
    """BERT's kind, as Chinese GPT-2s have; without a token that ends a text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=["[UNK]", "[SEP]"],
                                        show_progress=False)
    tokenizer.train_from_iterator(SWEDISH, trainer)
    return tokenizer


def save_gpt2(folder, vocab_size):
    """Writes config.json and weights of a small model whose predictions are far from uniform."""
    torch.manual_seed(0)
    # the ids of config.json are usually the defaults, GPT-2's
    theirs = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=128,
                                        vocab_size=vocab_size))
    for name, p in theirs.named_parameters():
        # by its positions, a model of random weights does not repeat one token
        torch.nn.init.normal_(p, std=3 if "wpe" in name else 0.3)
    theirs.save_pretrained(folder)


def make_folder(folder, kind):
    """Writes a Hugging Face folder with its own tokenizer, in one of the layouts in use."""
    folder.mkdir(exist_ok=True)
    if kind in ("unigram", "word_piece"):
        tokenizer = {"unigram": unigram, "word_piece": word_piece}[kind]()
        names = {"eos_token": "</s>"} if kind == "unigram" else {}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
        if kind == "word_piece":
            assert "eos_token" not in json.loads((folder / "tokenizer_config.json").read_text())
    else:
        tokenizer = byte_level(add_prefix_space=kind == "add_prefix_space")
        tokenizer.enable_truncation(4)  # left by a training script
        tokenizer.enable_padding(length=4)
        if kind == "vocab.json":
            tokenizer.model.save(str(folder))
        elif kind == "added_tokens.json":
            tokenizer.model.save(str(folder))
            added = {"<user>": tokenizer.get_vocab_size(), "<bot>": tokenizer.get_vocab_size() + 1}
            (folder / "added_tokens.json").write_text(json.dumps(added))
            tokenizer.add_special_tokens(list(added))
        elif kind == "tokenizer.json":
            tokenizer.save(str(folder / "tokenizer.json"))
        else:
            fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOT)
            fast.save_pretrained(folder)
    save_gpt2(folder, tokenizer.get_vocab_size())


KINDS = ["vocab.json", "tokenizer.json", "added_tokens.json", "save_pretrained", "add_prefix_space",
         "unigram", "word_piece"]


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / request.param
    make_folder(folder, request.param)
    return folder


@pytest.fixture(scope="module")
def swedish(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "swedish"
    make_folder(folder, "save_pretrained")
    return folder


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory):
    """A small model exported with GPT-2's tokenizer, as from_pretrained("gpt2") saves it."""
    folder = tmp_path_factory.mktemp("models") / "gpt2"
    model = tiny_model(std=0.3, vocab_size=50257, n_embd=4, block_size=64)
    convert.write_hf(model, str(folder))
    return folder


FLOAT32 = ["--dtype", "float32", "--device", "cpu"]
GREEDY = [*FLOAT32, "--temperature", 0, "--num-samples", 1, "--max-new-tokens"]


def command(module, *arguments):
    """Runs `python module.py arguments` in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{module.__name__}.py", *map(str, arguments)])
        patch.setattr(module, "keep_freed_memory", lambda: None, raising=False)
        module.main()


def theirs_of(folder):
    return (AutoTokenizer.from_pretrained(folder),
            AutoModelForCausalLM.from_pretrained(folder).eval())


# -----------------------------------------------------------------------------
# sampling

def test_a_sample_is_the_text_that_transformers_generates(folder, capsys):
    """It was GPT-2's tokens, with exit status 0."""
    tokenizer, model = theirs_of(folder)
    ids = tokenizer(PROMPT, add_special_tokens=False, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=40, pad_token_id=0,
                         eos_token_id=tokenizer.eos_token_id or len(tokenizer))
    start = len(tokenizer.decode(ids[0]))
    expected = tokenizer.decode(out[0])[start:].removesuffix(tokenizer.eos_token or "none")
    assert len(set(expected)) > 2
    for flags in ([], ["--stream"]):
        command(sample, folder, "--prompt", PROMPT, *GREEDY, 40, *flags)
        printed = capsys.readouterr().out.split("\n", 1)[1]
        assert printed == f"{PROMPT}{expected}\n"


def test_a_text_ends_at_the_end_token_of_the_tokenizer(swedish, tmp_path, capsys):
    tokenizer, model = theirs_of(swedish)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    new = model.generate(ids, do_sample=False, max_new_tokens=9, pad_token_id=0, eos_token_id=0)
    new = new[0, ids.shape[1]:].tolist()
    end = next(token for token in new[3:] if token not in new[:3])
    shutil.copytree(swedish, tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["eos_token"] = {"content": tokenizer.convert_ids_to_tokens(end), "lstrip": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(tmp_path), 400).eot == end != load_tokenizer(str(swedish), 400).eot
    command(sample, tmp_path, "--prompt", PROMPT, *GREEDY, 9)
    assert capsys.readouterr().out.endswith(
        PROMPT + tokenizer.decode(new[:new.index(end)]) + "\n")


def test_an_empty_prompt_starts_with_the_end_token_0(swedish, capsys):
    tokenizer, model = theirs_of(swedish)
    assert tokenizer.eos_token_id == 0
    new = model.generate(torch.tensor([[0]]), do_sample=False, max_new_tokens=9, pad_token_id=0,
                         eos_token_id=0)[0, 1:]
    command(sample, swedish, *GREEDY, 9)
    assert capsys.readouterr().out.split("\n", 1)[1] == tokenizer.decode(new) + "\n"


def test_without_an_end_token_a_prompt_is_needed(tmp_path):
    make_folder(tmp_path, "word_piece")
    with pytest.raises(ValueError, match="the prompt is empty, and this tokenizer has no <|endof"):
        command(sample, tmp_path)


def test_lone_surrogates_are_a_value_error(swedish):
    with pytest.raises(ValueError, match="surrogates not allowed"):
        command(sample, swedish, "--prompt", "a\udcff")


# -----------------------------------------------------------------------------
# scoring

@torch.no_grad()
def test_hellaswag_is_scored_in_the_folders_tokens(folder, tmp_path):
    example = {"ind": 1, "ctx": "Räven går över isen. Den", "activity_label": "Skog", "label": 2,
               "endings": ["badar i sjön.", "sjunger en visa", "bodde i skogen.", "är blå"]}
    (tmp_path / "hella.jsonl").write_text(json.dumps(example) + "\n")
    command(hellaswag, folder, "--data", tmp_path / "hella.jsonl", *FLOAT32,
            "--out", tmp_path / "scores.jsonl")
    scores = json.loads((tmp_path / "scores.jsonl").read_text())["completion"]
    tokenizer, model = theirs_of(folder)

    def encode(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    for ending, logprob, length in zip(example["endings"], scores["logprobs"], scores["lengths"]):
        context, ending = encode(example["ctx"]), encode(f" {ending}")
        ids = torch.tensor([context + ending])
        logprobs = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])
        assert length == len(ending)
        np.testing.assert_allclose(logprob, logprobs[0, -len(ending):].sum(), rtol=1e-4)


# -----------------------------------------------------------------------------
# pictures

@pytest.fixture
def figures(monkeypatch):
    """The figures that plots.py would write, {file name: Figure}."""
    drawn = {}
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: drawn.update(
        {os.path.basename(path): figure}))
    return drawn


def test_attention_is_labelled_with_the_folders_tokens(swedish, figures):
    """The labels were GPT-2's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(swedish)
    command(plots, "--weights", swedish, "--prompt", PROMPT)
    labels = [label.get_text() for label in figures["attention_0.png"].axes[0].get_xticklabels()]
    assert labels == [tokenizer.decode([token]) for token in tokenizer(PROMPT)["input_ids"]]


# -----------------------------------------------------------------------------
# info, export, convert, --init-from

def check_export(source, out, theirs, their_model):
    """Exports source, which is theirs; asserts that transformers gets the same ids and logits."""
    command(convert, "export", source, out)
    ours, our_model = theirs_of(out)
    text = f"{PROMPT}, \n\n  naïve 日本 <user>x{EOT}"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert len(ours) == len(theirs) and ours.eos_token_id == theirs.eos_token_id
    size = min(len(theirs), their_model.config.vocab_size)  # either may be the larger one
    ids = torch.tensor([[5, 9, 63, size - 1]])
    logits, expected = our_model(ids).logits, their_model(ids).logits[..., :size]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    return our_model


def test_an_exported_folder_has_the_tokenizer_of_the_source(folder, tmp_path, capsys):
    """It was GPT-2's."""
    tokenizer, model = theirs_of(folder)
    our_model = check_export(folder, tmp_path / "out", tokenizer, model)
    for name in os.listdir(folder):
        if "token" in name or name in ("vocab.json", "merges.txt"):
            assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    assert our_model.config.eos_token_id == tokenizer.eos_token_id
    capsys.readouterr()
    command(convert, "info", folder)
    size = our_model.config.vocab_size
    assert f"  vocabulary  {size} (its own tokenizer's)\n" in capsys.readouterr().out


@pytest.mark.parametrize("out", ["a.pt", "a.bin"])
def test_a_file_holds_no_tokenizer_but_gpt2s(swedish, gpt2_folder, tmp_path, out):
    with pytest.raises(ValueError, match=f"has its own tokenizer, which a {out[1:]} file cannot"):
        command(convert, "convert", swedish, tmp_path / out)
    assert not (tmp_path / out).exists()
    command(convert, "convert", gpt2_folder, tmp_path / out)
    command(sample, tmp_path / out, "--max-new-tokens", 1)


def test_init_from_needs_gpt2s_tokens(swedish, gpt2_folder):
    with pytest.raises(ValueError, match="swedish has its own tokenizer, and the data is in GPT-2"):
        settings.shape_of_weights({"init_from": str(swedish)})
    assert settings.shape_of_weights({"init_from": str(gpt2_folder)})["vocab_size"] == 50257


@pytest.mark.parametrize("vocab_size, known", [
    (50257, True), (50304, True), (50688, True), (50256, False), (50260, False), (52000, False),
    (32000, False), (65, False)])
def test_a_file_is_taken_for_gpt2s_by_the_size_of_its_vocabulary(tmp_path, vocab_size, known):
    """Any larger vocabulary was; llm.c's files were cut to 50257 rows."""
    path = str(tmp_path / "a.pt")
    model = tiny_model(vocab_size=vocab_size, n_embd=2, n_layer=1)
    checkpoint.save_file({**checkpoint.model_contents(model, None), "step": 1}, path)
    command(convert, "convert", path, tmp_path / "a.bin")
    rows = int(np.fromfile(tmp_path / "a.bin", "<i4", 4)[3])
    assert rows == (50257 if known else vocab_size)
    if known:
        assert load_tokenizer(path, vocab_size) is GPT2
        return
    for module in (sample, hellaswag):
        with pytest.raises(ValueError, match=f"a.pt has a vocabulary of {vocab_size} tokens, not"):
            command(module, path, *(["--data", "x"] if module is hellaswag else []))


# -----------------------------------------------------------------------------
# GPT-2's tokenizer

@pytest.mark.parametrize("files", [["tokenizer.json"], ["vocab.json", "merges.txt"], []])
def test_gpt2s_files_are_recognized(gpt2_folder, tmp_path, files):
    for name in ["config.json", "model.safetensors", *files]:
        shutil.copy(gpt2_folder / name, tmp_path)
    assert find_tokenizer(str(tmp_path), 50257) is GPT2
    if "vocab.json" in files:  # with another id, it is not GPT-2's
        vocab = json.loads((tmp_path / "vocab.json").read_text())
        vocab["!"], vocab['"'] = vocab['"'], vocab["!"]
        (tmp_path / "vocab.json").write_text(json.dumps(vocab))
        assert find_tokenizer(str(tmp_path), 50257).encode("!").tolist() == [1]


def test_added_tokens_are_not_padding(gpt2_folder, tmp_path, capsys, figures):
    """Their rows were cut on export: the usual recipe for chat and padding tokens."""
    tokenizer, model = theirs_of(gpt2_folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>",
                                  "additional_special_tokens": ["<user>", "<bot>"]})
    model.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        model.transformer.wte.weight[50257:] = 3 * torch.randn(model.config.vocab_size - 50257, 4)
    source = tmp_path / "added"
    model.save_pretrained(source)
    tokenizer.save_pretrained(source)
    ours = load_tokenizer(str(source), model.config.vocab_size)
    assert ours.num_tokens == len(tokenizer) == 50260
    assert ours.encode("a <user>").tolist() == tokenizer("a <user>")["input_ids"]
    exported = check_export(source, tmp_path / "out", tokenizer, model)
    assert exported.config.vocab_size == 50260
    capsys.readouterr()
    command(convert, "info", source)
    assert "50304 (its own tokenizer's 50260, padded)" in capsys.readouterr().out
    command(plots, "--weights", source)
    assert figures["norms.png"].axes[0].lines[1].get_xdata()[0] == 50260
    # sampled, too
    capsys.readouterr()
    ids = tokenizer("<user>", return_tensors="pt")["input_ids"]
    new = model.generate(ids, do_sample=False, max_new_tokens=20, pad_token_id=0,
                         suppress_tokens=list(range(50260, 50304)))  # the padding
    assert max(new[0, 1:].tolist()) > 50256
    command(sample, source, "--prompt", "<user>", *GREEDY, 20)
    assert capsys.readouterr().out.split("\n", 1)[1] == tokenizer.decode(new[0]) + "\n"


def test_a_token_that_the_model_lacks_may_be_added(gpt2_folder, tmp_path, capsys):
    """A pad_token without resize_token_embeddings."""
    tokenizer, _ = theirs_of(gpt2_folder)
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    tokenizer.save_pretrained(tmp_path)
    command(sample, tmp_path, "--prompt", "Hello", "--num-samples", 1)
    command(convert, "export", tmp_path, tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.vocab_size == 50257


def test_a_tokenizer_that_cannot_be_read_is_one_line(swedish, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(swedish / name, tmp_path)
    size = json.loads((tmp_path / "config.json").read_text())["vocab_size"]
    (tmp_path / "spiece.model").write_bytes(b"\x00")
    with pytest.raises(ValueError, match="neither tokenizer.json nor vocab.json.*save_pretrained"):
        load_tokenizer(str(tmp_path), size)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="the tokenizer of .* is damaged"):
        load_tokenizer(str(tmp_path), size)
    shutil.copy(swedish / "tokenizer.json", tmp_path)
    with pytest.raises(ValueError, match="has 38. tokens, its model only 64"):
        load_tokenizer(str(tmp_path), 64)


# -----------------------------------------------------------------------------
# an interrupted export

def killed_export(model, folder, calls):
    """Whether write_hf completes in a process that is killed before its next rename or removal."""
    pid = os.fork()
    if pid:
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert status in (0, 9)  # 1: an exception
        return status == 0
    left = [calls]

    def counted(function):
        def call(*args):
            if left[0] == 0:
                os._exit(9)
            left[0] -= 1
            return function(*args)
        return call

    status = 1
    with contextlib.suppress(BaseException):
        os.replace, os.remove = counted(os.replace), counted(os.remove)
        convert.write_hf(model, str(folder))
        status = 0
    os._exit(status)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_export_never_leaves_a_config_with_other_weights(gpt2_folder, tmp_path,
                                                                  monkeypatch):
    """The config.json of the new model was there first, its weights last."""
    monkeypatch.setattr(convert, "tokenizer_files", lambda block_size: {"vocab.json": "{}"})
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    new = tiny_model(std=0.3, seed=1, vocab_size=50257, n_embd=4, n_head=1, block_size=64)
    old_weights = (gpt2_folder / "model.safetensors").read_bytes()
    seen = set()
    for calls in range(99):
        folder = tmp_path / str(calls)
        folder.mkdir()
        for name in ("config.json", "model.safetensors", "tokenizer.json"):
            shutil.copy(gpt2_folder / name, folder)
        (folder / "notes.txt").write_text("mine")
        completed = killed_export(new, folder, calls)
        assert (folder / "notes.txt").exists()
        n_head = json.loads((folder / "config.json").read_text())["n_head"]
        weights = folder / "model.safetensors"
        if weights.exists():
            is_old = weights.read_bytes() == old_weights
            assert is_old == (n_head == 2)
            seen.add("old" if is_old else "new")
        else:
            seen.add("none")
        if completed:
            break
    assert seen == {"old", "none", "new"} and calls > 6
    assert not (folder / "tokenizer.json").exists()  # of the old model
    # the next export removes what the killed one left
    convert.write_hf(new, str(tmp_path / "3"))
    assert sorted(os.listdir(tmp_path / "3")) == sorted(os.listdir(folder))
