"""
Trains GPT-2 on one CPU, one GPU, or many with torchrun: the recipe of GPT-2 and GPT-3.

    python train_gpt2.py                                    # the preset follows from the data
    python train_gpt2.py --preset gpt2-124M --data edu_fineweb10B
    torchrun --standalone --nproc_per_node=8 train_gpt2.py  # DDP on every GPU of this machine
    python train_gpt2.py --preset gpt2-1558M --dry-run      # the plan: memory, steps, FLOPs, hours

Writes log/<exp-name>/: log.txt, config.json, checkpoints (see checkpoint.py) and loss.png. The
same command resumes a run from its newest checkpoint. SIGTERM, SIGUSR1 and Ctrl-C finish the step,
save, and exit with status 0, 75 and 130; a second Ctrl-C exits at once.

Sources: the GPT-2 paper (Radford et al. 2019), the GPT-3 paper (Brown et al. 2020, table 2.1 and
appendix B), and the lecture "Let's reproduce GPT-2 (124M)", whose names are kept.
"""
import signal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # Ctrl-C during the imports below, which take seconds, ends the process without a traceback
    signal.signal(signal.SIGINT, signal.SIG_DFL)

import atexit
import math
import os
import sys
import time
from dataclasses import asdict

import torch

import checkpoint
import data
import hellaswag
import parallel
from config import (FINEWEB_DIR, FINEWEB_TOKENS, choose_batch_size, config_from_flags,
                    estimate_memory)
from convert import load_model
from model import GPT, GPTConfig
from plots import plot_run
from runtime import (StopSignals, autocast, choose_dtype, device_name, free_memory, get_rng_state,
                     keep_freed_memory, peak_flops, print0, run_main, seed_all, set_rng_state,
                     synchronize, use_deterministic_algorithms)
from sample import generate_text

# -----------------------------------------------------------------------------
# the parts of the loop

def get_lr(step, max_lr, min_lr, warmup_steps, max_steps, schedule="cosine", wsd_decay=0.2):
    """Learning rate of a step: linear warmup, then cosine decay from max_lr to min_lr.

    Schedule "wsd" (warmup, stable, decay; Hu et al. 2024) stays at max_lr and decays linearly to
    min_lr over the last wsd_decay, a fraction, of max_steps.
    """
    # 1) linear warmup for warmup_steps; + 1 because a step with a learning rate of 0 does nothing
    if step < warmup_steps:
        return max_lr * (step + 1) / warmup_steps
    # 2) after max_steps, the minimum
    if step >= max_steps:
        return min_lr
    # 3) in between, wsd: constant, then linear decay
    if schedule == "wsd":
        coeff = min(1.0, (max_steps - step) / (wsd_decay * max_steps))
        return min_lr + coeff * (max_lr - min_lr)
    # 4) or cosine decay
    decay_ratio = (step - warmup_steps) / (max_steps - warmup_steps)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # from 1 down to 0
    return min_lr + coeff * (max_lr - min_lr)


class NonFinite(ValueError):
    """The loss or the gradient norm is NaN or infinite; the weights have not been updated."""


def train_step(step, model, raw_model, optimizers, scaler, loader, lr, grad_accum_steps, grad_clip,
               dtype, ranks):
    """One optimizer step; returns (loss, gradient norm) before the update, floats, of all ranks.

    model is raw_model, compiled and wrapped in DDP. Raises NonFinite instead of updating the
    weights if the loss or the norm is NaN or infinite; a float16 overflow only skips the update.
    """
    first_window = loader.position
    # None instead of zeros: the first backward then writes gradients instead of adding to them
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    # on the device: adding to it does not make the CPU wait
    loss_accum = torch.zeros((), device=ranks.device)
    for micro_step in range(grad_accum_steps):
        x, y = loader.next_batch()  # (B, T), (B, T)
        if ranks.ddp:
            # DDP averages gradients over the ranks in the last backward only, instead of in each
            # one; it reads this field in its forward. FSDP ignores it and reduces in each one.
            model.require_backward_grad_sync = (micro_step == grad_accum_steps - 1)
        # matmuls in dtype; softmax, LayerNorm and the loss, which need more digits, in float32
        with autocast(ranks.device, dtype):
            _, loss = model(x, y)
        # cross_entropy is a mean over a micro-batch, and backward() adds to the gradients: without
        # the division they would be those of a sum of means, grad_accum_steps times too large
        loss = loss / grad_accum_steps
        # detached, or loss_accum would keep every micro-step's graph
        loss_accum += loss.detach()
        # the scaler is the identity unless dtype is float16, whose small gradients underflow
        scaler.scale(loss).backward()
    local_loss = loss_accum.clone()  # to name the rank if it is non-finite
    # the mean over the ranks; SUM, then divide: gloo has no reliable AVG
    loss_accum = parallel.all_reduce_sum(loss_accum, ranks) / ranks.world_size  # a scalar
    # the gradients are scaled like the loss; unscale them before the norm is computed
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    # a batch with an unusually large gradient must not destabilize the model (GPT-3, appendix B)
    norm = parallel.clip_grad_norm(raw_model, grad_clip)
    # .item() makes the CPU wait for the GPU: only here, once per step
    loss, norm = loss_accum.item(), norm.item()
    # float16: if the scaled gradients overflow, the scaler skips the update and halves its scale
    overflow = not math.isfinite(norm) and scaler.is_enabled() and scaler.get_scale() > 1
    if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
        raise nonfinite(step, loss, norm, local_loss, first_window, loader.position, ranks)
    for optimizer in optimizers:
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr * param_group["lr_scale"]  # 1, or embd_lr_ratio
        scaler.step(optimizer)
    scaler.update()
    return loss, norm


