"""
The lecture's ladder: what makes a training step fast, one thing on top of the other (bench.py ladder).

    python bench.py ladder --json ladder.json --picture ladder.png

Each rung runs in fresh processes with all that stands below it. A rung that this machine does not have is said so.
"""
import os
from dataclasses import replace

import torch
from torch.nn import functional as F

import runtime
from bench_limits import forward_backward_seconds, in_fresh_process, matmul_peak, shape_for
from bench_train import Step, time_step, written_out_attention
from model import config_for


def rungs(dtype, device, world_size):
    """{name: (what the rung changes in the Step below it, None or why this machine does not have it)}."""
    on_cuda = device.startswith("cuda")
    return {
        "float32": ({}, None),
        "TF32": ({"tf32": True}, None if on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
                 else "NVIDIA GPUs from Ampere on have it"),
        f"{dtype} autocast": ({"dtype": dtype}, None if dtype != "float32" else "no fast 16-bit dtype here"),
        "torch.compile": ({"compile": True}, None if device != "mps" else "not used on MPS"),
        "flash attention": ({"flash": True}, None),
        "vocabulary 50304": ({"vocab_size": 50304}, None),
        "fused AdamW": ({"fused": True}, None if on_cuda or device == "cpu" else "not used on this device"),
        "memory kept, logits detached": ({"ours": True}, None),
        "gradient accumulation x 4": ({"grad_accum_steps": 4}, None),
        f"DDP x {world_size}": ({"world_size": world_size}, None if world_size > 1 else "one process: --ranks N starts more"),
    }


def climb(dtype, device, world_size):
    """Yields (name, Step or None, why not) of each rung, the Step with all that stands below."""
    step = Step("float32", tf32=False, compile=False, flash=False, vocab_size=50257, fused=False, ours=False)
    for name, (changes, why_not) in rungs(dtype, device, world_size).items():
        if why_not is None:
            step = replace(step, **changes)
        yield name, None if why_not else step, why_not


def attention_gain(size, B, T, dtype, device):
    """How many times faster flash attention is than the written-out softmax, forward and backward, of attention alone."""
    runtime.keep_freed_memory()
    config = config_for(size)
    shapes = [(B, config.n_head, T, config.n_embd // config.n_head)] * 3
    flash = forward_backward_seconds(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), shapes, dtype, device)
    return forward_backward_seconds(written_out_attention, shapes, dtype, device) / flash


def often_claimed(size, B, T, dtype, device):
    """{rung: what is often claimed of it, and what of the claim's own kind is measured here}.

    8 x is TF32's datatype against float32 on an A100's data sheet, 7.6 x attention alone (FlashAttention, Dao et al. 2022).
    """
    notes = {"torch.compile": "often claimed: 2 x",
             "flash attention": "often claimed: 7.6 x, of attention alone; here"
                                f" {in_fresh_process(attention_gain, size, B, T, dtype, device):.1f} x"}
    if device.startswith("cuda"):
        float32, tf32 = (in_fresh_process(matmul_peak, "float32", device, on) for on in (False, True))
        notes["TF32"] = f"often claimed: 8 x, of matmuls alone; here {tf32 / float32:.1f} x"
    return notes


def bench_ladder(args):
    """Rows of the rungs; gain: tok/s against the rung before. MFU: share of the data sheet's peak, where it is known."""
    device = runtime.choose_device(args.device)
    dtype = runtime.choose_dtype(args.dtype, device)
    B, T = shape_for(args, device)
    world_size = args.ranks or (torch.cuda.device_count() if device == "cuda" else 1)
    peak, data_sheet = in_fresh_process(matmul_peak, dtype, device), runtime.peak_flops(device, dtype)
    print(f"{runtime.device_name(device)}, {args.size}, B={B}, T={T}; {dtype} matmul peak {peak / 1e9:,.0f} GFLOP/s",
          flush=True)
    claims = often_claimed(args.size, B, T, dtype, device)
    rows, before, start = [], None, None
    for name, step, note in climb(dtype, device, world_size):
        row = dict.fromkeys(("ladder", "ms a step", "tok/s", "gain", "x float32", "% of matmul peak", "MFU %", "peak GB"))
        try:
            figures = time_step(step, args.size, B, T, device, args.steps, warmup=1) if step else None
        except (MemoryError, torch.OutOfMemoryError):
            figures, note = None, "out of memory"
        if figures:
            tokens = B * T * step.grad_accum_steps * step.world_size
            speed, flops = tokens / figures["seconds"], figures["flops"] / figures["seconds"]  # flops of one device
            before, start = before or speed, start or speed
            row.update({"ms a step": figures["seconds"] * 1000, "tok/s": speed, "gain": speed / before,
                        "x float32": speed / start, "% of matmul peak": 100 * flops / peak,
                        "MFU %": data_sheet and 100 * flops / data_sheet,
                        "peak GB": figures["memory"] and figures["memory"] / 1e9})
            note = claims.get(name, "")
            before = speed
            print(f"  {name}: {speed:,.0f} tok/s", flush=True)
        rows.append({**row, "ladder": name, "note": note})
    if args.picture:
        draw_ladder(rows, f"GPT-2 {args.size}, B={B}, T={T}: {runtime.device_name(device)}", args.picture)
    return rows


def draw_ladder(rows, title, path):
    """Draws the rungs' tokens a second as bars into a PNG file, from float32 at the top down to the last rung."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, panel = plt.subplots(figsize=(8, 0.42 * len(rows) + 1), layout="constrained")
    names = [row["ladder"] for row in rows]
    speeds = [row["tok/s"] or 0 for row in rows]
    bars = panel.barh(names, speeds, color="tab:blue")
    panel.bar_label(bars, [f"{row['tok/s']:,.0f}  (x {row['gain']:.2f})" if row["tok/s"] else row["note"] for row in rows],
                    padding=4, fontsize=8)
    panel.invert_yaxis()
    panel.set_xlim(0, 1.25 * max(speeds))
    panel.set(xlabel="tokens a second (x the rung before)", title=title)
    temporary = f"{path}.{os.getpid()}.tmp"
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, path)
