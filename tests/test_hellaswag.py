"""
hellaswag.py compared with independent references: one forward per ending, the lecture's four rows,
lm-evaluation-harness's documented arithmetic on transformers' GPT-2, the harness itself (slow).
The download is tested with a local HTTP server.

    .venv/bin/python -m pytest tests/test_hellaswag.py              # offline, CPU
    .venv/bin/python -m pytest tests/test_hellaswag.py -m slow      # needs `pip install lm_eval`

Tests on real examples need GPT2_REAL_DATA, a folder with hellaswag_raw_250.jsonl and
hellaswag_val_cleaned.jsonl.gz.
"""
import functools
import gzip
import hashlib
import http.server
import json
import os
import random
import re
import sys
import threading

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import convert
import hellaswag
from bench.hellaswag import lecture_rows
from common import ONE, ROOT, launcher, python, tiny_model
from convert import hf_state_dict
from data import EOT, NUM_TOKENS, get_tokenizer
from hellaswag import get_most_likely_row
from run.cli import StopSignals

REAL_DATA = os.environ.get("GPT2_REAL_DATA")
needs_data = pytest.mark.skipif(not REAL_DATA, reason="GPT2_REAL_DATA is not set")
TOLERANCE = dict(atol=1e-4, rtol=0)  # of float32 sums


def small_model(vocab_size=NUM_TOKENS, block_size=256, scale=4.0):
    """A random GPT whose predictions are far from uniform."""
    model = tiny_model(vocab_size=vocab_size, block_size=block_size, n_embd=32)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() > 1:
                p.mul_(scale)
    return model


def overflowing_model():
    """A model with finite weights whose activations are infinite in float16."""
    model = small_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] = 1e5
    return model


WORDS = ("the a man woman Dog is playing on roof, then she. He's THROWING 12 snow—café ball [step]"
         " runs [title] quickly").split()


def make_examples(n=6, seed=0):
    """n examples of random words, some with WikiHow's markup, double spaces and capitals."""
    rng = random.Random(seed)

    def text(min_words, max_words):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(min_words, max_words)))
    examples = []
    for i in range(n):
        ctx_a = text(3, 30) + "."
        ctx_b = rng.choice(["", "another Man", "he", "she [substeps]"])
        endings = [text(1, 12) for _ in range(4)]
        endings[1] = "[substeps]  " + endings[1]
        endings[2] += " [step]"
        examples.append({"ind": i, "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings,
                         "activity_label": rng.choice(["Roof shingle removal", "Home and Garden"]),
                         "ctx": f"{ctx_a} {ctx_b}".strip(), "label": rng.randrange(4)})
    return examples


def write_jsonl(path, examples):
    path.write_text("".join(json.dumps(example) + "\n" for example in examples))
    return str(path)


def make_dataset(tmp_path, examples):
    return hellaswag.prepare(write_jsonl(tmp_path / "examples.jsonl", examples))


def compute_sums(model, dataset, style="completion", dtype="float32", **options):
    """The first result of hellaswag.score, (n, 4), on a single process."""
    return hellaswag.score(model, dataset.rendered[style], dtype, ONE, **options)[0]


@torch.no_grad()
def reference_sums(model, dataset, style):
    """The log-probability of each ending: one forward per ending, log-softmax in float64."""
    sums = np.zeros((len(dataset.examples), 4))
    for i, (context, endings) in enumerate(dataset.rendered[style]):
        for k, ending in enumerate(endings):
            row = torch.from_numpy(np.concatenate([context, ending]).astype(np.int64))
            row = row[-model.config.block_size - 1:]
            x = model.hidden(row[None, :-1])[0, -len(ending):]
            logprobs = model.lm_head(x)[:, :NUM_TOKENS].double().log_softmax(-1)
            sums[i, k] = logprobs.gather(-1, row[-len(ending):, None]).sum()
    return sums


# -----------------------------------------------------------------------------
# the scores

@pytest.mark.parametrize("style", hellaswag.STYLES)
@pytest.mark.parametrize("vocab_size", [NUM_TOKENS, 50304])
def test_fast_path_equals_one_forward_per_ending(tmp_path, style, vocab_size):
    model, dataset = small_model(vocab_size), make_dataset(tmp_path, make_examples(12))
    expected = reference_sums(model, dataset, style)
    assert expected.std() > 10  # the endings differ by far more than the tolerance
    for options in ({}, {"batch_tokens": 1}, {"batch_tokens": 100}, {"batch_tokens": 700}):
        sums = compute_sums(model, dataset, style, **options)
        np.testing.assert_allclose(sums, expected, **TOLERANCE)


