"""
HellaSwag, the lecture's evaluation: a context and four candidate endings, one of which is correct.
The model predicts the ending to which it gives the highest probability; chance is 0.25.
Paper: Zellers et al. 2019, https://arxiv.org/abs/1905.07830.
Data: https://github.com/rowanz/hellaswag.

    python hellaswag.py                    # downloads the 10,042 validation examples (12 MB)
    python hellaswag.py gpt2               # scores OpenAI's weights
    python hellaswag.py log/gpt2-124M      # a run, a model_*.pt, or a Hugging Face folder
    torchrun --nproc_per_node=8 hellaswag.py gpt2-xl

Prints the accuracies, their standard errors and the number of examples in one line; --json writes
them to a file, --out the log-probabilities of every example. Two styles of scoring are in use;
their scores are not comparable:

    completion   the lecture's. Text: ctx + " " + ending. acc: the largest sum of an ending's
                 log-probabilities; acc_norm: the largest mean per token
    lm-eval      EleutherAI's lm-evaluation-harness, task hellaswag, 0-shot. Text:
                 "activity_label: ctx_a Ctx_b" + ending, without WikiHow's [markup]. acc: the
                 largest sum; acc_norm: the largest sum per character of the ending

Ties go to the first ending, as in the harness. An example is one line of the .jsonl file:

    {"ind": 24, "activity_label": "Roof shingle removal", "ctx_a": "A man is sitting on a roof.",
     "ctx_b": "he", "ctx": "A man is sitting on a roof. he", "label": 3,
     "endings": ["is using wrap to wrap a pair of skis.", "is ripping level tiles off.",
                 "is holding a rubik's cube.", "starts pulling up roofing on a roof."], ...}

The text is of an ActivityNet video or a WikiHow article; activity_label is its category. ctx_a and
ctx_b, which may be missing, are the complete sentences of ctx and the beginning of the next one;
label is the index of the correct ending.

Reference, acc / acc_norm of OpenAI's weights on the 10,042 examples (build-nanogpt's hellaswag.py):

                  completion        lm-eval
    GPT-2 124M    .2859 / .2955     .2892 / .3114
    GPT-2 1558M   .3842 / .4893     .4004 / .5089
"""
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

from run.cli import ArgumentParser, command, number, print0, run_main, start
from run.files import atomic_write, check_output

# the validation examples; the published scores use these
PATH = os.path.join("hellaswag", "hellaswag_val.jsonl")


