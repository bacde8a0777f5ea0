"""
The plan of a run: what fits into memory, the micro-batch, the number of steps, the FLOPs, hours and cost.

train_gpt2.py prints it before every run, and only it with --dry-run.
"""
import math
import os

import parallel
from cli import print0
from runtime import device_name, free_memory, peak_flops

LOSS_CHUNKS = 8  # parts of the loss in runs that need it (choice): less to save in each further one, more kernels


def estimate_memory(config, num_params, B, dtype, world_size, compiled, loss_chunks=1):
    """{part: bytes} that each training process needs at micro-batch size B; the sum is within 15% of measured CPU runs.

    "state" persists between steps: per parameter 4 bytes of weight, 4 of gradient, 8 of AdamW's two moments (4 of Muon's one),
    divided by world_size as far as they are sharded. "micro-batch" is added by a forward and backward, at its peak:

    - activations, bytes per block, token and channel, in 16 bits (in float32): 36 (64). They are the block's input, which
      LayerNorm keeps in float32, 4; both LayerNorms' outputs, q, k, v, attention's output, the second residual, and the MLP
      before and after GELU. With activation checkpointing a block keeps 4, and one block at a time has all 36.
    - the loss, bytes per logit: logits, log-softmax and two gradients, all but the first in float32; compiled, only logits and
      their gradient exist, in the autocast dtype. With loss_chunks, of one chunk at a time (model.chunked_loss, not compiled).
    - the weights in the autocast dtype, and the tied embedding's gradient twice, of lm_head and of wte

    "torch" is what PyTorch loads in the first step (measured). Not included: the copy of weights and moments, 12 bytes per
    parameter in the CPU memory of rank 0, from which a checkpoint is written. On a CPU more stays resident
    (runtime.keep_freed_memory).
    """
    wide, T, W = 2 if dtype == "float32" else 1, config.sequence_length, world_size
    mode, recompute = config.parallel if W > 1 else "ddp", config.activation_checkpointing
    compiled = compiled and mode != "fsdp"
    V, C, L, tokens = config.vocab_size, config.n_embd, config.n_layer, B * T
    block = 12 * C * C + 13 * C                            # parameters of a block
    root = num_params - L * block                          # of wte, wpe, ln_f

    per_block = 36 if wide == 1 else 64
    activations = tokens * C * (4 * L + per_block if recompute else L * per_block)
    loss = tokens * V / loss_chunks * (4 * wide if compiled and loss_chunks == 1 else 2 * wide + 12)
    casts = 0 if wide == 2 else 2 * (V * C + block if recompute else num_params)
    micro_batch = activations + loss + casts + 8 * V * C
    if mode == "fsdp":
        state = 16 * num_params / W
        gathered = 4 * root + 16 * block                   # weights of the root; weights and gradients of two blocks
        micro_batch = max(activations + loss + casts + gathered,                                  # at the loss
                          gathered + 4 * root + 8 * V * C,                                        # at the backward's end
                          (4 if wide == 2 else 6) * num_params                                    # to evaluate: a copy,
                          + min(tokens, max(T, 16384)) * V / loss_chunks * (2 * wide + 8))        # casts, the loss
    else:
        state = 8 * num_params + 8 * (max(num_params / W, V * C) if mode == "zero" else num_params)
        state -= 4 * L * 12 * C * C * (config.optimizer == "muon")  # normuon needs the second copy during its step
    return {"state": state, "micro-batch": micro_batch, "torch": 250e6}


