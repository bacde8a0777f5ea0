"""
What a run starts from: its settings, by the flags, and the checkpoint from which it resumes.

A value comes from the first source that sets it: the command line, the checkpoint that the run resumes from, the weights
of --init-from, the preset, the field's default in config.py.

When a run resumes, FIXED settings cannot change and FORCED ones only with --force; all others take effect.
"""
import contextlib
import json
import math
import os
from argparse import ArgumentTypeError
from dataclasses import asdict

import data
from run import checkpoint, folder, parallel, weights
from run.cli import is_rank0, print0, printable
from run.config import FINEWEB_DIR, INPUT_TXT, PRESETS, TrainConfig, parse_args, preset_settings, run_name
from run.runtime import device_name, free_memory, peak_flops

# -----------------------------------------------------------------------------
# the flags, the checkpoint, the preset

def choose_preset(given):
    """(preset, data, reason): those of the flags; by default gpt2-124M for shards, for text finetune or shakespeare."""
    def holds_shards(path):
        return os.path.isdir(path) and bool(data.find_shards(path, "train"))

    for_text = "finetune" if given.get("init_from") else "shakespeare"
    if "preset" in given:
        default = INPUT_TXT if given["preset"] in ("shakespeare", "finetune") else FINEWEB_DIR
        return given["preset"], given.get("data", default), "chosen by --preset"
    if "data" in given:
        if holds_shards(given["data"]):
            return "gpt2-124M", given["data"], "--data is a folder of shards"
        return for_text, given["data"], "--data is not a folder of shards"
    if holds_shards(FINEWEB_DIR):
        return "gpt2-124M", FINEWEB_DIR, f"{FINEWEB_DIR}/ holds shards"
    return for_text, INPUT_TXT, f"{FINEWEB_DIR}/ holds no shards (python fineweb.py creates them)"


def shape_of_weights(given):
    """The model's fields of --init-from's weights, a dict; ValueError if the flags differ from them."""
    if not given.get("init_from"):
        return {}
    if "init" in given:
        raise ValueError(f"--init {given['init']} is for random weights, and --init-from loads others: omit one of them")
    shape = asdict(weights.read_model(given["init_from"])[0])
    shape = {name: value for name, value in shape.items() if name in TrainConfig.__dataclass_fields__ and name != "dropout"}
    if given.get("block_size", shape["block_size"]) > shape["block_size"]:
        raise ValueError(f"--block-size {given['block_size']} is over the {shape['block_size']} positions of --init-from's"
                         " weights; use that many or fewer")
    shape["block_size"] = given.get("block_size", shape["block_size"])
    if wrong := [name for name in shape if given.get(name, shape[name]) != shape[name]]:
        raise ValueError(f"--init-from's weights have {', '.join(f'{n}={shape[n]}' for n in wrong)}: omit these flags")
    return shape


def run_folder(given):
    """The run's folder: that of --resume, if it names a folder or a file in one, else log/<exp-name>."""
    resume = given.get("resume", "auto")
    if resume not in ("auto", "never"):
        if "exp_name" in given or "log_dir" in given:
            raise ValueError(f"--resume {resume} names the run: omit --exp-name and --log-dir")
        if not os.path.exists(resume):
            raise FileNotFoundError(f"--resume {resume} does not exist; allowed are auto, never, a run folder, or a model_*.pt"
                                    " in one")
        if os.path.isdir(resume) and not folder.steps_of(resume, "model"):
            raise FileNotFoundError(f"--resume {resume}: there is no checkpoint")
        run_dir = os.path.normpath(resume if os.path.isdir(resume) else os.path.dirname(resume) or ".")
        return run_dir if os.path.basename(run_dir) not in (".", "..") else os.path.abspath(run_dir)
    return os.path.join(given.get("log_dir", TrainConfig.log_dir), given.get("exp_name", default_name(given)))


def default_name(given):
    """The run's name without --exp-name: of the text that --data names, so that each text has its own run, or the preset."""
    preset, source, _ = choose_preset(given)
    is_text = "preset" not in given and preset in ("shakespeare", "finetune")
    if is_text and os.path.realpath(source) != os.path.realpath(INPUT_TXT):
        name = os.path.basename(os.path.abspath(source))
        with contextlib.suppress(ArgumentTypeError):  # no name for a folder: "-.txt"
            name = run_name(name if os.path.isdir(source) else os.path.splitext(name)[0])
            return name if preset == "shakespeare" else f"{name}-{preset}"
    return preset


def load_run(given):
    """The Checkpoint to resume from, or None for a new run. Rank 0 locks the run folder before it is read."""
    if given.get("eval_only") and "init_from" in given:
        return None
    run_dir, resume = run_folder(given), given.get("resume", "auto")
    is_file = resume not in ("auto", "never") and not os.path.isdir(resume)
    step = folder.step_of(resume) if is_file else None
    if is_rank0() and not (given.get("dry_run") or given.get("eval_only")):
        folder.lock_run(run_dir)
    # a restarted process resumes from what its run has saved since
    started = has_started(run_dir, resume)
    if resume == "never" and folder.steps_of(run_dir, "model") and not started:
        raise ValueError(f"{run_dir} already holds a run; choose another --exp-name, or move that folder away")
    if is_file and not started:
        return checkpoint.Checkpoint(*checkpoint.load_pair(run_dir, step), [])
    return checkpoint.load_latest(run_dir)