def parse_args():
    """The flags; ValueError for an invalid one."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("source", nargs="?",
        help="run folder, checkpoint file, Hugging Face folder, or gpt2 ... gpt2-xl;"
        " without it the examples are downloaded, and nothing is scored")
    add("--data", metavar="FILE", help=f"examples, .jsonl or .jsonl.gz (default: {PATH})")
    add("--limit", type=number(int, 1), metavar="N", help="score only the first N examples")
    add("--batch-tokens", type=number(int, 1), metavar="N",
        help="tokens per batch, padding included (default 4096 on the CPU, 32768 on a GPU)")
    add("--device", default="auto",
        help="cuda, xpu, mps or cpu (default: the first that is available)")
    add("--dtype", default="auto", help="autocast dtype: auto, float32, bfloat16 or float16")
    add("--compile", nargs="?", choices=("on", "off"), const="on", default="off",
        help="torch.compile the network, which takes minutes (default off)")
    add("--json", nargs="?", const="-", metavar="FILE",
        help="write the result to this file, as one JSON object; without FILE, to stdout")
    add("--out", metavar="FILE", help="write log-probabilities and predictions to this .jsonl file")
    args = parser.parse_args()
    if args.source is None and (args.data or args.out or args.json):
        raise ValueError("name a model to score:"
                         f" {command('hellaswag.py', 'MODEL', '--data', 'FILE')}")
    for path in (args.json, args.out):
        if path not in (None, "-"):
            check_output(path)
    return args


if __name__ == "__main__":
    start(parse_args)

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from run.parallel import all_gather, rank0_first, setup, stop_requested, teardown
from run.reference import HELLASWAG_EXAMPLES
from run.runtime import (autocast, choose_dtype, full_float32, keep_freed_memory,
                         without_cudnn_attention)
from run.tokenizer import GPT2, load_tokenizer
from run.weights import load_model

STYLES = ("completion", "lm-eval")

# -----------------------------------------------------------------------------
# the dataset

URL = "https://raw.githubusercontent.com/rowanz/hellaswag/master/data/hellaswag_val.jsonl"
SHA256 = "0aa3b88843990f3f10a97b9575c94d7b71fb2205240ba04ae4884d9e9c992588"


def download():
    """PATH, to which the validation examples are downloaded unless it exists.

    Raises OSError naming the URL if that fails; no partial file is left.
    """
    import requests
    if os.path.exists(PATH):
        return PATH
    try:
        response = requests.get(URL, timeout=30)
        response.raise_for_status()
        sha256 = hashlib.sha256(response.content).hexdigest()
        if sha256 != SHA256:
            raise OSError(f"sha256 {sha256[:8]}... is not that of the official file")
    except OSError as e:  # requests' exceptions are OSErrors, too
        raise OSError(f"cannot download {URL}: {e}. Try again, or give a local copy"
                      " with --data FILE") from e
    os.makedirs(os.path.dirname(PATH), exist_ok=True)
    with atomic_write(PATH) as f:
        f.write(response.content)
    return PATH


def check_example(example):
    """The example with its label as an int; ValueError if it is invalid."""
    fields = {"ctx", "activity_label", "endings", "label"}
    if not isinstance(example, dict) or not fields <= example.keys():
        raise ValueError(f"an example must be a JSON object with {', '.join(sorted(fields))}")
    if not isinstance(example["endings"], list) or len(example["endings"]) != 4:
        raise ValueError("endings must be a list of four strings")
    label = str(example["label"])  # the files on the Hugging Face Hub have strings
    if label not in ("0", "1", "2", "3"):
        raise ValueError(f"label is {label[:40]!r}, it must be 0, 1, 2 or 3; the test split, whose"
                         " labels are not public, cannot be scored")
    return {**example, "label": int(label)}


def iterate_examples(path):
    """Yields the examples of a .jsonl or .jsonl.gz file; ValueError names an invalid line."""
    if not os.path.exists(path):
        raise FileNotFoundError(f"no HellaSwag examples at {path};"
                                f" {command('hellaswag.py')} downloads them to {PATH}")
    line_number = 0
    with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as f:
        try:
            for line in f:
                line_number += 1
                if line.strip():
                    yield check_example(json.loads(line))
        except (ValueError, EOFError, gzip.BadGzipFile, zlib.error) as e:
            raise ValueError(f"cannot read HellaSwag examples from {path}, line {line_number}: {e}"
                             ) from e


# -----------------------------------------------------------------------------
# rendering: from examples to tokens

def remove_markup(text):
    """WikiHow's text as the harness preprocesses it: "Pull. [step] Wait [title] Go" gives
    "Pull. Wait. Go"."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")


def split_context(ctx):
    """(ctx_a, ctx_b) of a ctx; ctx_b is the last sentence, if that is incomplete.

    "On a roof. he" gives ("On a roof.", "he").
    """
    head, separator, tail = ctx.rpartition(". ")
    if separator and tail.strip() and tail.strip()[-1] not in ".!?":
        return head + ".", tail
    return ctx, ""


def render_example(example, style="completion", tokenizer=GPT2):
    """(context, [4 endings]): the tokens of an example, 1-D integer arrays.

    The lecture's four rows are the context followed by one ending; its mask is 1 on the ending.
    An empty context becomes <|endoftext|>: the first token of an ending is predicted from the
    token before it.
    """
    if style == "completion":
        context = example["ctx"]
        # GPT-2's words begin with a space
        endings = [" " + ending for ending in example["endings"]]
    else:
        if "ctx_a" in example and "ctx_b" in example:
            ctx_a, ctx_b = example["ctx_a"], example["ctx_b"]
        else:
            ctx_a, ctx_b = split_context(example["ctx"])
        # str.capitalize also lowercases all other letters, as in the harness
        query = remove_markup(f"{example['activity_label']}: {ctx_a} {ctx_b.capitalize()}")
        # trailing spaces move to the ending, as in the harness
        context = query.rstrip()
        spaces = query[len(context):] + " "
        endings = [spaces + remove_markup(ending) for ending in example["endings"]]
    tokens = tokenizer.encode(context) if context else np.array([tokenizer.eot])
    return tokens, [tokenizer.encode(ending) for ending in endings]


