"""
An exported folder against outside truths: transformers' models, tokenizers and pipeline, offline; tiktoken; the hashes that
tiktoken pins for OpenAI's own vocabulary files; huggingface_hub's client against a small Hub of our own.

    .venv/bin/python -m pytest tests/test_huggingface.py

Needs nothing but requirements-dev.txt; no network is used.
"""
import base64
import hashlib
import http.server
import json
import os
import random
import subprocess
import sys
import threading

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import checkpoint
import huggingface
from data import EOT, get_tokenizer
from model import GPT, GPTConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our model with a padded vocabulary, the folder that `checkpoint.py export` made of its run folder)"""
    run_dir, folder = tmp_path_factory.mktemp("log") / "run", tmp_path_factory.mktemp("out") / "hf"
    run_dir.mkdir()
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, block_size=32, vocab_size=50304)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    contents = {"model": model.state_dict(), "config": vars(model.config), "val_loss": 3.5}
    checkpoint.save(str(run_dir), 20, contents, {})
    (run_dir / "log.txt").write_text("10 val 4.0\n20 val 3.5\n20 hella 0.2955\n30 hella 0.9\n")
    (run_dir / "config.json").write_text(json.dumps({"config": {"data": "/home/me/secret/books", "lr": 0.002},
                                                     "command": ["/home/me/train_gpt2.py"], "device": "a CPU"}))
    done = run("export", run_dir, folder)
    assert done.returncode == 0, done.stderr
    return model, folder


def run(*arguments, **environment):
    return subprocess.run([sys.executable, "checkpoint.py", *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          timeout=120, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment})


# -----------------------------------------------------------------------------
# the tokenizer

def test_vocabulary_and_merges_are_openais_files_byte_for_byte(exported):
    for name, sha256 in (("vocab.json", "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783"),   # encoder.json
                         ("merges.txt", "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5")):  # vocab.bpe
        assert hashlib.sha256((exported[1] / name).read_bytes()).hexdigest() == sha256, name


def hard_texts():
    """Texts that tokenizers disagree about, if they do."""
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


def test_token_ids_are_tiktokens_on_hard_text_and_decode_to_it(exported):
    theirs, ours = AutoTokenizer.from_pretrained(exported[1]), get_tokenizer()
    count = 0
    for text in hard_texts():
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text, allowed_special="all"), repr(text[:60])
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
        count += len(ids)
    assert count > 200_000
    assert [theirs.eos_token_id, theirs.bos_token_id, len(theirs), theirs.model_max_length] == [EOT, EOT, EOT + 1, 32]


def test_every_single_token_means_the_same_bytes(exported):
    """Bytes that are no whole character too: those ids come from no text, but a model may draw them."""
    with open(exported[1] / "vocab.json", encoding="utf-8") as f:
        vocab = json.load(f)
    letters = {letter: byte for byte, letter in huggingface.bytes_to_unicode().items()}
    assert len(letters) == 256 and vocab["!"] == 0 and vocab["Ġ"] == 220
    for word, rank in vocab.items():
        if rank != EOT:
            assert bytes(letters[letter] for letter in word) == get_tokenizer().decode_single_token_bytes(rank)


# -----------------------------------------------------------------------------
# the model

def test_transformers_computes_what_we_compute(exported):
    model, folder = exported
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "GPT2LMHeadModel" and theirs.dtype == torch.float32
    assert theirs.lm_head.weight.data_ptr() == theirs.transformer.wte.weight.data_ptr()
    idx = torch.randint(50257, (3, 32))
    assert (theirs(idx).logits - model(idx, idx)[0][..., :50257]).abs().max() < 1e-4
    again, _ = checkpoint.load_model(str(folder))
    assert torch.equal(again.lm_head.weight, model.lm_head.weight[:50257])


def test_the_pipeline_writes_text_and_stops(exported):
    generate = pipeline("text-generation", model=str(exported[1]))
    text = generate("Hello, I'm", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    tokens = get_tokenizer().encode_ordinary("Hello, I'm")
    for _ in range(5):
        tokens.append(exported[0](torch.tensor([tokens]))[0][0, -1, :50257].argmax().item())
    assert text == get_tokenizer().decode(tokens)


def test_save_pretrained_writes_the_same_tensors_and_tokenizer_again(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported[1]).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(exported[1]).save_pretrained(tmp_path)
    first, second = (safe_open(folder / "model.safetensors", "pt") for folder in (exported[1], tmp_path))
    assert set(first.keys()) == set(second.keys()) and "lm_head.weight" not in first.keys()
    assert all(torch.equal(first.get_tensor(name), second.get_tensor(name)) for name in first.keys())
    text = "Ünï côdé 👋 <|endoftext|> x\n\n  y"
    assert AutoTokenizer.from_pretrained(tmp_path)(text) == AutoTokenizer.from_pretrained(exported[1])(text)
    loaded, _ = checkpoint.load_model(str(tmp_path))
    assert torch.equal(loaded.lm_head.weight, exported[0].lm_head.weight[:50257])


def test_bfloat16_halves_the_file_and_rounds_once(exported, tmp_path):
    model = exported[0]
    huggingface.write_folder(model, str(tmp_path / "hf"), "bfloat16")
    sizes = [os.path.getsize(folder / "model.safetensors") for folder in (exported[1], tmp_path / "hf")]
    assert sizes[1] < 0.51 * sizes[0]
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert theirs.dtype == torch.bfloat16
    assert torch.equal(theirs.transformer.h[0].attn.c_attn.weight, model.transformer.h[0].attn.c_attn.weight.t().bfloat16())
    assert torch.equal(checkpoint.load_model(str(tmp_path / "hf"))[0].transformer.wpe.weight,
                       model.transformer.wpe.weight.bfloat16().float())


def test_a_model_without_biases_computes_the_same_over_there(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=8, vocab_size=50257, bias=False)).eval()
    huggingface.write_folder(model, str(tmp_path / "hf"))
    idx = torch.randint(50257, (2, 8))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert torch.allclose(theirs(idx).logits, model(idx, idx)[0], atol=1e-4)


def test_weights_that_transformers_cut_into_several_files_load(exported, tmp_path):
    AutoModelForCausalLM.from_pretrained(exported[1]).save_pretrained(tmp_path, max_shard_size="1MB")
    assert (tmp_path / "model.safetensors.index.json").exists() and not (tmp_path / "model.safetensors").exists()
    ours, whole = checkpoint.load_model(str(tmp_path))[0], checkpoint.load_model(str(exported[1]))[0]
    assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), whole.parameters(), strict=True))


def test_the_card_has_the_runs_facts_and_scores_of_its_step_and_no_path(exported):
    card = (exported[1] / "README.md").read_text()
    for words in ("library_name: transformers", "2 layers, 2 heads, 16 channels", "| step | 20 |", "| training data | books |",
                  "| lr | 0.002 |", "| validation loss (nats a token) | 3.5000 |", "completion style | 0.2955 |"):
        assert words in card
    assert "/home" not in card and "secret" not in card and "0.9" not in card


def test_an_interrupted_export_leaves_nothing(exported, tmp_path, monkeypatch):
    def interrupt(fd):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        huggingface.write_folder(exported[0], str(tmp_path / "hf"))
    assert os.listdir(tmp_path) == []


# -----------------------------------------------------------------------------
# the Hub

class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the Hub as an upload needs: create a repository, take large files by LFS, small ones with the commit."""

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


