"""The speed of scoring HellaSwag compared with the lecture's scoring, reimplemented here."""
import json
import os
import tempfile

import torch
from torch.nn import functional as F

import hellaswag
from bench.measure import print_table, timed
from model import GPT, config_for
from run import runtime
from run.config import INPUT_TXT
from run.files import atomic_write
from run.parallel import Ranks


def lecture_rows(example):
    """(tokens, mask), (4, N) int64: the lecture's render_example.

    A row is the context followed by one ending, padded with zeros; mask is 1 on the ending.
    """
    context, endings = hellaswag.render_example(example)
    N = len(context) + max(len(ending) for ending in endings)
    tokens = torch.zeros((4, N), dtype=torch.long)
    mask = torch.zeros((4, N), dtype=torch.long)
    for i, ending in enumerate(endings):
        row = [*context.tolist(), *ending.tolist()]
        tokens[i, :len(row)] = torch.tensor(row)
        mask[i, len(context):len(row)] = 1
    return tokens, mask


@torch.no_grad()
def lecture_prediction(model, example, device, dtype):
    """The predicted ending, as in build-nanogpt's hellaswag.py: logits at every position."""
    tokens, mask = (tensor.to(device) for tensor in lecture_rows(example))
    with runtime.autocast(device, dtype):
        logits = model.lm_head(model.hidden(tokens))                    # (4, N, V)
    # the logits at a position predict the next token
    shift_logits = logits[:, :-1].flatten(0, 1)                         # (4 * (N-1), V)
    shift_tokens = tokens[:, 1:].flatten()                              # (4 * (N-1))
    shift_mask = mask[:, 1:]                                            # (4, N-1)
    losses = F.cross_entropy(shift_logits, shift_tokens, reduction="none").view(4, -1)
    return ((losses * shift_mask).sum(dim=1) / shift_mask.sum(dim=1)).argmin().item()


def write_examples(path, count=60):
    """Writes examples in HellaSwag's format from input.txt, of about its lengths.

    40 words of context, four endings of 20.
    """
    with open(INPUT_TXT, encoding="utf-8") as f:
        words = f.read().split()
    with atomic_write(path, "w") as f:
        for start in range(0, 120 * count, 120):
            parts = [" ".join(words[i:i + 20]) for i in range(start, start + 120, 20)]
            example = {"activity_label": "Play", "ctx": f"{parts[0]} {parts[1]}",
                       "endings": parts[2:], "label": 0}
            f.write(json.dumps(example) + "\n")


def bench_hellaswag(args):
    """Rows of examples/s in completion style, random weights.

    The lecture's scoring, also with freed memory kept, and ours. differ: predictions that differ
    from those in float32.
    """
    torch.manual_seed(1337)
    model = GPT(config_for(args.size, vocab_size=50304)).to(args.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = args.data or os.path.join(folder, "examples.jsonl")
        if not args.data:
            write_examples(path)
        dataset = hellaswag.prepare(path)
    # spread over the file: its first part has shorter texts than its second
    n = min(args.limit, len(dataset.examples))
    chosen = [i * len(dataset.examples) // n for i in range(n)]
    examples = [dataset.examples[i] for i in chosen]
    rendered = [dataset.rendered["completion"][i] for i in chosen]
    lengths = dataset.lengths["completion"][chosen]
    ranks = Ranks(0, 0, 1, args.device, False)

    def lecture():
        return [lecture_prediction(model, example, args.device, args.dtype) for example in examples]

    def ours(dtype=args.dtype):
        sums, _ = hellaswag.score(model, rendered, dtype, ranks)
        return hellaswag.get_most_likely_row(sums, lengths).tolist()

    lecture_prediction(model, examples[0], args.device, args.dtype)  # warm-up
    results = {"lecture": timed(lecture, args.device)}
    runtime.keep_freed_memory()
    results["lecture, freed memory kept"] = timed(lecture, args.device)
    results["ours"] = timed(ours, args.device, 3, 1)
    in_float32 = ours("float32")
    rows = []
    for name, (seconds, predicted) in results.items():
        differ = sum(a != b for a, b in zip(predicted, in_float32))
        rows.append({"hellaswag": name, "examples/s": n / seconds,
                     "x lecture": results["lecture"][0] / seconds, "differ": differ, "examples": n})
    return print_table(rows)
