"""
Trains GPT-2: the recipe of GPT-2 and GPT-3, on one CPU, one GPU or many.

    python train_gpt2.py                                              # picks a preset by the data at hand, says which
    python train_gpt2.py --preset gpt2-124M --data edu_fineweb10B
    torchrun --standalone --nproc_per_node=8 train_gpt2.py            # DDP on every GPU of this machine
    python train_gpt2.py --preset gpt2-1558M --dry-run                # the plan: memory, steps, FLOPs, hours

Writes into log/<exp-name>/: log.txt (`step stream value` a line), config.json, model_*.pt and state_*.pt (see
checkpoint.py), loss.png. Started again, it goes on from the newest checkpoint.

Sources: the GPT-2 paper (Radford et al. 2019), the GPT-3 paper (Brown et al. 2020, tables 2.1 and appendix B) for the
learning rates and the schedule, and the lecture "Let's reproduce GPT-2 (124M)", whose names are kept.
"""
import math
import os
import time
from dataclasses import asdict, dataclass

import torch

import checkpoint
import data
import hellaswag
import parallel
from config import FINEWEB_DIR, FINEWEB_TOKENS, TrainConfig, choose_batch_size, estimate_memory, make_config, parse_args
from model import GPT, GPTConfig
from plots import plot_run
from runtime import (Ranks, all_gather, all_reduce_sum, autocast, choose_dtype, device_name, free_memory, get_rng_state,
                     keep_freed_memory, peak_flops, print0, rank0_first, run_main, seed_all, set_rng_state, setup,
                     synchronize, teardown, write_run_description)
from sample import generate_text

# -----------------------------------------------------------------------------
# the pieces of the loop

def get_lr(step, max_lr, min_lr, warmup_steps, max_steps):
    """Learning rate of a step: linear warm-up, then a cosine from max_lr down to min_lr."""
    # 1) linear warm-up; + 1, for a first step at 0 would teach nothing
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    # 2) past max_steps it stays at the minimum
    if step >= max_steps:
        return min_lr
    # 3) in between, half a cosine
    decay_ratio = (step - warmup_steps) / (max_steps - warmup_steps)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (max_lr - min_lr)


def train_step(model, raw_model, optimizers, scaler, loader, lr, grad_accum_steps, grad_clip, dtype, ranks):
    """One optimizer step over total_batch_size tokens; (loss, gradient norm) before it, means over all ranks.

    Raises ValueError, with the weights as they were, when the loss or the norm is not finite.
    """
    first_window = loader.position
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss_accum = torch.zeros((), device=ranks.device)
    for micro_step in range(grad_accum_steps):
        x, y = loader.next_batch()
        if ranks.ddp:
            # gradients are summed over the ranks once, in the last backward; DDP reads this in its forward. FSDP does not:
            # it sums them each time, for until then every rank would have to hold them whole
            model.require_backward_grad_sync = (micro_step == grad_accum_steps - 1)
        with autocast(ranks.device, dtype):
            _, loss = model(x, y)
        # gradients of successive backward() calls add up: a SUM, where the loss of a large batch is a MEAN
        loss = loss / grad_accum_steps
        loss_accum += loss.detach()
        scaler.scale(loss).backward()
    loss_accum = all_reduce_sum(loss_accum, ranks) / ranks.world_size
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = parallel.clip_grad_norm(raw_model, grad_clip)
    loss, norm = loss_accum.item(), norm.item()  # the one point of a step where the CPU waits for the GPU
    # in float16 a norm that overflows is the scaler's to handle: it skips the step and lowers the scale
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaler.is_enabled()):
        raise ValueError(f"loss {loss}, gradient norm {norm} in the step that read windows {first_window} to"
                         f" {loader.position - 1} of the data's order; the weights were not updated. Go on from the last"
                         " checkpoint with a lower --lr, or --dtype float32")
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        scaler.step(optimizer)
    scaler.update()
    return loss, norm


