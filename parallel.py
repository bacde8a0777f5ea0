"""
Training on more than one device: what the ranks share out, and full checkpoints of it.

    ddp     every rank holds all: weights, gradients, AdamW's two moments
    zero    the moments are shared out (ZeRO stage 1; Rajbhandari et al. 2020), the rest is as in ddp
    fsdp    weights, gradients and moments are shared out (FSDP2, torch's fully_shard); a block's weights are gathered
            for as long as it computes

and with activation checkpointing a block keeps only its input, and computes the rest again when its gradient is due
(Chen et al. 2016). None of them changes what is computed: losses agree to rounding, and a checkpoint is the same file.
config.py's estimate_memory says what each needs.
"""
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint as recompute

from checkpoint import snapshot
from model import GPT
from runtime import all_gather, barrier, compile_for_training, print0


def recomputed(forward, device_type):
    """forward, keeping nothing but its arguments for the backward, which runs it again with the same random numbers."""
    def checkpointed(*args):
        if not torch.is_grad_enabled():
            return forward(*args)
        # autocast keeps the weights that it casts until it is left, for the next use: here there is none, and they are large
        with torch.autocast(device_type, torch.get_autocast_dtype(device_type), torch.is_autocast_enabled(device_type),
                            cache_enabled=False):
            return recompute(forward, *args, use_reentrant=False)
    return checkpointed


def shard(raw_model, ranks):
    """Leaves each rank its part of every parameter (a DTensor), block by block, on its device; in place.

    Gradients are summed over the ranks in every micro-step: until then, each rank would have to hold them whole.
    Weights are gathered in float32, and autocast casts them as it does in DDP: cast by FSDP's MixedPrecisionPolicy, a
    block's LayerNorms and its residual stream would be 16 bits wide too. The price is a gather of twice the bytes.
    """
    mesh = init_device_mesh(ranks.device_type, (ranks.world_size,))
    policy = MixedPrecisionPolicy(param_dtype=None, reduce_dtype=torch.float32)
    for module in (*raw_model.transformer.h, raw_model):  # the root last: it takes the rest, the tied wte and lm_head in it
        fully_shard(module, mesh=mesh, mp_policy=policy)
        if ranks.device_type == "cpu":
            module.set_force_sum_reduction_for_comms(True)  # gloo has no mean to rely on; SUM, then divide


def is_fsdp(config, ranks):
    """Whether the weights are to be shared out; the model is then built on the CPU, for it need not fit on one device."""
    return config.parallel == "fsdp" and ranks.ddp


def wrap(raw_model, config, steps, B, dtype, ranks):
    """The module to train: raw_model with what the config asks for. Under fsdp raw_model itself, now sharded.

    steps: of the run, which torch.compile is worth it for or not. Call it before the optimizers are made.
    """
    if config.parallel != "ddp" and not ranks.ddp:
        print0(f"one process has nobody to share with: --parallel {config.parallel} does nothing without torchrun")
    for block in raw_model.transformer.h:
        if config.activation_checkpointing:
            block.forward = recomputed(block.forward, ranks.device_type)
        if is_fsdp(config, ranks) and config.compile == "on":
            block.forward = torch.compile(block.forward)  # inside what gathers the weights
    if is_fsdp(config, ranks):
        if config.compile == "auto":
            print0("--parallel fsdp is not compiled unless --compile on asks for it (block by block)")
        shard(raw_model, ranks)
        return raw_model
    model = compile_for_training(raw_model, config.compile, steps, B, config.sequence_length, dtype, ranks.device)
    if not ranks.ddp:
        return model
    barrier(ranks)  # however long each took to compile, here they meet
    return DDP(model, device_ids=[ranks.local_rank] if ranks.device_type == "cuda" else None, gradient_as_bucket_view=True)


def make_optimizers(raw_model, config, ranks):
    """raw_model's optimizers, which under zero update a part of the parameters on each rank and then pass them round."""
    optimizers = raw_model.configure_optimizers(config.lr, config.weight_decay, (config.beta1, config.beta2),
                                                config.optimizer, config.embd_lr_ratio)
    if config.parallel != "zero" or not ranks.ddp:
        return optimizers
    adamw, = optimizers  # config.py refuses muon
    defaults = {name: value for name, value in adamw.defaults.items() if name != "decoupled_weight_decay"}  # AdamW's own
    return [ZeroRedundancyOptimizer(adamw.param_groups, torch.optim.AdamW, **defaults)]


