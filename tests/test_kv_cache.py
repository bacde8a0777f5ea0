"""
The KV cache: what is sampled with it is what a plain forward pass over the whole context gives, and what transformers'
generate gives; rows of different lengths, contexts that slide, packed weights, torch.compile.

    .venv/bin/python -m pytest tests/test_kv_cache.py

Needs transformers (requirements-dev.txt).
"""
import copy

import pytest
import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import bench_sample
import sample
from data import EOT, NUM_TOKENS
from model import GPT, GPTConfig
from runtime import autocast
from sample import can_pack, context_start, generate, prepare_for_sampling, sample_next_token, stream


def make_model(vocab_size=211, block_size=32, seed=0, **changes):
    """A small model whose logits differ by far more than rounding."""
    torch.manual_seed(seed)
    config = GPTConfig(**{**dict(n_layer=2, n_head=2, n_embd=16, block_size=block_size, vocab_size=vocab_size), **changes})
    model = GPT(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.3)
    return model


def random_rows(lengths, vocab_size=211, seed=1):
    rng = torch.Generator().manual_seed(seed)
    return [torch.randint(vocab_size, (T,), generator=rng).tolist() for T in lengths]


@torch.no_grad()
def plain_generate(model, row, max_new_tokens):
    """Greedy, uncached, one row: the context by the rule of context_start, read anew for every token."""
    row = list(row[-model.config.block_size:])
    new = []
    for _ in range(max_new_tokens):
        context = torch.tensor([row[context_start(len(row), model.config.block_size):]])
        logits = model(context, context)[0][0, -1]
        new.append(logits[:NUM_TOKENS].argmax().item())
        row.append(new[-1])
    return new


def greedy(model, rows, max_new_tokens):
    """List of what each row goes on with, through the cache."""
    return torch.stack(list(stream(model, rows, max_new_tokens, temperature=0)), dim=1).tolist()


# -----------------------------------------------------------------------------
# logits

@torch.no_grad()
def forced_logits(model, idx, lengths):
    """Logits (B, V) a step, with the cache: row b is prompted with its first lengths[b] tokens, then told the others."""
    B, T = idx.size()
    cache = model.make_cache(B, T)
    last = torch.tensor(lengths) - 1
    longest = max(lengths)
    x = model.hidden(idx[:, :longest], torch.arange(longest), None, cache)[torch.arange(B), last]
    steps = [(last, model.lm_head(x))]
    while (last := last + 1).max() < T:
        mask = torch.arange(int(last.max()) + 1) <= last[:, None]
        x = model.hidden(idx[torch.arange(B), last][:, None], last[:, None], mask[:, None, None, :], cache)
        steps.append((last, model.lm_head(x[:, -1])))
    return steps


@pytest.mark.parametrize("lengths", [[5, 5, 5], [1, 20, 7]], ids=["equal", "mixed"])
@pytest.mark.parametrize("bias", [True, False])
def test_cached_logits_are_the_uncached_ones_over_the_whole_context(lengths, bias):
    model = make_model(bias=bias)
    idx = torch.tensor(random_rows([32, 32, 32]))
    whole = model(idx, idx)[0]
    steps = forced_logits(model, idx, lengths)
    assert len(steps) == 32 - max(lengths) + 1
    for last, logits in steps:
        assert torch.allclose(logits, whole[torch.arange(3), last], atol=1e-4, rtol=0)


@pytest.mark.slow
def test_cached_logits_of_a_124m_model_are_the_uncached_ones_over_1024_tokens():
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=12)).eval()
    idx = torch.tensor(random_rows([1024, 1024], NUM_TOKENS))
    with torch.no_grad():
        whole = model.lm_head(model.hidden(idx, torch.arange(1024)))
    for last, logits in forced_logits(model, idx, [1000, 900]):
        assert torch.allclose(logits, whole[torch.arange(2), last], atol=1e-4, rtol=0)


def test_without_a_cache_hidden_writes_nothing_and_reads_nothing():
    model = make_model()
    idx = torch.tensor(random_rows([9, 9]))
    with torch.no_grad():
        plain = model.hidden(idx, torch.arange(9))
        cache = model.make_cache(2, 32).fill_(float("nan"))  # a prompt must not look at what the cache held
        assert torch.allclose(model.hidden(idx, torch.arange(9), None, cache), plain, atol=1e-6)
    assert cache[:, :, :, :, :9].isfinite().all() and cache[:, :, :, :, 9:].isnan().all()


def test_the_cache_is_of_the_dtype_in_which_attention_runs():
    model = make_model()
    assert model.make_cache(1, 4).dtype == torch.float32
    with autocast("cpu", "bfloat16"):
        assert model.make_cache(1, 4).dtype == torch.bfloat16
        assert len(greedy(model, random_rows([3]), 5)[0]) == 5
    assert make_model(n_head=4).make_cache(3, 7).shape == (2, 2, 3, 4, 7, 4)


# -----------------------------------------------------------------------------
# tokens

