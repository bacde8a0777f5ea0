"""
hellaswag.py and scoring.py compared with independent references: one forward per ending, lm-evaluation-harness's documented
arithmetic on transformers' GPT-2, the harness itself (slow). The download is tested with a local HTTP server.

    .venv/bin/python -m pytest tests/test_hellaswag.py              # offline, CPU
    .venv/bin/python -m pytest tests/test_hellaswag.py -m slow      # the harness needs `pip install lm_eval`

Tests on real examples need GPT2_REAL_DATA, a folder with hellaswag_raw_250.jsonl and hellaswag_val_cleaned.jsonl.gz.
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
import tracemalloc

import numpy as np
import pytest
import torch

import convert
import hellaswag
from run.cli import StopSignals
from data import EOT, NUM_TOKENS, get_tokenizer
from convert import hf_state_dict
from run.weights import from_hf_names
from model import GPT, GPTConfig
from run.parallel import Ranks

SINGLE = Ranks(0, 0, 1, "cpu", False)
ROOT = os.path.dirname(os.path.abspath(hellaswag.__file__))
REAL_DATA = os.environ.get("GPT2_REAL_DATA")
needs_data = pytest.mark.skipif(not REAL_DATA, reason="GPT2_REAL_DATA is not set")


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


def make_examples(n=6, seed=0):
    """n examples of random words, some with WikiHow's markup, double spaces and capitals."""
    rng = random.Random(seed)

    def text(min_words, max_words):
        return " ".join(rng.choice(WORDS) for _ in range(rng.randint(min_words, max_words)))
    examples = []
    for i in range(n):
        ctx_a, ctx_b = text(3, 30) + ".", rng.choice(["", "another Man", "he", "she [substeps]"])
        endings = ["[substeps]  " * (k == 1) + text(1, 12) + " [step]" * (k == 2) for k in range(4)]
        examples.append({"ind": i, "activity_label": rng.choice(["Roof shingle removal", "Home and Garden"]),
                         "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}".strip(), "endings": endings,
                         "label": rng.randrange(4), "source_id": str(i)})
    return examples


def write_jsonl(path, examples):
    with open(path, "w", encoding="utf-8") as f:
        f.writelines(json.dumps(example) + "\n" for example in examples)
    return str(path)


def make_dataset(tmp_path, examples):
    return hellaswag.prepare(write_jsonl(tmp_path / "examples.jsonl", examples))


def compute_sums(model, dataset, style="completion", dtype="float32", **options):
    """The first result of hellaswag.score, (n, 4), on a single process."""
    return hellaswag.score(model, dataset.encoded[style], dtype, SINGLE, **options)[0]


@torch.no_grad()
def reference_sums(model, dataset, style):
    """The summed log-probability of each ending, (n, 4) float64: one forward per ending, log-softmax in float64."""
    sums = np.zeros((len(dataset.examples), 4))
    for i, (context, endings) in enumerate(dataset.encoded[style]):
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
def test_fast_path_equals_one_forward_per_ending(tmp_path, style, vocab_size):
    model, dataset = small_model(vocab_size), make_dataset(tmp_path, make_examples(12))
    expected = reference_sums(model, dataset, style)
    assert expected.std() > 10  # the endings differ by far more than the tolerance
    np.testing.assert_allclose(compute_sums(model, dataset, style), expected, atol=1e-4, rtol=0)


def test_lecture_functions_agree_with_the_fast_path(tmp_path):
    model, dataset = small_model(), make_dataset(tmp_path, make_examples(12))
    predicted = []
    for example in dataset.examples:
        tokens, mask, label = hellaswag.render_example(example)
        with torch.no_grad():
            logits, _ = model(tokens, tokens)
        predicted.append(hellaswag.get_most_likely_row(tokens, mask, logits))
        assert label == example["label"]
    sums = compute_sums(model, dataset)
    assert predicted == hellaswag.predictions(sums, dataset.lengths["completion"])[1].tolist()
    assert len(set(predicted)) > 1


def test_render_example_returns_the_rows_of_the_lecture():
    example = {"ctx": "A man is", "endings": ["up", "is down there", "x", "y z"], "label": 1, "activity_label": "Life"}
    tokens, mask, label = hellaswag.render_example(example)
    encode = get_tokenizer().encode_ordinary
    assert label == 1 and tokens.dtype == mask.dtype == torch.int64
    assert tokens.tolist() == [encode("A man is up") + [0, 0], encode("A man is is down there"),
                               encode("A man is x") + [0, 0], encode("A man is y z") + [0]]
    assert mask.tolist() == [[0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0]]


