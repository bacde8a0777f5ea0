"""
Sampling: token for token the lecture's loop, and the limits of its arguments; the command line on a checkpoint of nothing.

    .venv/bin/python -m pytest tests/test_sample.py

Needs nothing but requirements-dev.txt.
"""
import os
import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

import checkpoint
import sample
from data import EOT, NUM_TOKENS, get_tokenizer
from model import GPT, GPTConfig
from sample import generate, generate_text, sample_next_token

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def make_model(vocab_size=NUM_TOKENS, std=0.5):
    """A tiny model over GPT-2's vocabulary; the larger std, the more certain of its next token."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(n_layer=1, n_head=2, n_embd=8, block_size=16, vocab_size=vocab_size)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=std)
    return model


def generator(seed=42):
    return torch.Generator().manual_seed(seed)


# -----------------------------------------------------------------------------
# one token

def test_generation_is_the_lectures_token_by_token():
    model, x = make_model(), torch.tensor([[15496, 11, 314], [1101, 257, 3303]])
    ours = generate(model, x, 20, generator(), top_k=50)
    sample_rng = generator()
    with torch.no_grad():
        while x.size(1) < 23:
            logits = model(x[:, -16:], x[:, -16:])[0][:, -1, :]
            probs = F.softmax(logits, dim=-1)
            topk_probs, topk_indices = torch.topk(probs, 50, dim=-1)
            ix = torch.multinomial(topk_probs, 1, generator=sample_rng)
            x = torch.cat((x, torch.gather(topk_indices, -1, ix)), dim=1)
    assert ours.tolist() == x.tolist()


def test_draws_have_the_probabilities_of_the_softmax_at_the_temperature():
    logits, temperature = torch.tensor([1.0, 2.0, 0.5, -1.0]), 0.7
    drawn = sample_next_token(logits.repeat(20000, 1), generator(), temperature, top_k=0).flatten()
    shares = torch.bincount(drawn, minlength=4) / 20000
    assert torch.allclose(shares, torch.softmax(logits / temperature, dim=0), atol=0.015)  # over four standard errors


def test_top_k_keeps_the_k_likeliest():
    logits = torch.randn(1, 100, generator=generator(1))
    likeliest = set(logits.topk(5).indices[0].tolist())
    drawn = set(sample_next_token(logits.repeat(2000, 1), generator(), 5.0, top_k=5).flatten().tolist())
    assert drawn == likeliest


@pytest.mark.parametrize("top_k", [0, 100, 101, 10**9])
def test_top_k_of_zero_or_of_all_tokens_or_more_keeps_them_all(top_k):
    logits = torch.zeros(3000, 100)
    assert sample_next_token(logits, generator(), top_k=top_k).unique().numel() == 100


def test_ids_of_the_padding_are_never_drawn():
    logits = torch.zeros(50, 50304)
    logits[:, NUM_TOKENS:] = 100.0  # certain, if they were let in
    for temperature, top_k in ((0, 50), (1.0, 50), (1.0, 0), (10.0, 50304)):
        assert sample_next_token(logits, generator(), temperature, top_k).max() < NUM_TOKENS
    logits[:, NUM_TOKENS - 1] = 50.0
    assert (sample_next_token(logits, generator()) == NUM_TOKENS - 1).all()  # the last real id can be drawn


def test_temperature_zero_takes_the_likeliest_and_draws_nothing():
    logits = torch.randn(8, 1000, generator=generator(1))
    rng = generator()
    before = rng.get_state()
    assert sample_next_token(logits, rng, temperature=0).tolist() == logits.argmax(-1, keepdim=True).tolist()
    assert torch.equal(rng.get_state(), before)


def test_the_logits_handed_in_stay_as_they_were():
    logits = torch.randn(2, 1000, generator=generator(1))
    copy = logits.clone()
    sample_next_token(logits, generator(), 0.5, 3)
    assert torch.equal(logits, copy)


# -----------------------------------------------------------------------------
# texts

def test_a_context_longer_than_block_size_is_cut_to_its_end():
    model = make_model()
    long = torch.randint(NUM_TOKENS, (1, 40), generator=generator(1))
    out = generate(model, long, 5, temperature=0)
    assert out.shape == (1, 45) and out[:, :40].tolist() == long.tolist()
    assert out[:, 40:].tolist() == generate(model, long[:, -16:], 5, temperature=0)[:, 16:].tolist()


def test_the_same_seed_gives_the_same_texts_and_another_seed_others():
    model = make_model()
    first, again, other = (generate_text(model, "Hello", 3, 10, seed) for seed in (1, 1, 2))
    assert first == again != other and len(set(first)) == 3
    assert all(text.startswith("Hello") for text in first)


def test_endoftext_ends_a_text(monkeypatch):
    tokens = get_tokenizer().encode_ordinary(" one two three")
    script = iter([tokens[0], tokens[1], EOT, tokens[2]])
    monkeypatch.setattr(sample, "sample_next_token", lambda *args: torch.tensor([[next(script)]]))
    assert generate_text(make_model(), "Zero", 1, 4, seed=0) == ["Zero one two"]


def test_an_empty_prompt_begins_a_document(monkeypatch):
    word, = get_tokenizer().encode_ordinary("Once")
    seen = []

    class Model(torch.nn.Module):
        config = GPTConfig(n_layer=1, n_head=1, n_embd=1)

        def __init__(self):
            super().__init__()
            self.p = torch.nn.Parameter(torch.zeros(1))

        def forward(self, idx):
            seen.append(idx.tolist())
            return F.one_hot(torch.full((1, 1), word), NUM_TOKENS).float() * 100, None

    assert generate_text(Model(), "", 1, 2, seed=0) == ["OnceOnce"]
    assert seen[0] == [[EOT]]


def test_a_padded_model_speaks_without_an_error():
    text, = generate_text(make_model(50304, std=2.0), "Hello", 1, 100, seed=0, temperature=2.0, top_k=0)
    assert text.startswith("Hello")


# -----------------------------------------------------------------------------
# the command line

def run_sample(capsys, monkeypatch, *arguments):
    """(exit status, stdout, stderr) of `python sample.py arguments`, in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    status = 0
    try:
        sample.run_main(sample.main)
    except SystemExit as e:
        status = e.code
    return status, *capsys.readouterr()


