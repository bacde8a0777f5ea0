"""
The settings of a training run, each once with its default, meaning and flag; and the presets.

TrainConfig's fields are the flags of train_gpt2.py; settings.py determines their values for a run.

Sources: the GPT-3 paper (Brown et al. 2020, table 2.1 and appendix B) for learning rates, batch
size and schedule, and the lecture "Let's reproduce GPT-2 (124M)" for the rest of gpt2-124M.

Flags are parsed before PyTorch is imported, which takes more than a second: this file must not
import it.
"""
import math
import os
import textwrap
from argparse import SUPPRESS, ArgumentTypeError
from dataclasses import dataclass, field, fields

from run.cli import ROOT, ArgumentParser, number

FINEWEB_DIR = "edu_fineweb10B"  # where fineweb.py puts its shards
# Tokens of their train split, for --dry-run, which needs no shards. Approximate: published counts
# of FineWeb-Edu's sample differ, since the dataset has changed.
FINEWEB_TOKENS = 9_850_000_000
INPUT_TXT = os.path.join(ROOT, "input.txt")
# corpora of published results; their samples of 10B tokens
CORPORA = {"edu": "FineWeb-Edu", "fineweb": "FineWeb"}
TRACKERS = ("none", "tensorboard", "wandb")  # the last two are names of packages


# -----------------------------------------------------------------------------
# a run's settings

def flag(default, meaning, low=0, high=math.inf, above=-math.inf, **kwargs):
    """A field of TrainConfig with the help text of its flag.

    low, high, above: the range of a number. kwargs: more arguments of argparse's add_argument.
    """
    if type(default) in (int, float):
        kwargs["type"] = number(type(default), low, high, above)
    return field(default=default, metadata={"help": meaning, **kwargs})


def nonempty(value):
    """The type of a flag that takes a text; an unset shell variable gives an empty one."""
    if not value.strip():
        raise ArgumentTypeError(f"{value!r}: must not be empty; omit the flag to use its default")
    return value


def run_name(value):
    """The type of --exp-name: the name of a folder; shells add a slash at its end."""
    name = value.rstrip("/")
    if name.strip() in ("", ".", "..") or "/" in name:
        raise ArgumentTypeError(f"{value!r}: must be the name of a folder, not empty, without"
                                " slashes; --log-dir chooses the folder of all runs")
    return name


