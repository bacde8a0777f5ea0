"""
Log-probabilities of endings that share a context, at the speed of the network.

    sums, num_cut = score(model, [(context, [ending, ...]), ...], dtype, ranks)

Four endings of one context: the plain way puts the context through the network four times, pads the four rows to the
longest and makes logits for every position. Here a row is [context, ending 1, ..., ending 4]: the context goes through
once, each ending stands at the positions that follow it and is blind to the other endings, and logits are made only
where an ending's token is predicted; in float32, over GPT-2's 50257 ids.
"""
import numpy as np
import torch
from torch.nn import functional as F

from data import NUM_TOKENS
from parallel import all_reduce_sum, stop_requested
from runtime import autocast

def pack(encoded, block_size):
    """([(context, [(ending's number, ending), ...]), ...], number of examples cut): what goes into a row each.

    Endings of example i are numbers 4i to 4i+3. A text over block_size + 1 tokens (the last one is only predicted)
    loses the beginning of its context, as in the harness; endings of one example may then differ in what is left, and
    each gets a row of its own. Raises ValueError for an ending that fills the block by itself.
    """
    rows, num_cut = [], 0
    for i, (context, endings) in enumerate(encoded):
        longest = max(len(ending) for ending in endings)
        if longest > block_size:
            raise ValueError(f"example {i} has an ending of {longest} tokens; this model's block_size is {block_size}:"
                             " HellaSwag needs a longer one")
        if len(context) + longest <= block_size + 1:
            rows.append((context, [(4 * i + j, ending) for j, ending in enumerate(endings)]))
            continue
        num_cut += 1
        rows += [(context[max(0, len(context) + len(ending) - block_size - 1):], [(4 * i + j, ending)])
                 for j, ending in enumerate(endings)]
    return rows, num_cut


def width(row):
    """Positions that a row takes in the network: the last token of an ending predicts nothing."""
    context, endings = row
    return len(context) + sum(len(ending) - 1 for _, ending in endings)


def make_batches(rows, batch_tokens):
    """Lists of rows of like width, the widest first: each at most batch_tokens positions with its padding, or one row."""
    batches, batch, T = [], [], 0
    for row in sorted(rows, key=width, reverse=True):
        if not batch or (len(batch) + 1) * T > batch_tokens:
            batch, T = [], padded(width(row))
            batches.append(batch)
        batch.append(row)
    return batches


