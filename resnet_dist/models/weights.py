"""Weights in and out: our names, torchvision's and timm's; safetensors, .pth and ONNX.

Names and shapes of our state dicts are those of torchvision where it has the architecture, else
timm's where it has, else our own; so only timm's VGG and files of ffcv-imagenet need renaming.
"""

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from resnet_dist.models.catalog.options import ModelOptions

StateDict = dict[str, Tensor]
FORMATS = ("torchvision", "timm", "safetensors", "onnx")

# Architectures under the same name in each library, computing the same function.
_TORCHVISION = frozenset(
    ["resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d",
     "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2",
     "vgg16", "vgg16_bn", "vgg19", "vgg19_bn"]
)
_TIMM = _TORCHVISION | frozenset(
    ["resnet50d", "resnet101d", "resnet152d", "resnet200", "resnet200d", "resnext101_32x4d",
     "seresnet50", "seresnet101", "inception_v4", "inception_resnet_v2"]
)
# timm writes VGG's hidden layers as convolutions: (ours, theirs, kernel).
_VGG_HEAD = (("classifier.0", "pre_logits.fc1", 7), ("classifier.3", "pre_logits.fc2", 1),
             ("classifier.6", "head.fc", 0))


class WeightsError(ValueError):
    """Weights that do not fit the model, or a format it cannot be written in."""


def read_state_dict(path: Path) -> StateDict:
    """The tensors of a .safetensors file, or of a .pth/.pt file read without running its code.

    Wrappers are removed: a "state_dict" or "model" entry, and the prefixes "module." of
    DistributedDataParallel and "_orig_mod." of torch.compile.

    Raises:
        WeightsError: no such file, or it holds anything but tensors.
    """
    if not path.is_file():
        raise WeightsError(f"init_from = {str(path)!r}: no such file")
    try:
        if path.suffix == ".safetensors":
            loaded: Any = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise WeightsError(
            f"init_from = {str(path)!r}: not a readable state dict ({error}); save the tensors "
            "alone, as .safetensors or with torch.save(model.state_dict(), path)"
        ) from error
    for wrapper in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(wrapper), dict):
            loaded = loaded[wrapper]
    if not isinstance(loaded, dict) or not all(isinstance(t, Tensor) for t in loaded.values()):
        raise WeightsError(f"init_from = {str(path)!r}: not a dictionary of tensors")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", key): t for key, t in loaded.items()}


def init_from(model: nn.Module, path: Path, *, new_classifier: bool = False) -> None:
    """Load torchvision's, timm's, ffcv-imagenet's or our own weights into a model of `build_model`.

    Args:
        new_classifier: keep the model's own last layer, for another set of classes.

    Raises:
        WeightsError: listing every key that is missing, unexpected or of another shape.
    """
    state = to_our_names(read_state_dict(path))
    wanted = model.state_dict()
    if new_classifier:
        last = classifier_name(model)
        for key in (f"{last}.weight", f"{last}.bias"):
            state[key] = wanted[key]
    # Files older than PyTorch 0.4.1 have no such counters; only cumulative averages read them.
    for key in wanted.keys() - state.keys():
        if key.endswith("num_batches_tracked"):
            state[key] = wanted[key]
    problems = _mismatches(state, wanted)
    if problems:
        raise WeightsError(
            f"init_from = {str(path)!r} does not fit model {_name(model)!r}:\n  "
            + "\n  ".join(problems)
            + "\nChoose the model the file was saved from"
            + ("" if new_classifier else "; for other classes, keep a new classifier")
        )
    model.load_state_dict(state)


def _mismatches(state: StateDict, wanted: StateDict) -> list[str]:
    lines = [f"missing     {key} {tuple(wanted[key].shape)}" for key in wanted if key not in state]
    lines += [f"unexpected  {key} {tuple(state[key].shape)}" for key in state if key not in wanted]
    lines += [f"shape       {key}: file {tuple(state[key].shape)}, model {tuple(t.shape)}"
              for key, t in wanted.items() if key in state and state[key].shape != t.shape]
    return lines