def test_scores_do_not_depend_on_batches_or_their_order(tmp_path):
    model, examples = small_model(), make_examples(12)
    dataset = make_dataset(tmp_path, examples)
    expected = compute_sums(model, dataset)
    for batch_tokens in (1, 100, 700):
        np.testing.assert_allclose(compute_sums(model, dataset, batch_tokens=batch_tokens), expected, atol=1e-4, rtol=0)
    reversed_sums = compute_sums(model, make_dataset(tmp_path, examples[::-1]))
    np.testing.assert_allclose(reversed_sums[::-1], expected, atol=1e-4, rtol=0)


def test_batches_contain_every_ending_once_and_respect_batch_tokens():
    rows, _ = hellaswag.pack(hellaswag.tokenize(make_examples(40), "completion"), 256)
    batches = hellaswag.make_batches(rows, 600)
    assert sorted(ending_id for batch, _ in batches for _, endings in batch for ending_id, _ in endings) == list(range(160))
    for batch, T in batches:
        assert len(batch) == 1 or hellaswag.collate(batch, T)[0].size <= 600
    assert max(len(batch) for batch, _ in batches) > 1


def test_endings_are_masked_from_each_other(tmp_path):
    examples = make_examples(1)
    sums = compute_sums(small_model(), make_dataset(tmp_path, examples))
    examples[0]["endings"][:3] = ["something else", "short", "and a text that is much longer than any of the others"]
    changed = compute_sums(small_model(), make_dataset(tmp_path, examples))
    assert abs(sums[0, 3] - changed[0, 3]) < 1e-4 and (np.abs(sums[0, :3] - changed[0, :3]) > 1).all()


@pytest.mark.parametrize("style", hellaswag.STYLES)
def test_texts_longer_than_the_block_are_truncated(tmp_path, style):
    """As in the harness: the last block_size + 1 tokens of context + ending are kept; the endings' contexts then differ."""
    model, dataset = small_model(block_size=36), make_dataset(tmp_path, make_examples(12))
    sums, num_truncated = hellaswag.score(model, dataset.encoded[style], "float32", SINGLE)
    over = sum(len(c) + max(map(len, endings)) > 37 for c, endings in dataset.encoded[style])
    assert num_truncated == over and 0 < over < 12
    np.testing.assert_allclose(sums, reference_sums(model, dataset, style), atol=1e-4, rtol=0)


def test_an_ending_longer_than_the_block_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="example 0 has an ending of 19 tokens; this model's block_size is only 8"):
        compute_sums(small_model(block_size=8), make_dataset(tmp_path, make_examples(3)))


def test_a_vocabulary_smaller_than_gpt2s_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="vocabulary has 300 tokens; HellaSwag needs GPT-2's 50257"):
        compute_sums(small_model(vocab_size=300), make_dataset(tmp_path, make_examples(1)))


def test_a_uniform_model_predicts_the_first_of_equal_endings(tmp_path):
    """All tokens are equally likely: acc predicts the ending with the fewest tokens, acc_norm the first one."""
    model, dataset = small_model(scale=0.0), make_dataset(tmp_path, make_examples(12))
    sums = compute_sums(model, dataset)
    tokens = dataset.lengths["completion"]
    np.testing.assert_allclose(sums, -tokens * np.log(NUM_TOKENS), rtol=1e-6)
    by_sum, by_norm = hellaswag.predictions(sums, tokens)
    assert by_sum.tolist() == tokens.argmin(axis=1).tolist() and by_norm.tolist() == [0] * 12


def test_a_padded_vocabulary_scores_as_the_exported_model(tmp_path):
    """The 47 padding ids get no probability: the score is the same with and without them."""
    padded = small_model(50304)
    trimmed = small_model(NUM_TOKENS)
    trimmed.load_state_dict(from_hf_names(hf_state_dict(padded)))
    dataset = make_dataset(tmp_path, make_examples(3))
    np.testing.assert_allclose(compute_sums(padded, dataset), compute_sums(trimmed, dataset), atol=1e-5, rtol=0)


def test_bfloat16_is_close_to_float32_and_training_mode_is_restored(tmp_path):
    model, dataset = small_model().train(), make_dataset(tmp_path, make_examples(6))
    np.testing.assert_allclose(compute_sums(model, dataset, dtype="bfloat16"), compute_sums(model, dataset), rtol=0.05)
    assert model.training


def test_an_empty_context_becomes_endoftext(tmp_path):
    examples = make_examples(1)
    examples[0]["ctx"] = ""
    dataset = make_dataset(tmp_path, examples)
    assert dataset.encoded["completion"][0][0].tolist() == [EOT]
    model = small_model()
    np.testing.assert_allclose(compute_sums(model, dataset), reference_sums(model, dataset, "completion"), atol=1e-4, rtol=0)