def clip_grad_norm(raw_model, max_norm):
    """Scales the whole gradient, over all ranks, down to max_norm; its norm before that, a plain scalar tensor."""
    norm = torch.nn.utils.clip_grad_norm_(raw_model.parameters(), max_norm)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


# -----------------------------------------------------------------------------
# all of it in one place

def full(tensor):
    """A detached tensor, whole; all ranks must call it for a sharded one."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def whole(raw_model):
    """The model to evaluate, score and sample from: raw_model, or a plain copy of it where it is sharded.

    A copy, of 4 bytes a parameter while it is used, because no collective happens inside: ranks may then run other numbers
    of batches, or call parts of the model. All ranks must call it.
    """
    if not isinstance(raw_model.lm_head.weight, DTensor):
        return raw_model
    with torch.device("meta"):
        model = GPT(raw_model.config)
    model.load_state_dict({name: full(p) for name, p in raw_model.named_parameters()}, strict=False, assign=True)
    model.lm_head.weight = model.transformer.wte.weight  # named once, for it is one
    return model.train(raw_model.training)


def params_of(optimizer):
    """The parameters of an optimizer in the order of the numbers that its state_dict knows them by."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def gather_zero(optimizer, ranks):
    """{parameter's number: {name: tensor}} of all ranks' parts, on rank 0 on the CPU; one tensor at a time."""
    params, states, device = params_of(optimizer), optimizer.optim.state, ranks.device
    shapes = [{name: v.shape for name, v in states[p].items()} if p in states else {} for p in params]
    shapes, gathered = all_gather(shapes, ranks), {}
    for i, p in enumerate(params):
        for owner in range(ranks.world_size):
            for name, shape in shapes[owner][i].items():
                tensor = states[p][name].to(device) if owner == ranks.rank else torch.empty(shape, device=device)
                dist.broadcast(tensor, src=owner)
                if ranks.master_process:
                    gathered.setdefault(i, {})[name] = tensor.cpu()
    return gathered


def full_state(raw_model, optimizers, ranks):
    """(raw_model's state dict, [state dict of each optimizer]) as one unsharded process has them, copied to the CPU.

    All ranks must call it, and rank 0 alone gets the values. What is sharded is gathered tensor by tensor, so that no
    device ever holds the whole.
    """
    def collect(value):
        if isinstance(value, dict):
            return {name: collect(v) for name, v in value.items()}
        if not isinstance(value, DTensor):
            return snapshot(value) if ranks.master_process else None
        tensor = full(value)
        return tensor.to("cpu", copy=True) if ranks.master_process else None

    params = {name: p.detach() for name, p in raw_model.named_parameters()}
    weights = collect(params)  # the tied lm_head is not named twice
    weights = {name: weights.get(name, weights["transformer.wte.weight"]) for name in raw_model.state_dict()}
    states = []
    for optimizer in optimizers:
        # ZeRO's own state_dict would go through every device, all of it at once
        state = torch.optim.Optimizer.state_dict(optimizer)
        gathered = gather_zero(optimizer, ranks) if isinstance(optimizer, ZeroRedundancyOptimizer) else collect(state["state"])
        states.append({"state": gathered, "param_groups": state["param_groups"]})
    return weights, states


def load_full_optimizer_state(optimizers, saved):
    """Puts back the optimizers' state dicts of full_state, as far as they are this rank's."""
    for optimizer, full_state_dict in zip(optimizers, saved, strict=True):
        mine = getattr(optimizer, "optim", optimizer)  # ZeroRedundancyOptimizer's AdamW of this rank's parameters
        numbers = {p: i for i, p in enumerate(params_of(optimizer))}
        state, groups, n = {}, [], 0
        for group, saved_group in zip(mine.param_groups, full_state_dict["param_groups"], strict=True):
            groups.append({**saved_group, "params": list(range(n, n + len(group["params"])))})
            for p in group["params"]:
                state[n] = {name: shard_like(v, p) for name, v in full_state_dict["state"].get(numbers[p], {}).items()}
                n += 1
        mine.load_state_dict({"state": {i: s for i, s in state.items() if s}, "param_groups": groups})
        if mine is not optimizer:
            for group, saved_group in zip(optimizer.param_groups, full_state_dict["param_groups"]):
                group.update({name: v for name, v in saved_group.items() if name != "params"})


def shard_like(tensor, p):
    """This rank's part of a full tensor on the CPU, on p's device, where p is sharded and the tensor of its shape."""
    if not isinstance(p, DTensor) or tensor.shape != p.shape:
        return tensor
    return distribute_tensor(tensor.to(p.device), p.device_mesh, p.placements, src_data_rank=None)
