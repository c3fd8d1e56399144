"""Says in words what a profile measured."""

import dataclasses
import json

from pipeline.profile import MUCH_WAIT, SOME_WAIT, Profile

NAMES = {
    "reading": "reading, with checksums",
    "decoding": "decoding",
    "pipeline": "whole input pipeline",
    "training": "training on one batch",
    "both": "both together",
}


def verdict(profile: Profile) -> str:
    """What limits the run, in one sentence."""
    wait = profile.data_wait
    band = "Not input-bound" if wait < SOME_WAIT else "Partly input-bound" if wait < MUCH_WAIT else "Input-bound"
    rate = {stage: f"{profile.rate(stage):,.0f}" for stage in NAMES}
    waits = f"{band}: {wait:.0%} of each step waits for data"
    alone = f"training alone does {rate['training']} images/s and the input pipeline alone {rate['pipeline']}"
    return {
        "training": f"{waits}; the limit is training, the smallest rate with {rate['training']} images/s, "
        f"where the input pipeline alone gives {rate['pipeline']}.",
        "competition": f"{waits}; the limit is the machine, which both share: {alone}, together they do {rate['both']}.",
        "reading": f"{waits}; the limit is reading from storage, {rate['reading']} images/s in one thread: {alone}.",
        "decoding": f"{waits}; the limit is JPEG decoding, {rate['decoding']} images/s {_where(profile)}: {alone}.",
        "cropping": f"{waits}; the limit is what follows decoding (crop, flip, mean, hand-over) {_where(profile)}: {alone}.",
    }[profile.limit]


def remedy(profile: Profile) -> str:
    """What to change, in one sentence."""
    spare = profile.cores - profile.num_threads
    if spare > 0:
        threads = f"raise --threads from {profile.num_threads} to {profile.cores}"
    else:
        threads = "use a machine with more cores"
    return {
        "training": "A faster input pipeline would gain nothing; make the step cheaper (a GPU, a faster GPU, a smaller net).",
        "competition": f"Give each its own: lower --threads below {profile.num_threads} so that training keeps its cores, "
        "or use a machine with more.",
        "reading": "Put the dataset on faster storage, or on a machine whose memory holds all of it.",
        "decoding": f"To decode faster, {threads}{'' if profile.device != 'CPU' else ', or decode on a GPU'}.",
        "cropping": f"To crop and normalise faster, {threads}{'' if profile.device != 'CPU' else ', or do it on a GPU'}.",
    }[profile.limit]


def render_text(profile: Profile) -> str:
    """The verdict, a table of the rates, and what to change."""
    lines = [verdict(profile), "", f"{'images per second':<26}{'median':>10}   lowest to highest"]
    for stage, name in NAMES.items():
        rates = profile.rates[stage]
        lines.append(f"{name:<26}{profile.rate(stage):>10,.0f}   {min(rates):,.0f} to {max(rates):,.0f}")
    lines += [
        "",
        remedy(profile),
        f"Measured on {profile.device}, {profile.cores} cores, {profile.num_threads} thread{'s' * (profile.num_threads > 1)} "
        f"for the pipeline, batch {profile.batch_size}, crops of {profile.size} pixels, "
        f"training in {profile.precision}, {profile.records:,} records of {profile.split}.",
    ]
    return "\n".join(lines)


def render_json(profile: Profile) -> str:
    """All that was measured, with the verdict."""
    words = {"verdict": verdict(profile), "limit": profile.limit, "remedy": remedy(profile)}
    return json.dumps(words | dataclasses.asdict(profile), indent=1)


def _where(profile: Profile) -> str:
    threads = f"{profile.num_threads} CPU thread{'s' * (profile.num_threads > 1)}"
    return f"on {threads}" if profile.device == "CPU" else f"on {profile.device} with {threads}"
