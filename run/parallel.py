"""
Training on more than one device: the process group, its collectives, and what each rank holds.

    ddp     every rank holds all weights, gradients and AdamW's two moments
    zero    the moments are sharded (ZeRO stage 1, Rajbhandari et al. 2020); the rest as in ddp
    fsdp    weights, gradients and moments are sharded (FSDP2, torch's fully_shard); a block's weights are gathered
            while it computes

With activation checkpointing a block keeps only its input and recomputes its activations in the backward (Chen et al.
2016). None of these changes what is computed: losses agree up to rounding, which training amplifies (docs/reliability.md), and
checkpoints are interchangeable.
plan.estimate_memory estimates the memory of each.

torch.distributed.fsdp is imported only in the functions that use it: importing it takes half a second.
"""
import contextlib
import gc
import os
import socket
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recompute_in_backward

from run.cli import StopSignals, print0
from model import GPT
from run.runtime import autocast, choose_device, get_rng_state, set_rng_state

# -----------------------------------------------------------------------------
# the process group

@dataclass(frozen=True)
class Ranks:
    """This process's place among the processes of torchrun; Ranks(0, 0, 1, device, False) without torchrun."""
    rank: int
    local_rank: int   # on this machine
    world_size: int
    device: str       # "cuda:0", "mps", "cpu"
    ddp: bool         # started by torchrun

    @property
    def device_type(self):
        """What autocast takes: "cuda", never "cuda:0"."""
        return self.device.split(":")[0]

    @property
    def master_process(self):
        """Whether this rank prints and writes files."""
        return self.rank == 0


# The process group: gloo's destructor joins a thread that may need the global interpreter lock, which the thread that
# frees the group (or a DDP module that uses it) holds. Ranks hung so at their exit.
NEVER_FREED = []


def setup(device="auto", timeout_minutes=10):
    """The Ranks of this process; joins the process group if torchrun started it (NCCL on CUDA, gloo otherwise)."""
    # fewer gaps in GPU memory; read when CUDA is first used
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    device = choose_device(device)
    ddp = "RANK" in os.environ
    if not ddp:
        if device == "cuda" and (n := torch.cuda.device_count()) > 1:
            print0(f"using one of {n} GPUs; torchrun --standalone --nproc_per_node={n} uses all of them, as does ./train.sh")
        return Ranks(0, 0, 1, device, False)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")  # what torchrun sets
    values = [os.environ.get(name, "") for name in names]
    if not (all(value.isdecimal() for value in values[:4]) and values[4] and int(values[0]) < int(values[2])):
        raise ValueError("the environment is not torchrun's: " + ", ".join(f"{n}={v!r}" for n, v in zip(names, values))
                         + "; start several processes with torchrun, or one with RANK unset")
    rank, local_rank, world_size = map(int, values[:3])
    timeout = timedelta(minutes=timeout_minutes)
    if device == "mps":
        raise ValueError("torchrun's processes cannot communicate on Apple's GPU: start one process without torchrun, or give"
                         " --device cpu")
    if device.startswith("cuda"):
        if local_rank >= torch.cuda.device_count():
            raise ValueError(f"torchrun started {local_rank + 1} processes or more on this machine, which has"
                             f" {torch.cuda.device_count()} GPUs: --nproc_per_node={torch.cuda.device_count()}")
        device = f"cuda:{local_rank}"
        # before init_process_group, which also takes the device: otherwise NCCL guesses it and may hang
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=torch.device(device), **store_of_this_start(timeout))
    else:
        dist.init_process_group("gloo", timeout=timeout, **store_of_this_start(timeout))
    NEVER_FREED.append(dist.group.WORLD)
    return Ranks(rank, local_rank, world_size, device, True)


