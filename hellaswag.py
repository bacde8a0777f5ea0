"""
HellaSwag, the lecture's evaluation: a context and four candidate endings, one of which is correct. The model predicts the
ending to which it gives the highest probability; chance is 0.25.
Paper: Zellers et al. 2019, https://arxiv.org/abs/1905.07830. Data: https://github.com/rowanz/hellaswag.

    python hellaswag.py                           # downloads the 10,042 validation examples (12 MB) and stops
    python hellaswag.py gpt2                      # scores OpenAI's weights
    python hellaswag.py log/gpt2-124M             # a run's newest checkpoint, a model_*.pt, a Hugging Face folder
    torchrun --nproc_per_node=8 hellaswag.py gpt2-xl

Prints one line with the accuracies, their standard errors and the number of examples; --json prints the same as JSON, --out
writes the log-probabilities of every example. Two styles of scoring are in use; their numbers are not comparable:

    completion   the lecture's. Text: ctx + " " + ending. acc: the largest sum of an ending's log-probabilities;
                 acc_norm: the largest mean per token
    lm-eval      EleutherAI's lm-evaluation-harness, task hellaswag, 0-shot. Text: "activity_label: ctx_a Ctx_b" + ending,
                 without WikiHow's [markup]. acc: the largest sum; acc_norm: the largest sum per character of the ending

Ties go to the first ending, as in the harness. An example is one line of the .jsonl file:

    {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.", "ctx_b": "he",
     "ctx": "A man is sitting on a roof. he", "label": 3, "endings": ["is using wrap to wrap a pair of skis.",
     "is ripping level tiles off.", "is holding a rubik's cube.", "starts pulling up roofing on a roof."], ...}

    ind              number of the example in the dataset
    activity_label   category of the ActivityNet video or WikiHow article that the text describes
    ctx_a, ctx_b     the context's complete sentences, and the beginning of the next one; empty for WikiHow
    ctx              the whole context
    label            index of the correct ending
    endings          the four candidates
    ...              split, split_type, source_id: not used here

Reference, acc / acc_norm of OpenAI's weights on the 10,042 examples (build-nanogpt's hellaswag.py):

                  completion        lm-eval
    GPT-2 124M    .2859 / .2955     .2892 / .3114
    GPT-2 1558M   .3842 / .4893     .4004 / .5089
"""
import contextlib
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import sys
import time
import zlib
from dataclasses import dataclass

from run.cli import ArgumentParser, is_rank0, number, print0, printable, report_progress, run_main, start
from run.files import atomic_write, check_output, check_regular


PATH = os.path.join("hellaswag", "hellaswag_val.jsonl")  # of the examples; train and test have no published scores


def parse_args():
    """The flags; ValueError for an invalid one."""
    parser = ArgumentParser(description="HellaSwag score of a GPT-2.")
    parser.add_argument("source", nargs="?", help="run folder, checkpoint file, Hugging Face folder, or gpt2 ... gpt2-xl;"
                        " if omitted, the examples are downloaded and nothing is scored")
    parser.add_argument("--data", metavar="FILE", help=f"examples, .jsonl or .jsonl.gz (default {PATH}, downloaded)")
    parser.add_argument("--limit", type=number(int, 1), metavar="N", help="score only the first N examples")
    parser.add_argument("--batch-tokens", type=number(int, 1), metavar="N", help="tokens per batch, padding included"
                        " (default 4096 on the CPU, 32768 on a GPU)")
    parser.add_argument("--device", default="auto", help="cuda, mps or cpu (default: the first that is available)")
    parser.add_argument("--dtype", default="auto", help="autocast dtype: auto, float32, bfloat16 or float16")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network; pays off on the full set")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")
    parser.add_argument("--out", metavar="FILE", help="write log-probabilities and predictions to this .jsonl file")
    parser.add_argument("--show", type=number(int, 0), default=0, metavar="K",
                        help="print the first K examples with their losses")
    args = parser.parse_args()
    if args.source is None and (args.data is not None or args.out is not None or args.json or args.show):
        raise ValueError("name a model to score: python hellaswag.py MODEL --data FILE")
    if args.out is not None and is_rank0():  # the rank that writes
        check_output(args.out)
        for read in filter(os.path.exists, (args.source, args.data or PATH)):
            if os.path.exists(args.out) and os.path.samefile(args.out, read):
                raise ValueError(f"--out {args.out} would replace a file that is read; choose another name")
    return args


