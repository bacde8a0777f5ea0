"""
The training step's speed beside the lecture's step and beside its own matmuls and attention alone (bench.py train).

A variant of the step is a Step, timed in fresh processes by time_step; bench_ladder.py climbs them one by one. The
references are the lecture's arithmetic, in lines of our own.
"""
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import runtime
from bench_limits import (forward_backward_seconds, in_fresh_process, matmul_peak, median_seconds, peak_memory,
                          shape_for)
from model import GPT, CausalSelfAttention, config_for
from train_gpt2 import train_step

# -----------------------------------------------------------------------------
# the step and its variants

@dataclass(frozen=True)
class Step:
    """What a training step is made of."""
    dtype: str                    # of autocast; "float32" is none
    tf32: bool = True             # TF32 for what stays in float32, on GPUs that have it
    compile: bool = False
    flash: bool = True            # scaled_dot_product_attention, or the written-out softmax
    vocab_size: int = 50304
    fused: bool = True            # AdamW in one kernel, or torch's default on this device
    ours: bool = True             # freed memory kept (CPU), logits given back without a gradient
    grad_accum_steps: int = 1
    world_size: int = 1           # processes, one a device, gradients averaged by DDP


def lecture_step(dtype, device):
    """The lecture's last step as its script ships it: no compile, AdamW fused on CUDA alone."""
    return Step(dtype, fused=device.startswith("cuda"), ours=False)


def written_out_attention(q, k, v):
    """Attention (B, nh, T, hs) with every head's (T, T) matrix in memory: the lecture's lines before flash attention."""
    att = (q @ k.transpose(-2, -1)) * k.size(-1) ** -0.5                # (B, nh, T, T)
    future = torch.ones(att.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
    return F.softmax(att.masked_fill(future, float("-inf")), dim=-1).type_as(v) @ v


class WrittenOutAttention(CausalSelfAttention):
    """CausalSelfAttention with written_out_attention."""

    def forward(self, x, attn_mask=None):
        B, T, C = x.size()
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for t in self.c_attn(x).split(C, dim=2))             # 3 x (B, nh, T, hs)
        return self.c_proj(written_out_attention(q, k, v).transpose(1, 2).contiguous().view(B, T, C))


class LogitsWithGradient(GPT):
    """forward as the lecture has it: the logits come back with their gradient."""

    def forward(self, idx, targets=None):
        x = self.hidden(idx, torch.arange(idx.size(1), device=idx.device))
        logits = self.lm_head(x)                                        # (B, T, V)
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))


class OneBatch:
    """A loader that always gives the same random batch: the step is timed, not the disk."""

    def __init__(self, B, T, device):
        self.B, self.T, self.position = B, T, 0
        self.x, self.y = torch.randint(0, 50257, (2, B, T), device=device).unbind(0)

    def next_batch(self):
        """x, y of shape (B, T)."""
        return self.x, self.y


def build_step(step, size, B, T, ranks):
    """(function that makes one training step and returns its loss, raw_model, its optimizers) of a Step."""
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high" if step.tf32 else "highest")
    if step.ours:
        runtime.keep_freed_memory()
    raw_model = GPT(config_for(size, vocab_size=step.vocab_size)).to(ranks.device)
    if not step.ours:
        raw_model.__class__ = LogitsWithGradient
    if not step.flash:
        for block in raw_model.transformer.h:
            block.attn.__class__ = WrittenOutAttention
    optimizers = raw_model.configure_optimizers(6e-4, 0.1)
    if not step.fused:
        kept = ("params", "weight_decay", "lr_scale")
        groups = [{name: group[name] for name in kept} for group in optimizers[0].param_groups]
        optimizers = [torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95), eps=1e-8)]
    scaler = torch.amp.GradScaler(ranks.device_type, enabled=step.dtype == "float16")
    mode = "on" if step.compile else "off"
    model = runtime.compile_for_training(raw_model, mode, 1, B, T, step.dtype, ranks.device)
    if ranks.ddp:
        model = DDP(model, device_ids=[ranks.local_rank] if ranks.device_type == "cuda" else None, gradient_as_bucket_view=True)
    batch = OneBatch(B, T, ranks.device)

    def run():
        return train_step(model, raw_model, optimizers, scaler, batch, 6e-4, step.grad_accum_steps, 1.0, step.dtype, ranks)[0]
    return run, raw_model, optimizers


