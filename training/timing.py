"""Whether a run's steps are faster as CUDA graphs, timed once for each GPU, net and batch size."""

import copy

import torch

from imagefeed.model.graphed import MAX_IMAGES, StepForm, fastest_form, open_recorder
from imagefeed.model.step import compiled
from imagefeed.pipeline.arguments import trained_form
from imagefeed.pipeline.tuner.saved import gpu_key, timed_once
from imagefeed.training.recipes import make_optimizer
from imagefeed.training.resume import Run


def steps_form(run: Run, mode: str) -> StepForm:
    """As timed before on this GPU, or else timed now, with the net compiled in a `mode`, and saved; never graphed if batches are
    so large that the host has time enough to queue kernels."""
    recipe = run.recipe
    if recipe.batch_size > MAX_IMAGES:
        return StepForm(graphed=False)
    key = gpu_key(recipe.model, recipe.crop_size, recipe.precision, run.device)
    try:
        return timed_once(key | {"images a step": recipe.batch_size, "mode": mode}, StepForm, lambda: time_forms(run, mode))
    except torch.OutOfMemoryError:  # with a copy of the net beside the run's own
        return StepForm(graphed=False)


def time_forms(run: Run, mode: str) -> StepForm:
    """Times a copy of the net, on pixels of any content; the run stays as it is."""
    recipe, device = run.recipe, run.device
    net = copy.deepcopy(run.model)
    shape = recipe.batch_size, 3, recipe.crop_size, recipe.crop_size
    dtype = getattr(torch, trained_form(device, recipe.precision).get("dtype", "float32"))
    images = torch.randn(shape, device=device).to(dtype, memory_format=torch.channels_last)
    labels = torch.zeros(recipe.batch_size, dtype=torch.int64, device=device)
    step_net = net if mode == "off" else compiled(net, mode)
    try:
        return fastest_form(step_net, make_optimizer(net, recipe), recipe.precision, (images, labels), open_recorder(device))
    finally:
        torch.compiler.reset()  # the run's own net is compiled as if it were the first
