"""
Sampling: one token and the limits of its arguments, texts and streams of them, the command line on a checkpoint of nothing.
What concerns the cache is in test_kv_cache.py.

    .venv/bin/python -m pytest tests/test_sample.py

Needs nothing but requirements-dev.txt.
"""
import functools
import io
import os
import signal
import subprocess
import sys

import pytest
import torch

import checkpoint
import sample
from data import EOT, NUM_TOKENS, get_tokenizer
from model import GPT, GPTConfig
from sample import encode_prompt, generate_text, sample_next_token, stream_text

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


def test_an_empty_prompt_begins_a_document():
    assert encode_prompt("") == [EOT] and encode_prompt("Once") == get_tokenizer().encode_ordinary("Once")
    assert encode_prompt("<|endoftext|>") != [EOT]  # as text it is only text
    assert generate_text(make_model(), "", 1, 4, seed=0)[0]


HARD = "naïve café, 日本語のテキスト, \U0001f469\u200d\U0001f680 \U0001f1ec\U0001f1f7, ٣٤, \t\n\n   x"


def test_a_stream_holds_whole_characters_only_and_adds_up_to_the_text():
    tokens = get_tokenizer().encode_ordinary(HARD)
    pieces = list(stream_text(tokens))
    assert "".join(pieces) == HARD and "\ufffd" not in "".join(pieces)
    assert "" in pieces[:-1]  # some tokens end within a character: then it waits for the next one


def test_bytes_that_are_no_character_come_out_as_the_tokenizer_has_them():
    tokens = get_tokenizer().encode_ordinary("日本 😀 a")
    for cut in (tokens[1:], tokens[:-3], tokens[::-1], tokens[2:4] + [EOT] + tokens):
        text = get_tokenizer().decode(cut[:cut.index(EOT)] if EOT in cut else cut)
        assert "".join(stream_text(cut)) == text


def test_a_stream_reads_no_token_before_it_is_asked_for_and_none_past_endoftext():
    script = iter([*get_tokenizer().encode_ordinary(" one two"), EOT, 1, 2])
    texts = stream_text(script)
    assert next(texts) == " one" and next(texts) == " two"
    assert list(texts) == [""] and list(script) == [1, 2]


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


PLAIN = "--dtype float32 --device cpu --temperature 0".split()


def start(run_dir, *arguments, **options):
    """`python sample.py run_dir arguments` as a process of its own, greedy, its three streams piped as bytes."""
    return subprocess.Popen([sys.executable, os.path.join(ROOT, "sample.py"), str(run_dir), *PLAIN, *map(str, arguments)],
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=run_dir, **options)


def greedy_text(prompt, max_new_tokens):
    return generate_text(make_model(), prompt, 1, max_new_tokens, 0, temperature=0)[0]


@pytest.mark.slow
def test_compile_changes_no_greedy_text(run_dir):
    process = start(run_dir, "--compile", "--prompt", "Hello", "--num-samples", 1, "--max-new-tokens", 40)
    out, error = process.communicate(timeout=400)
    assert process.returncode == 0 and greedy_text("Hello", 40) in out.decode(), error.decode()


def test_the_command_line_prints_what_was_asked_for(run_dir, capsys, monkeypatch):
    status, stdout, stderr = run_sample(capsys, monkeypatch, run_dir, *PLAIN, "--prompt", "To be", "--num-samples", 2,
                                        "--max-new-tokens", 20)
    assert status == 0 and stderr == f"{run_dir / 'model_00007.pt'}: step 7, val loss 3.25\n"  # stdout is text alone
    before, *samples = stdout.split("--- sample ")
    assert before == "" and len(samples) == 2
    assert all(text.split("\n", 1)[1] == greedy_text("To be", 20) + "\n" for text in samples)


