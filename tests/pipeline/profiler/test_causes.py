"""What is named for the parts of a step, of the size that runs on two cores have, with batches of 64 from 256-pixel records.

Those of augmentation, image size and neighbors are from profiles of such runs; the others are made to stand for one fault each.
"""

import dataclasses

import numpy as np
import pytest

from imagefeed.pipeline.profiler.causes import PARTS, decoder_limits, explain, find_stalls, table
from imagefeed.pipeline.profiler.findings import LARGER, Evidence, Profile, Samples, Settings, Span, Step
from imagefeed.pipeline.profiler.fixes import remedies
from imagefeed.pipeline.profiler.report import render_text, verdict

SETTINGS = Settings(
    device="CPU",
    precision="float32",
    cores=2,
    threads=2,
    decoder="native",
    prefetch=4,
    hw_decoder_load=0.65,
    batch_size=64,
    loader="ImageLoader",
    crop_size=224,
    split="train",
    root="data",
    records=24_000,
    cache="none",
    read_ahead=8,
    verify_checksums=True,
    shuffle="global",
    random_resized_crop=False,
    color_jitter=(0, 0, 0, 0),
    record_bytes_per_step=22_600 * 64,
    pixels_per_image=65_536,
)
EVIDENCE = Evidence(
    read_bytes_per_step=0.0,
    dataset_bytes=543e6,
    available_bytes=22e9,
    evicted_share=0.0,
    read_s=0.0005,
    copy_s=0.0036,
    update_s=0.0001,
    disk_records_per_s=20_000.0,
    disk_bytes_per_s=450e6,
    others_share=(0.03, 0.02, 0.03),
    queued_share=(0.05, 0.06, 0.05),
    lock_latency_s=(7e-5,) * 20,
)
INPUT = ("read", "decode", "crop", "upload")
GPU = {"device": "NVIDIA H200", "cores": 16, "threads": 16, "batch_size": 1024, "decoder": "native", "hardware_decoder": True}


def measured(milliseconds, rates, settings=(), evidence=(), gains=(), steps=30, change=lambda n, row: row) -> Profile:
    """From a step's parts in milliseconds, which scatter by 3 % from step to step; `change` is what a step has beyond that."""
    drawn = np.random.default_rng(0)
    made, start_s = [], 0.0
    for number in range(steps):
        row = {name: 1e-3 * value * drawn.normal(1, 0.03) for name, value in milliseconds.items()}
        row = change(number, row)
        spans = tuple(Span(name, start_s, row[name]) for name in INPUT if name in row)
        wait_s = sum(span.seconds for span in spans) + row.get("loading", 0.0)
        phases = {name: seconds for name, seconds in row.items() if name not in (*INPUT, "loading")}
        made.append(Step(start_s, wait_s, phases, spans))
        start_s += made[-1].seconds
    settings, evidence = dataclasses.replace(SETTINGS, **dict(settings)), dataclasses.replace(EVIDENCE, **dict(evidence))
    if LARGER in rates:
        each_s, larger_s = (settings.batch_size / rates[name] for name in ("training", LARGER))
        evidence = dataclasses.replace(evidence, fixed_s=(max(4 * (each_s - larger_s), 0) / 3,) * 3)
    together = {"together": settings.batch_size * steps / sum(step.seconds for step in made)}
    samples = {name: Samples(tuple(rate * share for share in (0.98, 1.0, 1.02))) for name, rate in (together | rates).items()}
    stalls = find_stalls(table(made, settings.unnoted))
    return explain(Profile(settings, 12.0, samples, tuple(made), (), stalls, evidence, dict(gains)))


DECODING = {"read": 0.9, "decode": 12.8, "crop": 3.9, "copy": 0.05, "forward": 1.3, "backward": 0.7, "optimizer": 0.3}
FAST = {"training": 30_000, LARGER: 30_500, "loader warm": 4_000, "loader cold": 3_900}
MEDIUM = FAST | {"training": 2_900, LARGER: 3_000}
TRAINING = {"read": 0.9, "decode": 1.2, "crop": 4.6, "copy": 0.05, "forward": 160, "backward": 330, "optimizer": 0.3}
SLOW = {"training": 130, LARGER: 132, "loader warm": 3_900, "loader cold": 3_800}