def test_metrics_of_a_worked_example():
    sums = np.array([[-4.0, -2, -6, -8], [-1, -5, -5, -5], [-3, -3, -9, -9]])
    lengths = np.array([[1.0, 1, 6, 1], [1, 1, 1, 10], [1, 1, 1, 0]])
    by_sum, by_norm = hellaswag.predictions(sums, lengths)
    assert by_sum.tolist() == [1, 0, 0] and by_norm.tolist() == [2, 3, 0]
    result = hellaswag.metrics(sums, lengths, np.array([1, 3, 0]))
    assert result["acc"] == pytest.approx(2 / 3) and result["acc_norm"] == pytest.approx(2 / 3)
    assert result["acc_stderr"] == pytest.approx((2 / 3 * 1 / 3 / 2) ** 0.5)


@pytest.fixture
def stop_after_two_batches(monkeypatch):
    """Requests a stop, as SIGTERM would, after the second batch; returns the list of the batches scored."""
    batches, score_batch = [], hellaswag.score_batch

    def score_batch_and_stop(model, hidden, *batch):
        batches.append(batch)
        if len(batches) == 2:
            monkeypatch.setattr(StopSignals, "received", "SIGTERM")
        return score_batch(model, hidden, *batch)
    monkeypatch.setattr(hellaswag, "score_batch", score_batch_and_stop)
    return batches


def test_a_stop_request_ends_the_evaluation_before_the_next_batch(tmp_path, stop_after_two_batches):
    model, dataset = small_model().train(), make_dataset(tmp_path, make_examples(12))
    assert hellaswag.evaluate(model, dataset, "float32", SINGLE, batch_tokens=1) is None
    assert len(stop_after_two_batches) == 2 and model.training
    assert hellaswag.score_in_training(model, dataset, "float32", SINGLE) == {}
    assert len(stop_after_two_batches) == 2  # the stop is still requested: no further batch


def test_non_finite_log_probabilities_have_no_score_and_do_not_end_the_training(tmp_path, capsys):
    """NaN counted as the largest log-probability: a model of NaN got a score. In training it is an overflow in 16 bits."""
    model, dataset = small_model(), make_dataset(tmp_path, make_examples(6))
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] = 1e5  # finite, but infinite in float16
    assert all(np.isfinite(list(hellaswag.score_in_training(model, dataset, "float32", SINGLE).values())))
    capsys.readouterr()
    scores = hellaswag.score_in_training(model, dataset, "float16", SINGLE)
    assert set(scores) == {"hella", "hella_acc", "hella_lm_eval", "hella_lm_eval_acc"} and np.isnan(list(scores.values())).all()
    assert "log-probabilities of 6 examples are NaN or infinite: no score (overflow in float16?)" in capsys.readouterr().out
    sums = np.array([[-1.0, -2, -3, -4], [-1, float("nan"), -3, -4]])
    assert np.isnan(list(hellaswag.metrics(sums, np.ones((2, 4)), np.array([0, 0])).values())).all()


def test_batches_that_do_not_fit_into_memory_are_refused_with_a_number_that_fits(tmp_path, monkeypatch):
    model, dataset = small_model(), make_dataset(tmp_path, make_examples(20))
    monkeypatch.setattr(hellaswag, "free_memory", lambda device: 20 * 10**6)
    with pytest.raises(ValueError, match="GB of memory, 0.0 GB are available: use [0-9]{3} or fewer") as error:
        compute_sums(model, dataset, batch_tokens=2**60)
    fits = int(re.search("use ([0-9]+)", str(error.value))[1])
    sums, batches, score_batch = compute_sums(model, dataset, batch_tokens=fits), [], hellaswag.score_batch
    monkeypatch.setattr(hellaswag, "score_batch", lambda *args: batches.append(len(args[2]) * args[3]) or score_batch(*args))
    # the default is halved until it fits: no reason to end a training
    assert np.abs(sums - compute_sums(model, dataset)).max() < 1e-4 and 0 < max(batches) <= fits
    monkeypatch.setattr(hellaswag, "all_gather", lambda value, ranks: [value, 10**6])  # another rank has less memory
    largest, batches[:] = max(batches), []
    assert np.abs(sums - compute_sums(model, dataset)).max() < 1e-4 and 0 < max(batches) < largest


def test_a_stop_request_during_the_last_batch_keeps_the_scores(tmp_path, stop_after_two_batches):
    """There are two batches, one per style: the evaluation is complete."""
    model, dataset = small_model(), make_dataset(tmp_path, make_examples(2))
    scores = hellaswag.score_in_training(model, dataset, "float32", SINGLE)
    assert len(stop_after_two_batches) == 2 and set(scores) == {"hella", "hella_acc", "hella_lm_eval", "hella_lm_eval_acc"}


