"""
Trains GPT-2 on one CPU, one GPU, or many with torchrun: the recipe of GPT-2 and GPT-3.

    python train_gpt2.py                                    # the preset follows from the data
    python train_gpt2.py --preset gpt2-124M --data edu_fineweb10B
    torchrun --standalone --nproc_per_node=8 train_gpt2.py  # DDP on every GPU of this machine
    python train_gpt2.py --preset gpt2-1558M --dry-run      # the plan: memory, steps, FLOPs, hours
    python train_gpt2.py --resume log/gpt2-124M --eval-only # its validation loss and HellaSwag

Writes log/<exp-name>/: log.txt, config.json, checkpoints and loss.png. The same command resumes a
run from its newest checkpoint. SIGTERM, SIGUSR1, Ctrl-C, a closed terminal and a closed stdout
finish the step, save, and exit with status 0, 75, 130, 129 and 141; a second Ctrl-C exits at once.

Sources: the GPT-2 paper (Radford et al. 2019), the GPT-3 paper (Brown et al. 2020, table 2.1 and
appendix B), and the lecture "Let's reproduce GPT-2 (124M)", whose names are kept.
"""
import atexit
import math
import os
import sys
import time
from dataclasses import asdict

from run.cli import StopSignals, command, print0, report_progress, run_main, start
from run.config import FINEWEB_DIR, FINEWEB_TOKENS, parse_args

if __name__ == "__main__":
    start(parse_args)  # --help and an invalid flag end the process here
    print0("loading PyTorch")

import torch

import data
import hellaswag
from model import GPT
from plots import plot_run
from run import checkpoint, folder, parallel, reference
from run.prepare import prepare_data
from run.runtime import (autocast, choose_dtype, full_float32, get_rng_state, keep_freed_memory,
                         matmul_flops, peak_flops, set_rng_state, use_deterministic_algorithms)
from run.settings import (LOSS_CHUNKS, check_same_on_all_ranks, config_from_flags, how_to_resume,
                          make_plan)
from run.weights import load_model
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
        decay_steps = min(wsd_decay * max_steps, max_steps - warmup_steps)
        coeff = min(1.0, (max_steps - step) / decay_steps)
        return min_lr + coeff * (max_lr - min_lr)
    # 4) or cosine decay
    decay_ratio = (step - warmup_steps) / (max_steps - warmup_steps)
    coeff = 0.5 * (1.0 + math.cos(math.pi * decay_ratio))  # from 1 down to 0
    return min_lr + coeff * (max_lr - min_lr)


# some versions of cuDNN's attention, torch's choice on these GPUs, have returned NaN
NONFINITE_HINT = ("Resume from the last checkpoint with a lower --lr or with --dtype float32"
                  " --force; on an H100 or newer, first with TORCH_CUDNN_SDPA_DEPRIORITIZED=1 in"
                  " the environment")