if __name__ == "__main__":
    start(parse_args)

import numpy as np
import torch
from torch.nn import functional as F

from data import EOT, NUM_TOKENS, encode
from run.parallel import all_gather, all_reduce_sum, rank0_first, setup, stop_requested, teardown
from run.reference import HELLASWAG_EXAMPLES
from run.runtime import autocast, choose_dtype, free_memory, full_float32, keep_freed_memory, without_cudnn_attention
from run.weights import load_model

STYLES = ("completion", "lm-eval")

# -----------------------------------------------------------------------------
# the dataset

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/"
MAX_LINE = 2**18     # bytes; the longest line of the dataset has a few thousand
VAL_BYTES, VAL_SHA256 = 12246618, "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


def download():
    """PATH, the official examples of val; downloads them unless the file exists.

    Checks the HTTP status, the size and the sha256. Raises OSError naming the URL, and leaves no partial file and
    no new folder.
    """
    import requests
    from tqdm import tqdm
    if os.path.exists(PATH):
        return PATH
    folder, name = os.path.split(PATH)
    url, sha256 = URL + name, hashlib.sha256()
    is_new = not os.path.exists(folder)
    every = 0.1 if sys.stderr.isatty() else 10  # seconds between two updates of the progress bar
    try:
        # identity: Content-Length is the size of the file, not of a compressed body
        with requests.get(url, headers={"Accept-Encoding": "identity"}, stream=True, timeout=30) as response:
            response.raise_for_status()
            total = int(response.headers.get("Content-Length", 0)) or None
            os.makedirs(folder, exist_ok=True)
            with atomic_write(PATH) as f, tqdm(total=total, unit="B", unit_scale=True, desc=name,
                                               mininterval=every) as bar:
                for chunk in response.iter_content(2**16):  # raises if fewer than Content-Length bytes arrive
                    f.write(chunk)
                    sha256.update(chunk)
                    bar.update(len(chunk))
                if (f.tell(), sha256.hexdigest()) != (VAL_BYTES, VAL_SHA256):
                    raise OSError(f"{f.tell():,} bytes with sha256 {sha256.hexdigest()[:8]}... are not the official file")
    except OSError as e:  # requests' exceptions are OSErrors, too
        cause = e
        while cause.__context__:  # requests wraps urllib3's exceptions, and urllib3 those of the system
            cause = cause.__context__
        raise OSError(f"cannot download {url}: {cause}. Try again, or give a local copy with --data FILE") from e
    finally:
        if is_new and not os.path.exists(PATH):
            with contextlib.suppress(OSError):  # rmdir refuses a folder that holds anything
                os.rmdir(folder)
    return PATH


def check_example(example):
    """The example with its label as an int; ValueError if it is invalid."""
    if not isinstance(example, dict):
        raise ValueError("it must be a JSON object")
    if missing := {"ctx", "activity_label", "endings", "label"} - example.keys():
        raise ValueError(f"it lacks {', '.join(sorted(missing))}")
    texts = {name: example[name] for name in ("ctx", "activity_label", "ctx_a", "ctx_b") if name in example}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise ValueError(f"{name} is {text!r:.40}, it must be a string")
    endings, label = example["endings"], example["label"]
    if (not isinstance(endings, list) or len(endings) != 4
            or not all(isinstance(ending, str) and ending.strip() for ending in endings)):
        raise ValueError(f"endings is {endings!r:.40}, it must be four non-empty strings in a list")
    if ("ctx_a" in example) != ("ctx_b" in example):
        raise ValueError("it must have both ctx_a and ctx_b, or neither")
    if label == "":
        raise ValueError("it has no label, as in the test split, whose labels are not public; use the split val")
    if str(label) not in ("0", "1", "2", "3"):  # a string in the Hub's files; str(2.0) and str(True) are refused
        raise ValueError(f"label is {label!r:.40}, it must be 0, 1, 2 or 3")
    "".join([*texts.values(), *endings]).encode()  # "\ud800" is valid JSON, but not text
    return {**example, "label": int(label)}