def parts(**milliseconds) -> dict[str, float]:
    return DECODING | {name.replace("_", "-"): value for name, value in milliseconds.items()}


CASES = {
    "training": measured(TRAINING, SLOW),
    "decode": measured(DECODING, FAST, gains={"--cache host": (3.6, 3.9, 4.1)}),
    "DALI's decoder": measured(
        DECODING, FAST, {"decoder": "dali"},
        gains={"--decoder native": (0.9, 1.0, 1.1), "--cache host": (3.6, 3.9, 4.1)},
    ),
    "decode threads": measured(
        parts(decode=23.1, crop=6.4), FAST | {"loader warm": 2_400}, {"threads": 1},
        gains={"--threads 2": (0.78, 0.80, 0.83), "--cache host": (2.0, 2.2, 2.4)},
    ),
    "prefetch": measured(
        parts(decode=12.8, forward=9, backward=11), MEDIUM, {"prefetch": 1},
        gains={"--prefetch 4": (0.21, 0.24, 0.25)},
    ),
    "image size": measured(
        parts(read=1.9, decode=131.9, crop=8.6), {"training": 8_900, "loader warm": 106, "loader cold": 104},
        {"batch_size": 16, "records": 1_500, "pixels_per_image": 1024 * 1024, "record_bytes_per_step": 195_185 * 16},
        gains={"--cache host": (4.7, 17.8, 26.4)},
    ),
    "augmentation": measured(
        parts(decode=357.7, crop=0), FAST | {"loader warm": 178},
        {"random_resized_crop": True, "color_jitter": (0.4, 0.4, 0.4, 0.1)},
        gains={"no --random-resized-crop, no --color-jitter": (3.6, 4.3, 5.2)},
    ),
    "cold page cache": measured(
        parts(read=25.6, decode=1.3, forward=8, backward=10), MEDIUM | {"loader cold": 2_500}, {"read_ahead": 0},
        {"read_bytes_per_step": 22_600 * 64, "disk_records_per_s": 5_000},
        {"dataset in memory": (0.8, 0.9, 0.9), "--read-ahead 8": (0.7, 0.8, 0.8)},
    ),
    "slow disk": measured(
        parts(read=126, decode=1.3), FAST | {"loader cold": 500},
        evidence={"read_bytes_per_step": 22_600 * 64, "disk_records_per_s": 500, "disk_bytes_per_s": 11e6, "dataset_bytes": 29e9},
        gains={"dataset in memory": (6.1, 6.4, 6.6)},
    ),
    "memory pressure": measured(
        parts(read=40, decode=2), FAST | {"loader cold": 1_450},
        evidence={"read_bytes_per_step": 22_600 * 64, "disk_records_per_s": 1_500, "evicted_share": 0.62},
        gains={"dataset in memory": (1.6, 1.7, 1.9)},
    ),
    "interpreter lock": measured(
        parts(read=6, decode=16, crop=22, forward=60, backward=80), FAST | {"training": 420, LARGER: 440},
        evidence={"lock_latency_s": (5.1e-3,) * 15 + (8e-5,) * 5}, gains={"sys.setswitchinterval(1e-4)": (1.9, 2.0, 2.2)},
    ),
    "busy neighbor": measured(
        TRAINING | {"read": 6.7, "crop": 19}, SLOW,
        evidence={"others_share": (0.74, 0.78, 0.82), "queued_share": (0.82, 0.86, 0.89)},
    ),
    "CPU quota": measured(
        TRAINING | {"read": 6.7, "crop": 19}, SLOW,
        evidence={
            "others_share": (0.74, 0.78, 0.82), "queued_share": (0.82, 0.86, 0.89), "throttled_share": 0.8, "cpu_quota": 0.5
        },
    ),
    "small batch": measured(
        {"read": 0.1, "decode": 0.1, "crop": 0.2, "copy": 0.05, "forward": 1.1, "backward": 2.1, "optimizer": 0.3},
        {"training": 570, LARGER: 2_150, "loader warm": 3_000},
        {"batch_size": 2, "record_bytes_per_step": 45e3},
    ),
    "optimizer": measured(
        parts(decode=1, crop=4, forward=38, backward=72, optimizer=219),
        {"training": 191, LARGER: 380, "loader warm": 3_900},
        evidence={"update_s": 0.016},
    ),
    "host-to-device copy": measured(parts(decode=1.2, copy=180), FAST | {"training": 340, LARGER: 330}),
    "upload": measured(
        {"read": 0.1, "decode": 0.5, "upload": 30, "forward": 5, "backward": 9, "optimizer": 0.4},
        FAST | {"training": 71_000, LARGER: 73_000, "loader warm": 30_000}, GPU,
    ),
    "rest of the loop": measured(TRAINING | {"forward": 9, "backward": 16, "rest": 30}, SLOW | {"training": 1_150}),
    "loader": measured(
        {"loading": 160, "step": 2.4}, {"training": 26_000, LARGER: 27_000, "loader warm": 400},
        {"loader": "DataLoader", "workers": 0, "threads": None},
    ),
    "periodic stall": measured(
        TRAINING | {"forward": 9, "backward": 16}, MEDIUM, steps=80,
        change=lambda number, row: row | {"rest": 0.2 if number % 10 == 9 else 1e-5},
    ),
    "late stall": measured(
        TRAINING | {"forward": 9, "backward": 16}, MEDIUM, steps=80,
        change=lambda number, row: row | {"rest": 0.03 if number > 45 else 1e-5},
    ),
}  # fmt: skip


