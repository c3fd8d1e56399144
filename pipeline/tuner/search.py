"""Finds the fastest of many settings by noisy measurements, within a given time."""

import math
import statistics
from collections.abc import Callable
from itertools import chain
from typing import NamedTuple

from imagefeed.pipeline.options import OPTIONS


class Setting(NamedTuple):
    """Options of ImageLoader that only decide costs."""

    num_threads: int
    prefetch: int
    read_ahead: int
    hw_decoder_load: float
    decoder: str = "auto"
    native_share: float = OPTIONS["native_share"].default


Round = dict[Setting, float]  # images a second of settings that were measured one after the other

EQUAL = 0.01  # settings that differ by less are told apart by their cost
FINALISTS, OUT_OF_REACH = 4, 0.10  # how many are measured to the end, and the gap to the best that excludes one
DESCENT = 0.65  # of the time; the finalists get the rest
HALVE_EVERY = 2  # rounds
SWEEPS = 20  # of the median polish; it settles in about five
MEDIAN_ERROR = 1.25  # standard error of a median of normal values, times the root of their number over their deviation
MAD = 1.4826  # times the median deviation is the standard deviation of a normal distribution


def search(
    axes: dict[str, tuple], start: Setting, measure: Callable[[Setting], float], spent: Callable[[], float]
) -> list[Round]:
    """Rounds of measurements until `spent()`, the fraction of time used, is 1; `choose` picks the winner.

    One axis after the other: measures all its values in turns, and drops the slower half every two rounds (successive halving:
    Jamieson and Talwalkar, 2016, section 3), until a pass over the axes changes nothing. Then measures the best again and again
    beside `start`. Whatever the time, each value of the first axis is measured once.
    """
    rounds: list[Round] = []
    best = start

    def take(settings: list[Setting]) -> bool:
        """Measures each once, in alternating order; False if time runs out."""
        found: Round = {}
        for setting in settings if len(rounds) % 2 else settings[::-1]:
            if spent() >= 1 and rounds:
                break
            found[setting] = measure(setting)
        if len(found) > 1:  # one alone says nothing about the others
            rounds.append(found)
        return len(found) == len(settings)

    def race(settings: list[Setting], until: float) -> Setting:
        first = len(rounds)
        while len(settings) > 1 and (spent() < until or len(rounds) < first + HALVE_EVERY) and take(settings):
            if (len(rounds) - first) % HALVE_EVERY == 0:
                if len(settings) <= 2:
                    break
                settings = sorted(settings, key=score(rounds).get, reverse=True)[: math.ceil(len(settings) / 2)]
        known = score(rounds)
        return max(filter(known.__contains__, settings), key=known.get, default=best)

    share = DESCENT / sum(map(len, axes.values()))
    while spent() < DESCENT:
        before, until = best, spent()
        for name, values in axes.items():
            # Time that one axis does not need is left to the next ones.
            until = max(until, spent()) + share * len(values)
            others = [plain(best._replace(**{name: value})) for value in values]
            best = race(list(dict.fromkeys(others)), min(until, DESCENT))
        if best == before:
            break
    known = score(rounds)
    order = sorted(known, key=known.get, reverse=True)[:FINALISTS]
    finalists = [setting for setting in order if known[setting] > known[order[0]] - OUT_OF_REACH]
    finalists += [] if start in finalists else [start]
    while spent() < 1 and take(finalists):
        pass
    return rounds


def plain(setting: Setting) -> Setting:
    """With the default of each option that its decoder does not look at, so that nothing is measured twice."""
    idle = {"native": ("hw_decoder_load", "native_share"), "both": ()}.get(setting.decoder, ("native_share",))
    return setting._replace(**{name: OPTIONS[name].default for name in idle})


def choose(rounds: list[Round], start: Setting) -> Setting:
    """The fastest setting that was measured at least twice, and half as often as any; `start`, unless that is slower by more than
    the error of their medians.

    Among settings within 1 % of it, the cheapest: the fewest threads, which leaves the most to training, then the nearest to
    `start`.
    """
    known = score(rounds)
    times = {setting: sum(setting in found for found in rounds) for setting in known}
    proven = [setting for setting in known if times[setting] >= max(2, max(times.values()) / 2)]
    best = max(proven, key=known.__getitem__, default=start)
    if start in proven:
        error = MEDIAN_ERROR * noise(rounds) * math.sqrt(1 / times[best] + 1 / times[start])
        best = start if known[best] - known[start] < error else best
    equal = [setting for setting in proven if known[setting] > known[best] - EQUAL]

    def cost(setting: Setting) -> tuple:
        prefetch = abs(math.log(setting.prefetch / start.prefetch))
        read_ahead = abs(math.log1p(setting.read_ahead) - math.log1p(start.read_ahead))
        away = prefetch + read_ahead + abs(setting.hw_decoder_load - start.hw_decoder_load) + (setting.decoder != start.decoder)
        return setting.num_threads, away, -known[setting]

    return min(equal, key=cost, default=start)


def score(rounds: list[Round]) -> dict[Setting, float]:
    """The logarithm of each setting's images a second.

    A measurement is modeled as setting + round + noise, both parts fitted as medians in turns (median polish: Tukey, Exploratory
    Data Analysis, 1977, chapter 11), so that neither a machine that slows down nor a single bad window counts.
    """
    return _polish(rounds)[0]


def without_drift(rounds: list[Round]) -> list[Round]:
    """The measurements at the machine's usual speed, of which `score` is the medians."""
    _, drift = _polish(rounds)
    return [{setting: rate / math.exp(drift[n]) for setting, rate in found.items()} for n, found in enumerate(rounds)]


def noise(rounds: list[Round]) -> float:
    """The standard deviation of one measurement, as a fraction of it; 0 if nothing was measured twice."""
    settings, drift = _polish(rounds)
    left = [abs(math.log(rate) - settings[s] - drift[n]) for n, found in enumerate(rounds) for s, rate in found.items()]
    return MAD * statistics.median(left or [0.0])


def _polish(rounds: list[Round]) -> tuple[dict[Setting, float], list[float]]:
    """The logarithm of each setting's rate, and what each round adds to it."""
    logs = [{setting: math.log(rate) for setting, rate in found.items()} for found in rounds]
    rounds_of = {setting: [n for n, found in enumerate(logs) if setting in found] for setting in dict.fromkeys(chain(*logs))}
    drift = removed = [0.0] * len(logs)
    settings: dict[Setting, float] = {}
    for _ in range(SWEEPS if rounds else 0):
        removed = drift
        settings = {s: statistics.median(logs[n][s] - drift[n] for n in numbers) for s, numbers in rounds_of.items()}
        drift = [statistics.median(value - settings[s] for s, value in found.items()) for found in logs]
        middle = statistics.median(drift)
        drift = [value - middle for value in drift]
    return settings, removed  # that the settings are medians without
