"""The rules that join several fields of a configuration.

In: a `Config` whose fields are each valid. Out: one line a broken rule, naming key, value, remedy.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from resnet_dist.config.explain import nearest
from resnet_dist.config.schema import Config, LaunchConfig, ModelConfig
from resnet_dist.models.catalog.names import MODELS, model_names
from resnet_dist.models.catalog.options import ModelOptions, check_options

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")


PROFILE_STEPS = 200  # a trace takes some MB a step


def broken_rules(config: Config) -> list[str]:
    """One line a rule that `config` breaks: key, value, remedy."""
    problems = []

    def refuse(key: str, value: object, remedy: str) -> None:
        problems.append(f"{key} = {value}: {remedy}")

    if config.name is None or not NAME_PATTERN.fullmatch(config.name):
        refuse("name", config.name, "use letters, digits, '_' and '-' (at most 100)")
    if config.model.name not in model_names():
        near = nearest(config.model.name, model_names())
        refuse("model.name", config.model.name, f"no such model{near}")
    else:
        try:
            check_options(config.model.name, MODELS[config.model.name].family,
                          ModelOptions(num_classes=1, **_without_name(config.model)))
        except ValueError as error:
            problems.append(f"model.{error}")
    batch, bn, world = config.batch_size, config.bn_batch, config.world
    if bn is not None and batch % bn:
        refuse("bn_batch", bn, f"must divide batch_size = {batch}; {_divisors(batch, bn)}")
    else:
        problems += world_problems(config, world)
    if config.mode == "exact" and bn is None:
        refuse("bn_batch", bn, "exact mode needs it: the group is what ranks share; try 32")
    if config.mode == "exact" and config.engine == "deepspeed":
        refuse("engine", config.engine, "exact mode sums gradients itself; use engine=ddp")
    if config.mode == "exact" and config.micro_batch is not None:
        refuse("micro_batch", config.micro_batch, "exact mode runs one bn_batch at a time; drop it")
    if config.mode == "exact" and config.gradient_dtype != "fp32":
        refuse("gradient_dtype", config.gradient_dtype,
               "exact mode sums in float32; use gradient_dtype=fp32")
    if config.cuda_graphs and (config.mode == "exact" or config.engine == "deepspeed"):
        refuse("cuda_graphs", "true", "needs mode=fast and engine=ddp; or use cuda_graphs=false")
    if config.engine == "ddp" and config.zero_stage > 0:
        refuse("zero_stage", config.zero_stage, "needs engine=deepspeed; or use zero_stage=0")
    if config.zero_stage > 0 and config.optimizer.name in ("lars", "lamb"):
        refuse("zero_stage", config.zero_stage,
               f"splits layers between ranks and optimizer.name = {config.optimizer.name} needs "
               "their norms whole; use zero_stage=0")
    augment = config.augment
    for key in ("mixup", "cutmix"):
        if getattr(augment, key) and bn is None:
            refuse(f"augment.{key}", getattr(augment, key),
                   "images are mixed within their bn_batch group; set bn_batch, e.g. 32")
    if config.data.repeats > 1 and (bn is None or batch // bn < config.data.repeats):
        refuse("data.repeats", config.data.repeats,
               "copies of an image go to different bn_batch groups; set bn_batch so that a batch "
               f"has at least {config.data.repeats} of them")
    if augment.trivial and augment.rand_ops:
        refuse("augment.trivial", augment.trivial, "is another policy than augment.rand_ops; use "
               "one of them")
    if augment.min_side > augment.max_side:
        refuse("augment.min_side", augment.min_side,
               f"must not exceed augment.max_side = {augment.max_side}")
    if augment.name == "scale_crop" and augment.size > augment.min_side:
        refuse("augment.size", augment.size,
               f"must not exceed augment.min_side = {augment.min_side} with scale_crop")
    for key in ("scale", "ratio"):
        low, high = getattr(augment, key)
        if low > high:
            refuse(f"augment.{key}", [low, high], "write the smaller number first")
    epochs = [epoch for epoch, _ in augment.sizes]
    if epochs != sorted(set(epochs)):
        refuse("augment.sizes", [list(pair) for pair in augment.sizes],
               "epochs must increase strictly")
    if augment.sizes and augment.normalize == "pixel":
        refuse("augment.normalize", "pixel", "the mean image has one size; use mean with "
               "augment.sizes")
    if augment.scale[1] > 1:
        refuse("augment.scale", list(augment.scale), "is a fraction of the area: at most 1")
    if config.eval.resize is not None and config.eval.size > config.eval.resize:
        refuse("eval.size", config.eval.size,
               f"must not exceed eval.resize = {config.eval.resize}")
    if config.eval.protocol == "multiscale" and config.augment.normalize == "pixel":
        refuse("eval.protocol", config.eval.protocol,
               "a mean image has one size; use augment.normalize=mean, or eval.protocol=1crop")
    if list(config.schedule.milestones) != sorted(set(config.schedule.milestones)):
        refuse("schedule.milestones", list(config.schedule.milestones), "must increase strictly")
    if config.schedule.warmup_steps >= config.steps:
        refuse("schedule.warmup_steps", config.schedule.warmup_steps,
               f"must be below steps = {config.steps}")
    problems += launch_problems(config.launch)
    if config.profile is not None:
        first, last = map(int, config.profile.split(":"))
        if not first < last <= first + PROFILE_STEPS or last > config.steps:
            refuse("profile", config.profile, f"write START:STOP with START < STOP <= steps = "
                   f"{config.steps} and at most {PROFILE_STEPS} steps, e.g. 100:110")
    if config.launch.grace_s >= config.launch.time_minutes * 60:
        refuse("launch.grace_s", config.launch.grace_s,
               f"must be below the time limit of {config.launch.time_minutes} minutes")
    return problems


# Options of sbatch that the launcher sets itself -> the key that decides.
OWN_OPTIONS = {
    "nodes": "launch.nodes", "ntasks": "launch.ranks_per_node", "time": "launch.time_minutes",
    "ntasks-per-node": "launch.ranks_per_node", "cpus-per-task": "launch.cpus_per_rank",
    "exclusive": "launch.cpus_per_rank=null", "partition": "launch.partition",
    "account": "launch.account", "qos": "launch.qos", "constraint": "launch.constraint",
    "mem": "launch.mem_gb", "signal": "launch.grace_s", "gpus-per-node": "launch.gpus_per_rank",
    "gres": "launch.gpu_request=gres", "job-name": "name", "requeue": "nothing: it always is set",
    "open-mode": "nothing: logs are appended to", "output": "nothing: logs are in the run",
    "error": "nothing: logs are in the run", "array": "--sweep", "dependency": "--after",
}


def launch_problems(launch: LaunchConfig) -> list[str]:
    """What is wrong with what SLURM and the shell are told."""
    problems = []
    for key, value in launch.options.items():
        if not re.fullmatch(r"[a-z][a-z-]*", key) or "\n" in str(value):
            problems.append(f"launch.options.{key} = {value}: write sbatch's long option without "
                            "dashes in front, e.g. launch.options.reservation=friday")
        elif key in OWN_OPTIONS:
            problems.append(f"launch.options.{key} = {value}: is decided by {OWN_OPTIONS[key]}")
    problems += [f"launch.environment.{name} = {value}: a variable's name has letters, digits and "
                 "'_'; its value is taken as it is ($VARS belong into launch.setup)"
                 for name, value in launch.environment.items()
                 if not re.fullmatch(r"[A-Za-z_]\w*", name) or re.search(r"[\n$`]", str(value))]
    if launch.gpu_type is not None and launch.gpu_request == "none":
        problems.append(f"launch.gpu_type = {launch.gpu_type}: is asked for by "
                        "launch.gpu_request=gres or gpus-per-node; none asks for nothing")
    return problems


def world_problems(config: Config, world: int) -> list[str]:
    """Why `world` ranks cannot share this run's batch; empty when they can (promise 1)."""
    batch, bn, micro = config.batch_size, config.bn_batch, config.micro_batch
    atom = bn or 1
    what = "batch_size" if bn is None else "batch_size / bn_batch"
    shares = batch // atom
    if shares % world:
        return [f"launch.nodes x launch.ranks_per_node = {world}: must divide {what} = {shares}; "
                f"{_divisors(shares, world)}"]
    if config.mode == "exact" and world & (world - 1):
        return [f"launch.nodes x launch.ranks_per_node = {world}: exact mode sums along a binary "
                f"tree and needs a power of two; try {1 << (world.bit_length() - 1)}"]
    local = batch // world
    if micro is not None and (local % micro or micro % atom):
        return [f"micro_batch = {micro}: must divide a rank's {local} images"
                + (f" and be a multiple of bn_batch = {bn}" if bn else "")
                + f"; {_divisors(local, micro, atom)}"]
    return []


def _without_name(model: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in dataclasses.asdict(model).items() if key != "name"}


def _divisors(total: int, near: int, multiple_of: int = 1) -> str:
    fitting = [d for d in range(1, total + 1) if total % d == 0 and d % multiple_of == 0]
    closest = sorted(sorted(fitting, key=lambda d: abs(d - near))[:4])
    return "try " + ", ".join(map(str, closest))
