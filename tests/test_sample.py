"""
Sampling of one token; generation with the KV cache against plain forward passes over the whole
context and against transformers' generate; texts and streams of them; the command on a checkpoint
of random weights.

    .venv/bin/python -m pytest tests/test_sample.py

Needs transformers (requirements-dev.txt).
"""
import copy
import functools
import io
import os
import platform
import signal
import subprocess
import sys

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, TopKLogitsWarper, TopPLogitsWarper

import sample
import train_gpt2
from common import ENV, ONE, ROOT, tiny_model
from convert import hf_state_dict
from data import EOT, NUM_TOKENS, get_tokenizer
from model import GPT
from run import checkpoint
from run.runtime import autocast
from sample import (can_pack, encode_prompt, generate, generate_text, prepare_for_sampling,
                    sample_next_token, stream, stream_text)


def make_model(vocab_size=NUM_TOKENS, std=0.3, **changes):
    """A small model whose logits differ by far more than rounding errors."""
    return tiny_model(std=std, **{"block_size": 32, "vocab_size": vocab_size, **changes})


def overflowing_model():
    """A model with finite weights whose activations are infinite in float16."""
    model = make_model()
    with torch.no_grad():
        model.transformer.h[0].mlp.c_fc.weight[0, 0] = 1e5
    return model


def generator(seed=42):
    return torch.Generator().manual_seed(seed)


def random_rows(lengths, vocab_size=211):
    """Lists of random token ids, of these lengths."""
    rng = generator(1)
    return [torch.randint(vocab_size, (T,), generator=rng).tolist() for T in lengths]


# -----------------------------------------------------------------------------
# one token

def test_tokens_are_sampled_with_the_probabilities_of_the_softmax_at_the_temperature():
    logits, temperature = torch.tensor([1.0, 2.0, 0.5, -1.0]), 0.7
    sampled = sample_next_token(logits.repeat(20000, 1), generator(), temperature, top_k=0)
    frequencies = torch.bincount(sampled.flatten(), minlength=4) / 20000
    expected = torch.softmax(logits / temperature, dim=0)
    assert torch.allclose(frequencies, expected, atol=0.015)  # over four standard errors


@pytest.mark.parametrize("top_k, kept", [(5, 5), (0, 100), (100, 100), (101, 100), (10**9, 100)])
def test_top_k_keeps_the_k_most_likely_tokens(top_k, kept):
    """0, or more than the vocabulary, keeps all tokens."""
    logits = torch.randn(1, 100, generator=generator(1))
    sampled = sample_next_token(logits.repeat(3000, 1), generator(), 5.0, top_k)
    assert set(sampled.flatten().tolist()) == set(logits.topk(kept).indices[0].tolist())


@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [0, 20])
def test_top_p_keeps_the_tokens_that_transformers_keeps(top_p, top_k):
    logits = torch.randn(1, 60, generator=generator(3)) * 2
    kept = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    probs = TopPLogitsWarper(top_p)(None, kept).softmax(dim=-1)[0]
    sampled = sample_next_token(logits.repeat(60000, 1), generator(0), 1.0, top_k, top_p)
    frequencies = torch.bincount(sampled.flatten(), minlength=60) / 60000
    assert torch.allclose(frequencies, probs, atol=0.01) and (frequencies[probs == 0] == 0).all()


def test_ids_of_the_padded_vocabulary_are_never_sampled():
    logits = torch.zeros(50, 50304)
    logits[:, NUM_TOKENS:] = 100.0  # near certain, if they were not excluded
    for temperature, top_k in ((0, 50), (1.0, 50), (1.0, 0), (10.0, 50304)):
        assert sample_next_token(logits, generator(), temperature, top_k).max() < NUM_TOKENS
    logits[:, NUM_TOKENS - 1] = 50.0  # the last real id can be sampled
    assert (sample_next_token(logits, generator()) == NUM_TOKENS - 1).all()


def test_temperature_zero_is_argmax_and_uses_no_random_numbers():
    logits = torch.randn(8, 1000, generator=generator(1))
    rng = generator()
    before = rng.get_state()
    tokens = sample_next_token(logits, rng, temperature=0)
    assert torch.equal(tokens, logits.argmax(-1, keepdim=True))
    assert torch.equal(rng.get_state(), before)