def to_our_names(state: StateDict) -> StateDict:
    """Rename what other projects call differently; our own and torchvision's pass unchanged."""
    renamed: StateDict = {}
    for key, tensor in state.items():
        if key.endswith(".blur_filter"):  # ffcv-imagenet wraps strided convolutions; a constant
            continue
        renamed[re.sub(r"(conv\d|downsample\.0)\.conv\.weight$", r"\1.weight", key)] = tensor
    for ours, theirs, _kernel in _VGG_HEAD:
        if f"{theirs}.weight" in renamed:
            renamed[f"{ours}.weight"] = renamed.pop(f"{theirs}.weight").flatten(1)
        if f"{theirs}.bias" in renamed:
            renamed[f"{ours}.bias"] = renamed.pop(f"{theirs}.bias")
    return renamed


def to_timm_names(state: StateDict) -> StateDict:
    """The inverse of `to_our_names` for the architectures timm has."""
    renamed = dict(state)
    for ours, theirs, kernel in _VGG_HEAD:
        if "classifier.6.weight" not in state:
            break
        weight, bias = renamed.pop(f"{ours}.weight"), renamed.pop(f"{ours}.bias")
        if kernel:
            weight = weight.reshape(weight.shape[0], -1, kernel, kernel)
        renamed[f"{theirs}.weight"], renamed[f"{theirs}.bias"] = weight, bias
    return renamed


def classifier_name(model: nn.Module) -> str:
    """The path of the last linear layer."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear)][-1]


def export_weights(model: nn.Module, path: Path, format: str, *, input_size: int = 224) -> None:
    """Write the model for another program.

    Args:
        model: of `build_model`, unwrapped.
        format: torchvision: .pth that `load_state_dict` of the model of that name takes; timm: the
            same as .safetensors; safetensors: our own names; onnx: a graph images -> logits with a
            free batch dimension, in evaluation mode.
        input_size: side of the images, for onnx.

    Raises:
        WeightsError: the format is unknown or that library lacks this architecture.
    """
    if format not in FORMATS:
        raise WeightsError(f"format = {format!r}: choose one of {', '.join(FORMATS)}")
    if format == "onnx":
        _export_onnx(model, path, input_size)
        return
    state = {key: tensor.detach().cpu().contiguous().clone()
             for key, tensor in model.state_dict().items()}
    if format == "safetensors":
        save_file(state, path, metadata={"format": "pt", "model": _name(model)})
        return
    _require_peer(model, format, _TORCHVISION if format == "torchvision" else _TIMM)
    if format == "torchvision":
        torch.save(state, path)
    else:
        save_file(to_timm_names(state), path, metadata={"format": "pt", "model": _name(model)})


def _require_peer(model: nn.Module, library: str, names: frozenset[str]) -> None:
    """Raises unless the library's model of the same name computes the same function."""
    name = _name(model)
    if name not in names:
        raise WeightsError(
            f"format = {library!r}: {library} has no {name}; it has {', '.join(sorted(names))}. "
            "Use format=safetensors or format=onnx"
        )
    options: ModelOptions = model.__dict__["arch_options"]
    changed = {key: value for key, value in options.given().items()
               if key not in ("stochastic_depth", "dropout")}
    if changed:
        raise WeightsError(
            f"format = {library!r}: {name} of {library} computes something else than this model, "
            f"which has {changed}. Use format=safetensors or format=onnx"
        )


def _export_onnx(model: nn.Module, path: Path, input_size: int) -> None:
    try:
        import onnxscript  # noqa: F401  torch's exporter needs it and says so less clearly
    except ImportError as error:
        raise WeightsError("format = 'onnx' needs the packages onnx and onnxscript: "
                           "pip install onnx onnxscript") from error
    training = model.training
    model.eval()
    parameter = next(model.parameters())
    images = torch.zeros(2, 3, input_size, input_size, dtype=parameter.dtype,
                         device=parameter.device)
    try:
        program = torch.onnx.export(
            model, (images,), dynamo=True, input_names=["images"], output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), verbose=False)
    finally:
        model.train(training)
    assert program is not None
    program.save(str(path))


def _name(model: nn.Module) -> str:
    return model.__dict__.get("arch_name", type(model).__name__)
