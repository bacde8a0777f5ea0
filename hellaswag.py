"""
HellaSwag: sentence completion with four endings, one of them right (Zellers et al. 2019,
https://github.com/rowanz/hellaswag). Two styles of scoring will be reported; here is the lecture's, "completion".

    {"ind": 24, "activity_label": "Roof shingle removal", "ctx": "A man is sitting on a roof. He", "label": 3,
     "endings": ["is using wrap ...", "is ripping ...", "is holding ...", "starts pulling ..."], ...}

label: which ending is right. GPT-2 124M has acc_norm 0.2955 over the 10,042 validation examples, 1558M 0.4893.
"""
import json
import os

import torch
from torch.nn import functional as F

from data import get_tokenizer
from runtime import all_reduce_sum, autocast, print0

VAL_FILE = os.path.join("hellaswag", "hellaswag_val.jsonl")


def iterate_examples(path):
    """Yields the examples of a .jsonl file; ValueError names the line that is not one."""
    with open(path, encoding="utf-8") as f:
        for number, line in enumerate(f, 1):
            try:
                example = json.loads(line)
                example["ctx"], example["label"], example["endings"]
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"{path}, line {number} is not a HellaSwag example: {e!r}") from e
            yield example


def render_example(example):
    """(tokens, mask, label) of an example: tokens and mask are (4, N) int64, padded with zeros to the longest row.

    A row is the context followed by one ending; mask is 1 on the ending, where the loss counts.
    """
    tokenizer = get_tokenizer()
    context = tokenizer.encode_ordinary(example["ctx"])
    endings = [tokenizer.encode_ordinary(" " + ending) for ending in example["endings"]]  # GPT-2's words begin with a space
    N = len(context) + max(len(ending) for ending in endings)
    tokens, mask = torch.zeros((4, N), dtype=torch.long), torch.zeros((4, N), dtype=torch.long)
    for i, ending in enumerate(endings):
        tokens[i, :len(context) + len(ending)] = torch.tensor(context + ending)
        mask[i, len(context):len(context) + len(ending)] = 1
    return tokens, mask, example["label"]


def get_most_likely_row(tokens, mask, logits):
    """Index of the ending with the lowest mean loss a token; logits are (4, N, V), any dtype."""
    losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), tokens[:, 1:], reduction="none")  # (4, N-1)
    ending = mask[:, 1:]  # the position before a token predicts it
    mean_loss = (losses * ending).sum(dim=1) / ending.sum(dim=1)                                       # (4)
    return mean_loss.argmin().item()


@torch.no_grad()
def evaluate(model, examples, dtype, ranks):
    """acc_norm of examples (a list) in the completion style; each rank scores a part of them."""
    model.eval()
    correct = 0
    for example in examples[ranks.rank::ranks.world_size]:
        tokens, mask, label = (t.to(ranks.device) if torch.is_tensor(t) else t for t in render_example(example))
        with autocast(ranks.device, dtype):
            logits, _ = model(tokens, tokens)  # with targets: the logits of every position
        correct += get_most_likely_row(tokens, mask, logits) == label
    model.train()
    return all_reduce_sum(torch.tensor(correct, device=ranks.device), ranks).item() / len(examples)


def for_training(source, ranks):
    """function(raw_model, dtype) -> acc_norm for the training loop, or None where HellaSwag is off.

    source: a .jsonl file, "auto" (VAL_FILE if it is there; its absence is said once) or "off".
    """
    if source == "off":
        return None
    if source == "auto":
        if not os.path.exists(VAL_FILE):
            print0(f"HellaSwag is off: {VAL_FILE} is not there. Download hellaswag_val.jsonl from"
                   " https://github.com/rowanz/hellaswag (data/), or give --hellaswag FILE")
            return None
        source = VAL_FILE
    examples = list(iterate_examples(source))
    return lambda model, dtype: evaluate(model, examples, dtype, ranks)