@pytest.mark.parametrize("options", [
    dict(temperature=1e-40), dict(top_p=1e-300), dict(temperature=1e-300, top_k=0)])
def test_tiny_temperatures_and_probabilities_give_the_most_likely_token(options):
    """They were rounded to 0: torch.multinomial raised RuntimeError, for probabilities of NaN."""
    logits = torch.randn(8, 1000, generator=generator(1)) * 10
    tokens = sample_next_token(logits, generator(), **options)
    assert torch.equal(tokens, logits.argmax(-1, keepdim=True))


@pytest.mark.parametrize("temperature, top_p", [(0, 1.0), (1.0, 1.0), (1.0, 0.5)])
def test_the_token_of_a_row_without_finite_logits_is_minus_1(temperature, top_p):
    logits = torch.randn(5, 100, generator=generator(1))
    logits[0, 3], logits[1, 4], logits[2] = float("nan"), float("inf"), -float("inf")
    logits[3, 5] = -float("inf")  # only this token is impossible
    before = logits.clone()
    tokens = sample_next_token(logits, generator(), temperature, 50, top_p).flatten()
    assert (tokens >= 0).tolist() == [False, False, False, True, True]
    assert torch.equal(logits.nan_to_num(), before.nan_to_num())  # unchanged


# -----------------------------------------------------------------------------
# the KV cache: logits

@torch.no_grad()
def cached_logits(model, idx, lengths):
    """[(positions (B), logits (B, V)), ...]: row b's prompt is its first lengths[b] tokens."""
    B, T = idx.size()
    caches = sample.make_caches(model, B, T)
    prompts = [row[:n].tolist() for row, n in zip(idx, lengths)]
    last = torch.tensor(lengths) - 1
    x = sample.prefill(model.hidden, prompts, caches)
    steps = [(last, model.lm_head(x))]
    while last.max() < T - 1:
        last = last + 1
        tokens = idx[torch.arange(B), last][:, None]
        x = sample.decode(model.hidden, tokens, (last + 1).tolist(), caches)
        steps.append((last, model.lm_head(x)))
    return steps


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 20, 7]], ids=["equal", "mixed"])
@pytest.mark.parametrize("bias", [True, False])
def test_cached_logits_equal_those_of_a_forward_pass_over_the_whole_context(lengths, bias):
    model = make_model(211, bias=bias)
    idx = torch.tensor(random_rows([32, 32, 32]))
    uncached = model(idx, idx)[0]
    steps = cached_logits(model, idx, lengths)
    assert len(steps) == 32 - max(lengths) + 1
    for last, logits in steps:
        assert torch.allclose(logits, uncached[torch.arange(3), last], atol=1e-4, rtol=0)


@torch.no_grad()
def test_a_prompt_does_not_attend_to_the_previous_contents_of_the_cache():
    model = make_model(211)
    idx = torch.tensor(random_rows([9, 9]))
    caches = sample.make_caches(model, 2, 32)
    for cache in caches:
        cache.k.fill_(float("nan"))
        cache.v.fill_(float("nan"))
    x = sample.prefill(model.hidden, idx.tolist(), caches)
    assert torch.allclose(x, model.hidden(idx)[:, -1], atol=1e-6)
    for cached in (caches[0].k, caches[-1].v):
        assert cached[:, :, :9].isfinite().all() and cached[:, :, 9:].isnan().all()


def test_the_cache_has_the_dtype_of_attention():
    model = make_model(211, n_head=4)
    caches = sample.make_caches(model, 3, 7)
    assert [cache.k.shape for cache in caches] == [(3, 4, 7, 4)] * 2
    assert caches[0].k.dtype == torch.float32
    with autocast("cpu", "bfloat16"):
        assert sample.make_caches(model, 1, 4)[0].v.dtype == torch.bfloat16
        assert len(greedy(model, random_rows([3]), 5)[0]) == 5


# -----------------------------------------------------------------------------
# the KV cache: tokens

