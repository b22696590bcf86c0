"""ResNet-20 on CIFAR-10 in plain PyTorch: He et al. 2015, sec. 4.2, without a line of this project.

    torchrun --standalone --nproc-per-node 2 -m tests.proofs.plain_resnet20 cifar10-jpeg.tar.gz

An independent reading of the same recipe on the same files, to compare accuracies with: batch 128,
BatchNorm over 64 images (two GPUs), SGD 0.1 with momentum 0.9 and decay 1e-4 on everything, rate
divided by 10 at half and three quarters, 4-pixel padding, random crop and flip, per-pixel mean,
shortcuts of option A; bfloat16 where the device has it, otherwise float32. Two processes stand for
the paper's two GPUs; one process (python instead of torchrun) takes both halves of a batch in turn.
A GPU is used where torch sees one (by two processes where it sees two); --device cpu says no.
On 2 cores it takes 2.7 hours with bf16 instructions and other work beside it (seen), perhaps 6
without. Its state is saved every 1,000 steps; the same command goes on, and once it has finished,
prints all errors again.
"""

from __future__ import annotations

import argparse
import io
import os
import tarfile
import time
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


def has_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return "avx512_bf16" in Path("/proc/cpuinfo").read_text()


def read(archive: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{"train", "test"}: (uint8 [n, 32, 32, 3], int64 [n])."""
    found: dict[str, list[tuple[str, np.ndarray]]] = {"train": [], "test": []}
    with tarfile.open(archive) as tar:
        for member in tar:
            parts = member.name.split("/")
            if member.isfile() and len(parts) >= 3 and parts[-3] in found:
                content = tar.extractfile(member)
                assert content is not None
                pixels = np.asarray(Image.open(io.BytesIO(content.read())).convert("RGB"))
                found[parts[-3]].append((parts[-2], pixels))
    classes = sorted({name for name, _ in found["train"]})
    return {split: (np.stack([pixels for _, pixels in rows]),
                    np.array([classes.index(name) for name, _ in rows]))
            for split, rows in found.items()}


class Block(nn.Module):
    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.extra = stride, width - inside

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, ::self.stride, ::self.stride]
        return F.relu(y + F.pad(short, (0, 0, 0, 0, 0, self.extra)))


def resnet(blocks: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    inside = 16
    for width in (16, 32, 64):
        for block in range(blocks):
            layers.append(Block(inside, width, 2 if block == 0 and width > 16 else 1))
            inside = width
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


@lru_cache(maxsize=2)
def permutation(seed: int, epoch: int, count: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(count)


def augmented(images: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    out = np.empty_like(images)
    padded = np.pad(images, ((0, 0), (4, 4), (4, 4), (0, 0)))
    for i, (top, left, flip) in enumerate(zip(rng.integers(0, 9, len(images)),
                                              rng.integers(0, 9, len(images)),
                                              rng.integers(0, 2, len(images)), strict=True)):
        crop = padded[i, top:top + 32, left:left + 32]
        out[i] = crop[:, ::-1] if flip else crop
    return out


def as_input(images: np.ndarray, device: torch.device) -> Tensor:
    x = torch.from_numpy(np.ascontiguousarray(images)).to(device).permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def logits_of(net: nn.Module, images: np.ndarray, device: torch.device) -> Tensor:
    with torch.autocast(device.type, torch.bfloat16, enabled=has_bf16(device)):
        logits: Tensor = net(as_input(images, device))
    return logits.float()


@torch.no_grad()
def test_error(net: nn.Module, images: np.ndarray, labels: np.ndarray,
               device: torch.device) -> float:
    net.eval()
    wrong = 0
    for start in range(0, len(images), 500):
        logits = logits_of(net, images[start:start + 500], device)
        wrong += int((logits.argmax(1).cpu().numpy() != labels[start:start + 500]).sum())
    net.train()
    return 100 * wrong / len(images)


def mean_over_ranks(net: nn.Module) -> None:
    """Of the gradients, as one vector. Collective."""
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
    dist.all_reduce(flat)
    pieces = (flat / dist.get_world_size()).split([gradient.numel() for gradient in gradients])
    for gradient, piece in zip(gradients, pieces, strict=True):
        gradient.copy_(piece.view(gradient.shape))


def main() -> None:
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 2:
        raise SystemExit(f"WORLD_SIZE = {ranks}: a batch has two halves; use at most 2 processes")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--steps", type=int, default=64_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, default=3, help="a stage; 3 is ResNet-20")
    parser.add_argument("--state", type=Path, default=Path("plain_resnet20.pt"))
    parser.add_argument("--device", choices=["cpu", "cuda"],
                        default="cuda" if torch.cuda.device_count() >= ranks else "cpu")
    asked = parser.parse_args()
    device = torch.device(asked.device, rank if asked.device == "cuda" else 0)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        torch.set_num_threads(1)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    data = read(asked.archive)
    # Padding is with the mean image's zero: the paper pads what the mean was taken from.
    mean = data["train"][0].astype(np.float32).mean(0)
    train = (data["train"][0] - mean) / 255
    test, labels = (data["test"][0] - mean) / 255, data["train"][1]
    torch.manual_seed(asked.seed)
    net = resnet(asked.blocks).to(device)
    net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    step, spent_s, said = 0, 0.0, []
    if asked.state.exists():
        saved = torch.load(asked.state, weights_only=True, map_location=device)
        net.load_state_dict(saved["net"])
        optimizer.load_state_dict(saved["optimizer"])
        step, spent_s, said = saved["step"], saved["spent_s"], saved["said"]
        if rank == 0:
            print(*said, sep="\n", flush=True)
    began = time.monotonic()
    while step < asked.steps:
        epoch, batch = divmod(step * 128, len(train))
        chosen = permutation(asked.seed, epoch, len(train))[batch:batch + 128]
        if len(chosen) < 128:
            following = permutation(asked.seed, epoch + 1, len(train))
            chosen = np.concatenate((chosen, following[:128 - len(chosen)]))
        images = augmented(train[chosen], np.random.default_rng((asked.seed, 1, step)))
        target = torch.from_numpy(labels[chosen]).to(device)
        for group in optimizer.param_groups:
            group["lr"] = 0.1 * 0.1 ** ((step >= asked.steps // 2) + (step >= asked.steps * 3 // 4))
        optimizer.zero_grad()
        for half in (slice(0, 64), slice(64, 128))[rank::ranks]:
            logits = logits_of(net, images[half], device)
            (F.cross_entropy(logits, target[half]) * ranks / 2).backward()
        if ranks > 1:
            mean_over_ranks(net)
        optimizer.step()
        step += 1
        if rank == 0 and (step % 1000 == 0 or step == asked.steps):
            spent = spent_s + time.monotonic() - began
            error = test_error(net, test, data["test"][1], device)
            said.append(f"step {step}: test error {error:.2f}%, "
                        f"{step * 128 / spent:.0f} images/s")
            print(said[-1], flush=True)
            torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                        "spent_s": spent, "said": said}, f"{asked.state}.new")
            os.replace(f"{asked.state}.new", asked.state)


if __name__ == "__main__":
    main()
