"""
Training on more than one device: the process group, its collectives, and what each rank holds.

    ddp     every rank holds all weights, gradients and AdamW's two moments
    fsdp    all three are sharded (FSDP2, torch's fully_shard); a block's weights are gathered while
            it computes

With activation checkpointing a block keeps only its input and recomputes its activations in the
backward (Chen et al. 2016). None of these changes what is computed: losses agree up to rounding,
which training amplifies (docs/reliability.md), and checkpoints are interchangeable.
settings.estimate_memory estimates the memory of each.

torch.distributed.fsdp is imported only in the functions that use it: importing it takes half a
second.
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

from model import GPT
from run.cli import StopSignals, interpreter, print0
from run.runtime import autocast, choose_device, get_rng_state, set_rng_state

# -----------------------------------------------------------------------------
# the process group

@dataclass(frozen=True)
class Ranks:
    """This process's place among torchrun's; Ranks(0, 0, 1, device, False) without torchrun."""
    rank: int
    local_rank: int   # on this machine
    world_size: int
    device: str       # "cuda:0", "mps", "cpu"
    ddp: bool         # started by torchrun; True under fsdp, too

    @property
    def device_type(self):
        """What autocast takes: "cuda", never "cuda:0"."""
        return self.device.split(":")[0]

    @property
    def master_process(self):
        """Whether this rank prints and writes files."""
        return self.rank == 0


# Keeps a reference to the process group: gloo's destructor joins a thread that may need the global
# interpreter lock, which the thread that frees the group holds. Ranks hung at exit for this reason.
NEVER_FREED = []


def setup(device="auto", timeout_minutes=10):
    """The Ranks of this process; joins the process group, NCCL or gloo, if torchrun started it."""
    # fewer gaps in GPU memory; read when CUDA is first used
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    device = choose_device(device)
    num_gpus = torch.cuda.device_count()
    if "RANK" not in os.environ:
        if device == "cuda" and num_gpus > 1:
            print0(f"using one of {num_gpus} GPUs; ./train.sh uses all of them, as does"
                   f" {interpreter()} -m torch.distributed.run --standalone"
                   f" --nproc_per_node={num_gpus}")
        return Ranks(0, 0, 1, device, False)
    for name in ("LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"RANK is set, but not {name}, which torchrun sets, too: start several"
                             " processes with torchrun, or one with RANK unset")
    rank = int(os.environ["RANK"])
    local_rank = int(os.environ["LOCAL_RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    timeout = timedelta(minutes=timeout_minutes)
    one_gpu = "start one process without torchrun, which uses one GPU, or give --device cpu"
    if device in ("mps", "xpu"):
        raise ValueError(f"several processes cannot train on {device}: {one_gpu}")
    if device.startswith("cuda"):
        if local_rank >= num_gpus:
            raise ValueError(f"torchrun started {local_rank + 1} processes or more on this machine,"
                             f" which has {num_gpus} GPUs: --nproc_per_node={num_gpus}")
        if not dist.is_nccl_available():  # on Windows
            raise ValueError("this build of PyTorch has no NCCL, through which GPUs communicate:"
                             f" {one_gpu}")
        device = f"cuda:{local_rank}"
        # before init_process_group, which also takes the device: otherwise NCCL guesses it and may
        # hang
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=torch.device(device),
                                **store_of_this_start(timeout))
    else:
        dist.init_process_group("gloo", timeout=timeout, **store_of_this_start(timeout))
    NEVER_FREED.append(dist.group.WORLD)
    return Ranks(rank, local_rank, world_size, device, True)


def store_of_this_start(timeout):
    """Arguments of init_process_group: none, or a new store if torchrun may restart the ranks.

    With --max-restarts, torchrun's own store outlives its ranks (torch 2.11 to 2.14). Restarted
    ranks would read the addresses and the NCCL id that the previous ones left in it, and hang. So
    rank 0 opens another store and publishes its port in torchrun's.
    """
    if (os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
            or os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") == "0"):
        return {}
    host = os.environ["MASTER_ADDR"]
    rank = int(os.environ["RANK"])
    world_size = int(os.environ["WORLD_SIZE"])
    agent_store = dist.TCPStore(host, int(os.environ["MASTER_PORT"]), is_master=False,
                                timeout=timeout)
    if rank == 0:
        store = dist.TCPStore(host, 0, world_size, is_master=True, timeout=timeout,
                              wait_for_workers=False)
        agent_store.set("port of this start", str(store.port))
    else:
        deadline = time.monotonic() + timeout.total_seconds()
        port = int(agent_store.get("port of this start"))
        while not is_open(host, port):  # a previous rank 0 may have left it
            if time.monotonic() > deadline:
                raise ValueError(f"rank 0 opened no store on {host} within --timeout; see what it"
                                 " printed")
            time.sleep(0.1)
            port = int(agent_store.get("port of this start"))
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
    """Destroys the process group, if any. Not after an error: NCCL waits for the other ranks."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