def context_start(T, block_size):
    """Where the context of T tokens starts.

    For a block_size of 1024: at 0 up to T = 1024, 512 up to 1536, 1024 up to 2048.
    """
    half = (block_size + 1) // 2
    return -(-max(0, T - block_size) // half) * half


@torch.no_grad()
def uncached_generate(model, row, max_new_tokens):
    """The tokens that greedy decoding appends to one row, each by a pass over the whole context."""
    row = list(row[-model.config.block_size:])
    new = []
    for _ in range(max_new_tokens):
        context = torch.tensor([row[context_start(len(row), model.config.block_size):]])
        logits = model(context, context)[0][0, -1]
        new.append(logits[:NUM_TOKENS].argmax().item())
        row.append(new[-1])
    return new


def greedy(model, rows, max_new_tokens):
    """The tokens that greedy decoding with the cache appends to each row, a list of lists."""
    return torch.stack(list(stream(model, rows, max_new_tokens, temperature=0)), dim=1).tolist()


@pytest.mark.parametrize("lengths", [[4], [6, 6, 6], [1, 13, 5, 24]], ids=["one", "equal", "mixed"])
def test_greedy_tokens_equal_those_of_transformers(lengths):
    model, rows = make_model(211), random_rows(lengths)
    config = GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=211,
                        bos_token_id=None, eos_token_id=None)
    hf = GPT2LMHeadModel(config).eval()
    hf.load_state_dict(hf_state_dict(model), strict=False)
    T = max(lengths)
    padded = torch.tensor([[0] * (T - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (T - len(row)) + [1] * len(row) for row in rows])
    theirs = hf.generate(padded, attention_mask=mask, max_new_tokens=32 - T, do_sample=False,
                         pad_token_id=0)
    assert greedy(model, rows, 32 - T) == theirs[:, T:].tolist()


@pytest.fixture
def inputs(monkeypatch):
    """The list of the idx that GPT.hidden is called with."""
    calls, hidden = [], GPT.hidden

    def recorded(self, idx, *args):
        calls.append(idx.tolist())
        return hidden(self, idx, *args)
    monkeypatch.setattr(GPT, "hidden", recorded)
    return calls


def test_a_full_context_drops_its_older_half(inputs):
    model, rows = make_model(211, block_size=16), random_rows([3, 16, 11])
    expected = [uncached_generate(model, row, 50) for row in rows]
    assert greedy(model, rows, 50) == expected
    inputs.clear()
    assert greedy(model, rows[1:2], 50) == expected[1:2]
    # the prompt of 16 tokens; then 8 + 1 each time that 16 are exceeded, which is every 8 tokens;
    # otherwise one token
    widths = [len(idx[0]) for idx in inputs]
    assert [w for w in widths if w > 1] == [16] + [9] * 7 and len(widths) == 50


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_a_small_or_odd_block_size_works(block_size):
    model, rows = make_model(211, block_size=block_size), random_rows([1, 4])
    assert greedy(model, rows, 12) == [uncached_generate(model, row, 12) for row in rows]


def test_a_prompt_longer_than_the_block_is_cut_to_its_end(inputs):
    row, = random_rows([45])
    model = make_model(211, block_size=16)
    tokens = greedy(model, [row], 5)
    assert inputs[0] == [row[-16:]] and tokens == [uncached_generate(model, row[-16:], 5)]


def test_with_the_same_generator_the_tokens_equal_those_of_the_lecture():
    model = make_model()
    x = torch.tensor(random_rows([4, 4, 4], NUM_TOKENS))
    ours = generate(model, x, 28, generator(), top_k=50)
    sample_rng = generator()
    with torch.no_grad():
        while x.size(1) < 32:
            logits = model(x, x)[0][:, -1, :]
            probs = F.softmax(logits, dim=-1)
            topk_probs, topk_indices = torch.topk(probs, 50, dim=-1)
            ix = torch.multinomial(topk_probs, 1, generator=sample_rng)
            x = torch.cat((x, torch.gather(topk_indices, -1, ix)), dim=1)
    assert EOT not in x.flatten().tolist() and ours.tolist() == x.tolist()


# -----------------------------------------------------------------------------
# the end of a row

def script_tokens(monkeypatch, *steps):
    """Makes sample_next_token return these columns of tokens, one per call."""
    columns = iter(steps)
    monkeypatch.setattr(sample, "sample_next_token",
                        lambda *args: torch.tensor(next(columns))[:, None])


def test_a_row_stays_ended_and_generation_stops_when_all_rows_have_ended(monkeypatch):
    script_tokens(monkeypatch, [7, EOT], [8, 9], [EOT, 9])  # a fourth call would raise
    out = generate(make_model(), torch.tensor([[1], [2]]), 10)
    assert out.tolist() == [[1, 7, 8, EOT], [2, EOT, EOT, EOT]]


def test_endoftext_in_the_prompt_does_not_end_the_row(monkeypatch):
    script_tokens(monkeypatch, [3], [4])
    assert [tokens.tolist() for tokens in stream(make_model(), [[EOT]], 2)] == [[3], [4]]


def test_an_empty_row_is_an_error():
    with pytest.raises(ValueError, match="a prompt is empty; to start a document use"):
        next(stream(make_model(211), [[1], []], 3))


def test_a_row_that_has_ended_may_have_any_logits(monkeypatch):
    script_tokens(monkeypatch, [7, EOT], [8, -1])
    tokens = [tokens.tolist() for tokens in stream(make_model(), [[1], [2]], 2)]
    assert tokens == [[7, EOT], [8, EOT]]


def test_a_token_waits_for_the_device_once(monkeypatch):
    """.tolist() is the only transfer to the CPU; on a GPU each of them waits."""
    calls = []

    def count(name):
        original = getattr(torch.Tensor, name)

        def counted(*args):
            calls.append(name)
            return original(*args)
        monkeypatch.setattr(torch.Tensor, name, counted)
    for name in ("tolist", "item", "__bool__", "cpu", "numpy"):
        count(name)
    assert len(list(stream(make_model(211), [[1, 2], [3]], 10, generator(), top_p=0.9))) == 10
    assert calls == ["tolist"] * 10


def test_the_contexts_do_not_grow_with_the_text():
    """All tokens of a stream were kept: memory without bound in an endless --interactive."""
    steps = stream.__wrapped__(make_model(211, block_size=8), [[1], [2]], 10**9)
    with torch.no_grad():
        for _ in range(50):
            next(steps)
    assert max(map(len, steps.gi_frame.f_locals["rows"])) <= 9


def test_tokens_are_computed_when_they_are_requested_without_gradients(inputs):
    steps = stream(make_model(211), [[1], [2]], 5)
    assert inputs == []
    assert not next(steps).requires_grad and len(inputs) == 1 and torch.is_grad_enabled()
    assert len(list(steps)) == 4 and len(inputs) == 5


# -----------------------------------------------------------------------------
# packed weights, torch.compile

HAS_ONEDNN = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()


def pack(model, dtype, num_samples):
    """A copy prepared for sampling, whose weights are packed."""
    packed = copy.deepcopy(model)
    prepare_for_sampling(packed, dtype, num_samples)
    assert not [m for m in packed.modules() if isinstance(m, torch.nn.Linear)]
    return packed


@pytest.mark.skipif(not HAS_ONEDNN, reason="oneDNN packs weights only on x86")
def test_packed_float32_weights_give_the_same_logits():
    model, idx = make_model(50304), torch.tensor(random_rows([12, 12, 12], NUM_TOKENS))
    packed = pack(model, "float32", num_samples=3)
    expected = cached_logits(model, idx, [3, 9, 1])
    for (_, ours), (_, theirs) in zip(cached_logits(packed, idx, [3, 9, 1]), expected):
        assert torch.allclose(ours, theirs, atol=1e-4, rtol=0)
    assert greedy(packed, idx.tolist(), 30) == greedy(model, idx.tolist(), 30)


@pytest.mark.skipif(not HAS_ONEDNN or not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
                    reason="oneDNN does not support bfloat16 on this CPU")
def test_packed_bfloat16_weights_give_the_float32_logits_up_to_rounding():
    model, idx = make_model(211), torch.tensor(random_rows([12, 12]))
    float32 = model(idx, idx)[0]
    for last, logits in cached_logits(pack(model, "bfloat16", 2), idx, [4, 2]):
        expected = float32[torch.arange(2), last]
        assert (logits.float() - expected).norm() < 0.05 * expected.norm()


def test_only_the_cpu_and_its_dtypes_are_packed():
    assert not can_pack("cuda:0", "float32") and not can_pack("cpu", "float16")
    model = make_model(211)
    prepare_for_sampling(model, "float32", compiled=True)
    assert isinstance(model.lm_head, torch.nn.Linear)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_prepared_model_has_the_dtype_and_generates(dtype):
    model = make_model(50304)
    prepare_for_sampling(model, dtype)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    assert len(greedy(model, [[1, 2, 3]], 40)[0]) == 40


@pytest.mark.slow
def test_a_compiled_model_generates_the_same_tokens_with_few_graphs(monkeypatch, tmp_path):
    from torch._dynamo.testing import CompileCounterWithBackend
    # a shared cache may have kernels of a machine with another instruction set
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch._dynamo.reset()  # or the graphs of earlier tests in this process count, too
    model = make_model(211)
    rows, logits = random_rows([3, 9, 1]), []

    def recorded(x, *args):
        logits.append(x)
        return sample_next_token(x, *args)
    monkeypatch.setattr(sample, "sample_next_token", recorded)
    eager = greedy(model, rows, 60)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model.hidden, dynamic=True, backend=counter)
    steps = list(stream(model, rows, 60, temperature=0, hidden=compiled))
    expected, got = torch.stack(logits[:60]), torch.stack(logits[60:])  # (60, B, V)
    top = expected.topk(2, dim=-1).values
    # by far more than rounding errors: no token is a toss-up
    assert (top[:, :, 0] - top[:, :, 1]).min() > 0.01
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert torch.stack(steps, dim=1).tolist() == eager and counter.frame_count <= 4


