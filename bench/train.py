"""
The speed of a training step compared with the lecture's step, which is reimplemented here, and with
a roofline: its matmuls and attention.
"""
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch.nn import functional as F

from run import parallel, runtime
from bench.measure import (forward_backward_seconds, free_port, in_fresh_process, matmul_peak,
                           peak_gb, print_table, timed)
from run.config import TrainConfig
from model import GPT, CausalSelfAttention, config_for
from train_gpt2 import train_step


@dataclass(frozen=True)
class Variant:
    """How a training step is computed.

    The defaults are how train_gpt2.py computes it, without torch.compile.
    """
    dtype: str                    # autocast dtype; "float32" is no autocast
    tf32: bool = True             # TF32 for the matmuls in float32, on GPUs that have it
    compile: bool = False         # torch.compile
    flash: bool = True            # flash attention instead of naive attention
    vocab_size: int = 50304       # GPT-2's 50257 tokens, padded
    fused: bool = True            # fused AdamW instead of torch's default
    ours: bool = True             # freed memory is kept (CPU), and forward returns no logits
    grad_accum_steps: int = 1
    world_size: int = 1           # processes of DDP, one per device


def flash_attention(q, k, v):
    """Causal attention of q, k, v (B, nh, T, hs), as model.py computes it."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def naive_attention(q, k, v):
    """Causal attention of q, k, v (B, nh, T, hs), as the lecture first computes it.

    Flash attention replaces it later in the lecture.
    """
    att = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5                # (B, nh, T, T)
    future = torch.ones(att.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    att = att.masked_fill(future, float("-inf"))
    return F.softmax(att, dim=-1).type_as(v) @ v                        # (B, nh, T, hs)


class NaiveAttention(CausalSelfAttention):
    """CausalSelfAttention with naive_attention."""

    def forward(self, x, cache=None):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(C, dim=2)                        # 3 x (B, T, C)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)  # (B, nh, T, hs)
        y = naive_attention(q, k, v)                                    # (B, nh, T, hs)
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)


class LogitsWithGradient(GPT):
    """GPT with the lecture's forward, which returns the logits with their gradient."""

    def forward(self, idx, targets=None):
        logits = self.lm_head(self.hidden(idx))                         # (B, T, V)
        loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
        return logits, loss


def build_step(variant, args, ranks):
    """(run, raw_model, optimizers) of a Variant.

    run() runs one training step and returns its loss. Every step trains on the same random batch:
    data loading is not timed.
    """
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high" if variant.tf32 else "highest")
    if variant.ours:
        runtime.keep_freed_memory()
    raw_model = GPT(config_for(args.size, vocab_size=variant.vocab_size)).to(ranks.device)
    if not variant.ours:
        raw_model.__class__ = LogitsWithGradient
    if not variant.flash:
        for block in raw_model.transformer.h:
            block.attn.__class__ = NaiveAttention
    optimizers = raw_model.configure_optimizers(6e-4, 0.1)
    if not variant.fused:
        kept = ("params", "weight_decay", "lr_scale")
        groups = [{name: group[name] for name in kept} for group in optimizers[0].param_groups]
        optimizers = [torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8)]
    scaler = torch.amp.GradScaler(ranks.device_type, enabled=variant.dtype == "float16")
    config = TrainConfig(block_size=args.T, total_batch_size=args.T, dtype=variant.dtype,
                         compile="on" if variant.compile else "off")
    model = parallel.wrap(raw_model, config, args.B, ranks)
    x, y = torch.randint(0, 50257, (2, args.B, args.T), device=ranks.device).unbind(0)
    loader = SimpleNamespace(next_batch=lambda: (x, y), position=0)

    def run():
        result = train_step(0, model, raw_model, optimizers, scaler, loader, 6e-4,
                            variant.grad_accum_steps, 1.0, variant.dtype, ranks)
        return result[0]

    return run, raw_model, optimizers