@dataclass
class HellaSwag:
    """Rendered examples, kept in memory because training scores them many times."""
    examples: list      # dicts, as in the file
    labels: np.ndarray  # (n) int64
    rendered: dict      # style -> a list of what render_example returns
    lengths: dict       # style -> (n, 4) float64, the divisors of acc_norm: tokens (completion) or
                        # characters (lm-eval)
    num_tokens: int     # of the tokenizer


def prepare(path, limit=None, tokenizer=GPT2):
    """The HellaSwag of a .jsonl or .jsonl.gz file, or of its first limit examples."""
    examples = list(itertools.islice(iterate_examples(path), limit))
    if not examples:
        raise ValueError(f"{path} has no examples")
    rendered = {}
    for style in STYLES:
        rendered[style] = [render_example(example, style, tokenizer) for example in examples]
    tokens = [[len(ending) for ending in endings] for _, endings in rendered["completion"]]
    characters = [[len(remove_markup(ending)) for ending in example["endings"]]
                  for example in examples]
    lengths = {"completion": np.array(tokens, float), "lm-eval": np.array(characters, float)}
    labels = np.array([example["label"] for example in examples])
    return HellaSwag(examples, labels, rendered, lengths, tokenizer.num_tokens)


def load_examples(source, block_size, ranks):
    """The HellaSwag to score during training, or None; ValueError if an ending does not fit.

    source: a .jsonl or .jsonl.gz file, "off", or "auto": the validation examples if they were
    downloaded, otherwise a message is printed.
    """
    if source == "off":
        return None
    if source == "auto":
        if not all(all_gather(os.path.exists(PATH), ranks)):
            print0(f"HellaSwag is off: {PATH} does not exist. Download it with"
                   f" {command('hellaswag.py')}, or give --hellaswag FILE")
            return None
        source = PATH
    dataset = prepare(source)
    for rendered in dataset.rendered.values():
        pack(rendered, block_size)  # the error comes now, not after the model was compiled
    return dataset


# -----------------------------------------------------------------------------
# scoring: log-probabilities of the endings
#
# The lecture scores an example as four rows, each with a copy of the context, and computes logits
# at every position. Here an example is one row, with one copy of the context:
#
#     tokens         context           ending 1       ending 2       ending 3       ending 4
#     positions      0, 1, ..., c-1    c, c+1, ...    c, c+1, ...    c, c+1, ...    c, c+1, ...
#     attention to   earlier tokens    the context, and earlier tokens of the same ending
#
# So every token has the same position, context and log-probability as in the lecture's row. Logits
# are computed only where a token of an ending is predicted, in float32, over the tokenizer's ids.

def pack(rendered, block_size):
    """([(context, [(ending_id, ending), ...]), ...], num_truncated): the rows of the batches.

    An example is usually one row. The endings of example i have the ids 4i to 4i+3. Where one
    exceeds block_size + 1 tokens with its context, the context loses its first tokens, as in
    lm-evaluation-harness. How many depends on the ending, so each ending gets a row. Raises
    ValueError for an ending longer than block_size.
    """
    rows = []
    num_truncated = 0
    for i, (context, endings) in enumerate(rendered):
        longest = max(len(ending) for ending in endings)
        if longest > block_size:
            raise ValueError(f"example {i} has an ending of {longest} tokens; this model's"
                             f" block_size is only {block_size}")
        endings = list(enumerate(endings, start=4 * i))
        if len(context) + longest <= block_size + 1:
            rows.append((context, endings))
            continue
        num_truncated += 1
        for ending_id, ending in endings:
            excess = max(0, len(context) + len(ending) - block_size - 1)
            rows.append((context[excess:], [(ending_id, ending)]))
    return rows, num_truncated