# -----------------------------------------------------------------------------
# the CUDA graph

def traced(function):
    """cuda_graph on a CPU: a traced function, too, repeats the same operators on the same tensors,
    whatever Python would do now."""
    for _ in range(3):
        function()
    trace, result = make_fx(function)(), function()
    return lambda: result.copy_(trace()), result


@pytest.fixture
def graphs(monkeypatch):
    """Replaces CUDA graphs by traced functions; a list of what was captured."""
    captured = []

    def cuda_graph(function):
        captured.append(function)
        return traced(function)
    monkeypatch.setattr(sample, "cuda_graph", cuda_graph)
    return captured


def test_a_replayed_graph_gives_the_same_logits_and_tokens(graphs, capsys):
    model, rows = make_model(211), random_rows([3, 9, 1])
    hidden = sample.GraphedHidden(model.hidden)
    for max_new_tokens in (60, 5):  # 60: the context of 32 is full twice
        expected = greedy(model, rows, max_new_tokens)
        steps = stream(model, rows, max_new_tokens, temperature=0, hidden=hidden)
        assert torch.stack(list(steps), dim=1).tolist() == expected
    assert len(graphs) == 2 and capsys.readouterr().err == ""  # one per text, for all of its tokens
    idx = torch.tensor(random_rows([12, 12, 12]))
    expected = cached_logits(model, idx, [3, 9, 1])
    model.hidden = hidden
    for (_, ours), (_, theirs) in zip(cached_logits(model, idx, [3, 9, 1]), expected):
        assert torch.allclose(ours, theirs, atol=1e-5, rtol=0)