# -----------------------------------------------------------------------------
# lm-evaluation-harness

def hf_model(model):
    """transformers' GPT2LMHeadModel with a GPT's weights."""
    from transformers import GPT2Config, GPT2LMHeadModel
    c = model.config
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=NUM_TOKENS, n_positions=c.block_size, n_embd=c.n_embd, n_layer=c.n_layer,
                                        n_head=c.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    theirs.load_state_dict(hf_state_dict(model), strict=False)
    theirs.tie_weights()
    return theirs.eval()


@torch.no_grad()
def harness_sums(theirs, example):
    """What lm-evaluation-harness computes for one example, from its documentation: it preprocesses the text, encodes
    context + ending at once, and scores the tokens after those of the context."""
    def preprocess(text):
        text = text.strip().replace(" [title]", ". ")
        return re.sub("\\[.*?\\]", "", text).replace("  ", " ")
    encode = get_tokenizer().encode_ordinary
    sums = []
    for ending in example["endings"]:
        context = preprocess(example["activity_label"] + ": " + example["ctx_a"] + " " + example["ctx_b"].capitalize())
        ids = torch.tensor(encode(context + " " + preprocess(ending)))
        start = len(encode(context.rstrip()))
        logprobs = theirs(ids[None, :-1]).logits[0].double().log_softmax(-1)
        sums.append(logprobs[torch.arange(start - 1, len(ids) - 1), ids[start:]].sum().item())
    return sums


def test_lm_eval_style_equals_the_harness_arithmetic_on_transformers(tmp_path):
    model, dataset = small_model(50304), make_dataset(tmp_path, make_examples(8))
    theirs = hf_model(model)
    expected = np.array([harness_sums(theirs, example) for example in dataset.examples])
    np.testing.assert_allclose(compute_sums(model, dataset, "lm-eval"), expected, atol=1e-3, rtol=0)


def test_lm_eval_text_of_a_worked_example():
    example = {"activity_label": "Family Life", "ctx_a": "[header] How to win [title] Try.", "ctx_b": "the Man [step]",
               "ctx": "[header] How to win [title] Try. the Man [step]", "label": 0,
               "endings": ["Go on. [substeps] Now", "[title] rest", "a  b", "[step]"]}
    context, endings = hellaswag.context_and_endings(example, "lm-eval")
    assert context == "Family Life: How to win. Try. The man"  # capitalize lowercases "Man"
    assert endings == ["  Go on. Now", "   rest", "  a b", "  "]  # the context's trailing space moves to the ending


def test_split_context():
    assert hellaswag.split_context("A man is on a roof. he") == ("A man is on a roof.", "he")
    assert hellaswag.split_context("How to win. Try. Be good.") == ("How to win. Try. Be good.", "")
    assert hellaswag.split_context("limes") == ("limes", "")


@needs_data
def test_split_context_equals_ctx_a_and_ctx_b_of_the_raw_examples():
    for example in hellaswag.iterate_examples(os.path.join(REAL_DATA, "hellaswag_raw_250.jsonl")):
        assert hellaswag.split_context(example["ctx"]) == (example["ctx_a"], example["ctx_b"])


@pytest.mark.slow
@needs_data
def test_lm_evaluation_harness_agrees_on_the_raw_examples(tmp_path):
    """The harness's task file and model class, on an exported folder and the 250 raw examples: log-probabilities
    to 1e-3, and the same predictions and scores."""
    pytest.importorskip("lm_eval")
    import yaml
    from lm_eval import evaluator, tasks
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks.hellaswag import utils
    path = os.path.join(REAL_DATA, "hellaswag_raw_250.jsonl")
    model, dataset = small_model(50304, block_size=1024), hellaswag.prepare(path)
    convert.write_hf(model, str(tmp_path / "hf"))
    lm = HFLM(pretrained=str(tmp_path / "hf"), dtype="float32", batch_size=8, device="cpu")
    with open(os.path.join(os.path.dirname(tasks.__file__), "hellaswag", "hellaswag.yaml"), encoding="utf-8") as f:
        config = yaml.safe_load(f.read().replace("!function ", ""))
    config |= {"task": "local", "dataset_path": "json", "dataset_kwargs": {"data_files": {"validation": path}},
               "training_split": None, "process_docs": utils.process_docs}
    theirs = evaluator.simple_evaluate(lm, tasks=[config], log_samples=True, bootstrap_iters=0)
    samples = sorted(theirs["samples"]["local"], key=lambda sample: sample["doc_id"])
    expected = np.array([[response[0][0] for response in sample["resps"]] for sample in samples])
    results, sums, _ = hellaswag.evaluate(model, dataset, "float32", SINGLE)
    assert len(samples) == 250
    print("largest difference", np.abs(sums["lm-eval"] - expected).max())
    np.testing.assert_allclose(sums["lm-eval"], expected, atol=1e-3, rtol=0)
    for name, predicted in zip(("acc", "acc_norm"), hellaswag.predictions(sums["lm-eval"], dataset.lengths["lm-eval"])):
        assert [sample[name] for sample in samples] == (predicted == dataset.labels).astype(float).tolist()
        assert results["lm-eval"][name] == pytest.approx(theirs["results"]["local"][f"{name},none"])