def row_length(row):
    """Number of input tokens of a row: an ending's last token predicts nothing, so it is none."""
    context, endings = row
    return len(context) + sum(len(ending) - 1 for _, ending in endings)


def make_batches(rows, batch_tokens):
    """[(rows, T), ...], long rows first: B rows padded to the length T.

    B * T is at most batch_tokens, unless B is 1.
    """
    batches = []
    batch, T = [], 0
    for row in sorted(rows, key=row_length, reverse=True):
        if not batch or (len(batch) + 1) * T > batch_tokens:
            # a multiple of 16: fewer shapes, aligned for tensor cores
            batch, T = [], math.ceil(row_length(row) / 16) * 16
            batches.append((batch, T))
        batch.append(row)
    return batches


def collate(rows, T):
    """(idx, pos, segment, predicting, source, target, ending_ids): a batch as int64 arrays.

        idx          (B, T)  input tokens: context, endings without their last tokens, padding
        pos          (B, T)  their positions
        segment      (B, T)  0 in the context, 1, 2, ... in the endings, -1 in the padding
        predicting   (M)     where logits are needed, as indices into B * T: the context's last
                             token and the endings
        source       (N)     for each token of each ending: which of the M predicts it
        target       (N)     its id
        ending_ids   (N)     the ending it belongs to
    """
    shape = len(rows), T
    idx = np.zeros(shape, dtype=np.int64)
    pos = np.zeros(shape, dtype=np.int64)
    segment = np.full(shape, -1, dtype=np.int64)
    predictors, target, ending_ids = [], [], []
    for b, (context, endings) in enumerate(rows):
        c = len(context)
        idx[b, :c] = context
        pos[b, :c] = np.arange(c)
        segment[b, :c] = 0
        t = c  # where the next ending begins
        for k, (ending_id, ending) in enumerate(endings, start=1):
            n = len(ending) - 1
            idx[b, t:t + n] = ending[:-1]
            pos[b, t:t + n] = np.arange(c, c + n)
            segment[b, t:t + n] = k
            # the context's last token predicts the first token of the ending, which predicts the
            # second, and so on
            predictors.append(b * T + np.concatenate([[c - 1], np.arange(t, t + n)]))
            target.append(ending.astype(np.int64))
            ending_ids.append(np.full(n + 1, ending_id))
            t += n
    predicting, source = np.unique(np.concatenate(predictors), return_inverse=True)
    target, ending_ids = np.concatenate(target), np.concatenate(ending_ids)
    return idx, pos, segment, predicting, source, target, ending_ids


def token_logprobs(x, weight, source, target, slice_size=8192):
    """log p(target[n]) at x[source[n]], (N) float32.

    x: final hidden states (M, C) float32; weight: of the lm_head, (V, C), without padding. The
    vocabulary is processed in slices: logits of all M positions at once, (M, V), would take
    gigabytes.
    """
    logsumexps = []
    target_logits = torch.zeros(target.shape, device=x.device)
    for first, w in zip(range(0, len(weight), slice_size), weight.split(slice_size)):
        logits = F.linear(x, w)                                         # (M, slice)
        logsumexps.append(logits.logsumexp(dim=-1))                     # (M)
        inside = (target >= first) & (target < first + w.size(0))       # (N)
        column = (target - first).clamp(0, w.size(0) - 1)               # (N)
        target_logits = torch.where(inside, logits[source, column], target_logits)
    return target_logits - torch.stack(logsumexps).logsumexp(dim=0)[source]


class SharedContext:
    """The mask of a batch, in place of a KV cache: a token attends to its context and ending."""

    def __init__(self, segment):
        T = segment.size(1)
        causal = torch.ones((T, T), dtype=torch.bool, device=segment.device).tril()
        key, query = segment[:, None, :], segment[:, :, None]
        same_text = (key == 0) | (key == query)
        self.attn_mask = (causal & same_text).unsqueeze(1)              # (B, 1, T, T)

    def update(self, k, v):
        """Keys, values and mask of a block; see GPT.hidden."""
        return k, v, self.attn_mask