def test_without_a_graph_sampling_is_only_slower(monkeypatch, capsys):
    """What was captured is not computed: the first token attended by the mask of a failed capture.
    """
    def broken(function):
        function()
        for cache in hidden.caches:
            cache.attn_mask = torch.zeros_like(cache.attn_mask)
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
    monkeypatch.setattr(sample, "cuda_graph", broken)
    model, rows = make_model(211), random_rows([3, 9, 1])
    hidden = sample.GraphedHidden(model.hidden)
    steps = stream(model, rows, 60, temperature=0, hidden=hidden)
    assert torch.stack(list(steps), dim=1).tolist() == greedy(model, rows, 60)
    assert capsys.readouterr().err.count("sampling slowly, without a CUDA graph: RuntimeError") == 1


# -----------------------------------------------------------------------------
# texts


def test_the_seed_is_that_of_torchs_generator():
    model = make_model()
    prompt = torch.tensor([encode_prompt("Hello")] * 2)
    rows = generate(model, prompt, 10, generator(7)).tolist()
    texts = ["".join(stream_text(row)) for row in rows]
    assert generate_text(model, "Hello", 2, 10, seed=7) == texts


def test_endoftext_ends_a_text(monkeypatch):
    tokens = get_tokenizer().encode_ordinary(" one two three")
    script_tokens(monkeypatch, [tokens[0]], [tokens[1]], [EOT], [tokens[2]])
    assert generate_text(make_model(), "Zero", 1, 4, seed=0) == ["Zero one two"]