@pytest.mark.slow
@needs_data
@pytest.mark.parametrize("style", hellaswag.STYLES)
def test_fast_path_equals_one_forward_per_ending_on_a_thousand_examples(style):
    model = small_model(50304, block_size=1024)
    dataset = hellaswag.prepare(os.path.join(REAL_DATA, "hellaswag_val_cleaned.jsonl.gz"), 1000)
    np.testing.assert_allclose(compute_sums(model, dataset, style), reference_sums(model, dataset, style), atol=1e-4, rtol=0)


@pytest.mark.slow
def test_a_compiled_network_gives_the_same_scores_from_few_graphs(tmp_path):
    from torch._dynamo.testing import CompileCounterWithBackend
    model, dataset = small_model(), make_dataset(tmp_path, make_examples(40))
    counter = CompileCounterWithBackend("aot_eager")
    hidden = torch.compile(model.hidden, dynamic=True, backend=counter)
    sums = compute_sums(model, dataset, batch_tokens=250, hidden=hidden)
    np.testing.assert_allclose(sums, compute_sums(model, dataset, batch_tokens=250), atol=1e-4, rtol=0)
    rows, _ = hellaswag.pack(dataset.encoded["completion"], 256)
    shapes = {(len(batch), T) for batch, T in hellaswag.make_batches(rows, 250)}
    assert len(shapes) >= 6 and counter.frame_count <= 3, (len(shapes), counter.frame_count)


# -----------------------------------------------------------------------------
# the file of examples

def test_gzip_and_plain_files_have_the_same_examples(tmp_path):
    examples = make_examples(3)
    path = write_jsonl(tmp_path / "a.jsonl", examples)
    with open(path, "rb") as f, gzip.open(f"{path}.gz", "wb") as g:
        g.write(f.read())
    assert list(hellaswag.iterate_examples(path)) == list(hellaswag.iterate_examples(f"{path}.gz")) == examples


@pytest.mark.parametrize("change, message", [
    ({"endings": None}, "it lacks endings"), ({"ctx": None}, "it lacks ctx"), ({"label": None}, "it lacks label"),
    ({"activity_label": None}, "it lacks activity_label"), ({"ctx_a": None}, "both ctx_a and ctx_b, or neither"),
    ({"ctx_b": 5}, "ctx_b is 5, it must be a string"), ({"ctx": 3}, "ctx is 3, it must be a string"),
    ({"label": 4}, "label is 4"), ({"label": ""}, "no label, as in the test split"), ({"label": "03"}, "label is '03'"),
    ({"label": 2.0}, "label is 2.0"), ({"label": True}, "label is True"), ({"label": float("inf")}, "label is inf"),
    ({"label": [2]}, r"label is \[2\]"), ({"endings": "abcd"}, "endings is 'abcd'"),
    ({"endings": dict(a=1, b=2, c=3, d=4)}, "endings is {'a': 1"), ({"endings": ["a", "b", "c"]}, "four non-empty strings"),
    ({"endings": ["a", "b", " ", "d"]}, "four non-empty strings"), ({"ctx_b": "\ud800"}, "surrogates not allowed")])
def test_an_invalid_line_is_an_error_with_its_number(tmp_path, change, message):
    examples = make_examples(3)
    examples[1] = {name: value for name, value in {**examples[1], **change}.items() if value is not None}
    path = write_jsonl(tmp_path / "bad.jsonl", examples)
    with pytest.raises(ValueError, match=rf"bad.jsonl, line 2 is not a HellaSwag example: .*{message}"):
        hellaswag.prepare(path)


