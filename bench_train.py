"""
The training step's speed: the lecture's step, ours eager, ours compiled, each in a fresh process (bench.py train).

The reference is the lecture's arithmetic, in lines of our own.
"""
import torch

import runtime
from bench_limits import in_fresh_process, matmul_peak, median_seconds, peak_memory, shape_for
from model import GPT, config_for
from train_gpt2 import train_step

class OneBatch:
    """A loader that always gives the same random batch: the step is timed, not the disk."""

    def __init__(self, B, T, device):
        self.B, self.T, self.position = B, T, 0
        self.x, self.y = torch.randint(0, 50257, (2, B, T), device=device).unbind(0)

    def next_batch(self):
        """x, y of shape (B, T)."""
        return self.x, self.y


def time_train(variant, size, B, T, dtype, device, steps):
    """{"seconds", "loss", "rss"} of a training step: variant "lecture", "eager" or "compiled".

    lecture: its step as it stands, eager, AdamW looped over tensors where the device is not CUDA, as its script has it.
    eager, compiled: ours, as train_gpt2.py runs it without and with torch.compile.
    """
    torch.manual_seed(1337)
    torch.set_float32_matmul_precision("high")
    raw_model = GPT(config_for(size, vocab_size=50304)).to(device)
    batch = OneBatch(B, T, device)
    losses = []
    if variant == "lecture":
        decayed = [p for p in raw_model.parameters() if p.dim() >= 2]
        others = [p for p in raw_model.parameters() if p.dim() < 2]
        optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
                                      lr=6e-4, betas=(0.9, 0.95), eps=1e-8, fused=device.startswith("cuda"))

        def step():
            optimizer.zero_grad()
            with runtime.autocast(device, dtype):
                _, loss = raw_model(batch.x, batch.y)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(raw_model.parameters(), 1.0)
            optimizer.step()
            losses.append(loss.item())
    else:
        runtime.keep_freed_memory()
        optimizers = raw_model.configure_optimizers(6e-4, 0.1)
        scaler = torch.amp.GradScaler(device.split(":")[0], enabled=dtype == "float16")
        mode = "on" if variant == "compiled" else "off"
        model = runtime.compile_for_training(raw_model, mode, steps, B, T, dtype, device)
        ranks = runtime.Ranks(0, 0, 1, device, False)

        def step():
            losses.append(train_step(model, raw_model, optimizers, scaler, batch, 6e-4, 1, 1.0, dtype, ranks)[0])
    seconds = median_seconds(step, steps, device)
    return {"seconds": seconds, "loss": losses[-1], "memory": peak_memory(device),
            "flops": raw_model.flops_per_token(T) * B * T}


def bench_train(args):
    """Rows of the training step's figures: the lecture's step, ours eager, ours compiled; with the matmul peak."""
    device = runtime.choose_device(args.device)
    dtype = runtime.choose_dtype(args.dtype, device)
    B, T = shape_for(args, device)
    peak = in_fresh_process(matmul_peak, dtype, device)
    print(f"{runtime.device_name(device)}, torch {torch.__version__}, {dtype}, {args.size}, B={B}, T={T};"
          f" matmul peak {peak / 1e9:,.0f} GFLOP/s", flush=True)
    rows = []
    for variant in ("lecture", "eager", "compiled"):
        figures = in_fresh_process(time_train, variant, args.size, B, T, dtype, device, args.steps)
        reference = rows[0]["ms a step"] if rows else figures["seconds"] * 1000
        rows.append({"step": variant, "ms a step": figures["seconds"] * 1000, "tok/s": B * T / figures["seconds"],
                     "x lecture": reference / (figures["seconds"] * 1000),
                     "% of matmul peak": 100 * figures["flops"] / figures["seconds"] / peak,
                     "peak GB": (figures["memory"] or 0) / 1e9, "loss": figures["loss"]})
        print(f"  {variant}: {B * T / figures['seconds']:,.0f} tok/s", flush=True)
    return rows