def padded(T):
    """T rounded up to a multiple of 16: few different shapes, and ones that matrix units like."""
    return -(-T // 16) * 16


def collate(rows):
    """One batch as arrays. For the network, (B, T) int64 each:

        idx        [context, ending 1 but its last token, ending 2 ..., padding]
        pos        0, 1, ... in the context; each ending goes on from the context's end
        part       0 in the context, 1, 2, ... in the endings, -1 in the padding
        predicts   True from the context's last token to the row's end: where logits are needed; M positions in all

    For the N tokens of the endings, 1-D: source, the one of the M that predicts it; target, its id; number, whose it is.
    """
    shape = len(rows), padded(max(width(row) for row in rows))
    idx, pos, part = (np.full(shape, fill, dtype=np.int64) for fill in (0, 0, -1))
    predicts = np.zeros(shape, dtype=bool)
    source, target, number, M = [], [], [], 0
    for b, (context, endings) in enumerate(rows):
        t = len(context)
        idx[b, :t], pos[b, :t], part[b, :t] = context, np.arange(t), 0
        for k, (n, ending) in enumerate(endings, 1):
            here = slice(t, t + len(ending) - 1)
            idx[b, here] = ending[:-1]
            pos[b, here] = len(context) + np.arange(len(ending) - 1)
            part[b, here] = k
            # the context's last token is the first of this row's M; the ending's own follow from 1 + t - len(context)
            source.append(np.concatenate([[M], M + 1 + t - len(context) + np.arange(len(ending) - 1)]))
            target.append(ending.astype(np.int64))
            number.append(np.full(len(ending), n))
            t += len(ending) - 1
        predicts[b, len(context) - 1:t] = True
        M += 1 + t - len(context)
    return idx, pos, part, predicts, np.concatenate(source), np.concatenate(target), np.concatenate(number)


def token_logprobs(x, weight, source, target, slice_size=8192):
    """log p(target[n]) at x[source[n]], (N) float32; x (M, C) float32 hidden states, weight (V, C) the lm_head's.

    The logits are made a slice of the vocabulary at a time, so that (M, V) of them never exist.
    """
    logsumexps, picked = [], torch.zeros(target.shape, device=x.device)
    for start, w in zip(range(0, NUM_TOKENS, slice_size), weight[:NUM_TOKENS].split(slice_size)):
        logits = F.linear(x, w)                                         # (M, slice)
        logsumexps.append(logits.logsumexp(dim=-1))
        inside = (target >= start) & (target < start + w.size(0))
        picked = torch.where(inside, logits[source, (target - start).clamp(0, w.size(0) - 1)], picked)
    return picked - torch.stack(logsumexps).logsumexp(dim=0)[source]


def score_batch(model, hidden, rows):
    """(numbers of the endings' tokens, their log-probabilities): NumPy, (N) int64 and (N) float64.

    hidden runs under the caller's autocast, the logits in float32.
    """
    device = model.lm_head.weight.device
    *arrays, number = collate(rows)
    idx, pos, part, predicts, source, target = (torch.from_numpy(a).to(device) for a in arrays)
    T = idx.size(1)
    causal = torch.ones((T, T), dtype=torch.bool, device=device).tril()
    # an earlier token of the context, or of the same ending
    attn_mask = causal & ((part[:, None, :] == 0) | (part[:, None, :] == part[:, :, None]))            # (B, T, T)
    x = hidden(idx, pos, attn_mask.unsqueeze(1))                                                       # (B, T, C)
    with torch.autocast(device.type, enabled=False):
        logprobs = token_logprobs(x[predicts].float(), model.lm_head.weight.float(), source, target)
    return number, logprobs.cpu().double().numpy()


@torch.no_grad()
def score(model, encoded, dtype, ranks, batch_tokens=None, hidden=None, progress=None):
    """(sums, number of examples truncated): sums (n, 4) float64, the log-probability of each ending, on every rank.

    Returns None if a stop is requested meanwhile. encoded: from hellaswag.tokenize; the batches are split over the ranks.
    batch_tokens: positions in the network at a time. hidden: model.hidden, or a compiled one. progress(this rank's sums so
    far, fraction done) is called after each batch.
    """
    if model.config.vocab_size < NUM_TOKENS:
        raise ValueError(f"the model's vocabulary has {model.config.vocab_size} tokens, GPT-2's text needs {NUM_TOKENS}:"
                         " HellaSwag cannot be scored")
    batch_tokens = batch_tokens or (4096 if ranks.device == "cpu" else 32768)
    rows, num_cut = pack(encoded, model.config.block_size)
    batches = make_batches(rows, batch_tokens)
    sums = np.zeros(4 * len(encoded))
    was_training = model.training
    model.eval()
    try:
        with autocast(ranks.device, dtype):  # around all batches: it caches the weights it casts until the region ends
            for start in range(0, len(batches), ranks.world_size):  # the same number of times on every rank
                if stop_requested(ranks):
                    return None
                i = start + ranks.rank
                if i < len(batches):
                    number, logprobs = score_batch(model, hidden or model.hidden, batches[i])
                    np.add.at(sums, number, logprobs)
                if progress:
                    progress(sums.reshape(-1, 4), min(start + ranks.world_size, len(batches)) / len(batches))
    finally:
        model.train(was_training)
    # each ending was scored on one rank and is 0 on the others: the sum is exact in any order
    total = torch.from_numpy(sums).to(ranks.device, torch.float32 if ranks.device == "mps" else torch.float64)
    return all_reduce_sum(total, ranks).cpu().double().numpy().reshape(-1, 4), num_cut