@pytest.mark.parametrize("cause", CASES)
def test_cause_is_named(cause):
    found = CASES[cause]
    assert found.causes[0].name == cause, [(other.name, other.share) for other in found.causes]
    assert found.causes[0].confidence >= 0.95
    assert sum(other.confidence for other in found.causes) <= 1.000001
    assert found.causes[0].sentence in verdict(found)
    assert render_text(found).splitlines()[0] == verdict(found)


def test_verdict_is_one_sentence_with_band_limit_and_confidence():
    assert verdict(CASES["decode threads"]) == (
        "Input-bound: 93% of each step waits for data; the limit is JPEG decode on 1 of 2 CPU threads (confidence 100%)."
    )
    assert verdict(CASES["training"]) == (
        "Not input-bound: 1% of each step waits for data; the limit is training itself (confidence 100%)."
    )
    assert "the limit is a cold page cache, until an epoch has been read from the disk at 450 MB/s, 5,000 records/s (" in verdict(
        CASES["cold page cache"]
    )
    assert verdict(CASES["slow disk"]).endswith(
        "the disk at 11 MB/s, 500 records/s; the dataset's 29.0 GB do not fit in memory (confidence 100%)."
    )


@pytest.mark.parametrize(
    ("cause", "option", "gain"),
    [
        ("decode threads", "--threads 2", 0.80),
        ("prefetch", "--prefetch 4", 0.24),
        ("decode", "--cache host", 3.9),
        ("DALI's decoder", "--decoder native", 1.0),
        ("cold page cache", "cat data/*.tfrecord > /dev/null", 0.9),
        ("slow disk", "", 6.4),
        ("interpreter lock", "sys.setswitchinterval(1e-4)", 2.0),
        ("augmentation", "no --random-resized-crop, no --color-jitter", 4.3),
        ("small batch", "--batch-size 8", None),
        ("image size", "imagefeed build RAW OUT --size 256", None),
        ("loader", "num_workers=2", None),
    ],
)
def test_first_fix_is_of_the_first_cause(cause, option, gain):
    """Its gain is what the trial's median was."""
    first = CASES[cause].fixes[0]
    assert (first.cause, first.option) == (cause, option)
    before = CASES[cause].rates["together"].median
    assert first.images_per_second == pytest.approx(before * (1 + first.gain))
    assert gain is None or first.gain == pytest.approx(gain)