@pytest.mark.parametrize("lengths", [[4], [6, 6, 6], [1, 13, 5, 24]], ids=["one", "equal", "mixed"])
def test_greedy_tokens_are_those_of_transformers(lengths):
    model, rows = make_model(), random_rows(lengths)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=2, n_head=2, n_embd=16, n_positions=32, vocab_size=211, bos_token_id=None,
                                    eos_token_id=None)).eval()
    hf.load_state_dict(model.hf_state_dict(), strict=False)
    new = 32 - max(lengths)
    padded = torch.tensor([[0] * (max(lengths) - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (max(lengths) - len(row)) + [1] * len(row) for row in rows])
    theirs = hf.generate(padded, attention_mask=mask, max_new_tokens=new, do_sample=False, pad_token_id=0)
    assert greedy(model, rows, new) == theirs[:, max(lengths):].tolist()


def test_a_row_does_not_depend_on_the_rows_beside_it():
    model, rows = make_model(), random_rows([1, 30, 11])
    together = greedy(model, rows, 60)
    assert together == [greedy(model, [row], 60)[0] for row in rows]


def test_the_window_slides_by_halves_as_the_plain_rule_says(monkeypatch):
    model, rows = make_model(block_size=16), random_rows([3, 16, 11])
    expected = [plain_generate(model, row, 50) for row in rows]
    widths, hidden = [], model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, *args: widths.append(idx.size(1)) or hidden(idx, *args))
    assert greedy(model, rows, 50) == expected
    assert greedy(model, rows[1:2], 50) == expected[1:2]
    # 16 tokens, then 8 + 1 whenever 16 are exceeded, every 8 tokens; one token a step otherwise
    assert [w for w in widths[50:] if w > 1] == [16] + [9] * 7 and len(widths) == 100


@pytest.mark.parametrize("block_size", [1, 2, 5])
def test_the_window_of_a_tiny_or_odd_block(block_size):
    model, rows = make_model(block_size=block_size), random_rows([1, 4])
    assert greedy(model, rows, 12) == [plain_generate(model, row, 12) for row in rows]


def test_the_context_begins_at_a_multiple_of_half_a_block_and_is_never_too_long():
    assert [context_start(T, 1024) for T in (1, 1024, 1025, 1536, 1537, 2048, 2049)] == [0, 0, 512, 512, 1024, 1024, 1536]
    for block_size in (1, 2, 7, 8):
        for T in range(1, 40):
            context = T - context_start(T, block_size)
            assert 1 <= context <= block_size and (T <= block_size or context > block_size // 2 - 1)


def test_a_prompt_longer_than_the_block_is_cut_to_its_end(monkeypatch):
    model, seen = make_model(block_size=16), []
    row, = random_rows([45])
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda idx, *args: seen.append(idx.tolist()) or hidden(idx, *args))
    assert greedy(model, [row], 5) == [plain_generate(model, row[-16:], 5)]
    assert seen[0] == [row[-16:]]


def test_with_the_same_generator_the_tokens_are_the_lectures():
    model = make_model(vocab_size=NUM_TOKENS)
    x = torch.tensor(random_rows([4, 4, 4], NUM_TOKENS))
    ours = generate(model, x, 28, torch.Generator().manual_seed(42), top_k=50)
    sample_rng = torch.Generator().manual_seed(42)
    with torch.no_grad():
        while x.size(1) < 32:
            logits = model(x, x)[0][:, -1, :]
            probs = F.softmax(logits, dim=-1)
            topk_probs, topk_indices = torch.topk(probs, 50, dim=-1)
            ix = torch.multinomial(topk_probs, 1, generator=sample_rng)
            x = torch.cat((x, torch.gather(topk_indices, -1, ix)), dim=1)
    assert EOT not in x.tolist()[0] and ours.tolist() == x.tolist()


# -----------------------------------------------------------------------------
# the end of a text

def scripted(monkeypatch, *steps):
    """sample_next_token gives these columns of tokens, one a call."""
    script = iter(steps)
    monkeypatch.setattr(sample, "sample_next_token", lambda *args: torch.tensor(next(script))[:, None])


def test_a_row_that_ended_stays_ended_and_when_all_have_the_rest_is_not_computed(monkeypatch):
    model = make_model(vocab_size=NUM_TOKENS)
    scripted(monkeypatch, [7, EOT], [8, 9], [EOT, 9])  # a fourth call would raise StopIteration
    out = generate(model, torch.tensor([[1], [2]]), 10)
    assert out.tolist() == [[1, 7, 8, EOT], [2, EOT, EOT, EOT]]


def test_a_prompt_that_begins_with_endoftext_has_not_ended(monkeypatch):
    scripted(monkeypatch, [3], [4])
    assert [t.tolist() for t in stream(make_model(vocab_size=NUM_TOKENS), [[EOT]], 2)] == [[3], [4]]


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="an empty prompt"):
        next(stream(make_model(), [[1], []], 3))