def store_of_this_start(timeout):
    """Arguments of init_process_group: none, or a new store if torchrun may restart the ranks (--max-restarts).

    torchrun's own store outlives its ranks (torch 2.11 to 2.13). Restarted ranks would read the addresses and the NCCL
    id that the previous ones left in it, and hang. So rank 0 opens another store and publishes its port in torchrun's.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0":
        return {}
    host, rank, world_size = os.environ["MASTER_ADDR"], int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torchruns = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False, timeout=timeout)
    if rank == 0:
        store = dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        torchruns.set("port of this start", str(store.port))
    else:
        deadline = time.monotonic() + timeout.total_seconds()
        while not is_open(host, port := int(torchruns.get("port of this start"))):  # a previous rank 0 may have left it
            if time.monotonic() > deadline:
                raise ValueError(f"rank 0 opened no store on {host} within --timeout; see what it printed")
            time.sleep(0.1)
        store = dist.TCPStore(host, port, world_size, is_master=False, timeout=timeout)
    return {"store": store, "rank": rank, "world_size": world_size}


def is_open(host, port):
    """Whether a process listens on a TCP port."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except OSError:
        return False
    return True


def teardown():
    """Destroys the process group, if there is one. Not for use after an error: NCCL waits for the other ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# collectives; every rank must call them

def all_reduce_sum(tensor, ranks):
    """Sums tensor over the ranks, in place, and returns it. SUM works on every backend; gloo has no reliable AVG."""
    if ranks.ddp:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)
    return tensor


def all_gather(value, ranks):
    """[value of rank 0, value of rank 1, ...]; for picklable values and CPU tensors."""
    if not ranks.ddp:
        return [value]
    values = [None] * ranks.world_size
    dist.all_gather_object(values, value)
    return values


def barrier(ranks):
    """Waits until every rank has called it."""
    if ranks.ddp:
        dist.barrier()


@contextlib.contextmanager
def rank0_first(ranks):
    """Runs the body on rank 0, then on the others, which find what rank 0 wrote to disk."""
    if not ranks.master_process:
        barrier(ranks)
    yield
    if ranks.master_process:
        barrier(ranks)


def is_stop_requested():
    """Whether this rank has received a signal: 1.0 or 0.0."""
    return float(StopSignals.received is not None)


def name_of_stop(ranks):
    """Name of a signal that a rank has received ("SIGTERM", ...), the same on every rank, once all know that there is one."""
    return max(all_gather(StopSignals.received or "", ranks))  # any one if the ranks received different signals


def stop_requested(ranks):
    """Name of a signal that any rank has received, or None: the same answer on every rank."""
    stops = all_reduce_sum(torch.tensor(is_stop_requested(), device=ranks.device), ranks) if ranks.ddp else is_stop_requested()
    return name_of_stop(ranks) if stops else None


# -----------------------------------------------------------------------------
# the model to train

def should_compile(config, steps, ranks):
    """Whether to compile the training step, the same on every rank, before anything depends on it; steps: left in the run.

    --compile auto compiles if the run is long enough to pay for it and a small function compiles: Triton on a GPU and
    inductor on a CPU need a C compiler, and Triton Python's headers. Otherwise a message is printed.
    """
    if config.compile != "auto":
        return config.compile != "off"
    if is_fsdp(config, ranks) or ranks.device_type == "mps" or steps < 100:
        return False
    if config.dry_run:
        return ranks.device_type == "cuda"
    reason = ""
    try:
        torch.compile(lambda x: x * 2 + 1)(torch.ones(8, device=ranks.device))
    except Exception as e:  # of torch.compile's many layers
        reason = f"{type(e).__name__} {str(e).strip()[:160]!r}"
    reasons = {rank: reason for rank, reason in enumerate(all_gather(reason, ranks)) if reason}
    for rank, reason in list(reasons.items())[:1]:
        print0(f"torch.compile fails on this machine (rank {rank}), training eagerly: {reason}")
    return not reasons


# --compile max: Triton's matmuls are timed beside cuBLAS's, and all kernels' tilings are searched
MAX_OPTIONS = {"max_autotune": True, "coordinate_descent_tuning": True}


def wrap(raw_model, config, compiled, B, dtype, ranks):
    """The module to train: raw_model compiled and wrapped in DDP, or under fsdp raw_model itself, sharded in place.

    compiled: from should_compile. Call it before the optimizers are created.
    """
    if config.parallel != "ddp" and not ranks.ddp:
        print0(f"--parallel {config.parallel} is ignored on a single process; start several with torchrun")
    options = MAX_OPTIONS if config.compile == "max" else None
    for block in raw_model.transformer.h:
        if config.activation_checkpointing:
            block.forward = recompute_activations(block.forward, ranks.device_type)
        if is_fsdp(config, ranks) and compiled:
            block.forward = torch.compile(block.forward, options=options)  # inside FSDP's hooks, which gather the weights
    if is_fsdp(config, ranks):
        if config.compile == "auto":
            print0("--parallel fsdp is not compiled unless --compile on asks for it (block by block)")
        shard(raw_model, ranks)
        return raw_model
    if compiled and raw_model.loss_chunks > 1:
        # inductor would sum the chunks' gradients of the lm_head in one kernel, for which it keeps all of them
        raw_model.chunked_loss = torch.compiler.disable(raw_model.chunked_loss)
    model = torch.compile(raw_model, options=options) if compiled else raw_model
    if ranks.ddp:
        device_ids = [ranks.local_rank] if ranks.device_type == "cuda" else None
        model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True)
    if compiled:
        warm_up(model, raw_model, B, config.block_size, dtype, ranks)
        # the garbage collector then skips the 400,000 objects of the compiler: a pause of 0.4 s (measured) now and then
        gc.collect()
        gc.freeze()
    return model


def warm_up(model, raw_model, B, T, dtype, ranks):
    """Compiles model by one forward and backward, before the first step; then every rank waits for the others.

    DDP splits the compiled graph between its gradient buckets, so that it reduces one while the backward computes the
    next; it does so only for what is compiled inside it. In no_sync() it reduces nothing here.
    """
    print0("compiling ...")
    start, rng_state = time.time(), get_rng_state(ranks.device)
    # one tensor for both x and y would recompile later
    x, y = (torch.zeros((B, T), dtype=torch.long, device=ranks.device) for _ in range(2))
    with model.no_sync() if ranks.ddp else contextlib.nullcontext():
        with autocast(ranks.device, dtype):
            loss = model(x, y)[1]
        loss.backward()
    raw_model.zero_grad(set_to_none=True)
    set_rng_state(rng_state, ranks.device)
    barrier(ranks)
    print0(f"compiled in {time.time() - start:.1f} s")


def recompute_activations(forward, device_type):
    """forward, storing only its arguments; the backward recomputes activations, with the same random numbers."""
    def checkpointed(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        # autocast would cache the cast weights until the region ends; a block uses each only once, and they are large
        with torch.autocast(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type),
                            cache_enabled=False):
            return recompute_in_backward(forward, *args, use_reentrant=False)
    return checkpointed


def is_fsdp(config, ranks):
    """Whether the weights are sharded. The model is then built on the CPU: it need not fit on one device."""
    return config.parallel == "fsdp" and ranks.ddp


def shard(raw_model, ranks):
    """Replaces every parameter by this rank's shard of it, a DTensor on its device; block by block, in place.

    Gradients are reduce-scattered in every micro-step; otherwise each rank would hold them unsharded. Weights are
    gathered in float32 and autocast casts them, as in DDP; FSDP's MixedPrecisionPolicy would also compute the
    LayerNorms and the residual stream in 16 bits. The cost is twice the bytes in each gather.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(ranks.device_type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32)
    for module in (*raw_model.transformer.h, raw_model):  # the root last: it takes wpe, ln_f, wte and lm_head
        fully_shard(module, mesh=mesh, mp_policy=policy)
        if ranks.device_type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # gloo has no reliable mean: SUM, then divide