def score_batch(model, rows, T, num_tokens):
    """(ending ids int64, log-probabilities float64), (N) NumPy arrays.

    They have an entry for each token of an ending.
    """
    device = model.lm_head.weight.device
    *arrays, ending_ids = collate(rows, T)
    idx, pos, segment, predicting, source, target = (torch.from_numpy(a).to(device) for a in arrays)
    masks = [SharedContext(segment)] * model.config.n_layer
    x = model.hidden(idx, pos, masks)                                   # (B, T, C)
    # hidden runs in the autocast dtype, the logits in float32
    with torch.autocast(device.type, enabled=False):
        x = x.flatten(0, 1)[predicting].float()                         # (M, C)
        weight = model.lm_head.weight[:num_tokens].float()              # without padding
        logprobs = token_logprobs(x, weight, source, target)
    return ending_ids, logprobs.cpu().double().numpy()


@torch.no_grad()
def score(model, rendered, dtype, ranks, batch_tokens=None, num_tokens=GPT2.num_tokens):
    """(sums, num_truncated): the log-probability of each ending in nats, (n, 4) float64.

    The same on every rank; the batches are split over the ranks. rendered: a list of what
    render_example returns. num_tokens: the vocabulary without padding. If a stop is requested,
    scoring ends before the next batch and returns None.
    """
    if batch_tokens is None:
        batch_tokens = 4096 if ranks.device_type == "cpu" else 32768
    rows, num_truncated = pack(rendered, model.config.block_size)
    batches = make_batches(rows, batch_tokens)
    sums = np.zeros(4 * len(rendered))
    # the same number of iterations on every rank: stop_requested is a collective
    steps = tqdm(range(0, len(batches), ranks.world_size), desc="HellaSwag", leave=False,
                 disable=None if ranks.master_process else True)  # None: only on a terminal
    was_training = model.training
    model.eval()
    try:
        # one autocast region for all batches: it caches the cast weights
        with autocast(ranks.device, dtype), full_float32(), without_cudnn_attention():
            for first in steps:
                if stop_requested(ranks):
                    return None
                i = first + ranks.rank
                if i < len(batches):
                    ending_ids, logprobs = score_batch(model, *batches[i], num_tokens)
                    np.add.at(sums, ending_ids, logprobs)
    finally:
        model.train(was_training)
    # each ending is scored on one rank and is 0 on the others, so the sum is exact
    sums = sum(all_gather(sums, ranks))
    return sums.reshape(-1, 4), num_truncated


# -----------------------------------------------------------------------------
# the evaluation

def get_most_likely_row(sums, lengths=1.0):
    """The predicted ending of each example, (n) int64; the first of equally likely ones.

    sums: log-probabilities (n, 4). acc compares these sums, acc_norm the sums per length.
    """
    with np.errstate(divide="ignore"):  # in lm-eval style, an ending of only markup has length 0
        return (sums / lengths).argmax(axis=-1)


def metrics(sums, lengths, labels):
    """{"acc", "acc_stderr", "acc_norm", "acc_norm_stderr"} of (n, 4) log-probabilities.

    Standard errors as in the harness. All are NaN if a log-probability is non-finite.
    """
    result = {}
    for name, predicted in (("acc", get_most_likely_row(sums)),
                            ("acc_norm", get_most_likely_row(sums, lengths))):
        p = float((predicted == labels).mean()) if np.isfinite(sums).all() else math.nan
        result[name] = p
        result[f"{name}_stderr"] = math.sqrt(p * (1 - p) / max(1, len(labels) - 1))
    return result


def evaluate(model, dataset, dtype, ranks, batch_tokens=None):
    """({style: metrics}, {style: sums (n, 4)}, {style: number of truncated examples}).

    The same on every rank. dataset is a HellaSwag; the other arguments are those of score.
    Returns None if a stop is requested.
    """
    results, sums, num_truncated = {}, {}, {}
    for style in STYLES:
        scored = score(model, dataset.rendered[style], dtype, ranks, batch_tokens,
                       dataset.num_tokens)
        if scored is None:
            return None
        sums[style], num_truncated[style] = scored
        results[style] = metrics(sums[style], dataset.lengths[style], dataset.labels)
    return results, sums, num_truncated


