"""The whole configuration: one tree of frozen dataclasses, the only place a default lives.

Every field has its range beside it; rules that join several fields are in `rules`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Word = Annotated[str, Field(pattern=r"^\S+$")]


class Section:
    """Base of every part of a configuration: an unknown key is refused."""

    __pydantic_config__ = ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """A user's mistake; each line of the message names a key, its value and the remedy."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    path: str | None = None  # data set directory that `resnet-dist convert` wrote
    threads: Count | None = None  # decoding threads of one rank; None: the cores it may use
    prefetch: Count = 3  # batches prepared ahead of the step
    # "page" checks every sample's recorded hash as it is read; "open" checks structure only.
    verify: Literal["open", "page"] = "page"
    stage_dir: str | None = None  # node-local scratch to copy the shards to first; $VARS expand
    # Repeated augmentation: an epoch takes the first 1/N of its permutation, each image N times in
    # one batch, every time augmented anew and in another bn_batch group. Hoffer et al. 2019.
    repeats: Annotated[int, Field(ge=1, le=16)] = 1
    read_ahead: Natural = 8  # batches whose bytes are asked for ahead; 0: as they are decoded


@dataclass(frozen=True, kw_only=True)
class AugmentConfig(Section):
    # scale_crop: He et al. 2015, sec. 3.4; pad_crop: ibid. sec. 4.2;
    # random_resized_crop: Szegedy et al. 2014, sec. 6; resize: no augmentation.
    name: Literal["scale_crop", "random_resized_crop", "pad_crop", "resize"] = "scale_crop"
    size: Count = 224  # pixels, square crop that the network sees
    flip: bool = True
    min_side: Count = 256  # scale_crop: shorter side is drawn from [min_side, max_side]
    max_side: Count = 480
    scale: tuple[Positive, Positive] = (0.08, 1.0)  # random_resized_crop: area fraction
    ratio: tuple[Positive, Positive] = (0.75, 4 / 3)  # random_resized_crop: width / height
    pad: Natural = 4  # pad_crop: pixels on every side
    pca: NonNegative = 0.0  # standard deviation of the PCA colour draw; He et al. 2015: 0.1
    # Colour jitter: each factor is drawn from [1 - value, 1 + value], in a drawn order.
    brightness: Fraction = 0.0
    contrast: Fraction = 0.0
    saturation: Fraction = 0.0
    # RandAugment as timm's rand-mM-mstdS-inc1: ops an image (0: off), M and S.
    rand_ops: Annotated[int, Field(ge=0, le=8)] = 0
    rand_magnitude: Annotated[float, Field(ge=0, le=10)] = 7.0
    rand_std: NonNegative = 0.5
    trivial: bool = False  # TrivialAugment as torchvision's TrivialAugmentWide; Müller, Hutter 2021
    erase: Fraction = 0.0  # probability of random erasing; Zhong et al. 2017
    mixup: NonNegative = 0.0  # alpha of Beta(alpha, alpha); 0: off. Zhang et al. 2017
    cutmix: NonNegative = 0.0  # likewise; with both on, a coin decides. Yun et al. 2019
    # Progressive resizing: [epoch, size] pairs; a size holds for batches that begin from there on.
    sizes: tuple[tuple[Natural, Count], ...] = ()
    # channel: (x - mean) / std per channel; mean: x - mean per channel;
    # pixel: x - mean image (small images of one size only).
    normalize: Literal["channel", "mean", "pixel"] = "channel"


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    name: str = "resnet50"
    # None: as the named architecture was published. models/catalog/options.py says what each one
    # means and refuses what an architecture does not have.
    shortcut: Literal["A", "B", "C", "constant_scaling", "exclusive_gating",
                      "shortcut_only_gating", "conv1x1", "dropout"] | None = None
    activation: Literal["original", "bn_after_add", "relu_before_add", "relu_only_preact",
                        "full_preact"] | None = None
    gate_bias: float | None = None
    stem: Literal["conv7", "deep"] | None = None
    avg_down: bool | None = None
    antialias: bool | None = None
    se_reduction: Count | None = None
    stochastic_depth: Fraction | None = None
    dropout: Fraction | None = None
    init: Literal["he_fan_out", "he_fan_in", "torch"] = "he_fan_out"
    classifier_std: Positive | None = None  # normal weights, no bias; None: torch's default
    zero_init_last_bn: bool = False
    bn_momentum: Fraction = 0.1
    bn_eps: Positive | None = None  # 1e-5; Inception 1e-3
    checkpointing: bool = False  # recompute activations in the backward pass


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    # sgd: PyTorch's and Torch7's momentum, v = m v + g, w -= lr v. sgd_caffe: v = m v + lr g,
    # w -= v, which differs for a while after every change of the rate (Goyal et al. 2017, sec. 3).
    name: Literal["sgd", "sgd_caffe", "lars", "lamb", "adamw"] = "sgd"
    lr: Positive = 0.1
    momentum: Fraction = 0.9  # sgd, sgd_caffe, lars
    nesterov: bool = False  # sgd
    weight_decay: NonNegative = 1e-4
    # Of which parameters weight_decay is: weights: not of biases, not of BatchNorm; but_norm: of
    # biases too.
    decay: Literal["all", "weights", "but_norm"] = "all"
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)  # adamw, lamb
    eps: Positive = 1e-8  # adamw, lamb
    trust: Positive = 0.001  # lars: the coefficient eta of You et al. 2017
    clip_norm: Positive | None = None  # largest norm of the whole gradient


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    name: Literal["milestones", "plateau", "cosine", "linear", "one_cycle",
                  "constant"] = "milestones"
    milestones: tuple[Natural, ...] = ()  # steps at which the rate is multiplied by `factor`
    factor: Positive = 0.1
    warmup_steps: Natural = 0  # not for one_cycle, which has its own rise
    warmup_start: NonNegative = 0.0  # fraction of lr
    # linear: from lr * warmup_start to lr; constant: lr * warmup_start throughout (He et al. 2016,
    # appendix: 0.01 for 400 steps).
    warmup: Literal["linear", "constant"] = "linear"
    # Hold lr * warmup_start until the training error falls below this many percent (He et al. 2015,
    # sec. 4.2, ResNet-110: 0.01 until 80).
    warmup_until_error: Annotated[float, Field(gt=0, lt=100)] | None = None
    final: NonNegative = 0.0  # cosine, linear, one_cycle: the last rate as a fraction of lr
    peak: Annotated[float, Field(gt=0, lt=1)] = 0.3  # one_cycle: fraction of the steps that rise
    patience: Count = 3  # plateau: evaluations in a row without a gain before the rate drops
    gain: NonNegative = 0.1  # plateau: percent points of error that count as a gain


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    name: Literal["cross_entropy", "bce"] = "cross_entropy"
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    # bce: a class is a target where its (mixed, smoothed) weight exceeds this; None: soft targets.
    threshold: Fraction | None = None


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Section):
    decay: Annotated[float, Field(gt=0, lt=1)] | None = None  # None: no average of the weights
    every_steps: Count = 1


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Section):
    every_steps: Count = 1000
    keep_last: Count = 3
    keep_every_steps: Count | None = None  # checkpoints at multiples of it stay for good
    keep_best: bool = False  # so does the one after the best evaluation


