"""What many tests share: paths, tiny flags, a text, a tiny model, a subprocess of one thread."""
import os
import random
import subprocess
import sys

import torch

from model import GPT, GPTConfig
from run.parallel import Ranks

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # of subprocesses
ONE = Ranks(0, 0, 1, "cpu", False)            # a single process, without torchrun

# flags of train_gpt2.py for a run of seconds
TINY = [
    "--preset", "shakespeare", "--n-layer", "1", "--n-head", "2", "--n-embd", "16",
    "--block-size", "16", "--total-batch-size", "128", "--batch-size", "8",
    "--optimizer", "adamw", "--dtype", "float32", "--compile", "off",
    "--sample-every", "0", "--val-tokens", "1024",
]

WORDS = "the king and his queen will not come to this house tonight for love or war my lord".split()


def text_of_words(lines=400, seed=0):
    """A text of lines of eight common words."""
    rng = random.Random(seed)
    return "\n".join(" ".join(rng.choices(WORDS, k=8)) for _ in range(lines)) + "\n"


def tiny_model(seed=0, std=None, **changes):
    """A GPT of 2 blocks in eval mode; std: of all weights, so that a mistake in any one shows."""
    torch.manual_seed(seed)
    sizes = dict(n_layer=2, n_head=2, n_embd=16, block_size=16, vocab_size=64)
    model = GPT(GPTConfig(**{**sizes, **changes})).eval()
    if std is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.normal_(std=std)
    return model


def launcher(ranks):
    """Python's arguments that start a script on this many ranks."""
    if ranks == 1:
        return []
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]


def python(*arguments, cwd=ROOT, timeout=120, env=None, **kwargs):
    """The CompletedProcess of `python arguments`, its output captured as text."""
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=cwd, timeout=timeout,
                          capture_output=True, text=True, env={**ENV, **(env or {})}, **kwargs)