def train_step(step, model, raw_model, optimizers, scaler, loader, lr, grad_accum_steps, grad_clip,
               dtype, ranks):
    """One optimizer step; returns (loss, gradient norm, stop request), the same on every rank.

    Loss and norm are floats, before the update; the stop request is a signal's name or None. model
    is raw_model, compiled and wrapped in DDP. Raises ValueError instead of updating the weights if
    the loss or the norm is NaN or infinite; a float16 overflow only skips the update.
    """
    first_window = loader.position
    progress = report_progress(f"step {step:5d}")
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
            # without a name, the logits, B * T * V numbers, are freed before the backward
            loss = model(x, y)[1]
        # cross_entropy is a mean over a micro-batch, and backward() adds to the gradients: without
        # the division they would be those of a sum of means, grad_accum_steps times too large
        loss = loss / grad_accum_steps
        # detached, or loss_accum would keep every micro-step's graph
        loss_accum += loss.detach()
        # the scaler is the identity unless dtype is float16, whose small gradients underflow
        scaler.scale(loss).backward()
        # by the CPU's clock, without waiting for the device
        progress((micro_step + 1) / grad_accum_steps)
    # the step's only small all-reduce: the losses, and how many ranks are to stop. full_like fills
    # on the GPU; copying a number there would make the CPU wait.
    stops = torch.full_like(loss_accum, float(StopSignals.received is not None))
    sums = parallel.all_reduce_sum(torch.stack([loss_accum, stops]), ranks)
    # the gradients are scaled like the loss; unscale them before the norm is computed
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    # a batch with an unusually large gradient must not destabilize the model (GPT-3, appendix B)
    norm = parallel.clip_grad_norm(raw_model, grad_clip)
    # tolist makes the CPU wait for the GPU: only here, once per step. It is before the update, so
    # a non-finite step leaves the weights as they are.
    loss, stops, norm = torch.cat([sums, norm[None]]).tolist()
    loss /= ranks.world_size  # the mean: SUM, then divide, since gloo has no reliable AVG
    # float16: scaled gradients may overflow; then the update is skipped and the scale halved
    overflow = not math.isfinite(norm) and scaler.is_enabled() and scaler.get_scale() > 1
    if not math.isfinite(loss) or not (math.isfinite(norm) or overflow):
        raise ValueError(f"step {step}: non-finite loss {loss} or gradient norm {norm}"
                         f"{nonfinite_ranks(loss_accum, ranks)}, in windows {first_window} to"
                         f" {loader.position - 1} of the data's order; the weights were not"
                         f" updated. {NONFINITE_HINT}")
    for optimizer in optimizers:
        for param_group in optimizer.param_groups:
            param_group["lr"] = lr * param_group["lr_scale"]  # 1, or embd_lr_ratio
        # all optimizers or none; scaler.step would decide for each one by itself, and wait
        if not overflow:
            optimizer.step()
    update_scale(scaler, overflow)
    stop = parallel.name_of_stop(ranks) if stops else None
    return loss, norm, stop


def nonfinite_ranks(loss_accum, ranks):
    """", from rank [1]": those whose own loss is NaN or infinite; "" if none is.

    The mean over the ranks is NaN on all of them; only one may have a bad batch or memory.
    """
    losses = parallel.all_gather(loss_accum.item(), ranks)
    found = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
    return f", from rank {found}" if found else ""


def update_scale(scaler, overflow):
    """scaler.update(), with the scale halved on every rank if the gradient norm overflowed."""
    if not overflow:
        scaler.update()
        return
    state = scaler.state_dict()  # reads the scale, which makes the CPU wait
    scaler.update()  # halves it where this rank's gradients, a shard under FSDP, overflowed
    state["scale"] *= state["backoff_factor"]
    state["_growth_tracker"] = 0
    scaler.load_state_dict(state)