def time_rank(step, size, B, T, device, repeats, warmup, rank, port):
    """{"seconds", "loss", "memory", "flops"} of a Step in this process, which is one of step.world_size."""
    if step.world_size > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(step.world_size), MASTER_ADDR="localhost",
                          MASTER_PORT=str(port))
    ranks = runtime.setup(device)
    try:
        run, raw_model, _ = build_step(step, size, B, T, ranks)
        losses = []
        seconds = median_seconds(lambda: losses.append(run()), repeats, ranks.device, warmup)
    finally:
        runtime.teardown()
    return {"seconds": seconds, "loss": losses[-1], "memory": peak_memory(ranks.device),
            "flops": raw_model.flops_per_token(T) * B * T * step.grad_accum_steps}  # of one rank


def time_step(step, size, B, T, device, repeats, warmup=2):
    """time_rank's figures of a Step, measured in fresh processes, one for each of its ranks; those of rank 0."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    with ThreadPoolExecutor(step.world_size) as pool:
        ranks = [pool.submit(in_fresh_process, time_rank, step, size, B, T, device, repeats, warmup, rank, port)
                 for rank in range(step.world_size)]
        return [rank.result() for rank in ranks][0]


# -----------------------------------------------------------------------------
# what the matmuls and attention alone take

def time_matmuls_and_attention(size, B, T, dtype, device, repeats):
    """Seconds of a training step's matrix products and attention, forward and backward, with nothing between them.

    The weights are in dtype already; one layer is measured and taken n_layer times. No step can be faster that makes
    the same products in the same dtype with the same library.
    """
    runtime.keep_freed_memory()
    config = config_for(size, vocab_size=50304)
    C, nh = config.n_embd, config.n_head

    def seconds_of(function, *shapes):
        return forward_backward_seconds(function, shapes, dtype, device, repeats)

    linears = ((C, 3 * C), (C, C), (C, 4 * C), (4 * C, C))  # (in, out) of c_attn, attn.c_proj, c_fc, mlp.c_proj
    layer = sum(seconds_of(F.linear, (B * T, n_in), (n_out, n_in)) for n_in, n_out in linears)
    layer += seconds_of(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), *[(B, nh, T, C // nh)] * 3)
    return config.n_layer * layer + seconds_of(F.linear, (B * T, C), (config.vocab_size, C))


def bench_train(args):
    """Rows of the training step's figures: the lecture's step, ours eager, ours compiled; and the limit of all three,
    the matmuls and attention alone, measured in the same run."""
    device = runtime.choose_device(args.device)
    dtype = runtime.choose_dtype(args.dtype, device)
    B, T = shape_for(args, device)
    peak = in_fresh_process(matmul_peak, dtype, device)
    print(f"{runtime.device_name(device)}, {dtype}, {args.size}, B={B}, T={T}; matmul peak {peak / 1e9:,.0f} GFLOP/s",
          flush=True)
    alone = in_fresh_process(time_matmuls_and_attention, args.size, B, T, dtype, device, args.steps)
    steps = {"lecture": lecture_step(dtype, device), "eager": Step(dtype), "compiled": Step(dtype, compile=True)}
    figures = {}
    for name, step in steps.items():
        figures[name] = time_step(step, args.size, B, T, device, args.steps)
        print(f"  {name}: {B * T / figures[name]['seconds']:,.0f} tok/s", flush=True)
    flops = figures["eager"]["flops"]
    figures["matmuls and attention alone"] = {"seconds": alone, "flops": flops, "memory": None, "loss": None}
    return [{"step": name, "ms a step": f["seconds"] * 1000, "tok/s": B * T / f["seconds"],
             "x lecture": figures["lecture"]["seconds"] / f["seconds"], "% of alone": 100 * alone / f["seconds"],
             "% of matmul peak": 100 * f["flops"] / f["seconds"] / peak, "peak GB": f["memory"] and f["memory"] / 1e9,
             "loss": f["loss"]} for name, f in figures.items()]