def make_optimizers(raw_model, config, ranks):
    """The list of raw_model's optimizers; under zero each rank updates a part of the parameters and broadcasts it."""
    optimizers = raw_model.configure_optimizers(config.lr, config.weight_decay, (config.beta1, config.beta2),
                                                config.optimizer, config.embd_lr_ratio)
    if config.parallel != "zero" or not ranks.ddp:
        return optimizers
    from torch.distributed.optim import ZeroRedundancyOptimizer
    adamw, = optimizers  # TrainConfig does not allow others
    defaults = {name: value for name, value in adamw.defaults.items() if name != "decoupled_weight_decay"}  # AdamW sets it
    return [ZeroRedundancyOptimizer(adamw.param_groups, torch.optim.AdamW, **defaults)]


def clip_grad_norm(raw_model, max_norm):
    """Clips the norm of the gradient to max_norm (0: not), in place; returns the norm before, an unsharded scalar tensor."""
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm or float("inf"))
    return norm.full_tensor() if is_sharded(norm) else norm


# -----------------------------------------------------------------------------
# unsharded tensors: for evaluation, and for checkpoints that any number of ranks can load

def is_sharded(tensor):
    """Whether a tensor is a DTensor, each rank holding a shard of it."""
    return hasattr(tensor, "full_tensor")