@torch.no_grad()
def test_the_prediction_is_the_lectures(tmp_path):
    """As build-nanogpt's hellaswag.py: four padded rows, the mean loss of the masked tokens."""
    model, dataset = small_model(), make_dataset(tmp_path, make_examples(12))
    expected = []
    for example in dataset.examples:
        tokens, mask = lecture_rows(example)
        logits = model.lm_head(model.hidden(tokens))
        losses = F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")
        losses = (losses * mask[:, 1:]).sum(dim=1) / mask[:, 1:].sum(dim=1)
        expected.append(losses.argmin().item())
    sums = compute_sums(model, dataset)
    assert get_most_likely_row(sums, dataset.lengths["completion"]).tolist() == expected
    assert len(set(expected)) > 1


def test_render_example_has_the_tokens_of_the_lecture():
    example = {"ctx": "A man is", "endings": ["up", "is down there", "x", "y z"]}
    context, endings = hellaswag.render_example(example)
    encode = get_tokenizer().encode_ordinary
    assert context.tolist() == encode("A man is")
    rows = [[*context, *ending] for ending in endings]
    assert rows == [encode(f"A man is {ending}") for ending in example["endings"]]
    tokens, mask = lecture_rows(example)
    assert tokens.tolist() == [rows[0] + [0, 0], rows[1], rows[2] + [0, 0], rows[3] + [0]]
    assert mask.sum(dim=1).tolist() == [1, 3, 1, 2] and mask[:, :3].sum() == 0


def test_batches_contain_every_ending_once_and_respect_batch_tokens():
    rendered = [hellaswag.render_example(example) for example in make_examples(40)]
    rows, _ = hellaswag.pack(rendered, 256)
    batches = hellaswag.make_batches(rows, 600)
    ids = [ending_id for batch, _ in batches for _, endings in batch for ending_id, _ in endings]
    assert sorted(ids) == list(range(160))
    for batch, T in batches:
        assert len(batch) == 1 or hellaswag.collate(batch, T)[0].size <= 600
    assert max(len(batch) for batch, _ in batches) > 1


@pytest.mark.parametrize("style", hellaswag.STYLES)
def test_texts_longer_than_the_block_are_truncated(tmp_path, style):
    """As in the harness, the last block_size + 1 tokens of context + ending are kept."""
    model, dataset = small_model(block_size=36), make_dataset(tmp_path, make_examples(12))
    sums, num_truncated = hellaswag.score(model, dataset.rendered[style], "float32", ONE)
    too_long = [len(context) + max(map(len, endings)) > 37
                for context, endings in dataset.rendered[style]]
    assert num_truncated == sum(too_long) and 0 < sum(too_long) < 12
    np.testing.assert_allclose(sums, reference_sums(model, dataset, style), **TOLERANCE)


def test_bfloat16_is_close_to_float32_and_training_mode_is_restored(tmp_path):
    model, dataset = small_model().train(), make_dataset(tmp_path, make_examples(6))
    bfloat16 = compute_sums(model, dataset, dtype="bfloat16")
    np.testing.assert_allclose(bfloat16, compute_sums(model, dataset), rtol=0.05)
    assert model.training


def test_an_empty_context_becomes_endoftext(tmp_path):
    examples = make_examples(1)
    examples[0]["ctx"] = ""
    dataset = make_dataset(tmp_path, examples)
    assert dataset.rendered["completion"][0][0].tolist() == [EOT]
    model = small_model()
    np.testing.assert_allclose(compute_sums(model, dataset),
                               reference_sums(model, dataset, "completion"), **TOLERANCE)


def test_metrics_of_a_worked_example():
    sums = np.array([[-4.0, -2, -6, -8], [-1, -5, -5, -5], [-3, -3, -9, -9]])
    lengths = np.array([[1.0, 1, 6, 1], [1, 1, 1, 10], [1, 1, 1, 0]])
    assert get_most_likely_row(sums).tolist() == [1, 0, 0]
    assert get_most_likely_row(sums, lengths).tolist() == [2, 3, 0]
    result = hellaswag.metrics(sums, lengths, np.array([1, 3, 3]))
    assert result["acc"] == result["acc_norm"] == pytest.approx(1 / 3)
    assert result["acc_stderr"] == pytest.approx((1 / 3 * 2 / 3 / 2) ** 0.5)
    sums[1, 1] = np.nan  # argmax takes NaN for the largest
    assert np.isnan(list(hellaswag.metrics(sums, lengths, np.array([1, 3, 3])).values())).all()