@dataclass
class TrainConfig:
    preset: str = flag("gpt2-124M", "model and recipe (default: chosen by the data and"
                       " --init-from)")
    data: str = flag("", "folder of shards, text file, or folder of .txt; default"
                     f" {FINEWEB_DIR}/ if it exists, else input.txt")
    exp_name: str = flag("", "name of the run, whose folder is log/<exp-name>; default the name of"
                         " --data's text if no --preset is given, else the preset's",
                         type=run_name)
    log_dir: str = flag("log", "folder of all runs")
    init_from: str = flag("", "initial weights: gpt2 ... gpt2-xl, a checkpoint file, a run folder"
                          " or a Hugging Face folder (default random)")
    init: str = flag("openai", "random initial weights: openai, with std 0.01 for positions;"
                     " lecture, with 0.02, and bitwise build-nanogpt's from the same seed",
                     choices=("openai", "lecture"))
    # the model
    n_layer: int = flag(12, "number of blocks", low=1, high=1000)
    n_head: int = flag(12, "attention heads per block", low=1, high=100_000)
    n_embd: int = flag(768, "channels of the residual stream", low=1, high=100_000)
    block_size: int = flag(1024, "T, the context length and the length of the training sequences,"
                           " tokens", low=1, high=1_000_000)
    vocab_size: int = flag(50304, "GPT-2's 50257 padded to a multiple of 128, for faster matmuls",
                           low=1, high=1_000_000)
    dropout: float = flag(0.0, "dropout probability", high=1)
    bias: bool = True  # no flag: GPT-2 has biases, weights of nanoGPT may not
    # the data
    batch_size: int = flag(0, "micro-batch size B, sequences, lowered to a divisor of a rank's;"
                           " default the largest that fits")
    total_batch_size: int = flag(524288, "tokens per optimizer step, over all ranks and"
                                 " micro-steps; 2**19 is about 0.5M", low=1, high=10**9)
    epochs: float = flag(1.0, "passes over the training data; a preset's max_steps is then ignored",
                         above=0, high=1e6)
    max_steps: int = flag(0, "optimizer steps; default as many as the epochs have")
    shuffle: str = flag("on", "order of the windows: on, a seeded permutation per epoch; off, the"
                        " order in the files", choices=("on", "off"))
    # the optimizer; defaults from the GPT-3 paper, appendix B
    optimizer: str = flag("adamw", "muon: Muon for the matrices in the blocks, AdamW for the rest",
                          choices=("adamw", "muon"))
    lr: float = flag(6e-4, "peak learning rate", above=0, high=1e30)
    min_lr_ratio: float = flag(0.1, "final learning rate, as a fraction of the peak", high=1)
    embd_lr_ratio: float = flag(1.0, "factor on the learning rate of the embeddings")
    schedule: str = flag("cosine", "after the warmup: cosine decay, or wsd: constant, then linear"
                         " decay", choices=("cosine", "wsd"))
    wsd_decay: float = flag(0.2, "schedule wsd: fraction of the steps that the decay takes",
                            above=0, high=1)
    warmup_steps: int = flag(715, "steps of linear warmup; 375M tokens at 0.5M tokens per step")
    weight_decay: float = flag(0.1, "of matrices and embeddings")
    beta1: float = flag(0.9, "AdamW's beta1", high=0.99999)
    beta2: float = flag(0.95, "AdamW's beta2", high=0.99999)
    grad_clip: float = flag(1.0, "maximum norm of the gradient; 0 turns clipping off")
    seed: int = flag(1337, "of the initial weights, the order of the data, and dropout")
    # the machine
    device: str = flag("auto", "cuda, xpu (Intel), mps (Apple) or cpu")
    dtype: str = flag("auto", "autocast dtype", choices=("auto", "float32", "bfloat16", "float16"))
    compile: str = flag("auto", "torch.compile the training step; auto: if the run has 100 steps or"
                        " more and a compiler works; max: also time Triton's matmuls and all"
                        " tilings, which takes minutes, for 1 to 3%%",
                        choices=("auto", "on", "max", "off"))
    loss_chunks: int = 0  # no flag: the plan computes the loss in this many parts; 0: not planned
    parallel: str = flag("ddp", "sharding mode under torchrun; ddp: nothing is sharded; fsdp:"
                         " weights, gradients and the optimizer's state", choices=("ddp", "fsdp"))
    activation_checkpointing: bool = flag(False, "store only the blocks' inputs and recompute"
                                          " activations in the backward")
    # intervals; each is also due after the last step; 0: never, but the last step is always saved
    val_every: int = flag(250, "steps between validations")
    val_tokens: int = flag(10485760, "tokens per validation, from the start of the val split")
    hella_every: int = flag(250, "steps between HellaSwag evaluations")
    hellaswag: str = flag("auto", "HellaSwag's validation .jsonl; auto: if it was downloaded; off")
    sample_every: int = flag(250, "steps between samples")
    prompt: str = flag("Hello, I'm a language model,", "prompt of the samples", type=str)
    save_every: int = flag(250, "steps between checkpoints; the last step is always saved")
    keep_last: int = flag(3, "checkpoints to keep; older ones are removed", low=1)
    keep_best: bool = flag(False, "keep the checkpoint with the lowest validation loss too")
    tracker: str = flag("none", "also send the values of log.txt to TensorBoard or Weights &"
                        " Biases", choices=TRACKERS)
    # starting and resuming
    resume: str = flag("auto", "auto: resume the run if it has checkpoints; never: raise if it has"
                       " any; or a run folder to resume")
    force: bool = flag(False, "resume even if the data, their order, the total batch size, seed,"
                       " dropout or dtype have changed; start even if the run needs more memory"
                       " than is available")
    timeout: float = flag(10.0, "minutes that a rank waits for the others", low=0.01, high=1e6)
    deterministic: bool = flag(False, "bitwise identical runs on a GPU and when compiled, at some"
                               " cost in speed")
    dry_run: bool = flag(False, "print the plan of the run and exit")
    eval_only: bool = flag(False, "print the validation loss and HellaSwag score of the run's"
                           " checkpoint, or of --init-from, and exit; nothing is written")

    def __post_init__(self):
        self.exp_name = self.exp_name or self.preset
        model = self.gpt_config()  # checks the model's fields
        T = self.block_size
        if self.total_batch_size % T != 0:
            raise ValueError(f"--total-batch-size {self.total_batch_size} is not a multiple of"
                             f" --block-size {T}")
        if self.val_tokens < T:
            raise ValueError(f"--val-tokens {self.val_tokens} is less than one sequence of {T}")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise ValueError("--parallel fsdp cannot shard muon, which needs unsharded matrices;"
                             " use --optimizer adamw or --parallel ddp")
        if model.vocab_size < type(model).vocab_size and (self.sample_every or self.hella_every):
            raise ValueError(f"samples and HellaSwag need GPT-2's {type(model).vocab_size} tokens,"
                             f" the vocabulary has {self.vocab_size}: use --vocab-size"
                             f" {TrainConfig.vocab_size}, or --sample-every 0 --hella-every 0")

    @property
    def run_dir(self):
        """The run's folder."""
        return os.path.join(self.log_dir, self.exp_name)

    def gpt_config(self):
        """The GPTConfig of the model to train."""
        from model import GPTConfig
        return GPTConfig(**{f.name: getattr(self, f.name) for f in fields(GPTConfig)})