def nonfinite(step, loss, norm, local_loss, first_window, end_window, ranks):
    """The NonFinite error of a step, naming ranks and data. Every rank must call it."""
    # the mean over the ranks is NaN on all of them; only one may have a bad batch or bad memory
    losses = parallel.all_gather(local_loss.item(), ranks)
    where = [rank for rank, value in enumerate(losses) if not math.isfinite(value)]
    return NonFinite(f"step {step}: non-finite loss {loss} or gradient norm {norm}"
                     f"{f', from rank {where}' if where else ''}, in windows {first_window} to"
                     f" {end_window - 1} of the data's order; the weights were not updated. Resume"
                     " from the last checkpoint with a lower --lr or --dtype float32")


@torch.no_grad()
def evaluate_loss(model, stream, B, T, val_tokens, dtype, ranks):
    """Mean cross entropy over the first val_tokens tokens of a stream, which the ranks split.

    The result depends neither on B nor on the number of ranks. Returns None if a stop is requested
    meanwhile.
    """
    model.eval()  # no dropout
    total, count = 0.0, 0  # sum of the losses of all targets; number of targets
    # the logits are an evaluation's largest tensor; batches over 4096 tokens are no faster
    B = max(1, min(B, 4096 // T))
    for x, y in data.iterate_batches(stream, B, T, val_tokens, ranks.rank, ranks.world_size,
                                     ranks.device):
        # every rank has the same number of batches, so all ranks stop at the same one
        if parallel.stop_requested(ranks):
            model.train()
            return None
        # x is (0, T) on a rank that has no tokens left
        if len(x) > 0:
            with autocast(ranks.device, dtype):
                _, loss = model(x, y)
            # batches differ in size: weight each mean by its number of targets
            total += loss.item() * y.numel()
            count += y.numel()
    model.train()
    # float64: float32 has too few digits for a sum over 10M tokens; MPS has no float64
    sums = torch.tensor([total, count], device=ranks.device,
                        dtype=torch.float32 if ranks.device == "mps" else torch.float64)
    total, count = parallel.all_reduce_sum(sums, ranks).tolist()
    return total / count


def print_samples(model, prompt, dtype, ranks, num_samples=4, max_new_tokens=32):
    """Prints samples that start with prompt, split over the ranks; none if a stop is requested."""
    if parallel.stop_requested(ranks):
        return
    model.eval()  # no dropout
    texts = []
    for i in range(ranks.rank, num_samples, ranks.world_size):
        # generate_text has its own generator: sampling does not change training's random numbers
        with autocast(ranks.device, dtype):
            texts += generate_text(model, prompt, 1, max_new_tokens, seed=42 + i)
    model.train()
    # only rank 0 prints: lines of several processes would interleave
    gathered = parallel.all_gather(texts, ranks)
    for i in range(num_samples):
        print0(f"sample {i}: {gathered[i % ranks.world_size][i // ranks.world_size]!r}")


# -----------------------------------------------------------------------------
# what the run starts from

def open_data(config, ranks):
    """[train TokenStream, val TokenStream]; a text file is tokenized first, by rank 0."""
    # the other ranks find the files that rank 0 has written
    with parallel.rank0_first(ranks):
        splits = data.prepare_data(config.data)
    streams = [data.TokenStream(shards, config.vocab_size) for shards in splits]
    # a sequence of T tokens needs T + 1: the last one is only a target
    for split, stream in zip(("train", "val"), streams):
        if len(stream) <= config.sequence_length:
            raise ValueError(f"the {split} split of {config.data} has {len(stream)} tokens, too"
                             f" few for one sequence of {config.sequence_length} and its target;"
                             " use more text or a smaller --block-size")
    return streams


def make_plan(config, num_tokens, dtype, ranks):
    """(B, grad_accum_steps, max_steps) for num_tokens of training data; prints the run's plan."""
    # the meta device has shapes without memory: enough to count parameters
    with torch.device("meta"):
        model = GPT(config.gpt_config())
    T, W, on_cpu = config.sequence_length, ranks.world_size, ranks.device == "cpu"
    total_batch_size = config.total_batch_size
    num_params, memory = model.num_params(), free_memory(ranks.device)
    B = choose_batch_size(config, num_params, W, memory, on_cpu, dtype)
    # the ranks may have different amounts of free memory; the smallest B fits all of them
    B = min(parallel.all_gather(B, ranks))
    # tokens per step are fixed; B and the number of ranks only arrange them
    grad_accum_steps = total_batch_size // (B * T * W)
    # every token but the first is a target
    epoch_tokens = (num_tokens - 1) // T * T
    max_steps = config.max_steps or int(config.epochs * epoch_tokens / total_batch_size)
    if max_steps < 1:
        raise ValueError(f"{config.epochs} epochs of {num_tokens:,} tokens are less than one step"
                         f" of {total_batch_size:,}: use --preset shakespeare, for little text,"
                         " or --max-steps, or a smaller --total-batch-size")
    # over 1: data is repeated
    epochs = max_steps * total_batch_size / epoch_tokens
    parts = estimate_memory(config, num_params, B, dtype, W, on_cpu)
    needed = sum(parts.values())
    flops = model.flops_per_token(T)  # forward and backward
    total_flops = flops * max_steps * total_batch_size
    print0(f"model: {num_params:,} parameters, {model.config}\n"
           f"data: {num_tokens:,} training tokens; {max_steps:,} steps of {total_batch_size:,}"
           f" tokens = {epochs:.2f} epochs\n"
           f"step: {grad_accum_steps} micro-steps of B={B} x T={T} on each of {W} process(es),"
           f" {ranks.device_type}, {dtype}\n"
           f"memory: about {needed / 1e9:.1f} GB per process ("
           + ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items()) + ")"
           + (f", {memory / 1e9:.1f} GB available" if memory else "")
           + (": IT WILL NOT FIT" if memory and needed > memory else "")
           + f"\nwork: {flops / 1e9:.3f} GFLOPs per token, {total_flops:.3g} FLOPs in all")
    if peak := peak_flops(ranks.device, dtype):
        # a well-tuned run of this size reaches 40 to 60% of the peak
        hours = total_flops / (0.5 * peak * W) / 3600
        print0(f"time: about {hours:.1f} hours at half the peak of"
               f" {W} x {device_name(ranks.device)}")
    return B, grad_accum_steps, max_steps


def dry_run(config, dtype, ranks):
    """Prints the plan of the run; FineWeb-Edu's shards need not exist."""
    if config.data == FINEWEB_DIR and not os.path.exists(FINEWEB_DIR):
        print0(f"{FINEWEB_DIR}/ does not exist: the plan of FineWeb-Edu's sample of 10B tokens")
        num_tokens = FINEWEB_TOKENS
    else:
        num_tokens = len(open_data(config, ranks)[0])
    make_plan(config, num_tokens, dtype, ranks)


def build_model(config, saved, ranks):
    """The GPT to train: the checkpoint's, --init-from's, or initialized from torch's generator."""
    # fsdp moves shards to the GPUs: the unsharded model need not fit on one GPU
    device = "cpu" if parallel.is_fsdp(config, ranks) else ranks.device
    if not saved and config.init_from:
        return load_model(config.init_from, device, config.block_size, config.dropout)[0].train()
    raw_model = GPT(GPTConfig(**saved.model["config"]) if saved else config.gpt_config())
    if saved:
        checkpoint.load_weights(raw_model, saved.model["model"], "the checkpoint")
    return raw_model.to(device)


def capture(raw_model, val_loss, optimizers, scaler, loader, config, ranks):
    """(model, state): contents of a checkpoint's two files, on rank 0's CPU; see checkpoint.py.

    A run resumed from them is bitwise identical. Every rank must call it.
    """
    weights, optimizer_states = parallel.full_state(raw_model, optimizers, ranks)
    # dropout's random numbers differ between ranks; all other state is the same on every rank
    rng = parallel.all_gather(get_rng_state(ranks.device), ranks)
    state = {"optimizers": optimizer_states, "scaler": scaler.state_dict(),
             "loader": loader.state_dict(), "rng": rng, "train_config": asdict(config)}
    return checkpoint.model_contents(raw_model, val_loss, weights), state


def restore(saved, optimizers, scaler, config, ranks):
    """Restores what capture returned, as read from a checkpoint, except for the weights."""
    state = saved.state
    # without AdamW's moments the first updates would be far too large
    parallel.load_full_optimizer_state(optimizers, state["optimizers"])
    if state["scaler"]:  # empty unless the run was in float16
        scaler.load_state_dict(state["scaler"])
    if len(state["rng"]) == ranks.world_size:
        set_rng_state(state["rng"][ranks.rank], ranks.device)
    else:
        # only dropout draws from these generators; the order of the data is rank-independent
        print0(f"  changed: {ranks.world_size} processes, were {len(state['rng'])}; the order of"
               " the data is the same")
    if ranks.master_process:
        # --resume may name an older checkpoint; newer ones belong to another run
        for path in checkpoint.rename_newer(config.run_dir, saved.step):
            print0(f"renamed {path} to *.aside: it is newer than the checkpoint")


def is_finished(config, examples, first_step, max_steps, evaluated):
    """Whether all steps are made and the evaluations after the last one are in the log."""
    missing = [stream for stream, wanted in (("val", config.val_every), ("hella", examples))
               if wanted and stream not in evaluated]
    return first_step > max_steps or first_step == max_steps and not missing


def report_finished(config, step, ranks):
    """Prints that the run is finished; draws its curves if a stop prevented that."""
    print0(f"{config.run_dir} is finished at step {step}: sample from it with python sample.py"
           f" {config.run_dir}, train longer with --max-steps, or start over with --exp-name")
    if ranks.master_process and not os.path.exists(os.path.join(config.run_dir, "loss.png")):
        print0(f"curves: {plot_run(config.run_dir, baselines=FINEWEB_DIR in config.data)}")


# -----------------------------------------------------------------------------
# the run

def main():
    # settings: from the flags, or from the checkpoint that the run resumes from
    config, saved = config_from_flags()
    T, run_dir = config.sequence_length, config.run_dir

    # device: cuda, mps or cpu, and this process's rank among those that torchrun started
    keep_freed_memory()  # on a CPU
    ranks = parallel.setup(config.device, config.timeout)
    device, dtype = ranks.device, choose_dtype(config.dtype, ranks.device)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if config.deterministic:
        use_deterministic_algorithms()
    if config.dry_run:
        return dry_run(config, dtype, ranks)

    # data: two streams of tokens, HellaSwag's examples, how the tokens of a step are split up
    train_stream, val_stream = open_data(config, ranks)
    examples = hellaswag.for_training(config.hellaswag, ranks) if config.hella_every else None
    B, grad_accum_steps, max_steps = make_plan(config, len(train_stream), dtype, ranks)
    loader = data.DataLoaderLite(train_stream, B, T, ranks.rank, ranks.world_size,
                                 config.shuffle == "on", config.seed, device)
    atexit.register(loader.close)  # its thread must not run during interpreter shutdown

    # resume: the first step, and its evaluations in the log; a stop may have interrupted others
    first_step, log_bytes, evaluated = 0, 0, set()
    if saved:
        first_step = saved.step
        loader.load_state_dict(saved.state["loader"], config.force)  # ValueError for other data
        log_bytes, evaluated = checkpoint.kept_log(run_dir, first_step)
    evaluated = parallel.all_gather(evaluated, ranks)[0]  # rank 0's: all ranks must evaluate alike
    if is_finished(config, examples, first_step, max_steps, evaluated):
        return report_finished(config, first_step, ranks)

    # model: raw_model holds the only parameters; model is raw_model, compiled and wrapped in DDP
    seed_all(config.seed)  # every rank draws the same initial weights
    raw_model = build_model(config, saved, ranks)
    model = parallel.wrap(raw_model, config, max_steps - first_step, B, dtype, ranks)

    # optimizer, with the checkpoint's state
    optimizers = parallel.make_optimizers(raw_model, config, ranks)
    scaler = torch.amp.GradScaler(ranks.device_type, enabled=dtype == "float16")
    # from here on only dropout draws random numbers, different ones on each rank
    seed_all(config.seed + 1 + ranks.rank)
    if saved:
        restore(saved, optimizers, scaler, config, ranks)
        saved = None  # frees its memory

    # log: rank 0 writes config.json, log.txt, and, in a background thread, checkpoints
    checkpoint.write_config(run_dir, asdict(config), dtype, ranks)
    log = checkpoint.Log(run_dir, asdict(config), log_bytes, first_step, ranks)
    writer = checkpoint.Writer()
    peak = peak_flops(device, dtype)  # of one device, FLOP/s; None if unknown

    def due(every, stream=None):
        # every `every` steps and after the last one, unless logged before the run was resumed
        return (every and (step % every == 0 or step == max_steps)
                and not (step == first_step and stream in evaluated))

    with StopSignals():
        for step in range(first_step, max_steps + 1):  # step = number of updates made so far
            # once in a while: the validation loss; model would recompile for other shapes
            val_loss = None
            if due(config.val_every, "val"):
                val_loss = evaluate_loss(parallel.unsharded_model(raw_model), val_stream, B, T,
                                         config.val_tokens, dtype, ranks)
                log(step, val=val_loss)

            # once in a while: HellaSwag, in both styles of scoring
            if examples and due(config.hella_every, "hella"):
                log(step, **hellaswag.score_in_training(parallel.unsharded_model(raw_model),
                                                        examples, dtype, ranks))

            # once in a while: samples
            if due(config.sample_every):
                print_samples(parallel.unsharded_model(raw_model), config.prompt, dtype, ranks)

            # once in a while, and before stopping: a checkpoint
            writer.check()  # raises the error of the previous one, if any
            stopping = parallel.stop_requested(ranks)
            # again at first_step if its validation was interrupted: the model file holds val_loss
            is_new = step > first_step or step > 0 and val_loss is not None
            if is_new and (due(config.save_every) or stopping):
                log.flush()    # a checkpoint must not be on disk before the log up to it
                writer.wait()  # frees the previous copy before the next one is made
                contents = capture(raw_model, val_loss, optimizers, scaler, loader, config, ranks)
                if ranks.master_process:
                    writer.start(checkpoint.save_and_prune, run_dir, step, *contents)
            if stopping or step == max_steps:
                break

            # one optimizer step; only this is timed
            epoch = int(loader.epoch)
            lr = get_lr(step, config.lr, config.lr * config.min_lr_ratio, config.warmup_steps,
                        max_steps, config.schedule, config.wsd_decay)
            synchronize(device)
            t0 = time.perf_counter()
            loss, norm = train_step(step, model, raw_model, optimizers, scaler, loader, lr,
                                    grad_accum_steps, config.grad_clip, dtype, ranks)
            synchronize(device)            # CUDA runs asynchronously: wait for it
            dt = time.perf_counter() - t0  # seconds
            tok_per_sec = config.total_batch_size / dt
            # model FLOPs utilization: the fraction of the peak of all devices
            mfu = peak and raw_model.flops_per_token(T) * tok_per_sec / (peak * ranks.world_size)
            print0(f"step {step:5d}/{max_steps} | loss {loss:.6f} | lr {lr:.4e} | norm {norm:.4f}"
                   f" | dt {dt * 1000:.2f}ms | tok/sec {tok_per_sec:,.0f}"
                   + (f" | MFU {mfu:.1%}" if mfu else ""))
            log(step, quiet=True, train=loss, lr=lr, norm=norm, tok_per_sec=tok_per_sec)
            if int(loader.epoch) > epoch:
                log(step, epoch=int(loader.epoch))  # the next epoch has another order
        writer.wait()  # until the last checkpoint is on disk
        if stopping:
            print0(f"stopped at step {step} by {stopping}; the same command resumes from there")
        elif ranks.master_process:
            print0(f"finished; curves: {plot_run(run_dir, baselines=FINEWEB_DIR in config.data)},"
                   f" samples: python sample.py {run_dir}")

    # on success only: after an error NCCL would wait here for ranks that have exited
    parallel.teardown()
    sys.exit(StopSignals.STATUS[stopping] if stopping else 0)


if __name__ == "__main__":
    run_main(main)