@torch.no_grad()
def evaluate_loss(raw_model, stream, B, T, val_tokens, dtype, ranks):
    """Mean cross entropy over the first val_tokens tokens of the val split; each rank takes a part of them."""
    raw_model.eval()
    total, count = 0.0, 0
    # logits are the largest thing in an evaluation: at most 4096 tokens of them at a time
    B = max(1, min(B, 4096 // T))
    for x, y in data.iterate_batches(stream, B, T, val_tokens, ranks.rank, ranks.world_size, ranks.device):
        with autocast(ranks.device, dtype):
            _, loss = raw_model(x, y)
        total += loss.item() * y.numel()
        count += y.numel()
    raw_model.train()
    sums = torch.tensor([total, count], dtype=torch.float32 if ranks.device == "mps" else torch.float64, device=ranks.device)
    total, count = all_reduce_sum(sums, ranks).tolist()
    return total / count


def print_samples(raw_model, prompt, dtype, ranks, num_samples=4, max_new_tokens=32):
    """Prints samples that begin with prompt; the ranks share them out."""
    raw_model.eval()
    for i in range(ranks.rank, num_samples, ranks.world_size):
        with autocast(ranks.device, dtype):
            text, = generate_text(raw_model, prompt, 1, max_new_tokens, seed=42 + i)
        print(f"sample {i}: {text!r}", flush=True)
    raw_model.train()


class Log:
    """log.txt, one `step stream value` a line; on resume what lies past keep_bytes is cut off, to be written again."""

    def __init__(self, path, keep_bytes):
        with open(path, "ab") as f:
            f.truncate(min(keep_bytes, f.tell()))
        self.file = open(path, "a", encoding="utf-8", buffering=1)  # by the line: what was logged is on its way to disk

    def write(self, step, stream, value):
        """Appends one fact."""
        self.file.write(f"{step} {stream} {value}\n")

    def size(self):
        """Bytes so far."""
        return self.file.tell()


def report(log, step, quiet=False, **facts):
    """Logs facts (stream=value) of a step on rank 0, and prints them unless quiet."""
    for stream, value in facts.items():
        if log is not None:
            log.write(step, stream, value)
        if not quiet:
            print0(f"step {step:5d} | {stream} {value:.4f}")


# -----------------------------------------------------------------------------
# saving and going on

def save(run, step, val_loss):
    """Writes the checkpoint of step (all ranks call it, rank 0 writes) and removes the oldest ones."""
    rng = all_gather(get_rng_state(run.ranks.device), run.ranks)
    weights, optimizer_states = parallel.full_state(run.raw_model, run.optimizers, run.ranks)
    if run.ranks.master_process:
        state = {"optimizers": optimizer_states, "scaler": run.scaler.state_dict(),
                 "loader": run.loader.state_dict(), "rng": rng, "log_bytes": run.log.size(), "train_config": asdict(run.config)}
        checkpoint.save(run.run_dir, run.raw_model, step, val_loss, state, weights)
        checkpoint.prune(run.run_dir, run.config.keep_last)
        print0(f"saved {checkpoint.paths(run.run_dir, step)[0]}")


def restore(state, optimizers, scaler, loader, ranks):
    """Puts back all that save wrote but the weights. With another number of ranks, only the generators start afresh."""
    parallel.load_full_optimizer_state(optimizers, state["optimizers"])
    scaler.load_state_dict(state["scaler"])
    loader.load_state_dict(state["loader"])
    if len(state["rng"]) == ranks.world_size:
        set_rng_state(state["rng"][ranks.rank], ranks.device)


# -----------------------------------------------------------------------------
# the run

@dataclass
class Run:
    """What set_up builds and the loop uses."""
    config: TrainConfig
    ranks: Ranks
    dtype: str                  # of the matmuls
    raw_model: GPT              # evaluated, sampled, saved; its parameters are the only ones
    model: torch.nn.Module      # the same, compiled and wrapped in DDP: trained
    optimizers: list
    scaler: torch.amp.GradScaler
    loader: data.DataLoaderLite
    val_stream: data.TokenStream
    score_hellaswag: object     # function of (raw_model, dtype), or None
    grad_accum_steps: int
    first_step: int
    max_steps: int
    run_dir: str
    log: object                 # Log on rank 0, else None


def open_data(config, ranks):
    """(train TokenStream, val TokenStream); text is tokenized first, by one rank."""
    with rank0_first(ranks):
        splits = data.prepare_data(config.data)
    train_stream, val_stream = (data.TokenStream(shards, config.vocab_size) for shards in splits)
    for split, stream in (("train", train_stream), ("val", val_stream)):
        if len(stream) <= config.sequence_length:
            raise ValueError(f"the {split} split of {config.data} has {len(stream)} tokens, too few for one sequence of"
                             f" {config.sequence_length} and its target; give more text or a smaller --block-size")
    return train_stream, val_stream


def make_plan(config, num_tokens, ranks, dtype):
    """(B, grad_accum_steps, max_steps) for num_tokens training tokens; prints them and what they will take."""
    with torch.device("meta"):  # counts without memory
        model = GPT(config.gpt_config())
    T, memory = config.sequence_length, free_memory(ranks.device)
    B = choose_batch_size(config, model.num_params(), ranks.world_size, memory, ranks.device == "cpu", dtype)
    B = min(all_gather(B, ranks))  # the ranks may have seen different amounts of free memory
    grad_accum_steps = config.total_batch_size // (B * T * ranks.world_size)
    epoch_tokens = (num_tokens - 1) // T * T
    max_steps = config.max_steps or int(config.epochs * epoch_tokens / config.total_batch_size)
    if max_steps < 1:
        raise ValueError(f"{config.epochs} epochs of {num_tokens:,} tokens are less than one step of"
                         f" {config.total_batch_size:,}: more --epochs, --max-steps, or a smaller --total-batch-size")
    flops = model.flops_per_token(T)
    total = flops * max_steps * config.total_batch_size
    needed = estimate_memory(model.config, model.num_params(), B, T, dtype)
    print0(f"model: {model.num_params():,} parameters, {model.config}\n"
           f"data: {num_tokens:,} training tokens; {max_steps:,} steps of {config.total_batch_size:,} tokens"
           f" = {max_steps * config.total_batch_size / epoch_tokens:.2f} epochs\n"
           f"a step: {grad_accum_steps} micro-steps of B={B} x T={T} on each of {ranks.world_size} process(es),"
           f" {ranks.device_type}, {dtype}\n"
           f"memory: about {needed / 1e9:.1f} GB a process" + (f", {memory / 1e9:.1f} GB free" if memory else "")
           + (": THIS WILL NOT FIT" if memory and needed > memory else "") + "\n"
           f"work: {flops / 1e9:.3f} GFLOP a token, {total:.3g} FLOP in all")
    if peak := peak_flops(ranks.device, dtype):
        print0(f"time: about {total / (0.5 * peak * ranks.world_size) / 3600:.1f} hours at half the peak of"
               f" {ranks.world_size} x {device_name(ranks.device)}")
    return B, grad_accum_steps, max_steps


def build_model(config, saved, device):
    """The GPT to train, on its device: as saved, or with init_from's weights, or fresh from the seed."""
    if not saved and config.init_from:
        return checkpoint.load_model(config.init_from, device)[0].train()
    model = GPT(GPTConfig(**saved[0]["config"]) if saved else config.gpt_config())
    if saved:
        checkpoint.load_weights(model, saved[0]["model"], "the checkpoint")
    return model.to(device)


def set_up(config, saved, ranks):
    """The Run of a config, from its beginning or from what was saved; None if there is nothing to train."""
    dtype = choose_dtype(config.dtype, ranks.device)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays in float32, on GPUs that have it
    if config.dry_run and config.data == FINEWEB_DIR and not os.path.exists(FINEWEB_DIR):
        print0(f"{FINEWEB_DIR}/ is not there yet: this is the plan for FineWeb-Edu's sample of 10B tokens")
        make_plan(config, FINEWEB_TOKENS, ranks, dtype)
        return None
    train_stream, val_stream = open_data(config, ranks)
    B, grad_accum_steps, max_steps = make_plan(config, len(train_stream), ranks, dtype)
    run_dir, first_step = os.path.join(config.log_dir, config.exp_name), saved[1]["step"] if saved else 0
    if first_step >= max_steps:
        print0(f"{run_dir} is finished at step {first_step}: sample from it with python sample.py {run_dir},"
               " train on with --max-steps, or begin anew with --exp-name")
    if config.dry_run or first_step >= max_steps:
        return None
    T = config.sequence_length
    loader = data.DataLoaderLite(train_stream, B, T, ranks.rank, ranks.world_size, config.shuffle == "on", config.seed,
                                 ranks.device)
    seed_all(config.seed)                       # the same weights on every rank
    # what is to be sharded need not fit on one device
    raw_model = build_model(config, saved, "cpu" if config.parallel == "fsdp" and ranks.ddp else ranks.device)
    model = parallel.wrap(raw_model, config, max_steps - first_step, B, dtype, ranks)
    optimizers = parallel.make_optimizers(raw_model, config, ranks)
    scaler = torch.amp.GradScaler(ranks.device_type, enabled=dtype == "float16")
    seed_all(config.seed + 1 + ranks.rank)      # from here on only dropout draws, differently on each rank
    if saved:
        restore(saved[1], optimizers, scaler, loader, ranks)
    score_hellaswag = hellaswag.for_training(config.hellaswag, ranks) if config.hella_every else None
    log = None
    if ranks.master_process:
        os.makedirs(run_dir, exist_ok=True)
        write_run_description(os.path.join(run_dir, "config.json"), asdict(config), ranks, dtype)
        log = Log(os.path.join(run_dir, "log.txt"), keep_bytes=saved[1]["log_bytes"] if saved else 0)
    return Run(config, ranks, dtype, raw_model, model, optimizers, scaler, loader, val_stream, score_hellaswag,
               grad_accum_steps, first_step, max_steps, run_dir, log)


def due(step, every, run):
    """Whether it is time for what happens every so many steps, and at the end; not at the step a run was resumed from,
    where it happened before that was saved."""
    return every and (step % every == 0 or step == run.max_steps) and not step == run.first_step > 0


def training_loop(run):
    """Every so many steps validate, score, sample, save; then one step of training; then one line about it."""
    config, ranks, loader, raw_model = run.config, run.ranks, run.loader, run.raw_model
    peak = peak_flops(ranks.device, run.dtype)
    for step in range(run.first_step, run.max_steps + 1):  # step = number of updates made
        val_loss = None
        if due(step, config.val_every, run):
            val_loss = evaluate_loss(parallel.whole(raw_model), run.val_stream, loader.B, loader.T, config.val_tokens,
                                     run.dtype, ranks)
            report(run.log, step, val=val_loss)
        if run.score_hellaswag and due(step, config.hella_every, run):
            report(run.log, step, **run.score_hellaswag(parallel.whole(raw_model), run.dtype))
        if due(step, config.sample_every, run):
            print_samples(parallel.whole(raw_model), config.prompt, run.dtype, ranks)
        if due(step, config.save_every, run) and step > 0:
            save(run, step, val_loss)
        if step == run.max_steps:
            break

        epoch = int(loader.epoch)
        lr = get_lr(step, config.lr, config.lr * config.min_lr_ratio, config.warmup_steps, run.max_steps)
        synchronize(ranks.device)
        t0 = time.perf_counter()
        loss, norm = train_step(run.model, raw_model, run.optimizers, run.scaler, loader, lr, run.grad_accum_steps,
                                config.grad_clip, run.dtype, ranks)
        synchronize(ranks.device)
        dt = time.perf_counter() - t0  # seconds, of training alone
        tok_per_sec = config.total_batch_size / dt
        mfu = raw_model.flops_per_token(loader.T) * tok_per_sec / (peak * ranks.world_size) if peak else None
        print0(f"step {step:5d}/{run.max_steps} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f} | dt {dt * 1000:.2f}ms"
               f" | tok/sec {tok_per_sec:,.0f}" + (f" | MFU {mfu:.1%}" if mfu else ""))
        report(run.log, step, quiet=True, train=loss, lr=lr, norm=norm, tok_per_sec=tok_per_sec)
        if int(loader.epoch) > epoch:
            report(run.log, step, epoch=int(loader.epoch))  # every window was seen; the next epoch has its own order
    if ranks.master_process:
        picture = plot_run(run.run_dir, baselines=FINEWEB_DIR in config.data)
        print0(f"finished; curves: {picture}, samples: python sample.py {run.run_dir}")


def main():
    given = parse_args()
    keep_freed_memory()
    ranks = setup(given.get("device", "auto"))
    try:
        run = set_up(*make_config(given), ranks)
        if run:
            try:
                training_loop(run)
            finally:
                run.loader.close()
    finally:
        teardown()


if __name__ == "__main__":
    run_main(main)
