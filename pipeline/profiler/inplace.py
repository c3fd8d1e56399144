"""The profile of a run that trains for real: what its own steps tell, with nothing else measured."""

import dataclasses

from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler import machine
from imagefeed.pipeline.profiler.accounting import Account
from imagefeed.pipeline.profiler.causes import diagnose, find_stalls, table
from imagefeed.pipeline.profiler.findings import Profile
from imagefeed.pipeline.profiler.fixes import explain, find_fixes
from imagefeed.pipeline.profiler.isolation import facts_before
from imagefeed.pipeline.profiler.stages import cut, settings_of, stages_of, waiting, windows


def profile_of_run(account: Account, loader: ImageLoader, precision: str, model: str = "") -> Profile | None:
    """What limited the steps in `account`; None where there are none. `loader` is what they were fed by.

    Without ceilings, trials or limits: a part of the step is named, and its cause where the run itself shows it (bytes from the
    disk, neighbors, the interpreter's lock, stalls). `python -m pipeline profile` measures the rest.
    """
    account.stop()
    steps = account.steps()
    if not steps:
        return None
    device, batch_size = account.device, loader.plan.batch_size
    settings = settings_of(loader, device, precision) | {"model": model}
    evidence, series = facts_before(loader), {}
    if account.sampler:
        before, after = account.sampler.began, machine.counters()
        evidence["read bytes a step"] = (after.read_bytes - before.read_bytes) / account.count
        series = {name: tuple(values) for name, values in account.sampler.series.items()}
    parts = table(steps, True, device.type == "cuda")
    found = Profile(
        settings,
        sum(step.seconds for step in steps),
        {"together": windows(steps, batch_size)},
        waiting(steps),
        tuple(waiting(part) for part in cut(steps)),
        None,
        None,
        stages_of(steps, (), {}, settings, evidence, batch_size),
        find_stalls(parts),
        steps,
        evidence,
        series,
    )
    found = dataclasses.replace(found, causes=explain(found, diagnose(found)))
    return dataclasses.replace(found, fixes=find_fixes(found))
