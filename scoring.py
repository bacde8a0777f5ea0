"""
Log-probabilities of candidate endings of a shared context: the fast path of hellaswag.py.

The lecture scores an example as four rows, each with a copy of the context (hellaswag.render_example), and computes logits at
every position. Here an example is one row, with one copy of the context:

    tokens         context               ending 1         ending 2         ending 3         ending 4
    positions      0, 1, ..., c-1        c, c+1, ...      c, c+1, ...      c, c+1, ...      c, c+1, ...
    attention to   earlier tokens        the context, and earlier tokens of the same ending

So every token has the same position, context and log-probability as in the lecture's row. Logits are computed only where
a token of an ending is predicted, in float32, over GPT-2's 50257 ids.
"""
import math

import numpy as np
import torch
from torch.nn import functional as F

from data import NUM_TOKENS
from parallel import all_gather, all_reduce_sum, stop_requested
from runtime import autocast, free_memory, full_float32, without_cudnn_attention

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
    for start, w in zip(range(0, NUM_TOKENS, slice_size), weight[:NUM_TOKENS].split(slice_size)):
        logits = F.linear(x, w)                                                                         # (M, slice)
        logsumexps.append(logits.logsumexp(dim=-1))                                                     # (M)
        inside = (target >= start) & (target < start + w.size(0))
        picked = torch.where(inside, logits[source, (target - start).clamp(0, w.size(0) - 1)], picked)  # (N)
    return picked - torch.stack(logsumexps).logsumexp(dim=0)[source]


def score_batch(model, hidden, rows, T):
    """(ending ids int64, log-probabilities float64), (N) NumPy arrays: one entry per token of an ending."""
    device = model.lm_head.weight.device
    *arrays, ending_ids = collate(rows, T)
    idx, pos, segment, predicting, source, target = (torch.from_numpy(a).to(device) for a in arrays)
    causal = torch.ones((T, T), dtype=torch.bool, device=device).tril()
    same_text = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])  # the context or the same ending
    x = hidden(idx, pos, (causal & same_text).unsqueeze(1))                                             # (B, T, C)
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