def test_nothing_to_gain_is_an_answer():
    found = CASES["training"]
    assert found.fixes == ()
    assert "Nothing to gain: within 2 % of the ceiling." in render_text(found)
    below = dataclasses.replace(found, rates=found.rates | {"training": Samples((150.0,))})
    assert "Nothing to gain: no option would bring 2 %." in render_text(below)


def test_neighbor_takes_no_more_than_others_have_or_than_is_waited_for():
    """Threads of one's own wait for each other too, and others may use a processor that nobody else wants."""
    for others, queued in ((0.5, 0.02), (0.02, 0.5)):
        found = measured(TRAINING, SLOW, evidence={"others_share": (others,) * 3, "queued_share": (queued,) * 3})
        assert found.causes[0].name == "training"


@pytest.mark.parametrize("bytes_a_step", [22_600 * 64, 0])
def test_regular_stalls_of_reading_are_storage_where_bytes_come_from_a_disk(bytes_a_step):
    """A disk that is asked for some batches at once stalls every few of them."""
    found = measured(
        parts(read=1, decode=8), FAST, steps=80,
        evidence={"read_bytes_per_step": bytes_a_step, "disk_records_per_s": 1_500, "evicted_share": 0.6},
        change=lambda number, row: row | {"read": 0.08 if number % 4 == 3 else 1e-4},
    )  # fmt: skip
    assert found.stalls[0].stage == "read"
    assert found.causes[0].name == ("memory pressure" if bytes_a_step else "periodic stall")


def test_storage_stays_the_cause_beside_neighbors():
    """What waits for the disk would wait without them too; the neighbors' shares are from a machine with twelve programs."""
    found = measured(
        parts(read=126, decode=1.3), FAST | {"loader cold": 430},
        evidence={"read_bytes_per_step": 22_600 * 64, "disk_records_per_s": 500, "disk_bytes_per_s": 11e6, "dataset_bytes": 29e9,
                  "others_share": (0.81, 0.85, 0.89), "queued_share": (0.80, 0.83, 0.88)},
    )  # fmt: skip
    assert found.causes[0].name == "slow disk"


def test_cores_that_training_lacks_are_decodings_if_that_is_the_slower_of_the_two():
    row = {"read": 2, "decode": 6, "forward": 40, "backward": 60}
    assert measured(row, {"training": 4_000, "loader warm": 700}).causes[0].name == "decode"
    assert measured(row, {"training": 900, "loader warm": 1_000}).causes[0].name == "shared cores"


def test_the_decoder_in_use_is_the_limit_and_the_other_stands_beside_it():
    evidence = Evidence(decode_images_per_s=2_000.0, native_images_per_s=3_500.0)
    ours, other = ("imagefeed's decoder", 7_000.0), ("libjpeg-turbo", 4_000.0)
    for decoder, found in {"native": [ours, other], "dali": [other, ours]}.items():
        assert list(decoder_limits(dataclasses.replace(SETTINGS, decoder=decoder), evidence).items()) == found


def test_what_a_gpu_waits_for_is_decoding_copies_or_cores():
    fast = FAST | {"training": 71_000, LARGER: 73_000, "loader warm": 25_000}
    waiting = {"read": 0.1, "decode": 5, "loading": 30, "forward": 5, "backward": 9, "optimizer": 0.4}
    rates = {"cores_images_per_s": 50_000, "dali_images_per_s": 20_000}

    def named(**changes) -> str:
        return measured(waiting, fast, GPU | changes, rates).causes[0].sentence

    assert named() == "the copy of crops to the device"  # the host found the crops decoded, and the stream still waited
    assert named(decoder="dali") == "JPEG decode on NVIDIA H200"
    assert named(decoder="dali", hardware_decoder=False) == "JPEG decode on NVIDIA H200, without its hardware decoder"
    assert named(decoder="both", native_share=0.5) == "JPEG decode on NVIDIA H200"  # 40,000 of both, the cores 100,000
    assert named(decoder="both", native_share=0.9) == "JPEG decode on 16 CPU threads"
    on_cores = measured(waiting | {"decode": 35, "loading": 0}, fast, GPU, rates)
    assert on_cores.causes[0].sentence == "JPEG decode on 16 CPU threads"