@torch.no_grad()
def evaluate_loss(model, stream, B, T, val_tokens, dtype, ranks):
    """{"val": mean cross entropy over the first val_tokens tokens of a stream, "val_655360": ...}.

    "val_N" is that over the first N tokens, for each N of reference.VAL_TOKENS below val_tokens.
    The ranks split the tokens. The result depends neither on B nor on the number of ranks. Returns
    None if a stop is requested meanwhile.
    """
    model.eval()  # no dropout
    on_cpu = ranks.device_type == "cpu"
    # the logits are an evaluation's largest tensor; larger batches are no faster
    most_tokens = 4096 if on_cpu else 16384
    B = max(1, min(B, most_tokens // T))
    val_tokens = min(val_tokens, len(stream) - 1)
    # the tokens are evaluated in parts, each of which ends where a mean is wanted
    ends = [n for n in reference.VAL_TOKENS if n < val_tokens] + [val_tokens]
    # sum of the losses of each part's targets, on the device: reading it would make the CPU wait.
    # float64: float32 has too few digits for a sum over 10M tokens; MPS and XPU may not have it.
    sum_dtype = torch.float64 if ranks.device_type in ("cuda", "cpu") else torch.float32
    sums = torch.zeros(len(ends), device=ranks.device, dtype=sum_dtype)
    progress = report_progress("validation")
    start = 0
    for part, end in enumerate(ends):
        batches = data.iterate_batches(stream, B, T, end, ranks.rank, ranks.world_size,
                                       ranks.device, start)
        for i, (x, y) in enumerate(batches):
            # every rank has the same number of batches, so all ranks stop at the same one; asking
            # waits for the GPU
            if (on_cpu or i % 16 == 0) and parallel.stop_requested(ranks):
                model.train()
                return None
            # x is (0, T) on a rank that has no tokens left
            if len(x) > 0:
                with autocast(ranks.device, dtype), full_float32():
                    loss = model(x, y)[1]
                # batches differ in size: weight each mean by its number of targets
                sums[part] += loss.to(sum_dtype) * y.numel()
            progress((start + (i + 1) * B * T * ranks.world_size) / val_tokens)
        start = end
    model.train()
    sums = parallel.all_reduce_sum(sums, ranks).cumsum(0).tolist()
    means = [total / (end // T * T) for total, end in zip(sums, ends)]  # over whole sequences
    parts = {f"val_{end}": mean for end, mean in zip(ends[:-1], means)}
    return {"val": means[-1], **parts}


def print_samples(model, prompt, dtype, ranks, num_samples=4, max_new_tokens=32):
    """Prints samples that start with prompt, split over the ranks; none if a stop is requested."""
    if parallel.stop_requested(ranks):
        return
    model.eval()  # no dropout
    texts = []
    for i in range(ranks.rank, num_samples, ranks.world_size):
        # generate_text has its own generator: sampling does not change training's random numbers
        try:
            with autocast(ranks.device, dtype):
                texts += generate_text(model, prompt, 1, max_new_tokens, seed=42 + i)
        except ValueError as e:  # float16 overflows: no reason to end the training
            texts.append(f"none: {e}")
    model.train()
    # only rank 0 prints: lines of several processes would interleave
    texts_of_ranks = parallel.all_gather(texts, ranks)
    for i in range(num_samples):
        text = texts_of_ranks[i % ranks.world_size][i // ranks.world_size]
        print0(f"sample {i}: {text!r}")


def step_line(step, max_steps, loss, lr, norm, dt, tok_per_sec, mfu, mfu_name):
    """The line that is printed after a step, of up to 80 characters without MFU; dt in seconds.

    mfu, model FLOPs utilization: the fraction of all devices' FLOP/s, or None. mfu_name: "MFU" for
    those of the data sheet, "of matmul" for those measured in a large matmul.
    """
    digits = len(str(max_steps))
    line = (f"step {step:{digits}d}/{max_steps} | loss {loss:.4f} | lr {lr:.1e} | norm {norm:.2f}"
            f" | dt {dt * 1000:.0f}ms | tok/sec {tok_per_sec:,.0f}")
    if mfu is not None:
        line += f" | {mfu_name} {mfu:.1%}"
    return line


def due_at(step, max_steps, every):
    """Names of the evaluations that are due at a step: every n steps, and at the last step.

    every is {name: n}; 0 turns one off.
    """
    return {name for name, n in every.items() if n > 0 and (step % n == 0 or step == max_steps)}


# -----------------------------------------------------------------------------
# what the run starts from

def open_data(config, ranks):
    """[train TokenStream, val TokenStream]; a text file is tokenized first, by rank 0."""
    # the other ranks find the files that rank 0 has written
    with parallel.rank0_first(ranks):
        splits = prepare_data(config.data)
    streams = [data.TokenStream(shards, config.vocab_size) for shards in splits]
    # machines may have different files at the same path, which would go unnoticed
    fingerprints = parallel.all_gather([stream.fingerprint() for stream in streams], ranks)
    for rank, found in enumerate(fingerprints):
        if found != fingerprints[0]:
            raise ValueError(f"{config.data} holds other data on rank {rank} than on rank 0; copy"
                             " the same files to every machine")
    # a sequence of T tokens needs T + 1: the last one is only a target
    for split, stream in zip(("train", "val"), streams):
        if len(stream) <= config.block_size:
            raise ValueError(f"the {split} split of {config.data} has {len(stream)} tokens, too"
                             f" few for one sequence of {config.block_size} and its target; use"
                             " more text or a smaller --block-size")
    return streams


def dry_run(config, ranks):
    """Prints the plan of the run; FineWeb-Edu's shards need not exist."""
    if config.data == FINEWEB_DIR and not os.path.exists(FINEWEB_DIR):
        num_tokens = FINEWEB_TOKENS
        print0(f"{FINEWEB_DIR}/ does not exist: planning for {num_tokens:,} tokens, approximately"
               " FineWeb-Edu's sample")
    else:
        num_tokens = len(open_data(config, ranks)[0])
    make_plan(config, num_tokens, ranks)


def print_evaluations(config, saved, val_stream, examples, dtype, ranks):
    """--eval-only: prints the scores of the checkpoint, or of --init-from; writes nothing."""
    if not saved and not config.init_from:
        raise FileNotFoundError(f"--eval-only: there is no checkpoint in {config.run_dir}; name"
                                " another run with --exp-name, or weights with --init-from")
    # in chunks: there is no plan that would tell whether all logits fit into memory
    model = build_model(config, saved, ranks, LOSS_CHUNKS).to(ranks.device)
    T = config.block_size
    scores = evaluate_loss(model, val_stream, 4096, T, config.val_tokens, dtype, ranks)
    scores["val_bpb"] = scores["val"] * data.bits_per_byte(val_stream, T, config.val_tokens)
    if examples:
        scores |= hellaswag.score_in_training(model, examples, dtype, ranks)
    print0(folder.evaluation_line(saved.step if saved else 0, scores))


def build_model(config, saved, ranks, loss_chunks=1):
    """The GPT to train: the checkpoint's, --init-from's, or initialized from torch's generator."""
    # fsdp moves shards to the GPUs: the unsharded model need not fit on one GPU
    device = "cpu" if parallel.is_fsdp(config, ranks) else ranks.device
    if not saved and config.init_from:
        raw_model = load_model(config.init_from, device, config.block_size, config.dropout)[0]
    else:
        raw_model = GPT(config.gpt_config(), config.init)  # on the CPU, as in the lecture
        if saved:
            raw_model.load_state_dict(saved.model["model"])
    raw_model.loss_chunks = loss_chunks
    return raw_model.train().to(device)


def capture(raw_model, val_loss, optimizers, scaler, loader, config, ranks):
    """(model, state): contents of a checkpoint's two files, on rank 0's CPU; see checkpoint.py.

    A run resumed from them is bitwise identical. Every rank must call it. Raises ValueError if a
    weight is NaN or infinite: the loss would show it one step later, and the last good checkpoint
    might be removed.
    """
    norm = torch.nn.utils.get_total_norm(raw_model.parameters())
    if not math.isfinite(parallel.unsharded_tensor(norm).item()):
        raise ValueError(f"the weights are non-finite; they are not saved. {NONFINITE_HINT}")
    weights, optimizer_states = parallel.full_state(raw_model, optimizers, ranks)
    # dropout's random numbers differ between ranks; all other state is the same on every rank
    rng = parallel.all_gather(get_rng_state(ranks.device), ranks)
    state = {"optimizers": optimizer_states, "scaler": scaler.state_dict(),
             "loader": loader.state_dict(), "rng": rng, "train_config": asdict(config)}
    return checkpoint.model_contents(raw_model, val_loss, weights), state


def restore(saved, optimizers, scaler, config, ranks):
    """Restores what capture returned, as read from a checkpoint, except for the weights.

    The optimizers' settings (weight decay, betas, lr_scale) stay the config's.
    """
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


# -----------------------------------------------------------------------------
# the run

def main():
    # settings: from the flags, or from the checkpoint that the run resumes from
    config, saved = config_from_flags()
    T = config.block_size
    run_dir = config.run_dir
    first_step = saved.step if saved else 0

    # device: cuda, xpu, mps or cpu, and this process's rank among those that torchrun started
    keep_freed_memory()  # on a CPU
    ranks = parallel.setup(config.device, config.timeout)
    device = ranks.device
    dtype = config.dtype = choose_dtype(config.dtype, device)
    torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    use_deterministic_algorithms(config.deterministic)
    check_same_on_all_ranks(config, saved, ranks)
    if config.dry_run:
        return dry_run(config, ranks)

    # data: two streams of tokens, and HellaSwag's examples
    train_stream, val_stream = open_data(config, ranks)
    examples = None
    if config.hella_every:
        examples = hellaswag.load_examples(config.hellaswag, T, ranks)
    if config.eval_only:
        return print_evaluations(config, saved, val_stream, examples, dtype, ranks)

    # plan: how the tokens of a step are split into micro-batches
    B, grad_accum_steps, max_steps = make_plan(config, len(train_stream), ranks,
                                               resumed=saved is not None)
    bits_per_byte = data.bits_per_byte(val_stream, T, config.val_tokens)  # of a loss of 1
    loader = data.DataLoaderLite(train_stream, B, T, ranks.rank, ranks.world_size,
                                 config.shuffle == "on", config.seed, device)
    atexit.register(loader.close)  # its thread must not run during interpreter shutdown

    # steps between evaluations, by the stream of log.txt that has their results
    every = {"val": config.val_every, "hella": config.hella_every if examples else 0,
             "samples": config.sample_every}

    # resume: the position in the data. The log has the evaluations of the first step, unless a stop
    # interrupted them.
    logged = set()
    if saved:
        loader.load_state_dict(saved.state["loader"], config.force)  # ValueError for other data
        logged = folder.logged_evaluations(run_dir, first_step)
        logged = parallel.all_gather(logged, ranks)[0]  # rank 0's: all ranks evaluate together
    still_due = due_at(first_step, max_steps, every) - logged - {"samples"}  # not logged
    if first_step > max_steps or (first_step == max_steps and not still_due):
        print0(f"{run_dir} is finished at step {first_step}: sample from it with"
               f" {command('sample.py', run_dir)}, train longer with --max-steps, which raises the"
               " learning rate again, or start over with --exp-name")
        return

    # model: raw_model holds the only parameters; model is raw_model, compiled and wrapped in DDP
    torch.manual_seed(config.seed)  # every rank draws the same initial weights
    raw_model = build_model(config, saved, ranks, config.loss_chunks)
    model = parallel.wrap(raw_model, config, B, ranks)

    # optimizer, with the checkpoint's state
    optimizers = raw_model.configure_optimizers(
        config.lr, config.weight_decay, (config.beta1, config.beta2), config.optimizer,
        config.embd_lr_ratio)
    scaler = torch.amp.GradScaler(ranks.device_type, enabled=dtype == "float16")
    # from here on only dropout draws random numbers, different ones on each rank
    torch.manual_seed(config.seed + 1 + ranks.rank)
    if saved:
        restore(saved, optimizers, scaler, config, ranks)
        saved = None  # frees its memory

    # log: rank 0 writes config.json, log.txt, and, in a background thread, checkpoints
    if ranks.master_process:
        checkpoint.rename_skipped(run_dir, first_step)
    folder.write_config(run_dir, asdict(config), ranks)
    log = folder.Log(run_dir, asdict(config), first_step, ranks)
    writer = checkpoint.Writer()
    curve = reference.announce_curve(asdict(config))  # a public run to compare with, or None
    flops_per_token = raw_model.config.flops_per_token(T)
    # FLOP/s of one device: MFU is relative to its data sheet, otherwise to a matmul's; not on a CPU
    peak, mfu_name = peak_flops(device, dtype), "MFU"
    if peak is None and ranks.device_type != "cpu":
        peak, mfu_name = matmul_flops(device, dtype), "of matmul"
    progress = report_progress("training")
    stopping = None  # the name of the signal that requests a stop

    with StopSignals():
        for step in range(first_step, max_steps + 1):  # step = number of updates made so far
            due = due_at(step, max_steps, every)
            if step == first_step:
                due -= logged

            # once in a while: the validation loss; model would recompile for other shapes
            val_loss = None
            if "val" in due:
                losses = evaluate_loss(parallel.unsharded_model(raw_model), val_stream, B, T,
                                       config.val_tokens, dtype, ranks)
                if losses is not None:  # else a stop interrupted it
                    val_loss = losses["val"]
                    log(step, **losses, val_bpb=val_loss * bits_per_byte)
                    # "within the spread of public runs"
                    reference.print_comparison(asdict(config), curve, step, losses)

            # once in a while: HellaSwag, in both styles of scoring
            if "hella" in due:
                log(step, **hellaswag.score_in_training(parallel.unsharded_model(raw_model),
                                                        examples, dtype, ranks))

            # once in a while: samples
            if "samples" in due:
                print_samples(parallel.unsharded_model(raw_model), config.prompt, dtype, ranks)

            # evaluations may take minutes: has a stop been requested meanwhile?
            if due:
                stopping = parallel.stop_requested(ranks)

            # once in a while, before a stop, and at the end: a checkpoint; first_step's exists
            writer.check()  # raises the error of the previous one, if any
            save_due = config.save_every > 0 and step % config.save_every == 0
            if (save_due or stopping or step == max_steps) and step > first_step:
                log.flush()    # a checkpoint must not be on disk before the log up to it
                writer.wait()  # frees the previous copy before the next one is made
                contents = capture(raw_model, val_loss, optimizers, scaler, loader, config, ranks)
                if ranks.master_process:
                    writer.start(checkpoint.save_and_prune, run_dir, step, *contents)
                del contents  # the writer has the only reference
            if stopping or step == max_steps:
                break

            # one optimizer step; only this is timed
            lr = get_lr(step, config.lr, config.lr * config.min_lr_ratio, config.warmup_steps,
                        max_steps, config.schedule, config.wsd_decay)
            epoch = int(loader.epoch)
            t0 = time.perf_counter()
            loss, norm, stopping = train_step(step, model, raw_model, optimizers, scaler, loader,
                                              lr, grad_accum_steps, config.grad_clip, dtype, ranks)
            dt = time.perf_counter() - t0  # seconds; train_step and evaluations wait for the GPU

            # log
            tok_per_sec = config.total_batch_size / dt
            mfu = None
            if peak is not None:
                mfu = flops_per_token * tok_per_sec / (peak * ranks.world_size)
            print0(step_line(step, max_steps, loss, lr, norm, dt, tok_per_sec, mfu, mfu_name))
            progress((step + 1 - first_step) / (max_steps - first_step))
            log(step, quiet=True, train=loss, lr=lr, norm=norm, tok_per_sec=tok_per_sec)
            if ranks.master_process:  # the lecture's run: "as published"
                reference.print_first_losses(run_dir, asdict(config), step)
            if int(loader.epoch) > epoch:
                log(step, epoch=int(loader.epoch))  # the data has a new order from here on

        writer.wait()  # until the last checkpoint is on disk
        if stopping:
            print0(f"stopped at step {step} by {stopping}; {how_to_resume(config)} resumes"
                   " from there")
        elif ranks.master_process:
            print0(f"finished; curves: {plot_run(run_dir, baselines=FINEWEB_DIR in config.data)},"
                   f" samples: {command('sample.py', run_dir)}")
            best = checkpoint.best_step(run_dir)
            if best not in (None, step):  # little text, many epochs
                print0(f"the validation loss was lowest at step {best}:"
                       f" {command('sample.py', folder.paths(run_dir, best)[0])}")

    # on success only: after an error NCCL would wait here for ranks that have exited
    parallel.teardown()
    sys.exit(StopSignals.STATUS[stopping] if stopping else 0)


if __name__ == "__main__":
    run_main(main)
