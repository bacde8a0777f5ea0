"""
Runs train_gpt2.main() with a CUDA that is the CPU, alone or as rank 0 of W, and counts what it asks
of CUDA and NCCL.

    python tests/gpu/pretend_cuda.py WORLD_SIZE [flags of train_gpt2.py]

Every branch for CUDA runs, on real numbers: "cuda" becomes "cpu" in each call of a torch function,
and the process group is torch's fake one, which returns at once. The last line of the output is
JSON:

    status         exit status
    graphs         number of graphs that torch.compile captured
    first          the first call of torch.cuda, torch.distributed or torch.compile
    calls          {name: number of calls} of the whole run
    step           the same for one turn of the loop without evaluations, from one train_step to
                   the next
    micro_steps    grad_accum_steps of that step
    ddp            arguments of DistributedDataParallel
    backward       of the last step: b where a compiled backward graph ends, R where DDP reduces a
                   bucket of gradients
"""
import collections
import contextlib
import json
import os
import sys
from unittest import mock

import torch
import torch._dynamo
import torch.distributed as dist
from torch._dynamo.backends.common import aot_autograd
from torch.overrides import TorchFunctionMode
from torch.testing._internal.distributed.fake_pg import FakeStore

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
import train_gpt2  # noqa: E402
from run import cli, parallel  # noqa: E402

calls, order, steps, report = collections.Counter(), [], [], {}
# wait for the GPU
WAITS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "nonzero")


def count(name):
    calls[name] += 1
    order.append(name)


def on_cpu(value):
    """value, or "cpu" for a CUDA device."""
    if isinstance(value, (str, torch.device)) and str(value).split(":")[0] == "cuda":
        return torch.device("cpu") if isinstance(value, torch.device) else "cpu"
    return value


class CudaIsCpu(TorchFunctionMode):
    """Moves every call of a torch function from CUDA to the CPU; counts those that would wait."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in WAITS:
            count(f"wait: {name}")
        if func is torch.tensor and on_cpu(kwargs.get("device")) == "cpu":
            count("wait: torch.tensor")  # a copy from memory that is not pinned
        if func is torch.device:
            return func(*args, **kwargs)
        return func(*map(on_cpu, args), **{key: on_cpu(value) for key, value in kwargs.items()})


def counted(name, result=None):
    """A function that counts its calls; its result is result, or what result returns."""
    def function(*args, **kwargs):
        count(name)
        return result(*args, **kwargs) if callable(result) else result
    return function


def init_process_group(backend, **kwargs):
    count("init_process_group")
    report["backend"], report["device_id"] = backend, str(kwargs.get("device_id"))
    real["init_process_group"]("fake", store=FakeStore(), rank=0, world_size=WORLD_SIZE)


def finished(_, bucket):
    """A communication hook: the fake process group's futures hold no tensors, which DDP needs."""
    count("bucket")
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


class CountedDDP(parallel.DDP):
    def __init__(self, module, device_ids=None, **kwargs):
        count("DDP")
        report["ddp"] = {"device_ids": device_ids, **kwargs}
        super().__init__(module, **kwargs)
        self.register_comm_hook(None, finished)


def train_step(*args):
    steps.append(collections.Counter(calls))
    report["start"] = len(order)
    report["micro_steps"] = args[7]
    return real["train_step"](*args)


def backward_graph(graph, _):
    """Compiles a graph of the backward to itself, with a mark of its end."""
    def run(*args):
        result = graph(*args)
        order.append("backward graph")
        return result
    return run


WORLD_SIZE = int(sys.argv[1])
FREE_MEMORY = int(os.environ.get("PRETEND_MEMORY", 80 * 10**9))
COUNTING = aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=backward_graph)
COLLECTIVES = ("all_reduce", "all_gather_object", "barrier", "broadcast",
               "destroy_process_group")
real = {name: getattr(dist, name) for name in (*COLLECTIVES, "init_process_group")}
real |= {"train_step": train_gpt2.train_step, "compile": torch.compile,
         "Generator": torch.Generator}
cuda = {
    "is_available": lambda: True,
    "device_count": lambda: 8,
    "get_device_name": lambda device=None: "NVIDIA H100 80GB HBM3",
    "get_device_capability": lambda device=None: (9, 0),
    "get_arch_list": lambda: ["sm_90"],
    "mem_get_info": lambda device=None: (FREE_MEMORY, 85 * 10**9),
    "is_bf16_supported": lambda *args, **kwargs: "PRETEND_T4" not in os.environ,
    "set_device": lambda device: count(f"set_device {torch.cuda._utils._get_device_index(device)}"),
    "synchronize": lambda device=None: count("wait: synchronize"),
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "manual_seed_all": lambda seed: None,
    "is_current_stream_capturing": lambda: False,
    "amp.common.amp_definitely_not_available": lambda: False,
}


def main():
    if WORLD_SIZE > 1:
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE=str(WORLD_SIZE),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    patches = [mock.patch(f"torch.cuda.{name}", function) for name, function in cuda.items()]
    for name in COLLECTIVES:
        result = None if name == "barrier" else real[name]
        patches.append(mock.patch.object(dist, name, counted(name, result)))
    chunked_loss = counted("chunked_loss", train_gpt2.GPT.chunked_loss)
    pin_memory = counted("pin_memory", lambda tensor: tensor)
    # without a code generator: the graphs run eagerly
    compile_ = counted("compile", lambda model, **_: real["compile"](model, backend=COUNTING))
    patches += [
        mock.patch.object(train_gpt2.GPT, "chunked_loss", chunked_loss),
        mock.patch.object(dist, "init_process_group", init_process_group),
        mock.patch.object(dist, "is_nccl_available", lambda: True),
        mock.patch.object(parallel, "DDP", CountedDDP),
        mock.patch.object(train_gpt2, "train_step", train_step),
        mock.patch("torch.compile", compile_),
        mock.patch("torch.Generator", lambda device="cpu": real["Generator"]("cpu")),
        # in the prefetch thread, where no TorchFunctionMode is active
        mock.patch.object(torch.Tensor, "pin_memory", pin_memory),
        # None as in a CPU build; in a CUDA build it is cuda, whose current stream the optimizers
        # ask for, which fails without a driver
        mock.patch("torch.accelerator.current_accelerator", lambda check_available=False: None),
        # Dynamo would ask the pretended GPU for its properties
        mock.patch("torch.utils._triton.has_triton_package", lambda: False),
    ]
    sys.argv = ["train_gpt2.py", *sys.argv[2:]]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(CudaIsCpu())
        try:
            cli.run_and_report(train_gpt2.main)
        except SystemExit as e:
            report["status"] = e.code or 0
    marks = {"backward graph": "b", "bucket": "R"}
    report["backward"] = "".join(marks.get(name, "") for name in order[report.pop("start", 0):])
    report.update(graphs=torch._dynamo.utils.counters["stats"]["unique_graphs"], first=order[0],
                  calls=calls, step=steps[-1] - steps[-2] if len(steps) > 1 else {})
    print(json.dumps(report), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
