"""
The streams of log.txt, sent to TensorBoard or Weights & Biases as well: train_gpt2.py --tracker tensorboard|wandb.

Neither package is in requirements.txt: `pip install tensorboard` (then `tensorboard --logdir log`) or `pip install wandb`
(then `wandb login`, or WANDB_MODE=offline). log.txt stays what counts; the trackers get copies, from rank 0 alone.
"""
import atexit
import importlib.util
import os

TRACKERS = ("none", "tensorboard", "wandb")  # each but none is the name of its package


def check_tracker(name):
    """ValueError unless the package of a name in TRACKERS is installed: before data is read or a model built."""
    spec = None if name == "none" else importlib.util.find_spec(name)
    if name != "none" and getattr(spec, "origin", None) is None:  # a mere folder of that name has a spec, without a file
        raise ValueError(f"--tracker {name} needs the package {name}, which is not installed: pip install {name},"
                         " or --tracker none")


def open_tracker(name, run_dir, settings, first_step):
    """A function (step, {stream: value}) that sends a step's facts to the tracker, or None for "none".

    settings is the run's config as a dict. A run that goes on from first_step goes on there too: TensorBoard drops what it
    had from that step on; W&B finds the run by the id in run_dir/wandb_id.txt and gets those steps a second time.
    """
    if name == "none":
        return None
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(run_dir, purge_step=first_step)
        atexit.register(writer.close)  # writes what is still in its queue

        def track(step, facts):
            for stream, value in facts.items():
                writer.add_scalar(stream, value, step)
        return track
    import wandb
    path = os.path.join(run_dir, "wandb_id.txt")
    run_id = open(path, encoding="utf-8").read().strip() if os.path.exists(path) else None
    run = wandb.init(project="gpt2", name=settings["exp_name"], id=run_id, resume="allow", config=settings, dir=run_dir)
    with open(path, "w", encoding="utf-8") as f:
        f.write(run.id)
    run.define_metric("*", step_metric="step")  # its own counter only rises; ours goes back to a checkpoint
    return lambda step, facts: run.log({"step": step, **facts})