# -----------------------------------------------------------------------------
# collectives; every rank must call them

def all_reduce_sum(tensor, ranks):
    """Sums tensor over the ranks, in place, and returns it."""
    if ranks.ddp:
        dist.all_reduce(tensor, op=dist.ReduceOp.SUM)  # gloo has no reliable AVG
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


def name_of_stop(ranks):
    """Name of a signal that a rank has received ("SIGTERM", ...), the same on every rank.

    Every rank must call it, once all know that there is one.
    """
    names = all_gather(StopSignals.received or "", ranks)
    return max(names)  # any one if the ranks received different signals


def stop_requested(ranks):
    """Name of a signal that any rank has received, or None: the same answer on every rank."""
    if not ranks.ddp:
        return StopSignals.received
    stops = torch.tensor(float(StopSignals.received is not None), device=ranks.device)
    return name_of_stop(ranks) if all_reduce_sum(stops, ranks) else None


# -----------------------------------------------------------------------------
# the model to train

def choose_compile(config, max_steps, resumed, ranks):
    """"on", "max" or "off": how to compile the training step, the same on every rank.

    --compile auto compiles if the run is long enough to pay for it. Nothing is compiled if a small
    function does not compile: Triton on a GPU and inductor on a CPU need a C compiler, and Triton
    Python's headers. That is an error in a new run with --compile on or max.
    """
    mode = config.compile
    if mode == "auto":
        if is_fsdp(config, ranks):
            print0("--parallel fsdp is not compiled unless --compile on asks for it")
            return "off"
        if ranks.device_type == "mps" or max_steps < 100:
            return "off"
        if config.dry_run and ranks.device_type != "cuda":
            return "off"  # it is not tried, and a CPU may have no compiler
        mode = "on"
    if mode == "off" or config.dry_run:
        return mode
    print0("trying torch.compile (the first time up to half a minute)")
    reasons = all_gather(compile_error(ranks.device), ranks)
    for rank in range(ranks.world_size):
        if reasons[rank]:
            message = f"torch.compile fails on this machine (rank {rank}): {reasons[rank]}"
            if config.compile != "auto" and not resumed:
                raise ValueError(f"{message}; --compile off trains without it")
            print0(f"training eagerly, {message}")
            return "off"
    return mode


def compile_error(device):
    """Why a small function does not compile; "" if it does."""
    def is_compiled(x):
        return x * 0 + 1 if torch.compiler.is_compiling() else x * 0
    try:
        result = torch.compile(is_compiled)(torch.ones(8, device=device))
    except Exception as e:  # of torch.compile's many layers
        return f"{type(e).__name__} {str(e).strip()[:160]!r}"
    if result[0] == 0:
        return "an environment variable such as TORCHDYNAMO_DISABLE turns it off"
    return ""


# --compile max: Triton's matmuls are timed beside cuBLAS's, and all kernels' tilings are searched
MAX_OPTIONS = {"max_autotune": True, "coordinate_descent_tuning": True}


