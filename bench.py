"""
Speed of HellaSwag scoring beside the lecture's arithmetic, in one run.

    python bench.py hellaswag --data hellaswag/hellaswag_val.jsonl
"""
import argparse
import json
import time

import torch
from torch.nn import functional as F

import hellaswag
from model import GPT, config_for
from runtime import (Ranks, autocast, choose_device, choose_dtype, device_name, keep_freed_memory, run_main, seed_all,
                     synchronize)


@torch.no_grad()
def lecture_hellaswag(model, examples, device, dtype):
    """(examples/s, predictions): the lecture's way, one example at a time, logits everywhere (build-nanogpt's hellaswag.py)."""
    predicted = []
    start = time.perf_counter()
    for example in examples:
        tokens, mask, _ = (t.to(device) if torch.is_tensor(t) else t for t in hellaswag.render_example(example))
        with autocast(device, dtype):
            logits = model.lm_head(model.hidden(tokens, torch.arange(tokens.size(1), device=device)))   # (4, N, V)
        shift_logits = logits[:, :-1, :].contiguous()
        flat_shift_logits = shift_logits.view(-1, shift_logits.size(-1))
        losses = F.cross_entropy(flat_shift_logits, tokens[:, 1:].reshape(-1), reduction="none").view(4, -1)
        shift_mask = mask[:, 1:]
        predicted.append(((losses * shift_mask).sum(dim=1) / shift_mask.sum(dim=1)).argmin().item())
    synchronize(device)
    return len(examples) / (time.perf_counter() - start), predicted


def bench_hellaswag(data, limit=60, size="gpt2", device="cpu", dtype="bfloat16", batch_tokens=None, compile_it=False):
    """{"examples_per_s", "lecture_examples_per_s", "ratio", ...} of a random-weight model on the first limit examples.

    The lecture's arithmetic is timed as it stands (lecture) and with freed memory kept, as our scripts run
    (lecture_kept); every figure is for the completion style alone, tokenizing left out of ours: it is done once a run.
    flips: predictions unlike those in float32; the lecture's takes its losses from 16-bit logits.
    """
    seed_all(1337)
    model = GPT(config_for(size, vocab_size=50304)).to(device).eval()
    task = hellaswag.prepare(data, limit)
    encoded, lengths = task.encoded["completion"], task.lengths["completion"]
    ranks = Ranks(0, 0, 1, device, False)
    lecture_hellaswag(model, task.examples[:2], device, dtype)  # warm-up
    lecture, expected = lecture_hellaswag(model, task.examples, device, dtype)
    keep_freed_memory()
    lecture_kept, _ = lecture_hellaswag(model, task.examples, device, dtype)
    hidden = torch.compile(model.hidden, dynamic=True) if compile_it else None
    hellaswag.score(model, encoded[:4] if not compile_it else encoded, dtype, ranks, batch_tokens, hidden)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        sums, _ = hellaswag.score(model, encoded, dtype, ranks, batch_tokens, hidden)
        synchronize(device)
        seconds.append(time.perf_counter() - start)
    ours = limit / sorted(seconds)[1]
    truth, _ = hellaswag.score(model, encoded, "float32", ranks, batch_tokens)
    truth, predicted = (hellaswag.predictions(s, lengths)[1].tolist() for s in (truth, sums))
    return {"device": device_name(device), "dtype": dtype, "examples": limit, "examples_per_s": ours,
            "lecture_examples_per_s": lecture, "lecture_kept_examples_per_s": lecture_kept, "ratio": ours / lecture,
            "ratio_kept": ours / lecture_kept, "flips": sum(a != b for a, b in zip(predicted, truth)),
            "lecture_flips": sum(a != b for a, b in zip(expected, truth))}


def main():
    parser = argparse.ArgumentParser(description="Measure our speed.", allow_abbrev=False)
    parser.add_argument("what", choices=["hellaswag"])
    parser.add_argument("--data", default=hellaswag.path_of("val"), help="examples")
    parser.add_argument("--limit", type=int, default=60, help="examples to score")
    parser.add_argument("--batch-tokens", type=int)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    device = choose_device()
    dtype = choose_dtype("auto", device)
    result = bench_hellaswag(args.data, args.limit, "gpt2", device, dtype, args.batch_tokens, args.compile)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    run_main(main)