def iterate_examples(path):
    """Yields the examples of a .jsonl file, compressed with gzip or not; ValueError names the first invalid line and why."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no HellaSwag examples at {path}; python hellaswag.py downloads them to {PATH}")
    check_regular(path)
    with open(path, "rb") as f:
        is_gzip = f.read(2) == b"\x1f\x8b"  # whatever its name is
    number = 0
    with (gzip.open if is_gzip else open)(path, "rb") as f:
        try:
            while line := f.readline(MAX_LINE + 1):
                number += 1
                if len(line) > MAX_LINE:
                    raise ValueError(f"it is longer than {MAX_LINE:,} bytes")
                if line := line.decode("utf-8-sig" if number == 1 else "utf-8").strip():  # some editors write a byte order mark
                    yield check_example(json.loads(line))
        except (EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f"{path} is damaged after line {number}: {e}") from e
        except (ValueError, RecursionError) as e:  # RecursionError: thousands of nested brackets
            raise ValueError(f"{path}, line {number} is not a HellaSwag example: {e}") from e


# -----------------------------------------------------------------------------
# from examples to tokens

def remove_markup(text):
    """WikiHow's text as the harness preprocesses it: "Pull. [step] Wait [title] Go" -> "Pull. Wait. Go"."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def split_context(ctx):
    """(ctx_a, ctx_b) of a ctx; ctx_b is the last sentence if it is incomplete: "On a roof. he" -> ("On a roof.", "he")."""
    head, stop, tail = ctx.rpartition(". ")
    return (head + ".", tail) if stop and tail.strip() and tail.strip()[-1] not in ".!?" else (ctx, "")


def context_and_endings(example, style):
    """(context, [4 endings]), strings: what a style scores is context + ending."""
    if style == "completion":
        return example["ctx"], [" " + ending for ending in example["endings"]]  # GPT-2's words begin with a space
    ctx_a, ctx_b = (example["ctx_a"], example["ctx_b"]) if "ctx_a" in example else split_context(example["ctx"])
    # str.capitalize also lowercases all other letters, as in the harness
    query = remove_markup(f"{example['activity_label']}: {ctx_a} {ctx_b.capitalize()}")
    context = query.rstrip()  # trailing spaces move to the ending, since GPT-2's words begin with one
    return context, [query[len(context):] + " " + remove_markup(ending) for ending in example["endings"]]


def tokenize(examples, style):
    """[(context, [4 endings]), ...]: the strings of context_and_endings as 1-D uint16 arrays.

    An empty context becomes <|endoftext|>: the first token of an ending is predicted from the token before it.
    """
    encoded = []
    for example in examples:
        context, endings = context_and_endings(example, style)
        context, *endings = [encode(text) for text in (context, *endings)]
        encoded.append((context if len(context) else np.array([EOT], dtype=np.uint16), endings))
    return encoded


# -----------------------------------------------------------------------------
# one example, as in the lecture; score computes the same losses faster

def render_example(example, style="completion"):
    """(tokens, mask, label): tokens and mask are (4, N) int64, a row per ending, padded with zeros to the longest row.

    A row is the context followed by one ending; mask is 1 on the tokens of the ending, where the loss counts.
    """
    (context, endings), = tokenize([example], style)
    N = len(context) + max(len(ending) for ending in endings)
    tokens, mask = torch.zeros((4, N), dtype=torch.long), torch.zeros((4, N), dtype=torch.long)
    for i, ending in enumerate(endings):
        row = np.concatenate([context, ending]).astype(np.int64)
        tokens[i, :len(row)] = torch.from_numpy(row)
        mask[i, len(context):len(row)] = 1
    return tokens, mask, example["label"]