def unsharded_tensor(tensor):
    """A detached tensor with all of its elements; every rank must call it for a sharded one."""
    return (tensor.full_tensor() if is_sharded(tensor) else tensor).detach()


def unsharded_model(raw_model):
    """The model to evaluate and sample from: raw_model, or an unsharded copy of it under fsdp. Every rank must call it.

    The copy, of 4 bytes per parameter, has no collectives in its forward: ranks may run different numbers of batches, or
    call parts of the model.
    """
    if not is_sharded(raw_model.lm_head.weight):
        return raw_model
    with torch.device("meta"):
        model = GPT(raw_model.config)
    weights = {name: unsharded_tensor(p) for name, p in raw_model.named_parameters()}  # names the tied weight once
    model.load_state_dict(weights, strict=False, assign=True)
    model.lm_head.weight, model.loss_chunks = model.transformer.wte.weight, raw_model.loss_chunks
    return model.train(raw_model.training)


def params_of(optimizer):
    """The parameters of an optimizer, in the order in which its state_dict numbers them."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gather_zero(optimizer, ranks):
    """{parameter's number: {name: tensor}} of all ranks' optimizer states, on rank 0's CPU; one tensor at a time."""
    params, states, device = params_of(optimizer), optimizer.optim.state, ranks.device
    shapes = [{name: v.shape for name, v in states[p].items()} if p in states else {} for p in params]
    shapes, gathered = all_gather(shapes, ranks), {}
    for i, p in enumerate(params):
        for owner in range(ranks.world_size):
            for name, shape in shapes[owner][i].items():
                tensor = states[p][name].to(device) if owner == ranks.rank else torch.empty(shape, device=device)
                dist.broadcast(tensor, src=owner)
                if ranks.master_process:
                    # a copy of this rank's own tensor, which the next update changes; what was received is already one
                    gathered.setdefault(i, {})[name] = tensor.to("cpu", copy=owner == ranks.rank)
    return gathered


def copy_to_cpu(tensor):
    """A copy of a tensor in CPU memory, from a GPU in pinned memory, which is several times as fast to copy to."""
    return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda, requires_grad=False).copy_(tensor)


def snapshot(value):
    """value with every tensor in it copied to CPU memory; training may then change the originals.

    Tensors that share memory (the tied wte and lm_head) share it in the copy.
    """
    copies = {}

    def copy(v):
        if isinstance(v, torch.Tensor):
            key = (v.data_ptr(), v.shape, v.stride(), v.dtype) if v.numel() else id(v)
            if key not in copies:
                copies[key] = copy_to_cpu(v.detach())
            return copies[key]
        if isinstance(v, dict):
            return {k: copy(item) for k, item in v.items()}
        return type(v)(copy(item) for item in v) if isinstance(v, (list, tuple)) else v
    return copy(value)


