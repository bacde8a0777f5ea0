"""
The speed of sampling with the KV cache beside the lecture's sampling, transformers, and a lower bound: reading the weights.

Weights are random, prompts have eight tokens, top-k is 50. Each variant runs in a fresh process.
"""
import importlib.util
import itertools
import statistics

import torch

import runtime
from bench.measure import in_fresh_process, print_header, print_table, read_bandwidth, timed
from data import NUM_TOKENS
from model import GPT, config_for
from sample import prepare_for_sampling, sample_next_token, stream

PROMPT_LENGTH = 8


def random_model(size, device):
    """A model with random weights and the padded vocabulary of training."""
    torch.manual_seed(1337)
    return GPT(config_for(size, vocab_size=50304)).to(device).eval()


def random_prompts(B):
    """(B, 8) int64."""
    return torch.randint(NUM_TOKENS, (B, PROMPT_LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def time_lecture(size, B, num_tokens, dtype, device):
    """(seconds, tokens) of the lecture's sampling, which computes the whole context again for each token.

    Only eight lengths of context are timed: all of them would take minutes.
    """
    model, stride = random_model(size, device), max(1, num_tokens // 8)
    x = torch.randint(NUM_TOKENS, (B, PROMPT_LENGTH + num_tokens), device=device)

    def next_token(T):
        with runtime.autocast(device, dtype):
            logits = model.lm_head(model.hidden(x[:, :T], torch.arange(T, device=device)))[:, -1, :]
        return sample_next_token(logits).tolist()

    next_token(PROMPT_LENGTH)  # warm-up
    lengths = range(PROMPT_LENGTH + stride // 2, x.size(1), stride)
    return statistics.mean(timed(lambda T=T: next_token(T), device)[0] for T in lengths) * num_tokens, B * num_tokens


def time_transformers(size, B, num_tokens, dtype, device):
    """(seconds, tokens) of transformers' generate with its cache and the weights in dtype."""
    import transformers
    ours = random_model(size, device)
    c = ours.config
    hf = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd, n_positions=c.block_size, bos_token_id=None, eos_token_id=None))
    hf.load_state_dict(ours.hf_state_dict(), strict=False)
    hf.eval().to(device, runtime.DTYPES[dtype])
    prompts = random_prompts(B).to(device)

    def run(n):
        return hf.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, do_sample=True, top_k=50,
                           pad_token_id=0).numel() - prompts.numel()

    run(8)  # warm-up
    return timed(lambda: run(num_tokens), device)


def time_ours(size, B, num_tokens, dtype, device):
    """(seconds, tokens) of our stream, as sample.py uses it."""
    runtime.keep_freed_memory()
    model = prepare_for_sampling(random_model(size, device), dtype, B)
    generator, prompts = torch.Generator(device=device).manual_seed(42), random_prompts(B).tolist()

    def run(n):
        return sum(len(tokens.tolist()) for tokens in stream(model, prompts, n, generator))

    run(8)  # warm-up
    return timed(lambda: run(num_tokens), device)


def bytes_per_step(size, dtype):
    """Bytes of weights read for one token: all except wpe and the rows of wte that pad the vocabulary."""
    with torch.device("meta"):
        model = GPT(config_for(size, vocab_size=NUM_TOKENS))
    return model.num_params(with_wpe=False) * runtime.DTYPES[dtype].itemsize


def bench_sample(args):
    """Rows of the lecture's sampling, transformers' (if it is installed) and ours.

    By default for 1 and 4 texts of 256 tokens and of a whole context. "% of roofline": relative to reading the weights
    once per token at the measured bandwidth.
    """
    dtype, device = args.dtype, args.device
    bandwidth = in_fresh_process(read_bandwidth, device)
    roofline = bandwidth / bytes_per_step(args.size, dtype)  # steps/s
    print_header(args, f"reading the weights at {bandwidth / 1e9:.1f} GB/s: at most {roofline:.0f} steps/s")
    longest = config_for(args.size).block_size - PROMPT_LENGTH
    lengths = [min(args.sequence_length, longest)] if args.sequence_length else [256, longest]
    variants = {"lecture": time_lecture, "transformers": time_transformers, "ours": time_ours}
    if not importlib.util.find_spec("transformers"):
        del variants["transformers"]
    rows = []
    for num_tokens, B in itertools.product(lengths, [args.batch_size] if args.batch_size else [1, 4]):
        speeds = {}
        for name, function in variants.items():
            seconds, tokens = in_fresh_process(function, args.size, B, num_tokens, dtype, device)
            speeds[name] = tokens / seconds
            print(f"  {B} x {num_tokens}, {name}: {speeds[name]:,.1f} tok/s", flush=True)
        rows += [{"sample": f"{B} x {num_tokens}, {name}", "tok/s": speed, "x lecture": speed / speeds["lecture"],
                  "x transformers": speed / speeds["transformers"] if "transformers" in speeds else None,
                  "% of roofline": 100 * speed / B / roofline} for name, speed in speeds.items()]
    return print_table(rows)