def test_malformed_truncated_and_missing_files_are_errors_with_their_names(tmp_path):
    path = write_jsonl(tmp_path / "bad.jsonl", make_examples(3))
    with open(path, "a", encoding="utf-8") as f:
        f.write('{"ctx": "truncated\n')
    with pytest.raises(ValueError, match="bad.jsonl, line 4 is not a HellaSwag example"):
        hellaswag.prepare(path)
    with open(path, "rb") as f, open(f"{path}.gz", "wb") as g:
        g.write(gzip.compress(f.read())[:-30])
    with pytest.raises(ValueError, match="bad.jsonl.gz is damaged"):
        hellaswag.prepare(f"{path}.gz")
    with pytest.raises(FileNotFoundError, match="python hellaswag.py downloads"):
        hellaswag.prepare(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match="has no examples"):
        hellaswag.prepare(write_jsonl(tmp_path / "empty.jsonl", []))


def test_labels_may_be_strings_as_on_the_hub(tmp_path):
    examples = make_examples(2)
    examples[0]["label"] = "3"
    assert make_dataset(tmp_path, examples).labels[0] == 3


def test_a_byte_order_mark_blank_lines_and_other_line_breaks_are_accepted(tmp_path):
    examples = make_examples(3)
    lines = [json.dumps(example).encode() for example in examples]
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n" + lines[1] + b"\n" + lines[2] + b"\n\n  \n")
    assert list(hellaswag.iterate_examples(str(tmp_path / "a.jsonl"))) == examples


def test_gzip_is_recognized_by_its_contents(tmp_path):
    examples = make_examples(3)
    path = write_jsonl(tmp_path / "a.jsonl.gz", examples)  # not compressed
    (tmp_path / "b.jsonl").write_bytes(gzip.compress(read_bytes(path)))
    assert list(hellaswag.iterate_examples(path)) == list(hellaswag.iterate_examples(str(tmp_path / "b.jsonl"))) == examples


@pytest.mark.parametrize("contents", [b"", gzip.compress(b"")], ids=["empty", "gzip"])
def test_a_huge_line_is_an_error_before_it_is_read(tmp_path, contents):
    """A gzip file of zeros, or a sparse file, was read into memory as one line."""
    path = str(tmp_path / "a.jsonl")
    if contents:
        with gzip.open(path, "wb") as f:
            f.write(bytes(2**24))
    else:
        with open(path, "wb") as f:
            f.truncate(2**28)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=f"line 1 is not a HellaSwag example: it is longer than {hellaswag.MAX_LINE:,}"):
            hellaswag.prepare(path)
        assert tracemalloc.get_traced_memory()[1] < 2**23  # bytes at the peak
    finally:
        tracemalloc.stop()


# -----------------------------------------------------------------------------
# the download