def full_state(raw_model, optimizers, ranks):
    """(raw_model's state dict, [state dict of each optimizer]) with unsharded tensors, copied to the CPU.

    Every rank must call it; only rank 0 gets the values. Sharded tensors are gathered one by one: no device holds all
    of them.
    """
    def collect(value):
        if isinstance(value, dict):
            return {name: collect(v) for name, v in value.items()}
        if not is_sharded(value):
            return snapshot(value) if ranks.master_process else None
        tensor = unsharded_tensor(value)
        return copy_to_cpu(tensor) if ranks.master_process else None

    weights = collect({name: p.detach() for name, p in raw_model.named_parameters()})
    # named_parameters names the tied wte and lm_head once, a state dict twice
    weights = {name: weights.get(name, weights["transformer.wte.weight"]) for name in raw_model.state_dict()}
    states = []
    for optimizer in optimizers:
        state = torch.optim.Optimizer.state_dict(optimizer)  # ZeRO's would gather everything on every device
        gathered = gather_zero(optimizer, ranks) if hasattr(optimizer, "optim") else collect(state["state"])
        states.append({"state": gathered, "param_groups": state["param_groups"]})
    return weights, states


# names of the state of each parameter, by the optimizer's class
MOMENTS = {"AdamW": ("step", "exp_avg", "exp_avg_sq"), "ZeroRedundancyOptimizer": ("step", "exp_avg", "exp_avg_sq"),
           "Muon": ("momentum_buffer",)}


def check_optimizer_state(optimizer, saved):
    """Raises ValueError unless saved, a state dict, has all states of all parameters, or none at all: no step was made."""
    def kind(tensor):  # the fused AdamW writes out of bounds if one differs
        return tensor.shape, tensor.dtype, tensor.layout, tensor.device.type

    expected = [{name: (() if name == "step" else p.shape, torch.float32, torch.strided, "cpu")
                 for name in MOMENTS[type(optimizer).__name__]} for p in params_of(optimizer)]
    try:
        found = [{name: kind(v) for name, v in saved["state"][i].items()} for i in range(len(saved["state"]))]
    except (KeyError, TypeError, AttributeError):
        found = None
    if found not in ([], expected) or not isinstance(saved["state"], dict):
        raise ValueError(f"the state of {type(optimizer).__name__} in the checkpoint does not fit the model; --resume an older"
                         " checkpoint, or start over with another --exp-name")


def load_full_optimizer_state(optimizers, saved):
    """Loads the optimizers' state dicts of full_state; each rank keeps its part.

    Learning rates, betas and weight decay stay those that the optimizers were created with. ValueError if a state does not fit.
    """
    if len(saved) != len(optimizers):
        raise ValueError(f"the checkpoint has the state of {len(saved)} optimizers, this run has {len(optimizers)}")
    for optimizer, full_state_dict in zip(optimizers, saved):
        check_optimizer_state(optimizer, full_state_dict)
        mine = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's AdamW of this rank's parameters
        numbers = {p: i for i, p in enumerate(params_of(optimizer))}
        state, groups, n = {}, [], 0
        for group in mine.param_groups:
            groups.append({**group, "params": list(range(n, n + len(group["params"])))})
            for p in group["params"]:
                state[n] = {name: shard_like(v, p) for name, v in full_state_dict["state"].get(numbers[p], {}).items()}
                n += 1
        mine.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})


def shard_like(tensor, p):
    """This rank's shard of a CPU tensor, on p's device, if p is sharded and the tensor has its shape.

    Training on a CPU gets a copy: a tensor that maps its file would keep a pruned checkpoint on the disk until the run ends.
    """
    if not is_sharded(p) or tensor.shape != p.shape:
        return tensor.clone() if p.device.type == "cpu" else tensor
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