def wrap(raw_model, config, B, ranks):
    """The module to train: raw_model compiled and wrapped in DDP, or sharded in place under fsdp.

    config: completed by make_plan. Call it before the optimizers are created.
    """
    compiled = config.compile != "off"
    if config.parallel == "fsdp" and not ranks.ddp:
        print0("--parallel fsdp is ignored on a single process; start several with torchrun")
    options = MAX_OPTIONS if config.compile == "max" else None
    for block in raw_model.transformer.h:
        if config.activation_checkpointing:
            block.forward = recompute_activations(block.forward, ranks.device_type)
        if is_fsdp(config, ranks) and compiled:
            # inside FSDP's hooks, which gather the weights
            block.forward = torch.compile(block.forward, options=options)
    if is_fsdp(config, ranks):
        shard(raw_model, ranks)
        return raw_model
    model = raw_model
    if compiled:
        if raw_model.loss_chunks > 1:
            # inductor would sum the chunks' gradients of the lm_head in one kernel, for which it
            # keeps all of them
            raw_model.chunked_loss = torch.compiler.disable(raw_model.chunked_loss)
        model = torch.compile(raw_model, options=options)
    if ranks.ddp:
        device_ids = [ranks.local_rank] if ranks.device_type == "cuda" else None
        model = DDP(model, device_ids=device_ids, gradient_as_bucket_view=True)
    if compiled:
        warm_up(model, raw_model, config, B, ranks)
        # the garbage collector then skips the 400,000 objects of the compiler: a pause of 0.4 s
        # (measured) now and then
        gc.collect()
        gc.freeze()
    return model


def warm_up(model, raw_model, config, B, ranks):
    """Compiles model by one forward and backward, before the first step; then a barrier.

    DDP splits the compiled graph between its gradient buckets, so that it reduces one while the
    backward computes the next; it does so only for what is compiled inside it. In no_sync() it
    reduces nothing here.
    """
    print0("compiling ...")
    start = time.time()
    rng_state = get_rng_state(ranks.device)
    # random tokens: Triton times its kernels on them, and equal ones would all add to one row of
    # the embedding's gradient. One tensor for both x and y would recompile later.
    vocab_size = raw_model.config.vocab_size
    x = torch.randint(vocab_size, (B, config.block_size), device=ranks.device)
    y = torch.randint(vocab_size, (B, config.block_size), device=ranks.device)
    with model.no_sync() if ranks.ddp else contextlib.nullcontext():
        with autocast(ranks.device, config.dtype):
            loss = model(x, y)[1]
        loss.backward()
    raw_model.zero_grad(set_to_none=True)
    set_rng_state(rng_state, ranks.device)
    barrier(ranks)
    print0(f"compiled in {time.time() - start:.1f} s")


def recompute_activations(forward, device_type):
    """forward, storing only its arguments; the backward recomputes activations.

    The recomputation draws the same random numbers.
    """
    def checkpointed(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        # autocast would cache the cast weights until the region ends; a block uses each only once,
        # and they are large
        with torch.autocast(device_type, torch.get_autocast_dtype(device_type),
                            torch.is_autocast_enabled(device_type), cache_enabled=False):
            return recompute_in_backward(forward, *args, use_reentrant=False)
    return checkpointed


def is_fsdp(config, ranks):
    """Whether the weights are sharded; the model is then built on the CPU."""
    return config.parallel == "fsdp" and ranks.ddp


def shard(raw_model, ranks):
    """Replaces every parameter by this rank's shard, a DTensor on its device; in place.

    Gradients are reduce-scattered in every micro-step; otherwise each rank would hold them
    unsharded. Weights are gathered in float32 and autocast casts them, as in DDP; FSDP's
    MixedPrecisionPolicy would also compute the LayerNorms and the residual stream in 16 bits. The
    cost is twice the bytes in each gather.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(ranks.device_type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32)
    # the root last: it takes wpe, ln_f, wte and lm_head
    for module in (*raw_model.transformer.h, raw_model):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        if ranks.device_type == "cpu":
            # gloo has no reliable mean: SUM, then divide
            module.set_force_sum_reduction_for_comms(True)


def clip_grad_norm(raw_model, max_norm):
    """Clips the gradient's norm to max_norm (0: not), in place; returns the norm before."""
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm or float("inf"))
    return unsharded_tensor(norm)  # a scalar


