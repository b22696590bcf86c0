"""What can be chosen about an architecture beyond its name. Imports no torch."""

from dataclasses import dataclass, fields

SHORTCUTS = ("A", "B", "C")
# He et al. 2016, table 1, other than "original"
SHORTCUT_EXPERIMENTS = (
    "constant_scaling", "exclusive_gating", "shortcut_only_gating", "conv1x1", "dropout",
)
# He et al. 2016, table 2
ACTIVATIONS = (
    "original", "bn_after_add", "relu_before_add", "relu_only_preact", "full_preact",
)
INITS = ("he_fan_out", "he_fan_in", "torch")
STEMS = ("conv7", "deep")


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """Arguments of `build_model`; None means what the named architecture was published with."""

    num_classes: int
    shortcut: str | None = None
    activation: str | None = None  # CIFAR networks: one of ACTIVATIONS
    gate_bias: float | None = None  # gating experiments: initial bias of the gates
    stem: str | None = None  # "deep": three 3x3 instead of one 7x7 (ResNet-C/D)
    avg_down: bool | None = None  # average-pool in projection shortcuts (ResNet-D)
    antialias: bool | None = None  # blur before every strided convolution
    se_reduction: int | None = None  # squeeze-and-excitation; channels / this many in the middle
    stochastic_depth: float | None = None  # drop rate of the last block, growing linearly from 0
    dropout: float | None = None  # before the classifier
    init: str = "he_fan_out"
    classifier_std: float | None = None  # its weights normal with this deviation, its biases 0
    zero_init_last_bn: bool = False
    bn_batch: int | None = None
    bn_momentum: float = 0.1
    bn_eps: float | None = None  # 1e-5; Inception 1e-3
    checkpointing: bool = False

    def given(self) -> dict[str, object]:
        """The options that were chosen, not left to the architecture."""
        return {f.name: getattr(self, f.name) for f in fields(self)
                if f.default is None and getattr(self, f.name) is not None
                and f.name != "classifier_std" and not f.name.startswith("bn_")}


# Which of the None options each family understands.
FAMILY_OPTIONS: dict[str, frozenset[str]] = {
    "resnet": frozenset({"shortcut", "stem", "avg_down", "antialias", "se_reduction",
                         "stochastic_depth", "dropout"}),
    "cifar": frozenset({"shortcut", "activation", "gate_bias", "stochastic_depth", "dropout"}),
    "preact": frozenset({"stochastic_depth", "dropout"}),
    "vgg": frozenset({"dropout"}),
    "inception": frozenset({"dropout"}),
}


def has_last_bn(name: str, family: str) -> bool:
    """Whether the residual branches of `name`, as published, end in BatchNorm."""
    return family in ("resnet", "cifar") and not name.startswith(("plain", "preresnet"))


def check_options(name: str, family: str, options: ModelOptions) -> None:
    """Raises ValueError naming option, value and remedy when `name` cannot be built so."""

    def refuse(option: str, value: object, remedy: str) -> None:
        raise ValueError(f"{option} = {value!r} with model {name!r}: {remedy}")

    understood = FAMILY_OPTIONS[family]
    for option, value in options.given().items():
        if option not in understood and value not in (False, 0, 0.0):
            known = ", ".join(sorted(understood))
            refuse(option, value, f"this architecture has only the options {known}")
    choices: dict[str, tuple[str, ...]] = {
        "shortcut": SHORTCUTS + (SHORTCUT_EXPERIMENTS if family == "cifar" else ()),
        "activation": ACTIVATIONS, "stem": STEMS, "init": INITS,
    }
    for option, allowed in choices.items():
        value = getattr(options, option)
        if value is not None and value not in allowed:
            refuse(option, value, f"choose one of {', '.join(allowed)}")
    if options.num_classes < 1:
        refuse("num_classes", options.num_classes, "must be at least 1")
    for option in ("stochastic_depth", "dropout"):
        rate = getattr(options, option)
        if rate is not None and not 0.0 <= rate < 1.0:
            refuse(option, rate, "a drop rate is in [0, 1)")
    if options.classifier_std is not None and options.classifier_std <= 0:
        refuse("classifier_std", options.classifier_std, "a standard deviation is above 0")
    if name.startswith("plain") and options.shortcut is not None:
        refuse("shortcut", options.shortcut, f"a plain network has none; use resnet{name[5:]}")
    if name.startswith("plain") and options.stochastic_depth:
        refuse("stochastic_depth", options.stochastic_depth,
               f"a plain network has no branch to drop; use resnet{name[5:]}")
    experiment = options.shortcut in SHORTCUT_EXPERIMENTS
    if options.gate_bias is not None and "gating" not in (options.shortcut or ""):
        refuse("gate_bias", options.gate_bias,
               "only shortcut=exclusive_gating and shortcut_only_gating have gates")
    placed = options.activation not in (None, "original")
    if placed and (name.startswith(("plain", "preresnet")) or experiment):
        refuse("activation", options.activation,
               "activation placements are variants of resnet110, resnet164 and the like")
    if experiment and name.startswith("preresnet"):
        refuse("shortcut", options.shortcut, f"the shortcut experiments are variants of {name[3:]}")
    if options.stochastic_depth and (experiment or placed) and options.activation != "full_preact":
        refuse("stochastic_depth", options.stochastic_depth,
               "the ablations of 2016 have none; leave out shortcut and activation")
    if options.zero_init_last_bn and (
        not has_last_bn(name, family) or options.activation in ("bn_after_add", "full_preact")
    ):
        refuse("zero_init_last_bn", True,
               "it has no residual branch that ends in BatchNorm; leave it false")
    if options.avg_down and options.shortcut == "A":
        refuse("avg_down", True, "pooled shortcuts are projections: use shortcut B or C")
