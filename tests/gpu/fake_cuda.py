"""
Runs training steps, evaluations, scoring and sampling on fake CUDA tensors: they have a device, a
dtype and a shape, but no values, so a CPU tensor that meets a CUDA tensor is an error, as it would
be on a GPU. Needs a CPU build of PyTorch: others register hooks and a guard for CUDA themselves.

    python tests/gpu/fake_cuda.py GUARD.so      # compiled from cuda_guard.cpp

Prints one line of JSON, {check: its result, or the error}. The last two checks are planted errors.
"""
import contextlib
import ctypes
import json
import os
import sys
from unittest import mock

ctypes.CDLL(sys.argv[1], mode=ctypes.RTLD_GLOBAL)  # before torch
sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode  # noqa: E402
from torch.fx.experimental.symbolic_shapes import ShapeEnv  # noqa: E402

import data  # noqa: E402
import hellaswag as scorer  # noqa: E402
import sample  # noqa: E402
import train_gpt2  # noqa: E402
from model import GPT  # noqa: E402
from run import parallel, runtime  # noqa: E402
from run.config import TrainConfig  # noqa: E402

RANKS = parallel.Ranks(0, 0, 1, "cuda:0", False)
SIZES = dict(n_layer=2, n_head=2, n_embd=32, block_size=16, vocab_size=50304, total_batch_size=64,
             batch_size=2, compile="off", device="cuda")


class Stream:
    """641 tokens, in the place of a TokenStream."""

    def __len__(self):
        return 641

    def read(self, start, length):
        return (np.arange(start, start + length) % 500).astype(np.uint16)


class Loader:
    """Batches as DataLoaderLite makes them."""
    position = 0

    def next_batch(self):
        self.position += 2
        return data.to_batch(np.stack([Stream().read(0, 17)] * 2), "cuda:0")


def values(tensor):
    """Made-up values for a fake tensor: ones."""
    shape = tuple(int(n) for n in tensor.shape)
    return np.ones(shape, dtype=float if tensor.is_floating_point() else int).tolist()


@contextlib.contextmanager
def fake_cuda():
    """Context in which new tensors are fake, with made-up values where the code reads them."""
    shapes = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    mode = FakeTensorMode(shape_env=shapes, allow_non_fake_inputs=True)
    methods = {"item": values, "tolist": values, "pin_memory": lambda tensor: tensor,
               "__bool__": lambda tensor: False,
               "numpy": lambda tensor: np.asarray(values(tensor))}
    functions = {"amp.common.amp_definitely_not_available": lambda: False,
                 "is_bf16_supported": lambda *args, **kwargs: True,
                 "mem_get_info": lambda device: (80 * 10**9, 85 * 10**9)}
    with contextlib.ExitStack() as stack:
        stack.enter_context(mode)
        for name, function in methods.items():
            stack.enter_context(mock.patch.object(torch.Tensor, name, function))
        for name, function in functions.items():
            stack.enter_context(mock.patch(f"torch.cuda.{name}", function))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        yield mode


def on_gpu(config, mode):
    """The GPT of a TrainConfig with fake CUDA parameters."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily(), torch.device("meta"):
        model = GPT(config.gpt_config())
    for module in model.modules():
        for name, p in list(module._parameters.items()):
            if p is not None:
                fake = FakeTensor(mode, p.detach(), torch.device("cuda:0"))
                module._parameters[name] = torch.nn.Parameter(fake)
    model.transformer.wte.weight = model.lm_head.weight
    return model


def training(dtype, optimizer):
    """Devices of the optimizers' state, dtypes of the gradients, after a step of 2 micro-steps."""
    with fake_cuda() as mode:
        config = TrainConfig(**SIZES, optimizer=optimizer)
        model = on_gpu(config, mode)
        optimizers = model.configure_optimizers(
            config.lr, config.weight_decay, (config.beta1, config.beta2), config.optimizer,
            config.embd_lr_ratio)
        scaler = torch.amp.GradScaler("cuda", enabled=dtype == "float16")
        train_gpt2.train_step(0, model, model, optimizers, scaler, Loader(), 1e-3, 2, 1.0, dtype,
                              RANKS)
        devices = set()
        for optimizer in optimizers:
            for state in optimizer.state.values():
                devices |= {str(v.device) for v in state.values() if v.dim() > 0}
        return sorted(devices), sorted({str(p.grad.dtype) for p in model.parameters()})


def evaluation(dtype):
    with fake_cuda() as mode:
        model = on_gpu(TrainConfig(**SIZES), mode)
        return train_gpt2.evaluate_loss(model, Stream(), 8, 16, 600, dtype, RANKS)["val"]


def hellaswag(dtype):
    """Number of scores of three examples."""
    endings = [np.arange(3 + k, dtype=np.uint16) for k in range(4)]
    rows = [(np.arange(5, dtype=np.uint16), endings)] * 3
    with fake_cuda() as mode, mock.patch.object(torch.Tensor, "cpu", lambda tensor: tensor):
        return scorer.score(on_gpu(TrainConfig(**SIZES), mode), rows, dtype, RANKS)[0].size


def sampling(dtype, top_p):
    """Number of tokens, and their device, as in training and as in sample.py."""
    prompts = [[1, 2, 3], [4, 5]]
    with fake_cuda() as mode:
        model = on_gpu(TrainConfig(**SIZES), mode)
        graphed = sample.GraphedHidden(model.hidden)
        tokens = []
        with (runtime.autocast("cuda:0", dtype),
              mock.patch.object(sample, "cuda_graph", lambda function: (lambda: None, function()))):
            for hidden in (model.hidden, graphed):
                tokens += sample.stream(model, prompts, 4, None, top_p=top_p, hidden=hidden)
        return len(tokens), *sorted({str(token.device) for token in tokens})


def planted(where):
    """An error that the checks must find: a tensor that stayed on the CPU."""
    with fake_cuda() as mode:
        model, x = on_gpu(TrainConfig(**SIZES), mode), torch.zeros(2, 16, dtype=torch.long)
        if where == "targets":
            return model(x.to("cuda:0"), x)
        return model.transformer.wte(x.to("cuda:0")) + torch.zeros(2, 16, 32)


def main():
    checks = {}
    for dtype in runtime.DTYPES:
        for optimizer in ("adamw", "muon"):
            checks[f"train_step {dtype} {optimizer}"] = (training, dtype, optimizer)
        checks[f"evaluate_loss {dtype}"] = (evaluation, dtype)
        checks[f"score {dtype}"] = (hellaswag, dtype)
        checks[f"sample {dtype}"] = (sampling, dtype, 1.0)
        checks[f"sample top_p {dtype}"] = (sampling, dtype, 0.9)
    checks["planted targets"] = (planted, "targets")
    checks["planted positions"] = (planted, "positions")
    results = {}
    for name, (function, *args) in checks.items():
        try:
            results[name] = function(*args)
        except Exception as e:
            results[name] = f"{type(e).__name__}: {e}"
    print(json.dumps(results, default=str))
    sys.stdout.flush()
    os._exit(0)  # the made-up hooks cannot shut down


if __name__ == "__main__":
    main()