@pytest.fixture
def stop_after_two_batches(monkeypatch):
    """Requests a stop, as SIGTERM would, in the second batch; returns the list of the batches."""
    batches, score_batch = [], hellaswag.score_batch

    def score_batch_and_stop(model, *batch):
        batches.append(batch)
        if len(batches) == 2:
            monkeypatch.setattr(StopSignals, "received", "SIGTERM")
        return score_batch(model, *batch)
    monkeypatch.setattr(hellaswag, "score_batch", score_batch_and_stop)
    return batches


def test_a_stop_request_ends_the_evaluation_before_the_next_batch(tmp_path, stop_after_two_batches):
    model, dataset = small_model().train(), make_dataset(tmp_path, make_examples(12))
    assert hellaswag.evaluate(model, dataset, "float32", ONE, batch_tokens=1) is None
    assert len(stop_after_two_batches) == 2 and model.training
    assert hellaswag.score_in_training(model, dataset, "float32", ONE) == {}
    assert len(stop_after_two_batches) == 2  # the stop is still requested: no further batch


def test_a_stop_request_during_the_last_batch_keeps_the_scores(tmp_path, stop_after_two_batches):
    """There are two batches, one per style: the evaluation is complete."""
    dataset = make_dataset(tmp_path, make_examples(2))
    scores = hellaswag.score_in_training(small_model(), dataset, "float32", ONE)
    assert len(stop_after_two_batches) == 2 and len(scores) == 4


# -----------------------------------------------------------------------------
# lm-evaluation-harness