def time_rank(variant, args, rank, port):
    """The result of time_step, measured in this process, which is one of the variant's ranks."""
    if variant.world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank),
                          WORLD_SIZE=str(variant.world_size),
                          MASTER_ADDR="localhost", MASTER_PORT=str(port))
    ranks = parallel.setup(args.device)
    run, raw_model, _ = build_step(variant, args, ranks)
    seconds, loss = timed(run, ranks.device, args.steps, 2)
    parallel.teardown()
    tokens = args.B * args.T * variant.grad_accum_steps
    flops = raw_model.config.flops_per_token(args.T) * tokens
    return {
        "ms/step": 1000 * seconds,
        "tok/s": tokens * ranks.world_size / seconds,
        "peak GB": peak_gb(ranks.device),
        "GFLOP/s": flops / seconds / 1e9,
        "loss": loss,
    }


def time_step(variant, args):
    """{"ms/step", "tok/s", "peak GB", "GFLOP/s", "loss"} of a Variant.

    Each rank is a fresh process. The peak memory and GFLOP/s are those of one device.
    """
    port = free_port()
    with ThreadPoolExecutor(variant.world_size) as pool:
        futures = [pool.submit(in_fresh_process, time_rank, variant, args, rank, port)
                   for rank in range(variant.world_size)]
        results = [future.result() for future in futures]
    return results[0]


def time_roofline(args):
    """Seconds of a training step's matmuls and attention, forward and backward.

    They are a lower bound for the step. The weights are already in dtype; one layer is timed and
    multiplied by n_layer.
    """
    def seconds_of(function, *shapes):
        return forward_backward_seconds(function, shapes, args.dtype, args.device, args.steps)

    config = config_for(args.size, vocab_size=50304)
    tokens = args.B * args.T
    C, nh = config.n_embd, config.n_head
    linears = [  # (in, out)
        (C, 3 * C),  # c_attn
        (C, C),      # attn.c_proj
        (C, 4 * C),  # c_fc
        (4 * C, C),  # mlp.c_proj
    ]
    layer = 0
    for n_in, n_out in linears:
        layer += seconds_of(F.linear, (tokens, n_in), (n_out, n_in))
    heads = (args.B, nh, args.T, C // nh)
    layer += seconds_of(flash_attention, heads, heads, heads)  # q, k, v
    lm_head = seconds_of(F.linear, (tokens, C), (config.vocab_size, C))
    return config.n_layer * layer + lm_head


def bench_train(args):
    """Rows of the lecture's step, ours eager and ours compiled, and the lower bound for all."""
    peak = in_fresh_process(matmul_peak, args.dtype, args.device) / 1e9
    print(f"matmul peak: {peak:,.0f} GFLOP/s", flush=True)
    seconds = in_fresh_process(time_roofline, args)
    results = {}
    variants = {
        # as the lecture's script ends: no torch.compile, fused AdamW on CUDA only
        "lecture": Variant(args.dtype, fused=args.device.startswith("cuda"), ours=False),
        "eager": Variant(args.dtype),
        "compiled": Variant(args.dtype, compile=True),
    }
    for name, variant in variants.items():
        results[name] = time_step(variant, args)
        print(f"  {name}: {results[name]['tok/s']:,.0f} tok/s", flush=True)
    # the FLOPs of a step, as counted for every variant, in the roofline's time
    gflops = results["eager"]["GFLOP/s"] * results["eager"]["ms/step"] / 1000 / seconds
    roofline = {
        "ms/step": 1000 * seconds,
        "tok/s": args.B * args.T / seconds,
        "peak GB": None,
        "GFLOP/s": gflops,
        "loss": None,
    }
    results["roofline: matmuls, attention"] = roofline
    rows = []
    for name, result in results.items():
        rows.append({"train": name, **result,
                     "x lecture": result["tok/s"] / results["lecture"]["tok/s"],
                     "% of roofline": 100 * result["tok/s"] / roofline["tok/s"],
                     "% of matmul peak": 100 * result["GFLOP/s"] / peak})
    return print_table(rows)