# -----------------------------------------------------------------------------
# unsharded tensors: for evaluation, and for checkpoints that any number of ranks can load

def is_sharded(tensor):
    """Whether a tensor is a DTensor, each rank holding a shard of it."""
    return hasattr(tensor, "full_tensor")


def unsharded_tensor(tensor):
    """A detached tensor with all of its elements; every rank must call it for a sharded one."""
    if is_sharded(tensor):
        tensor = tensor.full_tensor()
    return tensor.detach()


def unsharded_model(raw_model):
    """The model to evaluate and sample from: raw_model, or under fsdp an unsharded copy of it.

    Every rank must call it. The copy, of 4 bytes per parameter, has no collectives in its forward:
    ranks may run different numbers of batches, or call parts of the model.
    """
    if not is_sharded(raw_model.lm_head.weight):
        return raw_model
    with torch.device("meta"):
        model = GPT(raw_model.config)
    # named_parameters names the tied weight once
    weights = {name: unsharded_tensor(p) for name, p in raw_model.named_parameters()}
    model.load_state_dict(weights, strict=False, assign=True)
    model.lm_head.weight = model.transformer.wte.weight
    model.loss_chunks = raw_model.loss_chunks
    return model.train(raw_model.training)


def copy_to_cpu(tensor):
    """A copy in CPU memory; of a GPU's tensor in pinned memory, which is several times as fast.

    Pinning fails where it is limited, as in WSL 2 and in some containers.
    """
    try:
        copy = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    except RuntimeError:
        copy = torch.empty_like(tensor, device="cpu")
    return copy.copy_(tensor)


def full_state(raw_model, optimizers, ranks):
    """(raw_model's state dict, [state dict of each optimizer]), unsharded copies on the CPU.

    Every rank must call it; only rank 0 gets the values. Sharded tensors are gathered one by one:
    no device holds all of them.
    """
    def collect(tensor):
        tensor = unsharded_tensor(tensor)
        return copy_to_cpu(tensor) if ranks.master_process else None

    weights = {name: collect(p) for name, p in raw_model.named_parameters()}
    # named_parameters names the tied wte and lm_head once, a state dict twice
    wte = weights["transformer.wte.weight"]
    weights = {name: weights.get(name, wte) for name in raw_model.state_dict()}
    states = []
    for optimizer in optimizers:
        state_dict = optimizer.state_dict()
        state = {}
        for i, tensors in state_dict["state"].items():
            state[i] = {name: collect(tensor) for name, tensor in tensors.items()}
        states.append({"state": state, "param_groups": state_dict["param_groups"]})
    return weights, states


def load_full_optimizer_state(optimizers, saved):
    """Loads the optimizers' state dicts of full_state; under fsdp each rank keeps its shards.

    Learning rates, betas and weight decay stay those that the optimizers were created with.
    ValueError for the state of another model.
    """
    for optimizer, full_state_dict in zip(optimizers, saved, strict=True):
        # in the order in which a state dict numbers them
        params = [p for group in optimizer.param_groups for p in group["params"]]
        state = {}
        for i, tensors in full_state_dict["state"].items():
            for name, tensor in tensors.items():
                # the fused AdamW would write out of bounds; its "step" is a scalar
                if tensor.shape not in (params[i].shape, ()):
                    raise ValueError(f"{name} of parameter {i} in the checkpoint has another shape"
                                     " than the parameter; resume an older checkpoint, or start"
                                     " over with another --exp-name")
            state[i] = {name: shard_like(tensor, params[i]) for name, tensor in tensors.items()}
        param_groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state, "param_groups": param_groups})


def shard_like(tensor, p):
    """This rank's shard of a CPU tensor if p is sharded and the tensor has its shape.

    Training on a CPU gets a copy: a tensor that maps its file would keep a pruned checkpoint on the
    disk until the run ends.
    """
    if is_sharded(p) and tensor.shape == p.shape:
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements,
                                 src_data_rank=None)
    return tensor.clone() if p.device.type == "cpu" else tensor