@dataclass(frozen=True, kw_only=True)
class DivergenceConfig(Section):
    # Rollbacks in a row, each to one checkpoint further back. A replay is exact, so it helps
    # against faults of the hardware; against a recipe that diverges by itself the rate must change.
    max_rollbacks: Natural = 3
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 1.0  # of the rate after each rollback; 1: none
    lr_steps: Count = 1000  # for so many steps after the one that diverged


EVAL_PROTOCOLS = ("1crop", "flip", "10crop", "multiscale")


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Section):
    every_steps: Count = 5000
    split: str = "val"
    # What of an image is looked at; evaluate/views.py says how. Probabilities of all are averaged.
    protocol: Literal["1crop", "flip", "10crop", "multiscale"] = "1crop"
    resize: Count | None = 256  # shorter side before the crop; None: the image as it is
    size: Count = 224
    # multiscale: shorter sides; He et al. 2015, sec. 3.4
    scales: Annotated[tuple[Count, ...], Field(min_length=1)] = (224, 256, 384, 480, 640)
    batch_size: Count = 100  # images of one rank in one forward


@dataclass(frozen=True, kw_only=True)
class LogConfig(Section):
    every_steps: Count = 20
    # Pictures and histograms in TensorBoard: of training at such steps and at the first, of a
    # validation at the first one in every so many steps and at the last; 0: none.
    panels_every_steps: Natural = 10_000