# What a preset changes in TrainConfig; size is a key of model.SIZES, the shape of the network.
# Learning rates and the XL's 1M tokens per step: GPT-3 paper, table 2.1.
PRESETS = {
    "gpt2-124M": dict(size="gpt2", lr=6e-4),
    # The lecture's run, build-nanogpt's train_gpt2.py: the same initial weights, schedule and
    # validation tokens (20 batches of 64 x 1024 on 8 GPUs), and on shards of 100M tokens the same
    # batch in each of the first 190 steps (189 with B=64 on 8 GPUs). Its loader then skips the
    # rest of the shard, at most 2 B T W tokens, while ours reads on: the batches of later steps
    # are shifted. 19,073 steps are more than an epoch; both start over with the first shard.
    "gpt2-124M-lecture": dict(size="gpt2", lr=6e-4, init="lecture", shuffle="off",
                              max_steps=19073),
    # Learning rate, warmup and number of steps of anw-g01/gpt2_124m, a rewrite of the lecture on
    # the same data, which reports a final loss 0.035 below the lecture's and HellaSwag .3128
    # (lecture: .3022). The next best, ashegde/build-nanoGPT, changed only the learning rate, to
    # 1.2e-3, and ended 0.026 below. Decay to 10% and the rest as in gpt2-124M.
    "gpt2-124M-tuned": dict(size="gpt2", lr=2e-3, warmup_steps=750, max_steps=18850),
    "gpt2-350M": dict(size="gpt2-medium", lr=3e-4),
    "gpt2-774M": dict(size="gpt2-large", lr=2.5e-4),
    "gpt2-1558M": dict(size="gpt2-xl", lr=2e-4, total_batch_size=2**20, warmup_steps=358),
    "gpt3-125M": dict(size="gpt3-small", lr=6e-4),
    "gpt3-350M": dict(size="gpt3-medium", lr=3e-4),
    "gpt3-760M": dict(size="gpt3-large", lr=2.5e-4),
    "gpt3-1.3B": dict(size="gpt3-xl", lr=2e-4, total_batch_size=2**20, warmup_steps=358),
    # minutes on a laptop's CPU; tuned by us on input.txt, which more steps only overfit (README)
    "shakespeare": dict(n_layer=2, n_head=4, n_embd=192, block_size=128, total_batch_size=1024,
                        max_steps=600, batch_size=8, optimizer="muon", lr=0.012, weight_decay=0.3,
                        embd_lr_ratio=2.0, min_lr_ratio=0.0, warmup_steps=20, val_every=100,
                        sample_every=200, save_every=100, keep_last=2, keep_best=True,
                        hella_every=0, prompt="ROMEO:"),
    # other weights, on little text; the learning rate is that of nanoGPT's
    # config/finetune_shakespeare.py
    "finetune": dict(total_batch_size=8192, max_steps=100, lr=3e-5, warmup_steps=10, val_every=25,
                     sample_every=50, save_every=25, keep_last=2, keep_best=True, hella_every=0),
}


