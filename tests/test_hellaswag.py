"""
hellaswag.py against outside truths: the harness's documented arithmetic on transformers' GPT-2, the harness itself (slow),
a plain forward of each row by itself, a local HTTP server that misbehaves.

    .venv/bin/python -m pytest tests/test_hellaswag.py              # offline, CPU
    .venv/bin/python -m pytest tests/test_hellaswag.py -m slow      # needs GPT2_REAL_DATA; the harness: pip install lm_eval
"""
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

import hellaswag
import huggingface
import scoring
from data import EOT, NUM_TOKENS, get_tokenizer
from model import GPT, GPTConfig
from runtime import Ranks

ALONE = Ranks(0, 0, 1, "cpu", False)
ROOT = os.path.dirname(os.path.abspath(hellaswag.__file__))
REAL_DATA = os.environ.get("GPT2_REAL_DATA")
needs_data = pytest.mark.skipif(not REAL_DATA, reason="GPT2_REAL_DATA names no folder")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_model(vocab_size=NUM_TOKENS, block_size=256, scale=4.0):
    """A random GPT whose predictions are far from uniform."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=block_size, vocab_size=vocab_size, n_layer=2, n_head=2, n_embd=32)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(scale)
    return model


WORDS = "the a man woman Dog is playing on roof, then she. He's THROWING 12 snow—café ball [step] runs [title] quickly".split()


def made_up(n=6, seed=0):
    """n examples of random words, with WikiHow's markup, double spaces and capitals among them."""
    draw = random.Random(seed)

    def text(least, most):
        return " ".join(draw.choice(WORDS) for _ in range(draw.randint(least, most)))
    examples = []
    for i in range(n):
        ctx_a, ctx_b = text(3, 30) + ".", draw.choice(["", "another Man", "he", "she [substeps]"])
        endings = ["[substeps]  " * (k == 1) + text(1, 12) + " [step]" * (k == 2) for k in range(4)]
        examples.append({"ind": i, "activity_label": draw.choice(["Roof shingle removal", "Home and Garden"]),
                         "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}".strip(), "endings": endings,
                         "label": draw.randrange(4), "source_id": str(i)})
    return examples


def write_jsonl(path, examples):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(example) + "\n" for example in examples)
    return str(path)


def set_of(tmp_path, examples):
    return hellaswag.prepare(write_jsonl(tmp_path / "examples.jsonl", examples))


def sums_of(model, task, style="completion", dtype="float32", **options):
    return scoring.score(model, task.encoded[style], dtype, ALONE, **options)[0]


@torch.no_grad()
def plain_sums(model, task, style):
    """The summed log-probability of each ending, every row by itself through the model, summed in float64."""
    sums = np.zeros((len(task.examples), 4))
    for i, (context, endings) in enumerate(task.encoded[style]):
        for k, ending in enumerate(endings):
            row = torch.from_numpy(np.concatenate([context, ending]).astype(np.int64))[-model.config.block_size - 1:]
            logits, _ = model(row[None, :-1], row[None, 1:])
            logprobs = logits[0, :, :NUM_TOKENS].double().log_softmax(-1).gather(-1, row[1:, None])[:, 0]
            sums[i, k] = logprobs[-len(ending):].sum()
    return sums


# -----------------------------------------------------------------------------
# the scores

@pytest.mark.parametrize("style", hellaswag.STYLES)
@pytest.mark.parametrize("vocab_size", [NUM_TOKENS, 50304])
def test_fast_path_equals_one_row_at_a_time(tmp_path, style, vocab_size):
    model, task = small_model(vocab_size), set_of(tmp_path, made_up(12))
    expected = plain_sums(model, task, style)
    assert expected.std() > 10  # the endings differ by far more than what is tolerated
    np.testing.assert_allclose(sums_of(model, task, style), expected, atol=1e-4, rtol=0)


def test_lecture_functions_agree_with_the_fast_path(tmp_path):
    model, task = small_model(), set_of(tmp_path, made_up(12))
    predicted = []
    for example in task.examples:
        tokens, mask, label = hellaswag.render_example(example)
        with torch.no_grad():
            logits, _ = model(tokens, tokens)
        predicted.append(hellaswag.get_most_likely_row(tokens, mask, logits))
        assert label == example["label"]
    sums = sums_of(model, task)
    assert predicted == hellaswag.predictions(sums, task.lengths["completion"])[1].tolist()
    assert len(set(predicted)) > 1