def score_in_training(model, dataset, dtype, ranks):
    """The streams of log.txt, {name: accuracy}; {} if a stop is requested.

    hella and hella_acc are acc_norm and acc in completion style, hella_lm_eval and
    hella_lm_eval_acc those in lm-eval style.
    """
    scored = evaluate(model, dataset, dtype, ranks)
    if scored is None:
        return {}
    completion, lm_eval = (scored[0][style] for style in STYLES)
    if math.isnan(completion["acc"] + lm_eval["acc"]):
        # the weights are finite, since train_step checks every update: the activations have
        # overflowed in 16 bits, and training continues
        print0("HellaSwag: log-probabilities are NaN or infinite: no score"
               f" (overflow in {dtype}?)")
    return {"hella": completion["acc_norm"], "hella_acc": completion["acc"],
            "hella_lm_eval": lm_eval["acc_norm"], "hella_lm_eval_acc": lm_eval["acc"]}


# -----------------------------------------------------------------------------
# the command

def summary(results, n):
    """One line: the metrics and n, with a note unless n is the size of the validation set."""
    line = "HellaSwag"
    for style, r in results.items():
        line += (f" | {style}: acc {r['acc']:.4f} acc_norm {r['acc_norm']:.4f}"
                 f" (s.e. {r['acc_norm_stderr']:.4f})")
    line += f" | n {n:,}"
    if n != HELLASWAG_EXAMPLES:
        line += (" -- NOT COMPARABLE with published scores, which use all"
                 f" {HELLASWAG_EXAMPLES:,} examples")
    return line


def write_scores(path, dataset, sums):
    """Writes --out, a line of JSON per example:

    {"ind", "label", style: {"logprobs", "lengths", "pred", "pred_norm"}}. logprobs: of the four
    endings, in nats; lengths: the divisors of acc_norm; pred, pred_norm: the predictions.
    """
    with atomic_write(path, "w") as f:
        for i, example in enumerate(dataset.examples):
            line = {"ind": example.get("ind", i), "label": example["label"]}
            for style in STYLES:
                logprobs, lengths = sums[style][i], dataset.lengths[style][i]
                line[style] = {"logprobs": logprobs.tolist(), "lengths": lengths.tolist(),
                               "pred": int(get_most_likely_row(logprobs)),
                               "pred_norm": int(get_most_likely_row(logprobs, lengths))}
            f.write(json.dumps(line) + "\n")


def score_source(args, path, ranks):
    """Scores args.source on the examples in path; rank 0 prints and writes the result."""
    model, info = load_model(args.source, ranks.device)
    tokenizer = load_tokenizer(args.source, model.config.vocab_size)
    dataset = prepare(path, args.limit, tokenizer)
    n = len(dataset.examples)
    if args.compile == "on":
        model.hidden = torch.compile(model.hidden, dynamic=True)
    dtype = choose_dtype(args.dtype, ranks.device)
    t0 = time.perf_counter()
    results, sums, num_truncated = evaluate(model, dataset, dtype, ranks, args.batch_tokens)
    seconds = time.perf_counter() - t0
    if any(math.isnan(r["acc"]) for r in results.values()):
        raise ValueError(f"log-probabilities of {args.source} are NaN or infinite: its activations"
                         f" overflow in {dtype}; try --dtype float32")
    if not ranks.master_process:
        return
    truncated = max(num_truncated.values())
    if truncated > 0:
        print(f"note: the contexts of {truncated} examples were truncated to the block_size",
              file=sys.stderr)
    result = {"source": args.source, **info, "data": path, "n": n,
              "full": n == HELLASWAG_EXAMPLES, "dtype": dtype, "seconds": round(seconds, 3),
              "truncated": num_truncated, **results}
    # first: the score is printed even if a file cannot be written
    if args.json == "-":
        print(json.dumps(result), flush=True)
    else:
        print(f"{summary(results, n)} | {seconds:.1f} s, {dtype}", flush=True)
    if args.json not in (None, "-"):
        with atomic_write(args.json, "w") as f:
            json.dump(result, f)
    if args.out:
        write_scores(args.out, dataset, sums)


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
    # only after success: destroying a process group waits for ranks that an error may have ended
    teardown()


if __name__ == "__main__":
    run_main(main)
