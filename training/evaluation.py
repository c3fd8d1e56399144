"""Measures the errors of a net, or of an ensemble of nets, on a split."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from imagefeed.dataset.records import NO_LABEL
from imagefeed.model.nets import build_net
from imagefeed.model.step import forward
from imagefeed.pipeline.batch import Batch
from imagefeed.training.inputs import Preprocessing
from imagefeed.training.parallel import Ranks
from imagefeed.training.recipes import Recipe

VIEWS = {"center": "center crop", "ten": "ten views"}
TOP = 5


@dataclass(frozen=True)
class Member:
    """A trained net, and what it was trained with."""

    model: torch.nn.Module
    precision: str
    preprocessing: Preprocessing


def net_of(recipe: Recipe, classes: int) -> torch.nn.Module:
    """A new net as a recipe describes it."""
    options = {name: getattr(recipe, name) for name in ("lrn", "overlapping", "dropout", "bias", "crop_size")}
    return build_net(recipe.model, classes, **options)


@torch.inference_mode()
def evaluate(
    members: list[Member],
    loaders: dict[Preprocessing, Iterable[Batch]],
    ranks: Ranks,
    on_progress: Callable[[float], None] = lambda fraction: None,
    on_batch: Callable[[Batch, torch.Tensor], None] = lambda batch, scores: None,
) -> dict[str, float]:
    """Returns the number of records with labels, over all ranks, and if there are any, top-1 error in percent, top-5 error among
    more than five classes, and the mean loss.

    `loaders` give the same records with each preprocessing. The softmax outputs of all views (section 4.1) and members (section
    6) are averaged. `on_progress` gets the fraction that is done, `on_batch` each batch with the logarithms (N, classes) of its
    averages.
    """
    for member in members:
        member.model.eval()
    first = next(iter(loaders.values()))
    sums = torch.zeros(4, dtype=torch.float64, device=first.device)
    for done, batches in enumerate(zip(*loaders.values(), strict=True), 1):
        batch, by_preprocessing = batches[0], dict(zip(loaders, batches, strict=True))
        outputs = []
        for member in members:
            crops = by_preprocessing[member.preprocessing].images
            logits = forward(member.model, crops.flatten(0, -4), member.precision)
            outputs.append(logits.unflatten(0, (len(batch.labels), -1)).log_softmax(-1))
        outputs = torch.cat(outputs, 1)
        scores = outputs.logsumexp(1) - math.log(outputs.shape[1])
        hits = scores.topk(min(TOP, scores.shape[1])).indices == batch.labels[:, None]
        known = batch.labels != NO_LABEL
        loss = F.nll_loss(scores, batch.labels * known, reduction="none")
        counts = torch.stack([hits[:, 0], hits.any(1), loss, torch.ones_like(loss)])
        sums += (counts * (batch.valid & known)).sum(1)
        on_batch(batch, scores)
        on_progress(done / len(first))
    for member in members:
        member.model.train()
    top1, top5, loss, records = ranks.sum(sums).tolist()
    if not records:
        return {"records": 0}
    errors = {"top1_error": 100 - 100 * top1 / records}
    if scores.shape[1] > TOP:  # otherwise it is always 0
        errors["top5_error"] = 100 - 100 * top5 / records
    return {**errors, "loss": loss / records, "records": int(records)}
