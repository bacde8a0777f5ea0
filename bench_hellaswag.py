"""
HellaSwag's speed beside the lecture's way of scoring (bench.py hellaswag).

The reference is the lecture's arithmetic, in lines of our own.
"""
import json
import os
import tempfile
import time

import torch

import hellaswag
import runtime
import scoring
from bench_limits import median_seconds
from config import INPUT_TXT
from model import GPT, config_for

@torch.no_grad()
def lecture_hellaswag(model, examples, device, dtype):
    """(examples/s, predictions): the lecture's way, one example at a time, logits everywhere (build-nanogpt's hellaswag.py)."""
    predicted = []
    start = time.perf_counter()
    for example in examples:
        tokens, mask, _ = (t.to(device) if torch.is_tensor(t) else t for t in hellaswag.render_example(example))
        with runtime.autocast(device, dtype):
            logits = model.lm_head(model.hidden(tokens, torch.arange(tokens.size(1), device=device)))   # (4, N, V)
        shift_logits = logits[:, :-1, :].contiguous()
        flat_shift_logits = shift_logits.view(-1, shift_logits.size(-1))
        losses = torch.nn.functional.cross_entropy(flat_shift_logits, tokens[:, 1:].reshape(-1), reduction="none").view(4, -1)
        shift_mask = mask[:, 1:]
        predicted.append(((losses * shift_mask).sum(dim=1) / shift_mask.sum(dim=1)).argmin().item())
    runtime.synchronize(device)
    return len(examples) / (time.perf_counter() - start), predicted


def examples_of_input_txt(count=60):
    """Examples of HellaSwag's form and lengths from input.txt: a context of 40 words, four endings of 20."""
    with open(INPUT_TXT, encoding="utf-8") as f:
        words = f.read().split()
    examples = []
    for start in range(0, 120 * count, 120):
        ctx_a, ctx_b = " ".join(words[start:start + 25]), " ".join(words[start + 25:start + 40])
        endings = [" ".join(words[start + i:start + i + 20]) for i in range(40, 120, 20)]
        examples.append({"ind": start, "activity_label": "Play", "ctx_a": ctx_a, "ctx_b": ctx_b, "ctx": f"{ctx_a} {ctx_b}",
                         "endings": endings, "label": 0})
    return examples


def bench_hellaswag(args):
    """Rows of scoring --limit examples of --data (default: made of input.txt) with random weights, completion style: the
    lecture's way as it stands, with freed memory kept as our scripts run, and ours. flips: predictions unlike those of
    float32."""
    device = runtime.choose_device(args.device)
    dtype = runtime.choose_dtype(args.dtype, device)
    runtime.seed_all(1337)
    model = GPT(config_for(args.size, vocab_size=50304)).to(device).eval()
    with tempfile.TemporaryDirectory() as folder:  # spread over the file: its first part has shorter texts than its second
        examples = list(hellaswag.iterate_examples(args.data)) if args.data else examples_of_input_txt()
        with open(os.path.join(folder, "sample.jsonl"), "w", encoding="utf-8") as f:
            for i in range(min(args.limit, len(examples))):
                f.write(json.dumps(examples[i * len(examples) // min(args.limit, len(examples))]) + "\n")
        task = hellaswag.prepare(f.name)
    encoded, lengths = task.encoded["completion"], task.lengths["completion"]
    ranks = runtime.Ranks(0, 0, 1, device, False)
    lecture_hellaswag(model, task.examples[:2], device, dtype)
    figures = {"lecture": lecture_hellaswag(model, task.examples, device, dtype)}
    runtime.keep_freed_memory()
    figures["lecture, memory kept"] = lecture_hellaswag(model, task.examples, device, dtype)
    sums = []
    seconds = median_seconds(lambda: sums.append(scoring.score(model, encoded, dtype, ranks)[0]), 3, device, warmup=1)
    figures["ours"] = len(encoded) / seconds, hellaswag.predictions(sums[-1], lengths)[1].tolist()
    truth = hellaswag.predictions(scoring.score(model, encoded, "float32", ranks)[0], lengths)[1].tolist()
    return [{"hellaswag": name, "examples/s": speed, "x lecture": speed / figures["lecture"][0],
             "flips": sum(a != b for a, b in zip(predicted, truth)), "examples": len(encoded)}
            for name, (speed, predicted) in figures.items()]