def test_render_example_lays_rows_out_as_the_lecture_does():
    example = {"ctx": "A man is", "endings": ["up", "is down there", "x", "y z"], "label": 1, "activity_label": "Life"}
    tokens, mask, label = hellaswag.render_example(example)
    encode = get_tokenizer().encode_ordinary
    assert label == 1 and tokens.dtype == mask.dtype == torch.int64
    assert tokens.tolist() == [encode("A man is up") + [0, 0], encode("A man is is down there"),
                               encode("A man is x") + [0, 0], encode("A man is y z") + [0]]
    assert mask.tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]]


def test_batches_and_their_order_change_nothing(tmp_path):
    model, examples = small_model(), made_up(12)
    task = set_of(tmp_path, examples)
    expected = sums_of(model, task)
    for batch_tokens in (1, 100, 700):
        np.testing.assert_allclose(sums_of(model, task, batch_tokens=batch_tokens), expected, atol=1e-4, rtol=0)
    backwards = sums_of(model, set_of(tmp_path, examples[::-1]))
    np.testing.assert_allclose(backwards[::-1], expected, atol=1e-4, rtol=0)


def test_batches_hold_every_row_once_within_the_bound():
    rows, _ = scoring.pack(hellaswag.tokenize(made_up(40), "completion"), 256)
    batches = scoring.make_batches(rows, 600)
    assert sorted(n for batch in batches for _, endings in batch for n, _ in endings) == list(range(160))
    for batch in batches:
        assert len(batch) == 1 or scoring.collate(batch)[0].size <= 600
    assert max(map(len, batches)) > 1


def test_an_ending_is_blind_to_the_others(tmp_path):
    examples = made_up(1)
    sums = sums_of(small_model(), set_of(tmp_path, examples))
    examples[0]["endings"][:3] = ["of quite another kind", "short", "and a good deal longer than all that was before"]
    changed = sums_of(small_model(), set_of(tmp_path, examples))
    assert abs(sums[0, 3] - changed[0, 3]) < 1e-4 and (np.abs(sums[0, :3] - changed[0, :3]) > 1).all()


@pytest.mark.parametrize("style", hellaswag.STYLES)
def test_text_over_the_block_loses_its_beginning(tmp_path, style):
    """The harness keeps the last block_size + 1 tokens of each context + ending; endings differ in what they lose."""
    model, task = small_model(block_size=36), set_of(tmp_path, made_up(12))
    sums, num_cut = scoring.score(model, task.encoded[style], "float32", ALONE)
    over = sum(len(c) + max(map(len, endings)) > 37 for c, endings in task.encoded[style])
    assert num_cut == over and 0 < over < 12
    np.testing.assert_allclose(sums, plain_sums(model, task, style), atol=1e-4, rtol=0)


def test_an_ending_that_fills_the_block_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="example 0 has an ending of .* block_size is 8"):
        sums_of(small_model(block_size=8), set_of(tmp_path, made_up(3)))


def test_a_vocabulary_too_small_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="vocabulary has 300 tokens"):
        sums_of(small_model(vocab_size=300), set_of(tmp_path, made_up(1)))


def test_a_uniform_model_answers_by_the_tie_rule(tmp_path):
    """All tokens equally likely: acc takes the ending of the fewest tokens, acc_norm by tokens the first."""
    model, task = small_model(scale=0.0), set_of(tmp_path, made_up(12))
    sums = sums_of(model, task)
    tokens = task.lengths["completion"]
    np.testing.assert_allclose(sums, -tokens * np.log(NUM_TOKENS), rtol=1e-6)
    by_sum, by_norm = hellaswag.predictions(sums, tokens)
    assert by_sum.tolist() == tokens.argmin(axis=1).tolist() and by_norm.tolist() == [0] * 12


def test_padded_vocabulary_scores_as_the_exported_model(tmp_path):
    """The 47 ids past GPT-2's take no probability: a model scores the same before and after they are cut off."""
    padded = small_model(50304)
    trimmed = small_model(NUM_TOKENS)
    trimmed.load_hf_state_dict(padded.hf_state_dict())
    task = set_of(tmp_path, made_up(3))
    np.testing.assert_allclose(sums_of(padded, task), sums_of(trimmed, task), atol=1e-5, rtol=0)


def test_bfloat16_is_near_float32_and_training_mode_comes_back(tmp_path):
    model, task = small_model().train(), set_of(tmp_path, made_up(6))
    np.testing.assert_allclose(sums_of(model, task, dtype="bfloat16"), sums_of(model, task), rtol=0.05)
    assert model.training


