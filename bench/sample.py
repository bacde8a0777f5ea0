"""
The speed of sampling with the KV cache compared with the lecture's sampling, transformers, and a
roofline: reading the weights once per token. Random weights, prompts of eight tokens, top-k 50.
"""
import importlib.util
import itertools
import statistics

import torch

from bench.measure import in_fresh_process, print_table, read_bandwidth, timed
from convert import hf_state_dict
from data import NUM_TOKENS
from model import GPT, config_for
from run import runtime
from sample import prepare_for_sampling, sample_next_token, stream

PROMPT_LENGTH = 8


def random_model(args):
    """A model with random weights and the padded vocabulary of training."""
    torch.manual_seed(1337)
    return GPT(config_for(args.size, vocab_size=50304)).to(args.device).eval()


def random_prompts(B):
    """(B, 8) int64."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(NUM_TOKENS, (B, PROMPT_LENGTH), generator=generator)


@torch.no_grad()
def time_lecture(args, B, num_tokens):
    """(seconds, tokens) of the lecture's sampling, which recomputes the context for each token.

    Estimated from eight lengths.
    """
    model = random_model(args)
    x = torch.randint(NUM_TOKENS, (B, PROMPT_LENGTH + num_tokens), device=args.device)

    def next_token(T):
        with runtime.autocast(args.device, args.dtype):
            logits = model.lm_head(model.hidden(x[:, :T]))[:, -1, :]
        return sample_next_token(logits).tolist()

    next_token(PROMPT_LENGTH)  # warm-up
    stride = max(1, num_tokens // 8)
    seconds = [timed(lambda T=T: next_token(T), args.device)[0]
               for T in range(PROMPT_LENGTH + stride // 2, x.size(1), stride)]
    return statistics.mean(seconds) * num_tokens, B * num_tokens


def time_transformers(args, B, num_tokens):
    """(seconds, tokens) of transformers' generate with its cache and the weights in dtype."""
    import transformers
    ours = random_model(args)
    c = ours.config
    config = transformers.GPT2Config(n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                                     n_positions=c.block_size, bos_token_id=None, eos_token_id=None)
    model = transformers.GPT2LMHeadModel(config)
    model.load_state_dict(hf_state_dict(ours), strict=False)
    model.eval().to(args.device, runtime.DTYPES[args.dtype])
    prompts = random_prompts(B).to(args.device)

    def run(n):
        rows = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n,
                              do_sample=True, top_k=50, pad_token_id=0)
        return rows.numel() - prompts.numel()

    run(8)  # warm-up
    return timed(lambda: run(num_tokens), args.device)


def time_ours(args, B, num_tokens):
    """(seconds, tokens) of our stream, as sample.py uses it."""
    runtime.keep_freed_memory()
    model = random_model(args)
    hidden = prepare_for_sampling(model, args.dtype, B)
    generator = torch.Generator(device=args.device).manual_seed(42)
    prompts = random_prompts(B).tolist()

    def run(n):
        new = stream(model, prompts, n, generator, hidden=hidden)
        return sum(len(tokens) for tokens in new)

    run(8)  # warm-up
    return timed(lambda: run(num_tokens), args.device)


def bytes_per_step(size, dtype):
    """Bytes read for one token: all weights except wpe and the padding of the vocabulary."""
    num_params = config_for(size, vocab_size=NUM_TOKENS).num_params(with_wpe=False)
    return num_params * runtime.DTYPES[dtype].itemsize


def bench_sample(args):
    """Rows of the lecture's sampling, transformers' (if it is installed) and ours.

    By default for 1 and 4 texts of 256 tokens and of a whole context. "% of roofline": relative to
    reading the weights once per token at the measured bandwidth.
    """
    bandwidth = in_fresh_process(read_bandwidth, args.device)
    roofline = bandwidth / bytes_per_step(args.size, args.dtype)  # steps/s
    print(f"reading the weights at {bandwidth / 1e9:.1f} GB/s: at most {roofline:.0f} steps/s",
          flush=True)
    longest = config_for(args.size).block_size - PROMPT_LENGTH
    lengths = [min(args.sequence_length, longest)] if args.sequence_length else [256, longest]
    batch_sizes = [args.batch_size] if args.batch_size else [1, 4]
    variants = {"lecture": time_lecture, "transformers": time_transformers, "ours": time_ours}
    if not importlib.util.find_spec("transformers"):
        del variants["transformers"]
    rows = []
    for num_tokens, B in itertools.product(lengths, batch_sizes):
        speeds = {}
        for name, function in variants.items():
            seconds, tokens = in_fresh_process(function, args, B, num_tokens)
            speeds[name] = tokens / seconds
            print(f"  {B} x {num_tokens}, {name}: {speeds[name]:,.1f} tok/s", flush=True)
        for name, speed in speeds.items():
            row = {"sample": f"{B} x {num_tokens}, {name}", "tok/s": speed,
                   "x lecture": speed / speeds["lecture"], "x transformers": None,
                   "% of roofline": 100 * speed / B / roofline}
            if "transformers" in speeds:
                row["x transformers"] = speed / speeds["transformers"]
            rows.append(row)
    return print_table(rows)