def ending_losses(tokens, mask, logits):
    """Summed cross entropy of each ending, (4) float32; logits (4, N, V), any dtype. score returns its negative."""
    # the logits at a position predict the next token; ids past GPT-2's vocabulary are padding
    logits = logits[:, :-1, :NUM_TOKENS].float()                                        # (4, N-1, V)
    losses = F.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")   # (4, N-1)
    return (losses * mask[:, 1:]).sum(dim=1)


def get_most_likely_row(tokens, mask, logits):
    """Index of the ending with the lowest mean loss per token: the prediction of the completion style's acc_norm."""
    return (ending_losses(tokens, mask, logits) / mask[:, 1:].sum(dim=1)).argmin().item()


# -----------------------------------------------------------------------------
# log-probabilities of candidate endings of a shared context
#
# The lecture scores an example as four rows, each with a copy of the context, and computes logits at every position. Here an
# example is one row, with one copy of the context:
#
#     tokens         context               ending 1         ending 2         ending 3         ending 4
#     positions      0, 1, ..., c-1        c, c+1, ...      c, c+1, ...      c, c+1, ...      c, c+1, ...
#     attention to   earlier tokens        the context, and earlier tokens of the same ending
#
# So every token has the same position, context and log-probability as in the lecture's row. Logits are computed only where
# a token of an ending is predicted, in float32, over GPT-2's 50257 ids.

BATCH_TOKENS = {"cpu": 4096, "cuda": 32768, "mps": 32768}  # positions per batch, padding included


def pack(encoded, block_size):
    """([(context, [(ending_id, ending), ...]), ...], num_truncated): the rows of the batches, usually one per example.

    The endings of example i have the ids 4i to 4i+3. Where one exceeds block_size + 1 tokens with its context, the context
    loses its first tokens, as in lm-evaluation-harness. How many depends on the ending, so each ending gets a row.
    Raises ValueError for an ending longer than block_size.
    """
    rows, num_truncated = [], 0
    for i, (context, endings) in enumerate(encoded):
        longest = max(len(ending) for ending in endings)
        if longest > block_size:
            raise ValueError(f"example {i} has an ending of {longest} tokens; this model's block_size is only {block_size}")
        endings = list(enumerate(endings, start=4 * i))
        if len(context) + longest <= block_size + 1:
            rows.append((context, endings))
        else:
            num_truncated += 1
            rows += [(context[max(0, len(context) + len(ending) - block_size - 1):], [(ending_id, ending)])
                     for ending_id, ending in endings]
    return rows, num_truncated


def row_length(row):
    """Number of input tokens of a row; the last token of an ending predicts nothing, so it is not an input."""
    context, endings = row
    return len(context) + sum(len(ending) - 1 for _, ending in endings)