def test_tokens_come_one_step_at_a_time(monkeypatch):
    calls = []
    monkeypatch.setattr(sample, "sample_next_token", lambda logits, *args: calls.append(1) or logits[:, :1].long() * 0)
    steps = stream(make_model(), [[1], [2]], 5)
    assert calls == []
    assert next(steps).tolist() == [0, 0] and len(calls) == 1
    assert len(list(steps)) == 4 and len(calls) == 5


def test_gradients_are_off_within_and_untouched_without():
    steps = stream(make_model(), [[1]], 3)
    assert not next(steps).requires_grad and torch.is_grad_enabled()


# -----------------------------------------------------------------------------
# fast weights

@pytest.mark.skipif(not can_pack("cpu", "float32"), reason="weights are packed by oneDNN on x86 alone")
def test_packed_float32_weights_give_the_logits_of_the_plain_ones():
    model, idx = make_model(vocab_size=50304), torch.tensor(random_rows([12, 12, 12], NUM_TOKENS))
    packed = prepare_for_sampling(copy.deepcopy(model), "float32", num_samples=3)
    assert not [m for m in packed.modules() if isinstance(m, torch.nn.Linear)]
    with torch.no_grad():
        for ours, theirs in zip(forced_logits(packed, idx, [3, 9, 1]), forced_logits(model, idx, [3, 9, 1])):
            assert ours[1].size(1) == NUM_TOKENS
            assert torch.allclose(ours[1], theirs[1][:, :NUM_TOKENS], atol=1e-4, rtol=0)
    assert greedy(packed, idx.tolist(), 30) == greedy(model, idx.tolist(), 30)


@pytest.mark.skipif(not can_pack("cpu", "bfloat16"), reason="this CPU has no bfloat16 for oneDNN")
def test_packed_bfloat16_is_plain_bfloat16_up_to_its_rounding():
    model, idx = make_model(), torch.tensor(random_rows([12, 12]))
    whole = model(idx, idx)[0]
    packed = prepare_for_sampling(copy.deepcopy(model), "bfloat16", num_samples=2)
    for last, logits in forced_logits(packed, idx, [4, 2]):
        truth = whole[torch.arange(2), last]
        assert (logits.float() - truth).norm() < 0.05 * truth.norm()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_prepared_model_is_of_the_dtype_and_samples(dtype):
    model = prepare_for_sampling(make_model(vocab_size=50304), dtype)
    assert {str(p.dtype) for p in model.parameters()} == {f"torch.{dtype}"}
    assert len(greedy(model, [[1, 2, 3]], 40)[0]) == 40


@pytest.mark.slow
def test_a_compiled_model_gives_the_same_tokens_with_few_graphs():
    model, rows = prepare_for_sampling(make_model(), "float32", 3, compiled=True), random_rows([3, 9, 1])
    compiled = torch.compile(model.hidden, dynamic=True)
    tokens = torch.stack(list(stream(model, rows, 60, temperature=0, hidden=compiled)), dim=1).tolist()
    assert tokens == greedy(model, rows, 60)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 4


# -----------------------------------------------------------------------------
# top-p

@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("top_k", [0, 20])
def test_top_p_keeps_the_tokens_that_transformers_keeps(top_p, top_k):
    from transformers import TopKLogitsWarper, TopPLogitsWarper
    logits = torch.randn(1, 60, generator=torch.Generator().manual_seed(3)) * 2
    kept = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
    kept = TopPLogitsWarper(top_p)(None, kept)
    drawn = sample_next_token(logits.repeat(60000, 1), torch.Generator().manual_seed(0), 1.0, top_k, top_p).flatten()
    shares = torch.bincount(drawn, minlength=60) / 60000
    truth = kept.softmax(dim=-1)[0]
    assert torch.allclose(shares, truth, atol=0.01) and (shares[truth == 0] == 0).all()


# -----------------------------------------------------------------------------
# its figure in bench.py

@pytest.mark.parametrize("time_one", ["time_lecture", "time_transformers", "time_ours"])
def test_what_the_bench_times_makes_as_many_tokens_as_it_says(time_one, monkeypatch):
    tiny = GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=32, vocab_size=50304)
    monkeypatch.setattr(bench_sample, "config_for", lambda size, **changes: tiny)
    monkeypatch.setattr(bench_sample.runtime, "keep_freed_memory", lambda: None)  # it is for the whole process
    drawn = []

    def counting(logits, *args):
        drawn.append(logits.size(0))
        return sample_next_token(logits, *args)

    monkeypatch.setattr(sample, "sample_next_token", counting)
    seconds, tokens = getattr(bench_sample, time_one)("tiny", 2, 16, "float32", "cpu")
    assert seconds > 0 and tokens == 2 * 16
    assert sum(drawn) == (2 * (8 + 16) if time_one == "time_ours" else 0)  # the warm-up's eight steps are not counted


def test_the_limit_counts_each_weight_that_a_step_reads_once():
    assert bench_sample.bytes_per_step("gpt2", "bfloat16") == 2 * (124_439_808 - 1024 * 768)