def test_push_uploads_the_folder_as_it_is(exported, hub, tmp_path):
    out = tmp_path / "hf"
    done = run("export", exported[1], out, "--push", "me/mine", HF_HUB_OFFLINE="0", HF_TOKEN="hf_secret",
               HF_HOME=str(tmp_path / "home"), HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}", HF_HUB_DISABLE_XET="1")
    assert done.returncode == 0, done.stderr
    assert hub.created[0]["name"] == "mine" and hub.tokens == {"Bearer hf_secret"}
    assert hub.files == {name: (out / name).read_bytes() for name in os.listdir(out)} and len(hub.files) == 8
    assert "hf_secret" not in done.stdout + done.stderr


NOWHERE = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}


def test_push_without_a_token_is_one_line_before_anything_is_written(exported, tmp_path):
    done = run("export", exported[1], tmp_path / "hf", "--push", "me/mine", HF_TOKEN="", HF_HOME=str(tmp_path), **NOWHERE)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "hf auth login" in done.stderr
    assert not (tmp_path / "hf").exists()


@pytest.mark.slow  # huggingface_hub tries for a while
def test_push_without_a_hub_says_so_and_leaves_the_folder(exported, tmp_path):
    done = run("export", exported[1], tmp_path / "hf", "--push", "me/mine", HF_TOKEN="hf_x", HF_HOME=str(tmp_path), **NOWHERE)
    assert done.returncode == 2 and "error: could not push to me/mine" in done.stderr.splitlines()[-1]
    assert (tmp_path / "hf" / "model.safetensors").exists()
