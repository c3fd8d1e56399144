"""A profile as it could have been measured, for tests of what is written from one."""

from imagefeed.pipeline.profiler.findings import Cause, Evidence, Fix, Profile, Samples, Settings, Span, Stage, Stall, Step, Tried

SLOW = 7  # of every ten steps, the one that stalls
HOSTILE = "/data/<script>alert('x')</script>\"&/imagenet"


def profile(steps: int = 40, **changes) -> Profile:
    """Input-bound: decoding on one of two threads, a stall every tenth step; the second half measured by a clock of its own."""
    taken, start_s = [], 1.5
    for n in range(steps):
        if n == steps // 2:
            start_s = 0.25
        stall_s = 0.1 if n % 10 == SLOW else 0.0
        spans = (
            Span("read", start_s + 0.001, 0.002),
            Span("decode", start_s + 0.003, 0.006),
            Span("crop", start_s + 0.009, 0.001),
        )
        phases = {"copy": 0.0001, "forward": 0.004 + 1e-7 * n, "backward": 0.008, "optimizer": 0.001, "rest": stall_s}
        taken.append(Step(start_s, 0.01, phases, spans))
        start_s += taken[-1].seconds
    values = {
        "settings": Settings(
            "CPU", "float32", 2, 32, "ImageLoader", threads=1, prefetch=4, root=HOSTILE, split="train", records=1000,
            color_jitter=(0.4, 0, 0, 0),
        ),
        "seconds": 31.5,
        "rates": {
            "together": Samples((1300.0, 1380.0, 1400.0)),
            "training": Samples((2400.0, 2430.0, 2500.0)),
            "loader warm": Samples((1500.0, 1520.0, 1600.0)),
            "loader cold": Samples((900.0, 1000.0, 1450.0)),
        },
        "stages": (
            Stage("read", "input", Samples((90_000.0, 99_000.0)), 0.002, 0.003, 0.004, 0.1, None, 110_000.0, "page cache"),
            Stage("decode", "input", Samples((1540.0, 1560.0)), 0.006, 0.007, 0.009, 0.9, 0.83, 3100.0, "libjpeg-turbo, 2 cores"),
            Stage("loading", "input", None, 0.0001, 0.0002, 0.0002, 0.01),
            Stage("copy", "training", Samples((9e6, 9e6)), 0.0001, 0.0001, 0.0002, 0.01, None, 7200.0, "memory bandwidth"),
            Stage("forward", "training", Samples((8000.0, 8100.0)), 0.004, 0.004, 0.005, 0.2),
        ),
        "stalls": (Stall("periodic", SLOW, 10.0, 0.1, 0.02, "rest"),),
        "steps": tuple(taken),
        "evidence": Evidence(resident_share=0.92, memory_bytes_per_s=8.66e9, lock_latency_s=(7e-5, 9e-5, 8e-5)),
        "gains": {"--threads 2": (0.6, 0.66, 0.7), "<seen>": (0.1, 0.1)},
        "causes": (
            Cause("decode threads", 0.38, 0.94, "JPEG decode on 1 of 2 CPU threads"),
            Cause("periodic stall", 0.02, 0.06, "a stall of 100 ms every 10 steps, between the steps"),
        ),
        "fixes": (
            Fix("decode threads", "--threads 2", "Tried for a moment.", 2300.0, 0.66, {"num_threads": 2}),
            Fix("busy neighbor", "", "Stop the other programs <all>.", 1500.0, 0.087),
        ),
        "tried": Tried("--threads 2", 1380.0, 2300.0, Samples((2150.0, 2200.0, 2210.0))),
    }  # fmt: skip
    return Profile(**(values | changes))