def test_a_stream_prints_the_same_text(run_dir, capsys, monkeypatch):
    flags = [*PLAIN, "--prompt", "To be", "--num-samples", 2, "--max-new-tokens", 20]
    assert run_sample(capsys, monkeypatch, run_dir, *flags) == run_sample(capsys, monkeypatch, run_dir, *flags, "--stream")


def test_a_prompt_from_a_pipe_and_from_a_file_is_that_of_the_flag(run_dir, capsys, monkeypatch):
    flags = ["--num-samples", 1, "--max-new-tokens", 5]
    process = start(run_dir, "-", *flags)
    piped, stderr = process.communicate("Wörld\n".encode(), timeout=120)
    assert process.returncode == 0, stderr
    assert piped.decode().split("\n", 1)[1] == greedy_text("Wörld", 5) + "\n"
    (run_dir / "prompt.txt").write_bytes("Wörld\r\n".encode())
    _, filed, _ = run_sample(capsys, monkeypatch, run_dir, *PLAIN, "--prompt-file", run_dir / "prompt.txt", *flags)
    assert filed == piped.decode()
    (run_dir / "prompt.txt").write_bytes(b"W\xf6rld")
    status, _, stderr = run_sample(capsys, monkeypatch, run_dir, "--prompt-file", run_dir / "prompt.txt")
    assert status == 2 and "prompt.txt is not UTF-8 at byte 2" in stderr and stderr.count("\n") == 1


def test_the_interactive_prompt_answers_each_line_and_goes_on_after_a_bad_one(run_dir, capsys, monkeypatch):
    long = "Or not " * 20
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"To be\n\xff\n" + long.encode() + b"\n\n"), "utf-8"))
    status, stdout, stderr = run_sample(capsys, monkeypatch, run_dir, *PLAIN, "--interactive", "--max-new-tokens", 5)
    answers = [greedy_text(prompt, 5).removeprefix(prompt) for prompt in ("To be", long, "")]
    assert status == 0 and stdout == f"> {answers[0]}\n> > {answers[1]}\n> {answers[2]}\n> \n"
    assert "error: the prompt is not UTF-8 at character 1" in stderr
    assert "the prompt has 41 tokens; the model reads the last 16" in stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGINT to send")
def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves_the_prompt_that_follows(run_dir):
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a shell's background jobs ignore it
    process = start(run_dir, "--interactive", "--max-new-tokens", 10**9, preexec_fn=heed)
    try:
        process.stdin.write(b"To be\n")
        process.stdin.flush()
        assert process.stdout.read(2) == b"> " and len(process.stdout.read(20)) == 20  # in the middle of its answer
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(b"", timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0 and stdout.endswith(b"\n> \n") and b"Traceback" not in stderr


def test_a_prompt_over_the_context_is_said_to_be_cut(run_dir, capsys, monkeypatch):
    status, stdout, stderr = run_sample(capsys, monkeypatch, run_dir, *PLAIN, "--prompt", "word " * 30, "--num-samples", 1)
    assert status == 0 and "the prompt has 31 tokens; the model reads the last 16" in stderr
    assert stdout.split("\n", 1)[1].startswith("word " * 30)  # printed whole


@pytest.mark.parametrize("arguments, words", [
    (["--num-samples", "0"], "--num-samples 0: it must be 1 or more"), (["--max-new-tokens", "-3"], "--max-new-tokens -3"),
    (["--temperature", "-1"], "--temperature -1.0"), (["--temperature", "nan"], "--temperature nan"),
    (["--top-k", "-1"], "--top-k -1"), (["--top-p", "0"], "--top-p 0.0: it must be more than 0 and at most 1"),
    (["--top-p", "1.5"], "--top-p 1.5"), (["--top-p", "nan"], "--top-p nan"),
    (["--prompt", "a\udcff"], "not UTF-8 at character 2"), (["--prompt-file", "nowhere.txt"], "nowhere.txt"),
    (["--prompt", "a", "--prompt-file", "b"], "give one of"), (["-", "--interactive"], "give one of"), (["x"], "only -"),
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
