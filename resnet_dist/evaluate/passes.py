"""Exact distributed evaluation: every sample once, at any world size.

In: networks in eval mode and a rank's contiguous slice of a split. Out: what they made of every
sample, the same on all ranks. Several networks, mirror images, crops and scales are averaged as
probabilities. World and batch size change the order of no addition, so they change results only
where the device computes a batch of another size with another rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from resnet_dist.evaluate.judge import Outcomes
from resnet_dist.evaluate.views import Views
from resnet_dist.ranks.distributed import World, agree_max, gather_rows

# What maps prepared images [n, 3, h, w] to logits [n, classes], and what prepares uint8
# [n, h, w, 3] on the device for it.
Member = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


class Interrupted(Exception):
    """An evaluation was left because some rank was asked to stop; raised on all ranks."""

    def __init__(self, number: int) -> None:
        super().__init__(f"asked to stop by signal {number}")
        self.number = number


_COLUMNS = 6  # of one sample's row: id, label, predicted, place, confidence, loss


def evaluate(model: Callable[[Tensor], Tensor], normalize: Callable[[Tensor], Tensor],
             views: Views, world: World, asked: Callable[[], int] = lambda: 0) -> Outcomes:
    """What one network makes of every sample of the split.

    Args:
        model: in eval mode; maps prepared images [n, 3, h, w] to logits [n, classes].
        normalize: uint8 [n, h, w, 3] on the device -> what the model takes.
        views: this rank's slice; closed on the way out.
        asked: the number of a signal that asked this rank to stop, else 0.

    Collective. Raises: DataError, Interrupted.
    """
    with views:
        return predict([(model, normalize)], views, world, asked)


def predict(members: Sequence[Member], views: Views, world: World,
            asked: Callable[[], int] = lambda: 0) -> Outcomes:
    """What `members` together make of every sample of the split.

    Each view of an image passes through each member; the mean of the softmax is the answer. Kept as
    logarithms in float64, so that a very sure network does not underflow. Equal probabilities rank
    by class index. An image whose logits are not numbers is wrong, and its loss is NaN.

    A rank that is asked to stop leaves at its next batch; the ranks agree on it before they share
    what they found, because their slices may have unlike numbers of batches.

    Collective. Raises: RuntimeError where a sample was seen twice or never; DataError; Interrupted.
    """
    rows = []
    with torch.inference_mode():
        for group in views:
            if asked():
                break
            labels = group.labels.to(world.device, non_blocking=True)
            scores = mean_log_probabilities(members, group.images, len(labels), world.device)
            rows.append(_outcome_rows(group.sample_ids.to(world.device), labels, scores))
    if number := agree_max(asked(), world):
        raise Interrupted(number)
    return _gather(rows, views.num_samples, world)


def mean_log_probabilities(members: Sequence[Member], shown: Iterable[tuple[Tensor, Tensor]],
                            count: int, device: torch.device) -> Tensor:
    """float64 [count, classes]: log of the mean over members and views.

    shown: (positions int64 [m], images uint8 [m, h, w, 3]); a position at most once in each.
    """
    total: Tensor | None = None
    seen = torch.zeros(count, 1, dtype=torch.float64, device=device)
    for positions, images in shown:
        images = images.to(device, non_blocking=True)
        positions = positions.to(device, non_blocking=True)
        for model, prepare in members:
            score = F.log_softmax(model(prepare(images)).double(), dim=1)
            if total is None:
                total = score.new_full((count, score.shape[1]), -torch.inf)
            total[positions] = torch.logaddexp(total[positions], score)
            seen[positions] += 1
    assert total is not None, "a group shows at least one view"
    return total - seen.log()


def _outcome_rows(sample_ids: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """float64 [n, 6] from log-probabilities [n, classes]."""
    classes = scores.shape[1]
    index = torch.arange(classes, device=scores.device)
    own = scores.gather(1, labels[:, None])
    ahead = ~(scores <= own) | ((scores == own) & (index < labels[:, None]))
    places = torch.where(torch.isfinite(own[:, 0]), ahead.sum(1), classes)
    best = scores.amax(1)
    # The first of equals: argmax leaves it to the device which one it names.
    predicted = torch.where(scores == best[:, None], index, classes).amin(1)
    predicted = predicted.clamp(max=classes - 1)
    return torch.stack([sample_ids.double(), labels.double(), predicted.double(), places.double(),
                        best.exp(), -own[:, 0]], dim=1)


def _gather(rows: list[Tensor], samples: int, world: World) -> Outcomes:
    """All ranks' rows in sample order, on every rank. Collective."""
    longest = -(-samples // world.size)
    mine = torch.full((longest, _COLUMNS), -1.0, dtype=torch.float64, device=world.device)
    found = torch.cat(rows) if rows else mine[:0]
    if len(found) > longest:
        raise RuntimeError(f"rank {world.rank} saw {len(found)} of {samples} samples, expected at "
                           f"most {longest}")
    mine[:len(found)] = found
    table = gather_rows(mine.reshape(-1), world).reshape(-1, _COLUMNS).cpu().numpy()
    table = table[table[:, 0] >= 0]
    table = table[table[:, 0].argsort(kind="stable")]
    ids = table[:, 0].astype("int64")
    if len(ids) != samples or (ids != range(samples)).any():
        raise RuntimeError(f"the ranks saw {len(ids)} samples, {len(set(ids.tolist()))} of them "
                           f"different; the split has {samples}: each must be seen once")
    labels, predicted, places = (table[:, column].astype("int64") for column in (1, 2, 3))
    return Outcomes(ids, labels, predicted, places, table[:, 4], table[:, 5])