def make_batches(rows, batch_tokens):
    """[(rows, T), ...], long rows first: T is the padded length; B * T is at most batch_tokens, unless B is 1."""
    batches, batch, T = [], [], 0
    for row in sorted(rows, key=row_length, reverse=True):
        if not batch or (len(batch) + 1) * T > batch_tokens:
            batch, T = [], -(-row_length(row) // 16) * 16  # a multiple of 16: fewer shapes, aligned for tensor cores
            batches.append((batch, T))
        batch.append(row)
    return batches


def memory_of(batches, n_embd):
    """Bytes that the largest of the batches needs, about (measured on a CPU)."""
    # hidden states and mask of each token; two slices of logits wherever a token of an ending is predicted
    return max(len(batch) * T * (32 * n_embd + 4 * T) + sum(row_length(row) - len(row[0]) + 1 for row in batch) * 80_000
               for batch, T in batches)


def choose_batch_tokens(rows, batch_tokens, n_embd, ranks):
    """batch_tokens, or by default the device's in BATCH_TOKENS, halved until a batch fits into memory; alike on every rank.

    Raises ValueError, naming a number that fits, if batches of a given batch_tokens need more memory than there is.
    """
    free = min(all_gather(free_memory(ranks.device) or math.inf, ranks))
    fits = batch_tokens or BATCH_TOKENS[ranks.device_type]
    while fits > 1 and memory_of(make_batches(rows, fits), n_embd) > free:
        fits //= 2
    if batch_tokens and fits < batch_tokens:
        needed = memory_of(make_batches(rows, batch_tokens), n_embd)
        raise ValueError(f"--batch-tokens {batch_tokens:,} needs about {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB"
                         f" are available: use {fits:,} or fewer")
    return fits


def collate(rows, T):
    """(idx, pos, segment, predicting, source, target, ending_ids): a batch as int64 arrays.

        idx          (B, T)  input tokens: context, ending 1 without its last token, ending 2 ..., padding
        pos          (B, T)  their positions
        segment      (B, T)  0 in the context, 1, 2, ... in the endings, -1 in the padding
        predicting   (M)     where logits are needed, as indices into B * T: the context's last token and the endings
        source       (N)     for each token of each ending: which of the M predicts it
        target       (N)     its id
        ending_ids   (N)     the ending it belongs to
    """
    idx, pos, segment = (np.full((len(rows), T), fill, dtype=np.int64) for fill in (0, 0, -1))
    predictors, target, ending_ids = [], [], []
    for b, (context, endings) in enumerate(rows):
        c = t = len(context)
        idx[b, :c], pos[b, :c], segment[b, :c] = context, np.arange(c), 0
        for k, (ending_id, ending) in enumerate(endings, start=1):
            n = len(ending) - 1
            idx[b, t:t + n], pos[b, t:t + n], segment[b, t:t + n] = ending[:-1], np.arange(c, c + n), k
            # the context's last token predicts the first token of the ending, which predicts the second, and so on
            predictors.append(b * T + np.concatenate([[c - 1], np.arange(t, t + n)]))
            target.append(ending.astype(np.int64))
            ending_ids.append(np.full(n + 1, ending_id))
            t += n
    predicting, source = np.unique(np.concatenate(predictors), return_inverse=True)
    return idx, pos, segment, predicting, source, np.concatenate(target), np.concatenate(ending_ids)


def token_logprobs(x, weight, source, target, slice_size=8192):
    """log p(target[n]) at x[source[n]], (N) float32. x: hidden states (M, C) float32; weight: of the lm_head, (V, C).

    The vocabulary is processed in slices: logits of all M positions at once, (M, V), would take gigabytes.
    """
    logsumexps, picked = [], torch.zeros(target.shape, device=x.device)
    for first, w in zip(range(0, NUM_TOKENS, slice_size), weight[:NUM_TOKENS].split(slice_size)):
        logits = F.linear(x, w)                                                                         # (M, slice)
        logsumexps.append(logits.logsumexp(dim=-1))                                                     # (M)
        inside = (target >= first) & (target < first + w.size(0))
        picked = torch.where(inside, logits[source, (target - first).clamp(0, w.size(0) - 1)], picked)  # (N)
    return picked - torch.stack(logsumexps).logsumexp(dim=0)[source]


class SharedContext:
    """The mask of a batch of rows, in place of a KV cache: a token attends to its context and its own ending."""

    def __init__(self, segment):
        T = segment.size(1)
        causal = torch.ones((T, T), dtype=torch.bool, device=segment.device).tril()
        same_text = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
        self.attn_mask = (causal & same_text).unsqueeze(1)                                              # (B, 1, T, T)

    def update(self, k, v):
        """Keys, values and mask of a block; see GPT.hidden."""
        return k, v, self.attn_mask


def score_batch(model, hidden, rows, T):
    """(ending ids int64, log-probabilities float64), (N) NumPy arrays: one entry per token of an ending."""
    device = model.lm_head.weight.device
    *arrays, ending_ids = collate(rows, T)
    idx, pos, segment, predicting, source, target = (torch.from_numpy(a).to(device) for a in arrays)
    x = hidden(idx, pos, [SharedContext(segment)] * model.config.n_layer)                               # (B, T, C)
    with torch.autocast(device.type, enabled=False):  # hidden runs in the autocast dtype, the logits in float32
        x = x.flatten(0, 1)[predicting].float()                                                         # (M, C)
        logprobs = token_logprobs(x, model.lm_head.weight.float(), source, target)
    return ending_ids, logprobs.cpu().double().numpy()


@torch.no_grad()
def score(model, encoded, dtype, ranks, batch_tokens=None, hidden=None, progress=None):
    """(sums, num_truncated): log-probability of each ending in nats, (n, 4) float64, the same on every rank.

    encoded: [(context, [4 endings]), ...] from hellaswag.tokenize; its batches are split over the ranks. hidden: a compiled
    model.hidden. progress(sums of this rank so far, fraction done) is called before the first and after each batch. If a stop
    is requested, scoring ends before the next batch and returns None. Raises ValueError for a vocabulary smaller than GPT-2's
    and for batches of batch_tokens that do not fit into memory.
    """
    if model.config.vocab_size < NUM_TOKENS:
        raise ValueError(f"this model's vocabulary has {model.config.vocab_size} tokens; HellaSwag needs GPT-2's {NUM_TOKENS}")
    rows, num_truncated = pack(encoded, model.config.block_size)
    batches = make_batches(rows, choose_batch_tokens(rows, batch_tokens, model.config.n_embd, ranks))
    sums = np.zeros(4 * len(encoded))
    if progress:
        progress(sums.reshape(-1, 4), 0.0)
    was_training = model.training
    model.eval()
    try:
        # one autocast region for all batches: it caches the cast weights
        with autocast(ranks.device, dtype), full_float32(), without_cudnn_attention():
            for i in range(ranks.rank, ranks.rank + len(batches), ranks.world_size):  # the same number on each rank
                if stop_requested(ranks):
                    return None
                if i < len(batches):
                    ending_ids, logprobs = score_batch(model, hidden or model.hidden, *batches[i])
                    np.add.at(sums, ending_ids, logprobs)
                if progress:
                    progress(sums.reshape(-1, 4), min(i + ranks.world_size, len(batches)) / len(batches))
    finally:
        model.train(was_training)
    # each ending is scored on one rank and is 0 on the others, so the sum is exact; mps has no float64
    total = torch.from_numpy(sums).to(ranks.device, torch.float32 if ranks.device == "mps" else torch.float64)
    return all_reduce_sum(total, ranks).cpu().double().numpy().reshape(-1, 4), num_truncated


# -----------------------------------------------------------------------------
# all examples

@dataclass
class HellaSwag:
    """Tokenized examples, kept in memory because training scores them many times."""
    examples: list      # dicts, as in the file
    labels: np.ndarray  # (n) int64
    encoded: dict       # style -> what tokenize returns
    lengths: dict       # style -> (n, 4) float64, what acc_norm divides by: tokens (completion) or characters (lm-eval)


def prepare(path, limit=None):
    """The HellaSwag of a .jsonl(.gz) file, or of its first limit examples."""
    examples = list(itertools.islice(iterate_examples(path), limit))
    if not examples:
        raise ValueError(f"{path} has no examples")
    encoded = {style: tokenize(examples, style) for style in STYLES}
    lengths = {"completion": np.array([[len(ending) for ending in endings] for _, endings in encoded["completion"]], float),
               "lm-eval": np.array([[len(remove_markup(e)) for e in example["endings"]] for example in examples], float)}
    return HellaSwag(examples, np.array([example["label"] for example in examples]), encoded, lengths)


def predictions(sums, lengths):
    """(by sum, by norm): the most likely ending of each example, (n) int64 each; ties go to the first."""
    with np.errstate(divide="ignore"):  # in lm-eval style an ending that is only markup has length 0: its norm is -inf
        return sums.argmax(axis=1), (sums / lengths).argmax(axis=1)


def metrics(sums, lengths, labels):
    """{"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} of (n, 4) log-probabilities; standard errors as in the harness.

    They are NaN if a log-probability is NaN or infinite.
    """
    result = {}
    for name, predicted in zip(("acc", "acc_norm"), predictions(sums, lengths)):
        p = float((predicted == labels).mean()) if np.isfinite(sums).all() else math.nan
        result[name], result[f"{name}_stderr"] = p, math.sqrt(p * (1 - p) / max(1, len(labels) - 1))
    return result


def evaluate(model, dataset, dtype, ranks, batch_tokens=None, hidden=None, show_progress=False):
    """({style: metrics}, {style: sums (n, 4)}, {style: number of truncated examples}), the same on every rank.

    dataset is a HellaSwag; the other arguments are those of score. Returns None if a stop is requested.
    """
    results, sums, num_truncated = {}, {}, {}
    for style in STYLES:
        with progress_bar(dataset, style) if show_progress else progress_lines(style) as progress:
            scored = score(model, dataset.encoded[style], dtype, ranks, batch_tokens, hidden, progress)
        if scored is None:
            return None
        sums[style], num_truncated[style] = scored
        results[style] = metrics(sums[style], dataset.lengths[style], dataset.labels)
    return results, sums, num_truncated


def progress_lines(style):
    """A line now and then, as score's progress argument."""
    report = report_progress(f"HellaSwag, {style} style")
    return contextlib.nullcontext(lambda sums, fraction: report(fraction))


@contextlib.contextmanager
def progress_bar(dataset, style):
    """A progress bar with the running acc_norm of this rank's examples, as score's progress argument."""
    from tqdm import tqdm
    bar = None

    def progress(sums, fraction):
        nonlocal bar
        bar = bar or tqdm(total=100, desc=style, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
        done = (sums < 0).all(axis=1)
        if done.any():
            acc_norm = metrics(sums[done], dataset.lengths[style][done], dataset.labels[done])["acc_norm"]
            bar.set_postfix_str(f"acc_norm {acc_norm:.4f}", refresh=False)
        bar.update(100 * fraction - bar.n)
    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def for_training(source, ranks):
    """The HellaSwag to score during training, or None.

    source: a .jsonl(.gz) file, "auto" (the validation set if it was downloaded, otherwise a message is printed) or "off".
    """
    if source == "off":
        return None
    if source == "auto":
        source = PATH
        if not all(all_gather(os.path.exists(source), ranks)):
            print0(f"HellaSwag is off: {source} does not exist. Download it with python hellaswag.py, or give --hellaswag FILE")
            return None
    return prepare(source)


def count_nonfinite(sums):
    """Number of examples with a log-probability that is NaN or infinite in a style; sums as evaluate returns them."""
    return int((~np.isfinite(np.concatenate(list(sums.values()), axis=1))).any(axis=1).sum())


def score_in_training(model, dataset, dtype, ranks):
    """The streams of log.txt, {name: accuracy}; {} if a stop is requested.

    hella and hella_acc are acc_norm and acc in completion style, hella_lm_eval and hella_lm_eval_acc those in lm-eval style.
    NaN and a message if a log-probability is non-finite. The weights are finite, since train_step checks every update: the
    activations have overflowed in 16 bits, and training continues.
    """
    scored = evaluate(model, dataset, dtype, ranks)
    if scored is None:
        return {}
    if count := count_nonfinite(scored[1]):
        print0(f"HellaSwag: the log-probabilities of {count} examples are NaN or infinite: no score (overflow in {dtype}?)")
    return {stream + suffix: scored[0][style][metric]
            for style, stream in (("completion", "hella"), ("lm-eval", "hella_lm_eval"))
            for metric, suffix in (("acc_norm", ""), ("acc", "_acc"))}


# -----------------------------------------------------------------------------
# the command line

def summary(results, n):
    """One line: the metrics and n, with a note if n is not the size of the full validation set."""
    parts = [f"{style}: acc {r['acc']:.4f} acc_norm {r['acc_norm']:.4f} (s.e. {r['acc_norm_stderr']:.4f})"
             for style, r in results.items()]
    note = ("" if n == HELLASWAG_EXAMPLES else
            f" -- NOT COMPARABLE with published scores, which use all {HELLASWAG_EXAMPLES:,} examples")
    return f"HellaSwag | {' | '.join(parts)} | n {n:,}{note}"


def write_examples(path, dataset, sums):
    """Writes --out, a line of JSON per example: {"ind", "label", style: {"logprobs", "lengths", "pred", "pred_norm"}}.

    logprobs: of the four endings, in nats; lengths: what acc_norm divides them by; pred, pred_norm: the predictions.
    """
    predicted = {style: predictions(sums[style], dataset.lengths[style]) for style in STYLES}
    with atomic_write(path, "w") as f:
        for i, example in enumerate(dataset.examples):
            line = {"ind": example.get("ind", i), "label": example["label"]}
            for style in STYLES:
                line[style] = {"logprobs": sums[style][i].tolist(), "lengths": dataset.lengths[style][i].tolist(),
                               "pred": int(predicted[style][0][i]), "pred_norm": int(predicted[style][1][i])}
            f.write(json.dumps(line) + "\n")


def print_example(dataset, sums, i):
    """Prints example i with the mean loss per token of each ending, in completion style."""
    example, losses = dataset.examples[i], -sums["completion"][i] / dataset.lengths["completion"][i]
    print(printable(f"---\nexample {example.get('ind', i)}: {example['ctx']}"))
    for k, ending in enumerate(example["endings"]):
        print(printable(f"{k} (loss: {losses[k]:.4f}) {ending}"))
    print(f"predicted: {losses.argmin()}, actual: {example['label']}")


def score_source(args, path, ranks):
    """Scores args.source on the examples in path; rank 0 prints and writes what the flags ask for."""
    dataset = prepare(path, args.limit)
    model, info = load_model(args.source, ranks.device)
    hidden = torch.compile(model.hidden, dynamic=True) if args.compile else None
    dtype = choose_dtype(args.dtype, ranks.device)
    start = time.perf_counter()
    results, sums, num_truncated = evaluate(model, dataset, dtype, ranks, args.batch_tokens, hidden, ranks.master_process)
    seconds, n = time.perf_counter() - start, len(dataset.examples)
    if count := count_nonfinite(sums):
        raise ValueError(f"the log-probabilities that {args.source} gives to {count} of {n} examples are NaN or infinite: its"
                         f" activations overflow in {dtype}; try --dtype float32")
    if not ranks.master_process:
        return
    for i in range(min(args.show, n)):
        print_example(dataset, sums, i)
    for style, count in num_truncated.items():
        if count:
            print(f"note: {count} examples exceed the block_size; their contexts were truncated ({style})", file=sys.stderr)
    if count := sum("ctx_a" not in example for example in dataset.examples):
        print(f"note: {count} examples have only ctx, which was split into ctx_a and ctx_b (lm-eval)", file=sys.stderr)
    if args.json:
        print(json.dumps({"source": args.source, **info, "data": path, "n": n, "full": n == HELLASWAG_EXAMPLES, "dtype": dtype,
                          "seconds": round(seconds, 3), "truncated": num_truncated, **results}), flush=True)
    else:
        print(f"{summary(results, n)} | {seconds:.1f} s, {dtype}", flush=True)
    if args.out:  # last: whatever happens to the file, the score is printed
        try:
            write_examples(args.out, dataset, sums)
        except BrokenPipeError:
            raise
        except OSError as e:
            raise OSError(f"cannot write {args.out}: {e.strerror}; the score above is complete") from e


def main():
    args = parse_args()
    keep_freed_memory()
    ranks = setup(args.device)
    with rank0_first(ranks):  # rank 0 downloads, then the others find the file
        path = download() if args.data is None else args.data
    if args.source is None:
        print0(f"HellaSwag examples: {path}")
    else:
        score_source(args, path, ranks)
    teardown()  # only after success: destroying a process group waits for ranks that an error may have ended


if __name__ == "__main__":
    run_main(main)