def test_stalls_are_found_with_their_period_and_place():
    (periodic,) = CASES["periodic stall"].stalls
    assert (periodic.kind, periodic.first_step, periodic.period, periodic.stage) == ("periodic", 9, 10, "rest")
    assert periodic.seconds == pytest.approx(0.2, rel=0.01)
    (late,) = CASES["late stall"].stalls
    assert (late.kind, late.period, late.stage) == ("late", None, "rest")
    assert 41 <= late.first_step <= 51 and late.seconds == pytest.approx(0.03, rel=0.1)
    assert not CASES["training"].stalls
    early = measured(
        TRAINING | {"forward": 9, "backward": 16},
        MEDIUM,
        steps=160,
        change=lambda number, row: row | {"rest": 0.03 if number > 25 else 1e-5},
    )
    assert 21 <= early.stalls[0].first_step <= 31 and early.causes[0].name == "late stall"


def test_irregular_slow_steps_are_no_periodic_stall():
    slow = {3, 5, 24, 60, 61}
    found = measured(TRAINING, SLOW, steps=80, change=lambda number, row: row | {"rest": 0.9 if number in slow else 1e-5})
    assert found.stalls == ()


def test_parts_of_a_step_add_up_and_what_the_host_did_is_scaled_to_what_the_stream_waited():
    spans = (Span("read", 0.0, 0.002), Span("decode", 0.0, 0.006), Span("crop", 0.0, 0.002))
    on_cpu, on_gpu = Step(0.0, 0.011, {"step": 0.004}, spans), Step(0.0, 0.005, {"step": 0.004}, spans)
    (row,) = table([on_cpu], SETTINGS.unnoted)
    assert dict(zip(PARTS, row.tolist(), strict=True))["loading"] == pytest.approx(0.001)
    assert row.sum() == pytest.approx(0.015)
    (row,) = table([on_gpu], dataclasses.replace(SETTINGS, device="NVIDIA H200", decoder="dali").unnoted)
    assert row[:3].tolist() == pytest.approx([0.001, 0.003, 0.001]) and row.sum() == pytest.approx(0.009)


def test_remedies_are_what_is_not_yet_set():
    def options(**changes):
        return [remedy.option for remedy in remedies(dataclasses.replace(SETTINGS, **changes), EVIDENCE)]

    assert options() == ["--cache host"]
    assert options(cache="host") == []
    assert options(threads=1, prefetch=1, cache="host") == ["--threads 2", "--prefetch 4"]
    assert options(records=100_000) == []  # no room for it
    assert options(random_resized_crop=True) == ["no --random-resized-crop", "--cache host"]
    assert options(random_resized_crop=True, decoder="dali") == ["--decoder native", "no --random-resized-crop"]
    assert options(cache="device", decoder="dali") == []
    assert options(device="NVIDIA H200", hw_decoder_load=0.0, cache="host") == []
    on_gpu = {"device": "NVIDIA H200", "records": 100_000, "hw_decoder_load": 0.0}
    assert options(**on_gpu, decoder="dali") == ["--decoder native", "--decoder both", "--hw-decoder-load 0.65"]
    assert options(**on_gpu, decoder="native", prefetch=2) == ["--decoder both"]
    assert options(**on_gpu, decoder="both", prefetch=2) == ["--prefetch 4", "--hw-decoder-load 0.65"]