def has_started(run_dir, resume):
    """Whether torchrun or Slurm has restarted this process after it had begun to train: then config.json is its own.

    Before that, newer checkpoints than that of --resume, and those of a run that --resume never must not touch, are not its
    own. torchrun restarts its processes after one has died, Slurm a job that was requeued (train.sbatch).
    """
    if not any(int(os.environ.get(name) or 0) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")):
        return False
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError), open(os.path.join(run_dir, "config.json")) as f:
        started = json.load(f)
        return (started["config"]["resume"], started["torchrun_id"]) == (resume, os.environ.get("TORCHELASTIC_RUN_ID"))
    return False


def check_same_step(saved, ranks):
    """ValueError if the ranks have loaded checkpoints of different steps: DDP would train on without noticing."""
    steps = parallel.all_gather(saved.step if saved else 0, ranks)
    if wrong := [rank for rank, step in enumerate(steps) if step != steps[0]]:
        raise ValueError(f"rank 0 starts from step {steps[0]}, rank {wrong[0]} from step {steps[wrong[0]]}: the run folder must"
                         " be the same on every machine; if it is shared, start again")


def how_to_resume(config):
    """The command that resumes a run that was stopped."""
    if config.resume == "auto" or os.path.isdir(config.resume):
        return "the same command"
    return f"--resume {config.run_dir}"  # the same command would start over from --resume's file, or raise for "never"


# What cannot change when a run resumes, and what changes its result, which --force allows.
FIXED = ["preset", "init_from", "init", "n_layer", "n_head", "n_embd", "block_size", "vocab_size", "sequence_length",
         "optimizer"]
FORCED = ["total_batch_size", "seed", "shuffle", "dropout", "dtype"]
# How a process was started, which the next one does not take over.
STARTED = ["dry_run", "eval_only", "force", "resume", "price", "tok_per_sec"]


def config_from_flags(argv=None):
    """(TrainConfig, the Checkpoint to resume from or None) of the command line; the run folder is locked."""
    given = parse_args(argv)
    if "epochs" in given:  # replaces the max_steps of the preset or of the run
        if given.get("max_steps"):
            raise ValueError("--epochs and --max-steps both set the length of the run: give one of them")
        given["max_steps"] = 0
    preset, source, reason = choose_preset(given)
    saved = load_run(given)
    log_dir, exp_name = os.path.split(run_folder(given))
    # a resumed run may give up a tracker that is not installed on this machine
    folder.check_tracker(given.get("tracker", saved.state["train_config"].get("tracker", "none") if saved else "none"))
    if not saved:
        print0(f"preset {preset}, data {source}: {reason}; --preset and --data choose others ({', '.join(PRESETS)})")
        return TrainConfig(**{**preset_settings(preset), **shape_of_weights(given), **given, "preset": preset, "data": source,
                              "log_dir": log_dir, "exp_name": exp_name}), None
    # the run's settings, with defaults for flags that are newer than the run
    settings = {**saved.state["train_config"], **saved.model["config"]}
    known = {name: value for name, value in settings.items() if name in TrainConfig.__dataclass_fields__}
    if unknown := saved.state["train_config"].keys() - known.keys():  # of another version of this file
        print0(printable(f"  ignored: the run's settings {', '.join(sorted(map(str, unknown)))}, which no longer exist"))
    base = TrainConfig(**{**known, **{name: getattr(TrainConfig, name) for name in STARTED}})
    if os.path.basename(base.data) == "input.txt" and not os.path.exists(base.data):
        base.data = INPUT_TXT  # this clone has been moved; the data's fingerprint is compared later
    # the run's folder may have been moved, too
    config = TrainConfig(**{**asdict(base), **given, "log_dir": log_dir, "exp_name": exp_name})
    changed = [name for name in given if getattr(base, name) != getattr(config, name)]
    if wrong := [name for name in changed if name in FIXED]:
        raise ValueError(f"{', '.join(wrong)} cannot change when a run resumes; choose another --exp-name")
    if (wrong := [name for name in changed if name in FORCED]) and not config.force:
        raise ValueError(f"changing {', '.join(wrong)} makes it a different run; --force resumes anyway, another --exp-name"
                         " starts over")
    print0("\n".join([*saved.messages, f"resuming {run_folder(given)} from step {saved.step}, with its settings"]))
    for name in changed:
        if name not in (*STARTED, "exp_name", "log_dir"):
            print0(f"  changed: {name} was {getattr(base, name)!r}, is {getattr(config, name)!r}")
    return config, saved


# -----------------------------------------------------------------------------
# the plan: what fits into memory, the micro-batch, the number of steps, the FLOPs and hours

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
        state -= 4 * L * 12 * C * C * (config.optimizer == "muon")
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