def test_an_empty_prompt_starts_a_document():
    assert encode_prompt("") == [EOT]
    assert encode_prompt("Once") == get_tokenizer().encode_ordinary("Once")
    assert encode_prompt("<|endoftext|>") != [EOT]  # in a prompt it is ordinary text
    assert generate_text(make_model(), "", 1, 4, seed=0)[0]


HARD = ("naïve café, 日本語のテキスト, \U0001f469\u200d\U0001f680 \U0001f1ec\U0001f1f7, ٣٤,"
        " \t\n\n   x")


def test_a_stream_yields_complete_characters_that_concatenate_to_the_text():
    pieces = list(stream_text(get_tokenizer().encode_ordinary(HARD)))
    assert "".join(pieces) == HARD and "\ufffd" not in "".join(pieces)
    assert "" in pieces[:-1]  # a token that ends within a character yields no text


def test_invalid_utf8_is_decoded_as_by_the_tokenizer():
    tokens = get_tokenizer().encode_ordinary("日本 😀 a")
    for cut in (tokens[1:], tokens[:-3], tokens[::-1]):
        text = get_tokenizer().decode(cut)
        assert "".join(stream_text(cut)) == text


def test_a_text_stream_reads_each_token_when_requested_and_none_after_endoftext():
    tokens = iter([*get_tokenizer().encode_ordinary(" one two"), EOT, 1, 2])
    texts = stream_text(tokens)
    assert next(texts) == " one" and next(texts) == " two"
    assert list(texts) == [""] and list(tokens) == [1, 2]


# -----------------------------------------------------------------------------
# the command

PLAIN = ["--dtype", "float32", "--device", "cpu", "--temperature", "0"]
ONE_SAMPLE = [*PLAIN, "--num-samples", "1", "--max-new-tokens", "5"]


@pytest.fixture
def run_dir(tmp_path):
    checkpoint.save(str(tmp_path), 7, checkpoint.model_contents(make_model(), 3.25), {})
    return tmp_path


@pytest.fixture
def command(run_dir, run_script):
    """A function of flags: (exit status, stdout, stderr) of `python sample.py RUN_DIR flags`."""
    return functools.partial(run_script, sample, run_dir)


def start(run_dir, *flags, streams=subprocess.PIPE, **options):
    """`python sample.py RUN_DIR flags` in a new process, greedy, with piped streams of bytes."""
    script = os.path.join(ROOT, "sample.py")
    return subprocess.Popen([sys.executable, script, run_dir, *PLAIN, *map(str, flags)],
                            env={**ENV, "TERM": "dumb"}, stdin=streams, stdout=streams,
                            stderr=streams, cwd=run_dir, **options)


def greedy_text(prompt, max_new_tokens):
    return generate_text(make_model(), prompt, 1, max_new_tokens, 0, temperature=0)[0]


@pytest.mark.slow
def test_compile_does_not_change_greedy_text(run_dir):
    process = start(run_dir, "--compile", "on", "--prompt", "Hello", "--num-samples", 1,
                    "--max-new-tokens", 40)
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0 and greedy_text("Hello", 40) in out.decode(), error.decode()


def test_samples_are_on_stdout_and_the_checkpoint_on_stderr(command, run_dir):
    flags = [*PLAIN, "--prompt", "To be", "--num-samples", 2, "--max-new-tokens", 20]
    status, stdout, stderr = command(*flags)
    assert status == 0 and stderr == f"{run_dir / 'model_00007.pt'}: step 7, val loss 3.2500\n"
    before, *samples = stdout.split("--- sample ")
    assert before == "" and len(samples) == 2
    for text in samples:
        assert text.split("\n", 1)[1] == greedy_text("To be", 20) + "\n"
    assert command(*flags, "--stream") == (status, stdout, stderr)


def test_the_flags_of_the_command_reach_the_sampling(command):
    flags = {"num_samples": 2, "max_new_tokens": 9, "seed": 5, "temperature": 0.7, "top_k": 20,
             "top_p": 0.9}
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    _, stdout, _ = command("--dtype", "float32", "--device", "cpu", "--prompt", "Hello", *arguments)
    texts = [text.split("\n", 1)[1][:-1] for text in stdout.split("--- sample ")[1:]]
    model = make_model()
    prepare_for_sampling(model, "float32", 2)
    assert texts == generate_text(model, "Hello", **flags)