@pytest.fixture
def run_dir(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "keep_freed_memory", lambda: None)  # it is for the whole process: not for pytest's
    checkpoint.save(str(tmp_path), 7, checkpoint.contents_of(make_model(), 3.25), {})
    return tmp_path


def test_the_command_line_prints_what_was_asked_for(run_dir):
    flags = "--num-samples 2 --max-new-tokens 5 --temperature 0 --dtype float32 --device cpu".split()
    done = subprocess.run([sys.executable, os.path.join(ROOT, "sample.py"), str(run_dir), "--prompt", "To be", *flags],
                          cwd=run_dir, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    header, *samples = done.stdout.split("--- sample ")
    assert "step 7, val loss 3.25" in header and len(samples) == 2
    text = generate_text(make_model(), "To be", 1, 5, 0, temperature=0)[0]
    assert all(sample.split("\n", 1)[1].rstrip("\n") == text.rstrip("\n") for sample in samples)


@pytest.mark.parametrize("arguments, words", [
    (["--num-samples", "0"], "--num-samples 0: it must be 1 or more"), (["--max-new-tokens", "-3"], "--max-new-tokens -3"),
    (["--temperature", "-1"], "--temperature -1.0"), (["--temperature", "nan"], "--temperature nan"),
    (["--top-k", "-1"], "--top-k -1"),
    (["--top-k", "many"], "invalid int value: 'many'"), (["--tokens", "5"], "unrecognized arguments: --tokens 5"),
    (["--max-new", "5"], "unrecognized arguments: --max-new 5"), (["--device", "tpu"], "'tpu' is not here"),
    (["--dtype", "int8"], "unknown dtype 'int8'"),
])
def test_a_wrong_flag_is_one_line_and_status_2(run_dir, capsys, monkeypatch, arguments, words):
    status, _, stderr = run_sample(capsys, monkeypatch, run_dir, *arguments)
    assert status == 2 and stderr.startswith("error: ") and words in stderr and stderr.count("\n") == 1


def test_a_missing_or_damaged_checkpoint_is_one_line_and_status_2(run_dir, capsys, monkeypatch):
    model_file = run_dir / "model_00007.pt"
    model_file.write_bytes(model_file.read_bytes()[:1000])
    for source in (run_dir / "nowhere", run_dir, model_file):
        status, _, stderr = run_sample(capsys, monkeypatch, source)
        assert status == 2 and stderr.startswith("error: ") and str(source) in stderr and stderr.count("\n") == 1