def preset_settings(preset):
    """What a preset changes in TrainConfig, {field: value}, with the model's shape."""
    from model import SIZES
    changes = dict(PRESETS[preset])
    size = changes.pop("size", None)
    if size is not None:
        changes |= zip(("n_layer", "n_head", "n_embd", "block_size"), SIZES[size])
    return changes


# -----------------------------------------------------------------------------
# the flags

# titles of --help's groups, by the first flag in each
GROUPS = {"preset": "the run", "n_layer": "the model", "batch_size": "the data",
          "optimizer": "the optimizer", "device": "the machine",
          "val_every": "every so many steps, and after the last one (0: never)",
          "resume": "resuming"}
EXAMPLES = """examples:
  python train_gpt2.py                    # on edu_fineweb10B/ if it exists, else on Shakespeare
  python train_gpt2.py --data my_book.txt # the same command again resumes the run log/my_book
  torchrun --standalone --nproc_per_node=8 train_gpt2.py --preset gpt2-350M --exp-name medium
"""


PRESET_NOTES = """
  gpt2-124M-lecture is the lecture's run: the same initial weights and, for 189 steps, the same
  batches. Learning rate, warmup and steps of gpt2-124M-tuned were published by others, not run by
  us. finetune is for the weights of --init-from; the model's shape is theirs.
"""


def presets_table():
    """What each preset changes, for --help."""
    lines = ["presets, and the settings that they change:"]
    for preset, changes in PRESETS.items():
        values = ", ".join(f"{name} {value}" for name, value in changes.items())
        lines += textwrap.wrap(f"  {preset:19}{values}", width=98, subsequent_indent=" " * 21)
    return "\n".join(lines) + "\n" + PRESET_NOTES


def parse_args(argv=None):
    """The flags that were given, a dict; they are made from TrainConfig's fields."""
    parser = ArgumentParser(description="Train a GPT-2.", usage="train_gpt2.py [flags]",
                            epilog=f"{presets_table()}\n{EXAMPLES}")
    changed_by_presets = {"n_head"}.union(*PRESETS.values())  # the others come with size
    for f in fields(TrainConfig):
        if "help" not in f.metadata:
            continue
        if f.name in GROUPS:
            group = parser.add_argument_group(GROUPS[f.name])
        kwargs = dict(f.metadata)
        if f.type is bool:
            kwargs["action"] = "store_true"
        elif f.name == "preset":
            kwargs["choices"] = list(PRESETS)
        elif "choices" not in kwargs:
            kwargs.setdefault("type", nonempty)
            kwargs["metavar"] = f.type.__name__.upper()
        # some help texts say what the default is
        if f.type is not bool and "default" not in kwargs["help"]:
            note = "; depends on the preset" if f.name in changed_by_presets else ""
            kwargs["help"] += f" (default {f.default}{note})"
        group.add_argument("--" + f.name.replace("_", "-"), default=SUPPRESS, **kwargs)
    return vars(parser.parse_args(argv))