def choose_batch_size(config, num_params, world_size, memory, on_cpu, dtype, compiled):
    """(B, loss_chunks): B is the config's, or the largest that divides the batch and fits into 85% of memory (bytes or None).

    It gives grad_accum_steps = total_batch_size / (B T world_size), which must be an integer. The largest B has at most 4096
    tokens on a CPU, where more are no faster, 65536 on a GPU, and is 1 if none fits. The loss is computed in chunks, which is
    slower, if the config's B, or one of up to 4096 tokens, does not fit otherwise: fewer are too few for fast matmuls (choice).
    ValueError lists the allowed values.
    """
    def fits(B, loss_chunks):
        needed = estimate_memory(config, num_params, B, dtype, world_size, compiled, loss_chunks)
        return memory is None or sum(needed.values()) < 0.85 * memory

    T, sequences = config.sequence_length, config.total_batch_size // config.sequence_length
    if sequences % world_size != 0:
        raise ValueError(f"{sequences} sequences per step cannot be split over {world_size} processes; numbers that would fit:"
                         f" {[w for w in range(1, min(sequences, 1024) + 1) if sequences % w == 0]}")
    divisors = [B for B in range(1, min(sequences // world_size, 65536) + 1) if (sequences // world_size) % B == 0]
    if config.batch_size:
        if (sequences // world_size) % config.batch_size != 0:
            micro_step = config.batch_size * T * world_size
            near = sorted({max(1, n) * micro_step for n in (config.total_batch_size // micro_step,
                                                            -(-config.total_batch_size // micro_step))})
            raise ValueError(f"--total-batch-size {config.total_batch_size} is not a multiple of B*T*W = {config.batch_size}*"
                             f"{T}*{world_size}; --batch-size that would fit: {divisors}, or --total-batch-size"
                             f" {' or '.join(map(str, near))}")
        useful, enough = [config.batch_size], config.batch_size
    else:
        useful, enough = [B for B in divisors if B * T <= (4096 if on_cpu else 65536)], -(-4096 // T)
    whole = max((B for B in useful if fits(B, 1)), default=0)
    chunked = max((B for B in useful if fits(B, LOSS_CHUNKS) and B <= enough), default=0)
    if whole >= max(chunked, 1):
        return whole, 1
    return chunked or config.batch_size or 1, LOSS_CHUNKS


def time_line(config, max_steps, total_flops, dtype, ranks):
    """The plan's line with the hours of the run, and its cost if --price is given."""
    if config.tok_per_sec:
        hours = max_steps * config.total_batch_size / config.tok_per_sec / 3600
        line = f"time: {hours:.1f} hours at {config.tok_per_sec:,.0f} tok/s"
    elif peak := peak_flops(ranks.device, dtype):
        # a well-tuned run of this size reaches 40 to 60% of the peak
        hours = total_flops / (0.5 * peak * ranks.world_size) / 3600
        line = (f"time: about {hours:.1f} hours at half the peak of"
                f" {ranks.world_size} x {device_name(ranks.device)}")
    else:
        return ("time: unknown on this device, --tok-per-sec gives its speed; each step prints"
                " what is left, as measured so far")
    if config.price:
        line += (f", {ranks.world_size} x {hours:.1f} x ${config.price:g} ="
                 f" ${hours * ranks.world_size * config.price:,.2f}")
    return line


def make_plan(config, num_tokens, dtype, ranks, first_step=0):
    """(B, loss_chunks, grad_accum_steps, max_steps, whether to compile) of the run.

    Prints its plan. num_tokens: size of the training data. first_step: where the run resumes.
    """
    model, T, W, on_cpu = config.gpt_config(), config.sequence_length, ranks.world_size, ranks.device == "cpu"
    total_batch_size = config.total_batch_size
    # infinite if unknown; on a CPU the processes of a machine share its memory
    memory = (free_memory(ranks.device) or math.inf) / (int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if on_cpu else 1)
    # the ranks may have different amounts of free memory: the smallest
    memory = min(parallel.all_gather(memory, ranks))
    num_params = model.num_params()
    # every token but the first is a target
    epoch_tokens = (num_tokens - 1) // T * T
    max_steps = config.max_steps or int(config.epochs * epoch_tokens / total_batch_size)
    if max_steps < 1:
        raise ValueError(f"{config.epochs} epochs of {num_tokens:,} tokens are less than one step"
                         f" of {total_batch_size:,}: use --preset shakespeare, for little text,"
                         " or --max-steps, or a smaller --total-batch-size")
    # the compiled step needs less memory, so B depends on it
    compiled = parallel.should_compile(config, max_steps - first_step, ranks)
    B, loss_chunks = choose_batch_size(config, num_params, W, memory, on_cpu, dtype, compiled)
    # tokens per step are fixed; B and the number of ranks only arrange them
    grad_accum_steps = total_batch_size // (B * T * W)
    # over 1: data is repeated
    epochs = max_steps * total_batch_size / epoch_tokens
    parts = estimate_memory(config, num_params, B, dtype, W, compiled, loss_chunks)
    needed = sum(parts.values())
    too_large = 0.85 * needed >= memory  # the estimate may be 15% too high
    fits = "" if needed < memory else ", IT WILL NOT FIT" if too_large else ", IT MAY NOT FIT"
    flops = model.flops_per_token(T)  # forward and backward
    total_flops = flops * max_steps * total_batch_size
    print0(f"model: {num_params:,} parameters, {model}\n"
           f"data: {num_tokens:,} training tokens; {max_steps:,} steps of {total_batch_size:,}"
           f" tokens = {epochs:.2f} epochs\n"
           f"step: {grad_accum_steps} micro-steps of B={B} x T={T} on each of {W} process(es),"
           f" {ranks.device_type}, {dtype}"
           + (f", the loss in {loss_chunks} chunks to save memory\n" if loss_chunks > 1 else "\n") +
           f"memory: about {needed / 1e9:.1f} GB per process ("
           + ", ".join(f"{part} {size / 1e9:.2f}" for part, size in parts.items()) + ")"
           + (f", {memory / 1e9:.1f} GB available" if memory < math.inf else "") + fits
           + f"\nwork: {flops / 1e9:.3f} GFLOPs per token, {total_flops:.3g} FLOPs in all")
    print0(time_line(config, max_steps, total_flops, dtype, ranks))
    if too_large and not (config.force or config.dry_run):
        raise ValueError(f"the run needs about {needed / 1e9:,.1f} GB per process, of which"
                         f" {memory / 1e9:,.1f} GB are available: choose a smaller --batch-size"
                         " (or model), --activation-checkpointing or --parallel fsdp, or give"
                         " --force to try it anyway")
    return B, loss_chunks, grad_accum_steps, max_steps, compiled
