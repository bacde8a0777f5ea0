"""
bench.py's figure "sample": tokens a second with the KV cache, beside the lecture's way, transformers, and the memory's limit.

Weights are random, prompts eight tokens, top-k 50. Each variant runs in a fresh process, once to warm up (a few tokens)
and then whole; only "lecture" is timed at eight lengths, for it would take minutes. Called by bench.py.
"""
import importlib.util
import itertools
import statistics
import time

import torch

import runtime
from bench_limits import in_fresh_process, median_seconds
from data import NUM_TOKENS
from model import GPT, config_for
from sample import prepare_for_sampling, sample_next_token, stream

PROMPT_LENGTH = 8


def read_bandwidth(device):
    """Bytes/s at which 500 MB are read: the sum of a float32 tensor."""
    numbers = torch.ones(125_000_000, device=device)
    return numbers.nbytes / median_seconds(numbers.sum, 7, device)


def random_model(size, device):
    """A model of the size, vocabulary padded as in training, random weights."""
    torch.manual_seed(1337)
    return GPT(config_for(size, vocab_size=50304)).to(device).eval()


def random_prompts(B):
    """(B, 8) int64."""
    return torch.randint(NUM_TOKENS, (B, PROMPT_LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def time_lecture(size, B, num_tokens, dtype, device):
    """(seconds for num_tokens tokens in each of B rows, their number): the whole context for each, logits everywhere."""
    model, seconds, stride = random_model(size, device), [], max(1, num_tokens // 8)
    x = torch.randint(NUM_TOKENS, (B, PROMPT_LENGTH + num_tokens), device=device)
    for T in [PROMPT_LENGTH, *range(PROMPT_LENGTH + stride // 2, x.size(1), stride)]:  # the first one warms up
        runtime.synchronize(device)
        start = time.perf_counter()
        with runtime.autocast(device, dtype):
            logits = model.lm_head(model.hidden(x[:, :T], torch.arange(T, device=device)))[:, -1, :]
        sample_next_token(logits).tolist()
        seconds.append(time.perf_counter() - start)
    return statistics.mean(seconds[1:]) * num_tokens, B * num_tokens


def time_transformers(size, B, num_tokens, dtype, device):
    """(seconds, tokens) of generate with its cache, the weights in dtype."""
    import transformers
    ours = random_model(size, device)
    config = ours.config
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, n_positions=config.block_size,
        bos_token_id=None, eos_token_id=None)).eval()
    hf.load_state_dict(ours.hf_state_dict(), strict=False)
    hf.to(device, runtime.DTYPES[dtype])
    prompts = random_prompts(B).to(device)

    def run(n):
        out = hf.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, do_sample=True, top_k=50,
                          pad_token_id=0)
        runtime.synchronize(device)
        return out.numel() - prompts.numel()

    return timed(run, num_tokens)


def time_ours(size, B, num_tokens, dtype, device):
    """(seconds, tokens) of our stream, as sample.py runs it."""
    runtime.keep_freed_memory()
    model = prepare_for_sampling(random_model(size, device), dtype, B)
    generator, prompts = torch.Generator(device=device).manual_seed(42), random_prompts(B).tolist()

    def run(n):
        return sum(len(tokens.tolist()) for tokens in stream(model, prompts, n, generator))

    return timed(run, num_tokens)


def timed(run, num_tokens):
    """(seconds, tokens) of run(num_tokens), after a run of a few tokens."""
    run(8)
    start = time.perf_counter()
    tokens = run(num_tokens)
    return time.perf_counter() - start, tokens


def bytes_per_step(size, dtype):
    """Bytes of the weights that one step reads: all but wpe and the rows of wte beyond GPT-2's vocabulary."""
    with torch.device("meta"):
        model = GPT(config_for(size, vocab_size=NUM_TOKENS))
    return model.num_params(with_wpe=False) * runtime.DTYPES[dtype].itemsize


def bench_sample(args):
    """Rows of 1 and 4 texts of 256 tokens and of a whole context, in --dtype: ours beside the lecture's and, where it is
    installed, transformers'.

    --batch-size and --sequence-length, tokens to draw, choose others.
    "% of limit": the time that reading the weights once a token would take at the bandwidth measured, of the time taken.
    """
    device = runtime.choose_device(args.device)
    dtype = runtime.choose_dtype(args.dtype, device)
    bandwidth = in_fresh_process(read_bandwidth, device)
    limit = bytes_per_step(args.size, dtype) / bandwidth  # seconds a step
    print(f"{runtime.device_name(device)}, torch {torch.__version__}, {dtype}, {args.size}; {bandwidth / 1e9:.1f} GB/s,"
          f" {bytes_per_step(args.size, dtype) / 1e6:.0f} MB of weights: {1 / limit:.0f} steps/s at most", flush=True)
    whole = config_for(args.size).block_size - PROMPT_LENGTH
    batch_sizes = [args.batch_size] if args.batch_size else [1, 4]
    lengths = [min(args.sequence_length, whole)] if args.sequence_length else [256, whole]
    variants = {"lecture": time_lecture, "transformers": time_transformers, "ours": time_ours}
    if not importlib.util.find_spec("transformers"):
        del variants["transformers"]
    rows = []
    for num_tokens, B in itertools.product(lengths, batch_sizes):
        figures = {name: in_fresh_process(function, args.size, B, num_tokens, dtype, device)
                   for name, function in variants.items()}
        speed = {name: tokens / seconds for name, (seconds, tokens) in figures.items()}
        for name in figures:
            rows.append({"sample": f"{B} x {num_tokens}, {name}", "tok/s": speed[name],
                         "x lecture": speed[name] / speed["lecture"],
                         "x transformers": speed[name] / speed["transformers"] if "transformers" in speed else None,
                         "% of limit": 100 * limit * speed[name] / B})
            print(f"  {rows[-1]['sample']}: {speed[name]:,.1f} tok/s", flush=True)
    return rows