def test_an_empty_context_is_a_document_that_begins(tmp_path):
    examples = made_up(1)
    examples[0]["ctx"] = ""
    task = set_of(tmp_path, examples)
    assert task.encoded["completion"][0][0].tolist() == [EOT]
    model = small_model()
    np.testing.assert_allclose(sums_of(model, task), plain_sums(model, task, "completion"), atol=1e-4, rtol=0)


def test_figures_by_hand():
    sums = np.array([[-4.0, -2, -6, -8], [-1, -5, -5, -5], [-3, -3, -9, -9]])
    lengths = np.array([[1.0, 1, 6, 1], [1, 1, 1, 10], [1, 1, 1, 0]])
    by_sum, by_norm = hellaswag.predictions(sums, lengths)
    assert by_sum.tolist() == [1, 0, 0] and by_norm.tolist() == [2, 3, 0]
    result = hellaswag.figures(sums, lengths, np.array([1, 3, 0]))
    assert result["acc"] == pytest.approx(2 / 3) and result["acc_norm"] == pytest.approx(2 / 3)
    assert result["acc_stderr"] == pytest.approx((2 / 3 * 1 / 3 / 2) ** 0.5)


# -----------------------------------------------------------------------------
# the harness

def hf_model(model):
    """transformers' GPT2LMHeadModel with a GPT's weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=NUM_TOKENS, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                        n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    theirs.load_state_dict(model.hf_state_dict(), strict=False)
    theirs.tie_weights()
    return theirs.eval()


@torch.no_grad()
def harness_sums(theirs, example):
    """What lm-evaluation-harness computes for one example, written from its documentation: text by its rules, the whole
    text encoded at once, the tokens past those of the context scored."""
    def clean(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub("\\[.*?\\]", "", text).replace("  ", " ")
    encode = get_tokenizer().encode_ordinary
    sums = []
    for ending in example["endings"]:
        context = clean(example["activity_label"] + ": " + example["ctx_a"] + " " + example["ctx_b"].capitalize())
        whole = encode(context + " " + clean(ending))
        start = len(encode(context.rstrip()))
        ids = torch.tensor(whole)
        logprobs = theirs(ids[None, :-1]).logits[0].double().log_softmax(-1)
        sums.append(logprobs[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum().item())
    return sums


def test_lm_eval_style_equals_the_harness_arithmetic_on_transformers(tmp_path):
    model, task = small_model(50304), set_of(tmp_path, made_up(8))
    theirs = hf_model(model)
    expected = np.array([harness_sums(theirs, example) for example in task.examples])
    np.testing.assert_allclose(sums_of(model, task, "lm-eval"), expected, atol=1e-3, rtol=0)


def test_lm_eval_text_worked_out():
    example = {"activity_label": "Family Life", "ctx_a": "[header] How to win [title] Try.", "ctx_b": "the Man [step]",
               "ctx": "[header] How to win [title] Try. the Man [step]", "label": 0,
               "endings": ["Go on. [substeps] Now", "[title] rest", "a  b", "[step]"]}
    context, endings = hellaswag.texts_of(example, "lm-eval")
    assert context == "Family Life: How to win. Try. The man"  # capitalize: "Man" became "man"
    assert endings == ["  Go on. Now", "   rest", "  a b", "  "]  # the context's last space goes over to the ending


def test_context_is_split_where_the_file_has_it_whole():
    assert hellaswag.split_context("A man is on a roof. he") == ("A man is on a roof.", "he")
    assert hellaswag.split_context("How to win. Try. Be good.") == ("How to win. Try. Be good.", "")
    assert hellaswag.split_context("limes") == ("limes", "")


@needs_data
def test_split_context_is_right_on_the_raw_examples():
    for example in hellaswag.iterate_examples(os.path.join(REAL_DATA, "hellaswag_raw_250.jsonl")):
        assert hellaswag.split_context(example["ctx"]) == (example["ctx_a"], example["ctx_b"])


@pytest.mark.slow
@needs_data
def test_the_harness_itself_agrees_on_the_raw_examples(tmp_path):
    """lm-evaluation-harness, its own task file and model class, on an exported folder and the 250 raw examples:
    log-probabilities to 1e-3, and the same predictions and scores."""
    pytest.importorskip("lm_eval")
    import yaml
    from lm_eval import evaluator, tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag import utils
    path = os.path.join(REAL_DATA, "hellaswag_raw_250.jsonl")
    model, task = small_model(50304, block_size=1024), hellaswag.prepare(path)
    huggingface.write_folder(model, str(tmp_path / "hf"))
    lm = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", batch_size=8, device="cpu")
    with open(os.path.join(os.path.dirname(tasks.__file__), "hellaswag", "hellaswag.yaml"), encoding="utf-8") as f:
        config = yaml.safe_load(f.read().replace("!function ", ""))
    config |= {"task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": path}},
               "training_split": None, "process_docs": utils.process_docs}
    theirs = evaluator.simple_evaluate(lm, tasks=[config], log_samples=True, bootstrap_iters=0)
    samples = sorted(theirs["samples"]["local"], key=lambda sample: sample["doc_id"])
    expected = np.array([[response[0][0] for response in sample["resps"]] for sample in samples])
    results, sums, _ = hellaswag.evaluate(model, task, "float32", ALONE)
    assert len(samples) == 250
    print("largest difference", np.abs(sums["lm-eval"] - expected).max())
    np.testing.assert_allclose(sums["lm-eval"], expected, atol=1e-3, rtol=0)
    right = hellaswag.predictions(sums["lm-eval"], task.lengths["lm-eval"])
    for name, predicted in zip(("acc", "acc_norm"), right):
        assert [sample[name] for sample in samples] == (predicted == task.labels).astype(float).tolist()
        assert results["lm-eval"][name] == pytest.approx(theirs["results"]["local"][f"{name},none"])


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("style", hellaswag.STYLES)
def test_fast_path_equals_one_row_at_a_time_on_a_thousand_examples(style):
    model = small_model(50304, block_size=1024)
    task = hellaswag.prepare(os.path.join(REAL_DATA, "hellaswag_val_cleaned.jsonl.gz"), 1000)
    np.testing.assert_allclose(sums_of(model, task, style), plain_sums(model, task, style), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_compile_makes_few_graphs_and_changes_nothing(tmp_path):
    from torch._dynamo.testing import CompileCounterWithBackend
    model, task = small_model(), set_of(tmp_path, made_up(40))
    counter = CompileCounterWithBackend("aot_eager")
    hidden = torch.compile(model.hidden, dynamic=True, backend=counter)
    sums = sums_of(model, task, batch_tokens=250, hidden=hidden)
    np.testing.assert_allclose(sums, sums_of(model, task, batch_tokens=250), atol=1e-4, rtol=0)
    shapes = {scoring.collate(batch)[0].shape for batch in
              scoring.make_batches(scoring.pack(task.encoded["completion"], 256)[0], 250)}
    assert len(shapes) >= 6 and counter.frame_count <= 3, (len(shapes), counter.frame_count)


# -----------------------------------------------------------------------------
# the file

def test_gzip_and_plain_files_read_the_same(tmp_path):
    examples = made_up(3)
    path = write_jsonl(tmp_path / "a.jsonl", examples)
    with open(path, "rb") as f, gzip.open(f"{path}.gz", "wb") as g:
        g.write(f.read())
    assert list(hellaswag.iterate_examples(path)) == list(hellaswag.iterate_examples(f"{path}.gz")) == examples


@pytest.mark.parametrize("change, message", [
    ({"endings": None}, "lacks 'endings'"), ({"ctx": None}, "lacks 'ctx'"), ({"label": None}, "lacks 'label'"),
    ({"activity_label": None}, "lacks 'activity_label'"), ({"ctx_a": None}, "ctx_a and ctx_b must both"),
    ({"label": 4}, "label is 4"), ({"label": ""}, "invalid literal"), ({"ctx": 3}, "ctx is 3, it must be text"),
    ({"endings": ["a", "b", "c"]}, "four texts"), ({"endings": ["a", "b", " ", "d"]}, "four texts that are not empty")])
def test_a_line_that_is_no_example_is_named(tmp_path, change, message):
    examples = made_up(3)
    examples[1] = {name: value for name, value in {**examples[1], **change}.items() if value is not None}
    path = write_jsonl(tmp_path / "bad.jsonl", examples)
    with pytest.raises(ValueError, match=rf"bad.jsonl, line 2 is not a HellaSwag example: .*{message}"):
        hellaswag.prepare(path)


def test_malformed_cut_and_absent_files_are_named(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", made_up(3))
    with open(path, "a", encoding="utf-8") as f:
        f.write('{"ctx": "half a li\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 4 is not a HellaSwag example"):
        hellaswag.prepare(path)
    with open(path, "rb") as f, open(f"{path}.gz", "wb") as g:
        g.write(gzip.compress(f.read())[:-30])
    with pytest.raises(ValueError, match="bad.jsonl.gz is damaged"):
        hellaswag.prepare(f"{path}.gz")
    with pytest.raises(FileNotFoundError, match="python hellaswag.py downloads"):
        hellaswag.prepare(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="holds no examples"):
        hellaswag.prepare(write_jsonl(tmp_path / "empty.jsonl", []))


def test_labels_may_be_digits_as_on_the_hub(tmp_path):
    examples = made_up(2)
    examples[0]["label"] = "3"
    assert set_of(tmp_path, examples).labels[0] == 3


# -----------------------------------------------------------------------------
# the download

CONTENTS = os.urandom(3000)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of CONTENTS on this machine; server.ranges lists the Range headers it saw. mode: "ok", "no ranges" (sends
    all), "short" (closes the connection after 1000 bytes), "wrong" (another content), "404"."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked = self.headers.get("Range")
            self.server.ranges.append(asked)
            if self.server.mode == "404":
                return self.send_error(404)
            start = int(asked[6:-1]) if asked and self.server.mode != "no ranges" else 0
            if start >= len(CONTENTS):
                return self.send_error(416)
            body = bytes(len(CONTENTS)) if self.server.mode == "wrong" else CONTENTS[start:]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:1000] if self.server.mode == "short" else body)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.mode, server.ranges = "ok", []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(hellaswag, "VAL_BYTES", len(CONTENTS))
    monkeypatch.setattr(hellaswag, "VAL_SHA256", hashlib.sha256(CONTENTS).hexdigest())
    yield server
    server.shutdown()
    server.server_close()


def contents(path):
    with open(path, "rb") as f:
        return f.read()


@pytest.mark.parametrize("split", hellaswag.SPLITS)
def test_download_fetches_once(server, split):
    path = hellaswag.download(split)
    assert path == os.path.join("hellaswag", f"hellaswag_{split}.jsonl") and contents(path) == CONTENTS
    assert hellaswag.download(split) == path and len(server.ranges) == 1
    assert os.listdir("hellaswag") == [f"hellaswag_{split}.jsonl"]


@pytest.mark.parametrize("then", ["ok", "no ranges"])
def test_a_download_that_broke_off_is_taken_up(server, then):
    server.mode = "short"
    with pytest.raises(OSError, match="broke off.* run this again"):
        hellaswag.download()
    assert os.listdir("hellaswag") == ["hellaswag_val.jsonl.part"] and contents("hellaswag/hellaswag_val.jsonl.part")
    server.mode = then
    assert contents(hellaswag.download()) == CONTENTS
    assert server.ranges == [None, "bytes=1000-"]


def test_a_part_that_is_whole_needs_no_byte_more(server):
    os.mkdir("hellaswag")
    with open("hellaswag/hellaswag_val.jsonl.part", "wb") as f:
        f.write(CONTENTS)
    assert contents(hellaswag.download()) == CONTENTS


def test_a_wrong_file_is_refused_and_removed(server):
    server.mode = "wrong"
    with pytest.raises(OSError, match="not the file it should be.*--data FILE"):
        hellaswag.download()
    assert os.listdir("hellaswag") == []
    server.mode = "ok"
    assert contents(hellaswag.download()) == CONTENTS


def test_a_missing_file_and_a_dead_server_name_the_url(server, monkeypatch):
    server.mode = "404"
    with pytest.raises(OSError, match="cannot download http://127.0.0.1.*404.*--data FILE"):
        hellaswag.download()
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:1/")
    with pytest.raises(OSError, match="cannot download http://127.0.0.1:1/hellaswag_val.jsonl"):
        hellaswag.download()
    assert os.listdir("hellaswag") == []


# -----------------------------------------------------------------------------
# training and the command line

def test_training_gets_both_scores_and_absence_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert hellaswag.for_training("off", ALONE) is None and capsys.readouterr().out == ""
    assert hellaswag.for_training("auto", ALONE) is None
    assert capsys.readouterr().out.count("\n") == 1
    path = write_jsonl(tmp_path / "examples.jsonl", made_up(16, seed=1))  # a seed for which all the scores differ
    model = small_model()
    results, _, _ = hellaswag.evaluate(model, hellaswag.prepare(path), "float32", ALONE)
    assert all(r["acc"] != r["acc_norm"] for r in results.values())
    os.mkdir("hellaswag")
    os.rename(path, hellaswag.path_of("val"))
    scores = hellaswag.for_training("auto", ALONE)(model, "float32", lambda: None)
    assert scores == {"hella": results["completion"]["acc_norm"], "hella_lm_eval": results["lm-eval"]["acc_norm"]}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """function(*flags) -> what `python hellaswag.py CHECKPOINT --data EXAMPLES *flags` prints; run in this process."""
    monkeypatch.chdir(tmp_path)
    model = small_model()
    torch.save({"model": model.state_dict(), "config": vars(model.config), "step": 7, "val_loss": 2.5}, "model_00007.pt")
    write_jsonl("examples.jsonl", made_up(12))

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", "model_00007.pt", "--data", "examples.jsonl", "--device", "cpu",
                                          "--dtype", "float32", *flags])
        hellaswag.main()
        return capsys.readouterr().out
    return run


def test_json_and_out_hold_the_scores(command):
    result = json.loads(command("--json", "--out", "scores.jsonl", "--batch-tokens", "300"))
    task = hellaswag.prepare("examples.jsonl")
    results, sums, _ = hellaswag.evaluate(small_model(), task, "float32", ALONE)
    assert result["n"] == 12 and result["full"] is False and result["step"] == 7
    with open("scores.jsonl", encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    for style in hellaswag.STYLES:
        assert result[style] == pytest.approx(results[style])
        np.testing.assert_allclose([line[style]["logprobs"] for line in lines], sums[style], atol=1e-4)
        for name, predicted in zip(("pred", "pred_norm"), hellaswag.predictions(sums[style], task.lengths[style])):
            assert [line[style][name] for line in lines] == predicted.tolist()


def test_the_line_says_that_a_part_is_not_the_set(command):
    line = command("--limit", "5")
    assert "completion: acc 0." in line and "lm-eval: acc 0." in line and "n 5 -- NOT COMPARABLE" in line
    results = {style: {"acc": 0.3, "acc_norm": 0.3, "acc_norm_stderr": 0.0046} for style in hellaswag.STYLES}
    assert "NOT" not in hellaswag.summary(results, 10042)


def test_show_and_worst_print_losses(command):
    out = command("--show", "2")
    task = hellaswag.prepare("examples.jsonl")
    sums = sums_of(small_model(), task)
    losses = -sums / task.lengths["completion"]
    for i in range(2):
        for k in range(4):
            assert f"{k} (loss: {losses[i, k]:.4f}) {task.examples[i]['endings'][k]}\n" in out
    wrong = [i for i in range(12) if losses[i].argmin() != task.labels[i]]
    margins = {i: losses[i, task.labels[i]] - losses[i].min() for i in wrong}
    order = sorted(wrong, key=margins.get, reverse=True)
    assert len(wrong) > 3
    shown = re.findall(r"^example (\d+):", command("--worst", "3"), re.MULTILINE)
    assert shown == [str(i) for i in order[:3]]
    assert len(re.findall(r"^example (\d+):", command("--worst", "12"), re.MULTILINE)) == len(wrong)


@pytest.mark.parametrize("flags, message", [(["--limit", "0"], "--limit 0"), (["--batch-tokens", "-1"], "--batch-tokens -1"),
                                            (["--worst", "-1"], "--worst -1"), (["--dtype", "int8"], "unknown dtype")])
def test_bad_flags_are_errors(command, flags, message):
    with pytest.raises(ValueError, match=message):
        command(*flags)


def test_without_a_model_it_downloads_and_no_more(server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hellaswag.py"])
    hellaswag.main()
    assert hellaswag.path_of("val") in capsys.readouterr().out and contents(hellaswag.path_of("val")) == CONTENTS


def test_two_ranks_score_as_one(command, tmp_path):
    # 11 batches: one rank has one less
    expected = json.loads(command("--json", "--limit", "11", "--batch-tokens", "1", "--out", "one.jsonl"))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    done = subprocess.run(
        [*torchrun, os.path.join(ROOT, "hellaswag.py"), "model_00007.pt", "--data", "examples.jsonl", "--device", "cpu",
         "--dtype", "float32", "--json", "--limit", "11", "--batch-tokens", "1", "--out", "two.jsonl"],
        capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    got = json.loads(done.stdout)
    assert {**got, "seconds": 0} == {**expected, "seconds": 0}
    with open("one.jsonl", encoding="utf-8") as one, open("two.jsonl", encoding="utf-8") as two:
        for line, other in zip(one, two, strict=True):
            np.testing.assert_allclose(*[json.loads(x)["completion"]["logprobs"] for x in (line, other)], atol=1e-4)