CONTENTS = os.urandom(3000)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A local server of CONTENTS, in place of the official one; server.requests counts the requests.

    server.mode: "ok", "broken" (closes the connection after 1000 bytes), "short" (1000 bytes are the whole answer), "wrong"
    (3000 other bytes), "404".
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.server.requests += 1
            if self.server.mode == "404":
                return self.send_error(404)
            body = {"short": CONTENTS[:1000], "wrong": bytes(len(CONTENTS))}.get(self.server.mode, CONTENTS)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[:1000] if self.server.mode == "broken" else body)

        def log_message(self, *args):
            pass
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.mode, server.requests = "ok", 0
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(hellaswag, "URL", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setattr(hellaswag, "VAL_BYTES", len(CONTENTS))
    monkeypatch.setattr(hellaswag, "VAL_SHA256", hashlib.sha256(CONTENTS).hexdigest())
    yield server
    server.shutdown()
    server.server_close()


def read_bytes(path):
    with open(path, "rb") as f:
        return f.read()


def test_the_examples_are_downloaded_once(server):
    path = hellaswag.download()
    assert path == os.path.join("hellaswag", "hellaswag_val.jsonl") and read_bytes(path) == CONTENTS
    assert hellaswag.download() == path and server.requests == 1
    assert os.listdir("hellaswag") == ["hellaswag_val.jsonl"]


@pytest.mark.parametrize("mode, reason", [
    ("broken", "1000 bytes read, 2000 more expected"), ("short", "1,000 bytes with sha256 .* are not the official file"),
    ("wrong", "3,000 bytes with sha256 .* are not the official file"), ("404", "404 Client Error")])
def test_a_failed_download_names_the_url_leaves_nothing_and_starts_over(server, mode, reason):
    server.mode = mode
    with pytest.raises(OSError, match="cannot download http://127.0.0.1:[0-9]+/hellaswag_val.jsonl: .*" + reason) as error:
        hellaswag.download()
    assert "--data FILE" in str(error.value) and "\n" not in str(error.value)
    assert not os.path.exists("hellaswag")
    os.mkdir("hellaswag")
    with pytest.raises(OSError):
        hellaswag.download()
    assert os.listdir("hellaswag") == []  # a folder that was there stays
    server.mode = "ok"
    assert read_bytes(hellaswag.download()) == CONTENTS


def test_an_unreachable_server_is_one_line(server, monkeypatch):
    monkeypatch.setattr(hellaswag, "URL", "http://127.0.0.1:1/")
    url = "http://127.0.0.1:1/hellaswag_val.jsonl"
    with pytest.raises(OSError, match=f"^cannot download {url}: [^:]*Connection refused. Try again"):
        hellaswag.download()
    assert not os.path.exists("hellaswag")


# -----------------------------------------------------------------------------
# training and the command line

def test_training_gets_both_scores_and_missing_examples_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert hellaswag.for_training("off", SINGLE) is None and capsys.readouterr().out == ""
    assert hellaswag.for_training("auto", SINGLE) is None
    assert capsys.readouterr().out.count("\n") == 1
    path = write_jsonl(tmp_path / "examples.jsonl", make_examples(16, seed=1))  # a seed with which the scores differ
    model = small_model()
    results, _, _ = hellaswag.evaluate(model, hellaswag.prepare(path), "float32", SINGLE)
    assert all(r["acc"] != r["acc_norm"] for r in results.values())
    os.mkdir("hellaswag")
    os.rename(path, hellaswag.PATH)
    scores = hellaswag.score_in_training(model, hellaswag.for_training("auto", SINGLE), "float32", SINGLE)
    assert scores == {"hella": results["completion"]["acc_norm"], "hella_acc": results["completion"]["acc"],
                      "hella_lm_eval": results["lm-eval"]["acc_norm"], "hella_lm_eval_acc": results["lm-eval"]["acc"]}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """run(*flags) returns what `python hellaswag.py CHECKPOINT --data EXAMPLES *flags` prints; it runs in this process."""
    monkeypatch.chdir(tmp_path)
    model = small_model()
    torch.save({"model": model.state_dict(), "config": vars(model.config), "step": 7, "val_loss": 2.5}, "model_00007.pt")
    write_jsonl("examples.jsonl", make_examples(12))

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["hellaswag.py", "model_00007.pt", "--data", "examples.jsonl", "--device", "cpu",
                                          "--dtype", "float32", *flags])
        hellaswag.main()
        return capsys.readouterr().out
    return run


def test_json_and_out_contain_the_scores(command):
    result = json.loads(command("--json", "--out", "scores.jsonl", "--batch-tokens", "300"))
    dataset = hellaswag.prepare("examples.jsonl")
    results, sums, _ = hellaswag.evaluate(small_model(), dataset, "float32", SINGLE)
    assert result["n"] == 12 and result["full"] is False and result["step"] == 7
    with open("scores.jsonl", encoding="utf-8") as f:
        lines = [json.loads(line) for line in f]
    for style in hellaswag.STYLES:
        assert result[style] == pytest.approx(results[style])
        np.testing.assert_allclose([line[style]["logprobs"] for line in lines], sums[style], atol=1e-4)
        for name, predicted in zip(("pred", "pred_norm"), hellaswag.predictions(sums[style], dataset.lengths[style])):
            assert [line[style][name] for line in lines] == predicted.tolist()


def run_hellaswag(monkeypatch, *flags):
    """Exit status of `python hellaswag.py model_00007.pt --data examples.jsonl *flags` in this process."""
    monkeypatch.setattr(sys, "argv", ["hellaswag.py", "model_00007.pt", "--data", "examples.jsonl", "--device", "cpu",
                                      "--dtype", "float32", *flags])
    with pytest.raises(SystemExit) as end:
        hellaswag.run_main(hellaswag.main)
        sys.exit(0)
    return end.value.code


def test_out_is_checked_before_the_work_and_only_on_the_rank_that_writes(command, monkeypatch, capsys):
    monkeypatch.setattr(hellaswag, "setup", lambda device: sys.exit("the work begins"))
    for out, message in (("none/a.jsonl", "none is not an existing folder"), (".", "is not the name of a file"),
                         ("examples.jsonl", "would replace a file that is read"), ("model_00007.pt", "would replace a file")):
        assert run_hellaswag(monkeypatch, "--out", out) == 2 and message in capsys.readouterr().err
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(hellaswag, "run_main", lambda main: main())  # that of RANK 1 registers an exit without shutdown
    assert run_hellaswag(monkeypatch, "--out", "none/a.jsonl") == "the work begins"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_the_score_is_printed_even_if_out_cannot_be_written(command, monkeypatch, capsys, flags):
    """It was printed after --out was written: a full disk cost the score."""
    assert run_hellaswag(monkeypatch, "--out", "/dev/full", "--limit", "1", *flags) == 2
    out, err = capsys.readouterr()
    assert "acc" in out and out.count("\n") == 1 and "error: cannot write /dev/full: No space left on device" in err
    assert not os.path.isfile("/dev/full") and os.listdir(".") == ["model_00007.pt", "examples.jsonl"]


