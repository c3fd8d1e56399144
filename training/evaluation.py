"""Errors on the validation split: of a net, or of several as an ensemble."""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from imagefeed.dataset.manifest import Manifest
from imagefeed.model import build_net
from imagefeed.model.step import forward
from imagefeed.pipeline.loader import Batch, ImageLoader
from imagefeed.training.parallel import Ranks

VIEWS = {"center": "center crop", "ten": "ten views"}
NET = ("model", "lrn", "overlapping", "dropout", "bias", "crop_size")  # of a recipe, what build_net takes
LOOKS = ("crop_size", "mean", "std")  # and what an image is for it
TOP = 5


class Member(NamedTuple):
    """A trained net, and what it was trained with."""

    model: torch.nn.Module
    precision: str
    looks: tuple  # values of LOOKS


def net_from(settings: dict[str, object], classes: int, prefix: str = "") -> torch.nn.Module:
    """A new net as a recipe says, whose names carry a prefix in a checkpoint."""
    name, *options = (settings[prefix + key] for key in NET)
    return build_net(name, classes, **dict(zip(NET[1:], options, strict=True)))


def validation(
    manifest: Manifest, views: str, batch_size: int, device: torch.device, reading: dict[str, object], looks: tuple, ranks: Ranks
) -> ImageLoader:
    """Each validation record once, this rank's share, about `batch_size` crops at a time; no cache, which is for what is seen
    again."""
    return ImageLoader(
        manifest,
        manifest.eval_split,
        max(1, batch_size // 10) if views == "ten" else batch_size,
        views=views,
        device=device,
        rank=ranks.rank,
        world_size=ranks.count,
        **dict(zip(LOOKS, looks, strict=True)),
        **reading | {"cache": "none"},
    )


@torch.inference_mode()
def evaluate(
    members: list[Member],
    loaders: dict[tuple, Iterable[Batch]],
    ranks: Ranks,
    watch: Callable[[float], None] = lambda share: None,
    keep: Callable[[Batch, torch.Tensor], None] = lambda batch, scores: None,
) -> dict[str, float]:
    """Top-1 and top-5 error in percent, the mean loss, and the number of records that count, over all ranks.

    `loaders` are of the same records, one for each kind of looks. The softmax outputs of all views (section 4.1) and
    members (section 6) are averaged. `watch` gets the share that is done, batch by batch, and `keep` each batch with the
    logarithms (N, classes) of its averages.
    """
    for member in members:
        member.model.eval()
    first = next(iter(loaders.values()))
    sums = torch.zeros(4, dtype=torch.float64, device=first.device)
    for done, batches in enumerate(zip(*loaders.values(), strict=True), 1):
        seen = dict(zip(loaders, batches, strict=True))
        batch = batches[0]
        outputs = []
        for member in members:
            crops = seen[member.looks].images
            logits = forward(member.model, crops.flatten(0, -4), member.precision)
            outputs.append(logits.unflatten(0, (len(batch.labels), -1)).log_softmax(-1))
        outputs = torch.cat(outputs, 1)
        scores = outputs.logsumexp(1) - math.log(outputs.shape[1])
        hits = scores.topk(min(TOP, scores.shape[1])).indices == batch.labels[:, None]
        loss = F.nll_loss(scores, batch.labels, reduction="none")
        counts = torch.stack([hits[:, 0], hits.any(1), loss, torch.ones_like(loss)])
        sums += (counts * batch.valid).sum(1)
        keep(batch, scores)
        watch(done / len(first))
    for member in members:
        member.model.train()
    top1, top5, loss, records = ranks.sum(sums).tolist()
    return {
        "top1_error": 100 - 100 * top1 / records,
        "top5_error": 100 - 100 * top5 / records,
        "loss": loss / records,
        "records": int(records),
    }


def accuracy(errors: dict[str, float]) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, by the names that others use; empty where there are no errors."""
    return {name.removesuffix("_error"): 100 - value for name, value in errors.items() if name.endswith("_error")}