def hf_model(model):
    """transformers' GPT2LMHeadModel with a GPT's weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=NUM_TOKENS, n_positions=c.block_size,
                                        n_embd=c.n_embd, n_layer=c.n_layer, n_head=c.n_head))
    theirs.load_state_dict(hf_state_dict(model), strict=False)
    theirs.tie_weights()
    return theirs.eval()


@torch.no_grad()
def harness_sums(theirs, example):
    """What lm-evaluation-harness computes for one example, from its documentation.

    It preprocesses the text, encodes context + ending at once, and scores the tokens after those
    of the context.
    """
    def preprocess(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub("\\[.*?\\]", "", text).replace("  ", " ")
    encode = get_tokenizer().encode_ordinary
    context = preprocess(f"{example['activity_label']}: {example['ctx_a']}"
                         f" {example['ctx_b'].capitalize()}")
    start = len(encode(context.rstrip()))
    sums = []
    for ending in example["endings"]:
        ids = torch.tensor(encode(context + " " + preprocess(ending)))
        logprobs = theirs(ids[None, :-1]).logits[0].double().log_softmax(-1)
        sums.append(logprobs[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum().item())
    return sums


def test_lm_eval_style_equals_the_harness_arithmetic_on_transformers(tmp_path):
    """Also for examples without ctx_a and ctx_b, which the harness needs."""
    model, examples = small_model(50304), make_examples(8)
    theirs = hf_model(model)
    expected = [harness_sums(theirs, example) for example in examples]
    for example in examples[::2]:
        del example["ctx_a"], example["ctx_b"]
    dataset = make_dataset(tmp_path, examples)
    np.testing.assert_allclose(compute_sums(model, dataset, "lm-eval"), expected, atol=1e-3, rtol=0)


def test_lm_eval_text_of_a_worked_example():
    example = {"activity_label": "Family Life", "ctx_a": "[header] How to win [title] Try.",
               "ctx_b": "the Man [step]",
               "endings": ["Go on. [substeps] Now", "[title] rest", "a  b", "[step]"]}
    context, endings = hellaswag.render_example(example, "lm-eval")
    decode = get_tokenizer().decode
    # capitalize lowercases "Man"; the context's trailing space moves to the ending
    assert decode(context) == "Family Life: How to win. Try. The man"
    assert [decode(ending) for ending in endings] == ["  Go on. Now", "   rest", "  a b", "  "]


@pytest.mark.parametrize("ctx, parts", [
    ("A man is on a roof. he", ("A man is on a roof.", "he")),
    ("How to win. Try. Be good.", ("How to win. Try. Be good.", "")), ("limes", ("limes", ""))])
def test_ctx_is_split_where_ctx_a_and_ctx_b_are_missing(ctx, parts):
    assert hellaswag.split_context(ctx) == parts
    example = {"activity_label": "Life", "ctx": ctx, "endings": ["a", "b", "c", "d"]}
    context, _ = hellaswag.render_example(example, "lm-eval")
    example |= {"ctx_a": parts[0], "ctx_b": parts[1]}
    expected, _ = hellaswag.render_example(example, "lm-eval")
    assert context.tolist() == expected.tolist()


@needs_data
def test_split_context_equals_ctx_a_and_ctx_b_of_the_raw_examples():
    for example in hellaswag.iterate_examples(os.path.join(REAL_DATA, "hellaswag_raw_250.jsonl")):
        assert hellaswag.split_context(example["ctx"]) == (example["ctx_a"], example["ctx_b"])


@pytest.mark.slow
@needs_data
def test_lm_evaluation_harness_agrees_on_the_raw_examples(tmp_path):
    """The harness's task file and model class, on an exported folder and the 250 raw examples:
    log-probabilities to 1e-3, and the same predictions and scores."""
    pytest.importorskip("lm_eval")
    import yaml
    from lm_eval import evaluator, tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag import utils
    path = os.path.join(REAL_DATA, "hellaswag_raw_250.jsonl")
    model, dataset = small_model(50304, block_size=1024), hellaswag.prepare(path)
    convert.write_hf(model, str(tmp_path / "hf"))
    lm = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", batch_size=8, device="cpu")
    task_file = os.path.join(os.path.dirname(tasks.__file__), "hellaswag", "hellaswag.yaml")
    with open(task_file, encoding="utf-8") as f:
        config = yaml.safe_load(f.read().replace("!function ", ""))
    config |= {"task": "local", "dataset_path": "json", "training_split": None,
               "dataset_kwargs": {"data_files": {"validation": path}},
               "process_docs": utils.process_docs}
    theirs = evaluator.simple_evaluate(lm, tasks=[config], log_samples=True, bootstrap_iters=0)
    samples = sorted(theirs["samples"]["local"], key=lambda sample: sample["doc_id"])
    expected = np.array([[response[0][0] for response in sample["resps"]] for sample in samples])
    results, sums, _ = hellaswag.evaluate(model, dataset, "float32", ONE)
    assert len(samples) == 250
    np.testing.assert_allclose(sums["lm-eval"], expected, atol=1e-3, rtol=0)
    for name, lengths in (("acc", 1.0), ("acc_norm", dataset.lengths["lm-eval"])):
        correct = get_most_likely_row(sums["lm-eval"], lengths) == dataset.labels
        assert [sample[name] for sample in samples] == correct.astype(float).tolist()
        score = theirs["results"]["local"][f"{name},none"]
        assert results["lm-eval"][name] == pytest.approx(score)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_scores_from_few_graphs(tmp_path):
    from torch._dynamo.testing import CompileCounterWithBackend
    model, dataset = small_model(), make_dataset(tmp_path, make_examples(40))
    counter = CompileCounterWithBackend("aot_eager")
    expected = compute_sums(model, dataset, batch_tokens=250)
    model.hidden = torch.compile(model.hidden, dynamic=True, backend=counter)
    sums = compute_sums(model, dataset, batch_tokens=250)
    np.testing.assert_allclose(sums, expected, **TOLERANCE)
    rows, _ = hellaswag.pack(dataset.rendered["completion"], 256)
    shapes = {(len(batch), T) for batch, T in hellaswag.make_batches(rows, 250)}
    assert len(shapes) >= 6 and counter.frame_count <= 3, (len(shapes), counter.frame_count)


# -----------------------------------------------------------------------------
# the file of examples

def test_a_file_may_be_compressed_and_have_a_byte_order_mark_blank_lines_and_labels_as_strings(
        tmp_path):
    examples = make_examples(2)
    # the Hub's labels are strings
    lines = [json.dumps({**example, "label": str(example["label"])}).encode()
             for example in examples]
    contents = b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n" + lines[1] + b"\n\n  \n"
    path = str(tmp_path / "a.jsonl")
    with open(path, "wb") as f, gzip.open(f"{path}.gz", "wb") as g:
        f.write(contents)
        g.write(contents)
    assert list(hellaswag.iterate_examples(path)) == examples
    assert list(hellaswag.iterate_examples(f"{path}.gz")) == examples


# -----------------------------------------------------------------------------
# the download

CONTENTS = os.urandom(3000)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server of CONTENTS, in place of the official one; server.requests counts requests.

    server.mode: "ok", "broken" (closes the connection after 1000 bytes), "wrong" (other bytes) or
    "404".
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            if self.server.mode == "404":
                return self.send_error(404)
            self.send_response(200)
            self.send_header("Content-Length", str(len(CONTENTS)))
            self.end_headers()
            body = bytes(len(CONTENTS)) if self.server.mode == "wrong" else CONTENTS
            self.wfile.write(body[:1000] if self.server.mode == "broken" else body)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.mode, server.requests = "ok", 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/val.jsonl")
    monkeypatch.setattr(hellaswag, "SHA256", hashlib.sha256(CONTENTS).hexdigest())
    yield server
    server.shutdown()
    server.server_close()


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def test_without_a_model_the_examples_are_downloaded_once(server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hellaswag.py"])
    for _ in range(2):
        hellaswag.main()
        assert hellaswag.PATH in capsys.readouterr().out
    assert read_bytes(hellaswag.PATH) == CONTENTS and server.requests == 1
    assert os.listdir("hellaswag") == ["hellaswag_val.jsonl"]


@pytest.mark.parametrize("mode, reason", [
    ("broken", "1000 bytes read, 2000 more expected"), ("404", "404 Client Error"),
    ("wrong", "sha256 .* is not that of the official file"), ("closed", "Connection refused")])
def test_a_failed_download_names_the_url_leaves_nothing_and_starts_over(server, monkeypatch, mode,
                                                                        reason):
    server.mode, url = mode, hellaswag.URL
    if mode == "closed":
        monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:1/val.jsonl")
    with pytest.raises(OSError, match=f"cannot download {hellaswag.URL}: .*{reason}") as error:
        hellaswag.download()
    assert "--data FILE" in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists(hellaswag.PATH)
    server.mode = "ok"
    monkeypatch.setattr(hellaswag, "URL", url)
    assert read_bytes(hellaswag.download()) == CONTENTS


# -----------------------------------------------------------------------------
# training

def test_training_gets_both_scores_and_missing_examples_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert hellaswag.load_examples("off", 1024, ONE) is None and capsys.readouterr().out == ""
    assert hellaswag.load_examples("auto", 1024, ONE) is None
    assert capsys.readouterr().out.count("\n") == 1
    os.mkdir("hellaswag")
    # a seed with which the scores differ
    write_jsonl(tmp_path / hellaswag.PATH, make_examples(16, seed=1))
    model, dataset = small_model(), hellaswag.load_examples("auto", 1024, ONE)
    with pytest.raises(ValueError, match="has an ending of .*block_size is only 2"):
        hellaswag.load_examples("auto", 2, ONE)  # before the model is compiled
    results, _, _ = hellaswag.evaluate(model, dataset, "float32", ONE)
    completion, lm_eval = results["completion"], results["lm-eval"]
    assert completion["acc"] != completion["acc_norm"] and lm_eval["acc"] != lm_eval["acc_norm"]
    assert hellaswag.score_in_training(model, dataset, "float32", ONE) == {
        "hella": completion["acc_norm"], "hella_acc": completion["acc"],
        "hella_lm_eval": lm_eval["acc_norm"], "hella_lm_eval_acc": lm_eval["acc"]}


def test_an_overflow_has_no_score_and_does_not_end_the_training(tmp_path, capsys):
    """NaN counted as the largest log-probability: a model of NaN got a score."""
    model, dataset = overflowing_model(), make_dataset(tmp_path, make_examples(6))
    scores = hellaswag.score_in_training(model, dataset, "float32", ONE)
    assert np.isfinite(list(scores.values())).all() and capsys.readouterr().out == ""
    scores = hellaswag.score_in_training(model, dataset, "float16", ONE)
    assert len(scores) == 4 and np.isnan(list(scores.values())).all()
    assert "NaN or infinite: no score (overflow in float16?)" in capsys.readouterr().out


# -----------------------------------------------------------------------------
# the command

def save_model(model):
    torch.save({"model": model.state_dict(), "config": vars(model.config), "step": 7,
                "val_loss": 2.5}, "model_00007.pt")


ARGUMENTS = ["model_00007.pt", "--data", "examples.jsonl", "--device", "cpu", "--dtype", "float32"]


@pytest.fixture
def command(tmp_path, monkeypatch, run_script):
    """A function of flags: (status, stdout, stderr) of `python hellaswag.py *ARGUMENTS *flags`."""
    monkeypatch.chdir(tmp_path)
    save_model(small_model())
    write_jsonl(tmp_path / "examples.jsonl", make_examples(12))
    return functools.partial(run_script, hellaswag, *ARGUMENTS)


def read_jsonl(path):
    with open(path, encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def test_json_and_out_contain_the_scores(command):
    flags = "--json", "result.json", "--out", "scores.jsonl", "--batch-tokens", "300"
    status, out, _ = command(*flags)
    result, = read_jsonl("result.json")
    _, printed, _ = command("--json")
    assert {**json.loads(printed), "seconds": 0} == {**result, "seconds": 0}
    dataset = hellaswag.prepare("examples.jsonl")
    results, sums, _ = hellaswag.evaluate(small_model(), dataset, "float32", ONE)
    assert status == 0 and result["n"] == 12 and result["full"] is False and result["step"] == 7
    lines = read_jsonl("scores.jsonl")
    assert [line["label"] for line in lines] == dataset.labels.tolist()
    for style in hellaswag.STYLES:
        scores, lengths = [line[style] for line in lines], dataset.lengths[style]
        assert result[style] == pytest.approx(results[style])
        np.testing.assert_allclose([s["logprobs"] for s in scores], sums[style], atol=1e-4)
        assert [s["lengths"] for s in scores] == lengths.tolist()
        assert [s["pred"] for s in scores] == get_most_likely_row(sums[style]).tolist()
        expected = get_most_likely_row(sums[style], lengths).tolist()
        assert [s["pred_norm"] for s in scores] == expected


def test_two_ranks_get_the_scores_of_one(command, tmp_path):
    # 11 batches: one rank has one fewer
    flags = ["--limit", "11", "--batch-tokens", "1"]
    command(*flags, "--json", "one.json", "--out", "one.jsonl")
    flags += ["--json", "two.json", "--out", "two.jsonl"]
    done = python(*launcher(2), os.path.join(ROOT, "hellaswag.py"), *ARGUMENTS, *flags,
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    result, = read_jsonl("two.json")
    expected, = read_jsonl("one.json")
    assert {**result, "seconds": 0} == {**expected, "seconds": 0}
    one, two = ([line["completion"]["logprobs"] for line in read_jsonl(name)]
                for name in ("one.jsonl", "two.jsonl"))
    np.testing.assert_allclose(two, one, atol=1e-4)


def test_the_score_is_printed_even_if_out_cannot_be_written(command, monkeypatch):
    """It was printed after --out was written: a full disk cost the score."""
    def full(*args):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(hellaswag, "atomic_write", full)
    status, out, err = command("--out", "scores.jsonl", "--limit", "1")
    assert status == 2 and "acc" in out and out.count("\n") == 1 and "No space left" in err


def test_an_overflow_is_one_line_and_no_score(command):
    """A model of NaN got a score, and status 0."""
    save_model(overflowing_model())
    status, out, err = command("--dtype", "float16", "--out", "scores.jsonl")
    assert status == 2 and out == "" and not os.path.exists("scores.jsonl")
    assert err == ("error: log-probabilities of model_00007.pt are NaN or infinite: its activations"
                   " overflow in float16; try --dtype float32\n")


def test_the_summary_of_a_subset_says_not_comparable(command):
    line = command("--limit", "5")[1]
    assert "completion: acc 0." in line and "lm-eval: acc 0." in line
    assert "n 5 -- NOT COMPARABLE" in line
    scores = {"acc": 0.3, "acc_norm": 0.3, "acc_norm_stderr": 0.0046}
    assert "NOT" not in hellaswag.summary({style: scores for style in hellaswag.STYLES}, 10042)


def test_the_process_group_is_destroyed_only_after_success(command, monkeypatch):
    """Destroying NCCL's group waits for other ranks: an error would never be printed."""
    calls = []
    monkeypatch.setattr(hellaswag, "teardown", lambda: calls.append("teardown"))
    assert command("--dtype", "int8")[0] == 2 and calls == []
    assert command("--limit", "1")[0] == 0 and calls == ["teardown"]