def test_out_replaces_the_target_of_a_link(command, monkeypatch):
    os.mkdir("there")
    os.symlink("there/scores.jsonl", "link")
    assert run_hellaswag(monkeypatch, "--out", "link", "--limit", "1") == 0
    assert os.path.islink("link") and "logprobs" in open("there/scores.jsonl", encoding="utf-8").read()


def test_ctrl_c_while_scoring_leaves_no_out(command, monkeypatch, capsys):
    def interrupt(*args):
        raise KeyboardInterrupt
    monkeypatch.setattr(hellaswag, "score_batch", interrupt)
    assert run_hellaswag(monkeypatch, "--out", "scores.jsonl") == 130
    out, err = capsys.readouterr()
    assert out == "" and err.endswith("\ninterrupted\n") and os.listdir(".") == ["model_00007.pt", "examples.jsonl"]


def test_an_overflow_is_one_line_and_no_score(command, monkeypatch, capsys):
    """A model of NaN got a score, and status 0."""
    model = small_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.bias[0] = 1e5
    torch.save({"model": model.state_dict(), "config": vars(model.config), "step": 7, "val_loss": 2.5}, "model_00007.pt")
    assert run_hellaswag(monkeypatch, "--dtype", "float16", "--out", "scores.jsonl") == 2
    out, err = capsys.readouterr()
    assert out == "" and not os.path.exists("scores.jsonl") and err.splitlines()[-1] == (
        "error: the log-probabilities that model_00007.pt gives to 12 of 12 examples are NaN or infinite: its activations"
        " overflow in float16; try --dtype float32")


def test_the_summary_of_a_subset_says_not_comparable(command):
    line = command("--limit", "5")
    assert "completion: acc 0." in line and "lm-eval: acc 0." in line and "n 5 -- NOT COMPARABLE" in line
    results = {style: {"acc": 0.3, "acc_norm": 0.3, "acc_norm_stderr": 0.0046} for style in hellaswag.STYLES}
    assert "NOT" not in hellaswag.summary(results, 10042)


def test_show_prints_losses(command):
    out = command("--show", "2")
    dataset = hellaswag.prepare("examples.jsonl")
    losses = -compute_sums(small_model(), dataset) / dataset.lengths["completion"]
    for i in range(2):
        for k in range(4):
            assert f"{k} (loss: {losses[i, k]:.4f}) {dataset.examples[i]['endings'][k]}\n" in out
        assert f"predicted: {losses[i].argmin()}, actual: {dataset.labels[i]}\n" in out
    assert out.count("predicted:") == 2


def test_the_process_group_is_destroyed_only_after_success(command, monkeypatch):
    """Destroying NCCL's group waits for the other ranks: after an error it would hang before the error is printed."""
    calls = []
    monkeypatch.setattr(hellaswag, "teardown", lambda: calls.append("teardown"))
    with pytest.raises(ValueError, match="unknown dtype"):
        command("--dtype", "int8")
    assert calls == []
    command("--limit", "1")
    assert calls == ["teardown"]


@pytest.mark.parametrize("flags, message", [
    (["--limit", "0"], "--limit 0: must be an integer, 1 or more"),
    (["--batch-tokens", "0"], "--batch-tokens 0: must be an integer, 1 or more"),
    (["--show", "-1"], "--show -1: must be an integer, 0 or more"), (["--dtype", "int8"], "unknown dtype")])
def test_invalid_flags_are_errors(command, flags, message):
    with pytest.raises(ValueError, match=message):
        command(*flags)


def test_the_help_has_the_defaults_of_batch_tokens(command, capsys):
    """The flags are parsed before scoring.py is imported, which imports torch."""
    with pytest.raises(SystemExit):
        command("--help")
    cpu, gpu = hellaswag.BATCH_TOKENS["cpu"], hellaswag.BATCH_TOKENS["cuda"]
    assert f"(default {cpu} on the CPU, {gpu} on a GPU)" in " ".join(capsys.readouterr().out.split())


def test_without_a_model_it_only_downloads(server, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["hellaswag.py"])
    hellaswag.main()
    assert hellaswag.PATH in capsys.readouterr().out and read_bytes(hellaswag.PATH) == CONTENTS


def test_two_ranks_get_the_scores_of_one(command, tmp_path):
    # 11 batches: one rank has one fewer
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