@dataclass(frozen=True, kw_only=True)
class LaunchConfig(Section):
    nodes: Count = 1
    ranks_per_node: Count = 1
    cpus_per_rank: Count | None = None  # None: the machine's cores divided by its ranks
    gpus_per_rank: Natural | None = None  # None: 1 where `device` is cuda, else 0
    # A cluster profile, slurm/NAME.yaml or a path; `cluster=NAME` for short. What it says holds
    # where neither the recipe nor the command line says anything.
    cluster: Word | None = None
    partition: Word | None = None
    account: Word | None = None
    qos: Word | None = None
    constraint: Word | None = None
    # How the cluster wants to be asked for GPUs: --gpus-per-node=N, --gres=gpu:N (with `gpu_type`
    # --gres=gpu:TYPE:N), or not at all, because whole nodes come with theirs.
    gpu_request: Literal["gpus-per-node", "gres", "none"] = "gpus-per-node"
    gpu_type: Word | None = None
    mem_gb: Positive | None = None
    time_minutes: Count = 24 * 60
    grace_s: Count = 60  # SIGUSR2 arrives this long before the time limit
    # Further options of sbatch that have no key here, e.g. {reservation: friday, exclude: n7}.
    options: dict[str, str | int] = field(default_factory=dict)
    # On the node, before the job: modules are loaded, variables set, shell lines run.
    modules: tuple[Word, ...] = ()
    environment: dict[str, str | int | float] = field(default_factory=dict)
    setup: tuple[str, ...] = ()
    container: Word | None = None  # image in which the job runs
    container_runtime: Literal["apptainer", "pyxis"] = "apptainer"
    container_options: tuple[Word, ...] = ()  # e.g. --bind=/data, --container-mounts=/data
    container_python: Word = "python3"  # that has the packages, inside the image
    max_restarts: Natural = 3  # restarts without progress before a job gives up
    hang_s: Positive = 600.0  # a rank without a step for so long is ended and restarted


@dataclass(frozen=True, kw_only=True)
class Config(Section):
    name: str | None = None  # run name; None: the recipe's file name
    runs: str = "runs"  # folder that holds the run directories
    seed: Natural = 0
    steps: Count = 600_000  # optimizer steps in all
    batch_size: Count = 256  # images in a global batch, whatever the world
    bn_batch: Count | None = 32  # images one BatchNorm normalises over; None: a rank's micro-batch
    # After the last step, replace BatchNorm's running statistics by their true average over so many
    # further batches, as the released models of He et al. 2015 were finished; 0: keep them.
    bn_refresh_steps: Natural = 0
    # Images of one forward of one rank. None: all it has; on a CPU at most 64 or one bn_batch.
    micro_batch: Count | None = None
    mode: Literal["fast", "exact"] = "fast"
    engine: Literal["ddp", "deepspeed"] = "ddp"
    # Of convolutions and matrix products; weights and optimizer are float32 throughout.
    # auto: bf16 where the device has instructions for it; see engine/precision.py.
    precision: Literal["auto", "bf16", "fp16", "tf32", "fp32"] = "auto"
    gradient_dtype: Literal["fp32", "bf16"] = "fp32"  # in which ranks exchange gradients
    # Replay forward and backward as one CUDA graph: for GPUs with few images each.
    cuda_graphs: bool = False
    zero_stage: Annotated[int, Field(ge=0, le=2)] = 0  # engine=deepspeed: what ranks share out
    device: Literal["auto", "cpu", "cuda"] = "auto"
    # Intra-op CPU threads of a rank. None: its cores in fast mode, 1 in exact mode, where the
    # count is part of the run because oneDNN's reductions depend on it.
    threads: Count | None = None
    # Weights to start from: .safetensors or .pth of ours, torchvision's or timm's.
    init_from: str | None = None
    new_classifier: bool = False  # init_from: leave its last layer out, for other classes
    # START:STOP: steps START, ... STOP - 1 of rank 0 under torch's profiler; see watch/trace.py.
    profile: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = None
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    divergence: DivergenceConfig = field(default_factory=DivergenceConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)

    @property
    def world(self) -> int:
        return self.launch.nodes * self.launch.ranks_per_node