def set_stdin(monkeypatch, contents, encoding="ascii"):
    """Makes sys.stdin a pipe with these bytes."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(contents), encoding))


@pytest.mark.parametrize("contents", ["Wörld", "Wörld\n", "Wörld\r\n", "\ufeffWörld"])
def test_a_prompt_from_stdin_or_a_file_equals_that_of_the_flag(command, run_dir, monkeypatch,
                                                               contents):
    expected = command(*ONE_SAMPLE, "--prompt", "Wörld")
    assert expected[0] == 0 and expected[1].split("\n", 1)[1] == greedy_text("Wörld", 5) + "\n"
    set_stdin(monkeypatch, contents.encode())
    assert command(*ONE_SAMPLE, "-") == expected
    path = run_dir / "prompt.txt"
    path.write_bytes(contents.encode())
    assert command(*ONE_SAMPLE, "--prompt-file", path) == expected


def test_a_prompt_file_may_be_process_substitution(command):
    reader, writer = os.pipe()
    os.write(writer, "Wörld\n".encode())
    os.close(writer)
    piped = command(*ONE_SAMPLE, "--prompt-file", f"/dev/fd/{reader}")
    os.close(reader)
    assert piped == command(*ONE_SAMPLE, "--prompt", "Wörld")


def test_a_prompt_from_stdin_must_be_utf8(command, monkeypatch):
    set_stdin(monkeypatch, b"W\xf6rld")
    status, _, stderr = command("-")
    assert status == 2 and stderr.startswith("error: stdin is not valid UTF-8 at byte 2")


def test_interactive_answers_each_line_and_continues_after_an_invalid_one(command, monkeypatch):
    long = "Or not " * 20
    set_stdin(monkeypatch, b"To be\n\xff\n" + long.encode() + b"\n\n", "utf-8")
    status, stdout, stderr = command(*PLAIN, "--interactive", "--max-new-tokens", 5)
    answers = [greedy_text(prompt, 5).removeprefix(prompt) for prompt in ("To be", long, "")]
    assert status == 0 and stdout == f"> {answers[0]}\n> > {answers[1]}\n> {answers[2]}\n> \n"
    assert "error: the text is not valid Unicode at character 1" in stderr
    assert "the prompt has 41 tokens; only the last 32 are used" in stderr


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_in_a_terminal_ctrl_c_stops_an_answer_arrow_up_repeats_a_prompt_ctrl_d_exits(run_dir):
    import fcntl
    import pty
    import termios
    keyboard, terminal = pty.openpty()

    def use_terminal():
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = start(run_dir, "--interactive", "--max-new-tokens", 10**9, streams=terminal,
                    start_new_session=True, preexec_fn=use_terminal)
    os.close(terminal)
    output = b""
    try:
        for typed in (b"To be\n", b"\x1b[A\n", b"\x04"):
            while not output.endswith(b"> "):
                output += os.read(keyboard, 1000)
            os.write(keyboard, typed)
            if typed != b"\x04":
                start_of_answer = len(output)
                while len(output) < start_of_answer + 50:  # in the middle of it
                    output += os.read(keyboard, 1000)
                os.write(keyboard, b"\x03")
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        os.close(keyboard)
    assert output.count(b"> To be\r\n") == 2 and b"Traceback" not in output


def test_a_prompt_longer_than_the_context_is_reported_and_printed_whole(command):
    status, stdout, stderr = command(*ONE_SAMPLE, "--prompt", "word " * 40)
    assert status == 0 and "the prompt has 41 tokens; only the last 32 are used" in stderr
    assert stdout.split("\n", 1)[1].startswith("word " * 40)


def test_an_overflow_in_float16_does_not_end_the_training(capsys):
    train_gpt2.print_samples(overflowing_model(), "To be", "float16", ONE, num_samples=2,
                             max_new_tokens=3)
    assert capsys.readouterr().out.count("logits are NaN or infinite") == 2


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_overflow_in_float16_is_one_line(command, run_dir, temperature):
    """Sampling printed "!!!!!!", token 0, or ended with a traceback of torch.multinomial."""
    checkpoint.save(str(run_dir), 8, checkpoint.model_contents(overflowing_model(), 3.25), {})
    flags = "--dtype", "float16", "--device", "cpu", "--temperature", temperature
    status, stdout, stderr = command(*flags)
    assert status == 2 and stdout == "" and stderr.splitlines()[1:] == [
        "error: the model's logits are NaN or infinite: its activations overflow;"
        " try --dtype float32"]
