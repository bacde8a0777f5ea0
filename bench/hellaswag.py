"""The speed of scoring HellaSwag compared with the lecture's scoring, which is reimplemented here."""
import json
import os
import tempfile

import torch
from torch.nn import functional as F

import hellaswag
from run import parallel
from run import runtime
from bench.measure import print_table, timed
from run.config import INPUT_TXT
from run.files import atomic_write
from model import GPT, config_for


@torch.no_grad()
def lecture_prediction(model, example, device, dtype):
    """The predicted ending of an example, as build-nanogpt's hellaswag.py computes it: logits at every position."""
    tokens, mask, _ = (t.to(device) if torch.is_tensor(t) else t for t in hellaswag.render_example(example))
    with runtime.autocast(device, dtype):
        logits = model.lm_head(model.hidden(tokens, torch.arange(tokens.size(1), device=device)))       # (4, N, V)
    shift_logits, shift_tokens, shift_mask = logits[:, :-1].contiguous(), tokens[:, 1:].contiguous(), mask[:, 1:]
    losses = F.cross_entropy(shift_logits.view(-1, logits.size(-1)), shift_tokens.view(-1), reduction="none").view(4, -1)
    return ((losses * shift_mask).sum(dim=1) / shift_mask.sum(dim=1)).argmin().item()


def write_examples(path, count=60):
    """Writes examples in HellaSwag's form and of its lengths from input.txt: 40 words of context, four endings of 20."""
    with open(INPUT_TXT, encoding="utf-8") as f:
        words = f.read().split()
    with atomic_write(path, "w") as f:
        for start in range(0, 120 * count, 120):
            context, *endings = (" ".join(words[start + a:start + b])
                                 for a, b in ((0, 40), (40, 60), (60, 80), (80, 100), (100, 120)))
            f.write(json.dumps({"activity_label": "Play", "ctx": context, "endings": endings, "label": 0}) + "\n")


def bench_hellaswag(args):
    """Rows of examples/s in completion style, random weights: the lecture's scoring, also with freed memory kept, and ours.

    differ: predictions that differ from those in float32.
    """
    runtime.seed_all(1337)
    model = GPT(config_for(args.size, vocab_size=50304)).to(args.device).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = args.data or os.path.join(folder, "examples.jsonl")
        if not args.data:
            write_examples(path)
        task = hellaswag.prepare(path)
    # spread over the file: its first part has shorter texts than its second
    n = min(args.limit, len(task.examples))
    chosen = [i * len(task.examples) // n for i in range(n)]
    examples, encoded = ([of[i] for i in chosen] for of in (task.examples, task.encoded["completion"]))

    def lecture():
        return [lecture_prediction(model, example, args.device, args.dtype) for example in examples]

    def ours(dtype=args.dtype):
        sums, _ = hellaswag.score(model, encoded, dtype, parallel.Ranks(0, 0, 1, args.device, False))
        return hellaswag.predictions(sums, task.lengths["completion"][chosen])[1].tolist()

    lecture_prediction(model, examples[0], args.device, args.dtype)  # warm-up
    results = {"lecture": timed(lecture, args.device)}
    runtime.keep_freed_memory()
    results["lecture, freed memory kept"] = timed(lecture, args.device)
    results["ours"] = timed(ours, args.device, 3, 1)
    in_float32 = ours("float32")
    return print_table([{"hellaswag": name, "examples/s": n / seconds, "x lecture": results["lecture"][0] / seconds,
                         "differ": sum(a != b for a, b in zip(predicted, in_float32)), "examples": n}
                        for name, (seconds, predicted) in results.items()])
