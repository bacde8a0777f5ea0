"""The lecture's ladder: the optimizations of a training step, added one by one."""
from dataclasses import replace

import torch

from run import runtime
from bench.measure import forward_backward_seconds, in_fresh_process, matmul_peak, print_table
from bench.train import Variant, flash_attention, naive_attention, time_step
from model import config_for
from plots import new_figure, write_figure


def rungs(dtype, device, world_size):
    """Yields (name, Variant, reason) of each rung; reason: why it cannot run here, or None."""
    on_cuda = device.startswith("cuda")
    has_tf32 = on_cuda and torch.cuda.get_device_capability(device) >= (8, 0)
    variant = Variant("float32", tf32=False, compile=False, flash=False, vocab_size=50257,
                      fused=False, ours=False)
    no_tf32 = None if has_tf32 else "needs an NVIDIA GPU, Ampere or newer"
    no_autocast = "no fast 16-bit dtype" if dtype == "float32" else None
    no_compile = "not used on MPS" if device == "mps" else None
    no_fused = None if on_cuda or device == "cpu" else "not used on this device"
    no_ddp = None if world_size > 1 else "one process; use --ranks"
    changes = [
        ("float32", {}, None),
        ("TF32", {"tf32": True}, no_tf32),
        (f"{dtype} autocast", {"dtype": dtype}, no_autocast),
        ("torch.compile", {"compile": True}, no_compile),
        ("flash attention", {"flash": True}, None),
        ("vocabulary 50304", {"vocab_size": 50304}, None),
        ("fused AdamW", {"fused": True}, no_fused),
        ("memory kept, logits detached", {"ours": True}, None),
        ("gradient accumulation x 4", {"grad_accum_steps": 4}, None),
        (f"DDP x {world_size}", {"world_size": world_size}, no_ddp),
    ]
    for name, change, reason in changes:
        if reason is None:
            variant = replace(variant, **change)
        yield name, variant, reason


def claims(args):
    """{rung: the speedup commonly claimed for it, and what the claim is about as measured here}.

    8x is TF32 against float32 on an A100's data sheet, 7.6x is FlashAttention (Dao et al. 2022) on
    GPT-2's attention.
    """
    config = config_for(args.size)
    shapes = [(args.B, config.n_head, args.T, config.n_embd // config.n_head)] * 3

    def seconds(attention):
        return in_fresh_process(forward_backward_seconds, attention, shapes, args.dtype,
                                args.device)

    speedup = seconds(naive_attention) / seconds(flash_attention)
    notes = {"torch.compile": "claimed: 2x",
             "flash attention": f"claimed: 7.6x for attention only; here {speedup:.1f}x"}
    if args.device.startswith("cuda"):
        float32 = in_fresh_process(matmul_peak, "float32", args.device, False)
        tf32 = in_fresh_process(matmul_peak, "float32", args.device, True)
        notes["TF32"] = f"claimed: 8x for matmuls only; here {tf32 / float32:.1f}x"
    return notes


def bench_ladder(args):
    """Rows of the rungs.

    gain: tok/s relative to the rung before; MFU: relative to the data sheet's peak, if it is known.
    """
    world_size = args.ranks
    if world_size == 0:
        world_size = torch.cuda.device_count() if args.device == "cuda" else 1
    peak = in_fresh_process(matmul_peak, args.dtype, args.device)
    data_sheet = runtime.peak_flops(args.device, args.dtype)
    print(f"matmul peak: {peak / 1e9:,.0f} GFLOP/s", flush=True)
    notes = claims(args)
    rows = []
    not_measured = []
    for name, variant, reason in rungs(args.dtype, args.device, world_size):
        if reason is None:
            try:
                result = time_step(variant, args)
            except (MemoryError, torch.OutOfMemoryError):
                reason = "out of memory"
        if reason:
            not_measured.append(f"{name} ({reason})")
            continue
        print(f"  {name}: {result['tok/s']:,.0f} tok/s", flush=True)
        first = rows[0] if rows else result
        before = rows[-1] if rows else result
        flops = 1e9 * result["GFLOP/s"]
        mfu = 100 * flops / data_sheet if data_sheet else None
        rows.append({"ladder": name, **result, "gain": result["tok/s"] / before["tok/s"],
                     "x float32": result["tok/s"] / first["tok/s"],
                     "% of matmul peak": 100 * flops / peak,
                     "MFU %": mfu,
                     "note": notes.get(name, "")})
    if not rows:
        raise ValueError("every rung ran out of memory; use a smaller --batch-size")
    print_table(rows)
    if not_measured:
        print(f"not measured: {', '.join(not_measured)}", flush=True)
    if args.picture:
        device = runtime.device_name(args.device)
        draw_ladder(rows, f"{args.size}, B={args.B}, T={args.T}, {device}", args.picture)
    return rows


def draw_ladder(rows, title, path):
    """Draws the rungs' tok/s as bars, from float32 at the top to the last rung."""
    figure = new_figure(8, 0.42 * len(rows) + 1, dpi=110)
    panel = figure.subplots()
    speeds = [row["tok/s"] for row in rows]
    bars = panel.barh([row["ladder"] for row in rows], speeds, color="tab:blue")
    labels = [f"{row['tok/s']:,.0f}  ({row['gain']:.2f}x)" for row in rows]
    panel.bar_label(bars, labels, padding=4, fontsize=8)
    panel.invert_yaxis()
    panel.set(xlabel="tokens per second (speedup over the rung above)", title=title,
              xlim=(0, 1.2 * max(speeds)))
    write_figure(figure, path)
