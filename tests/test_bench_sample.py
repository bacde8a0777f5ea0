"""
The speed of sampling in the benchmark: what it times generates the tokens it counts.

    .venv/bin/python -m pytest tests/test_bench_sample.py

Needs transformers (requirements-dev.txt).
"""
import pytest

import bench_sample
import sample
from model import GPTConfig
from sample import sample_next_token


@pytest.mark.parametrize("time_one", ["time_lecture", "time_transformers", "time_ours"])
def test_what_is_timed_generates_the_tokens_it_counts(time_one, monkeypatch):
    tiny = GPTConfig(n_layer=1, n_head=1, n_embd=4, block_size=32, vocab_size=50304)
    monkeypatch.setattr(bench_sample, "config_for", lambda size, **changes: tiny)
    monkeypatch.setattr(bench_sample.runtime, "keep_freed_memory", lambda: None)  # it would change all of pytest's process
    sampled = []

    def counting(logits, *args):
        sampled.append(logits.size(0))
        return sample_next_token(logits, *args)

    monkeypatch.setattr(sample, "sample_next_token", counting)
    seconds, tokens = getattr(bench_sample, time_one)("tiny", 2, 16, "float32", "cpu")
    assert seconds > 0 and tokens == 2 * 16
    assert sum(sampled) == (2 * (8 + 16) if time_one == "time_ours" else 0)  # 8 warm-up steps, which are not timed


def test_the_lower_bound_counts_each_weight_that_a_step_reads_once():
    assert bench_sample.bytes_per_step("gpt2", "bfloat16") == 2 * (124_439_808 - 1024 * 768)
