"""The search finds the fastest setting in noise; what was found is kept, and found again where it holds."""

import dataclasses
import itertools
import json
import logging
import math
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import train
from imagefeed.dataset.errors import UserError
from imagefeed.pipeline.cli import main
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.profiler.windows import Bench, read_stretch
from imagefeed.pipeline.tuner.saved import VERSION, key_of, load, save, settings_path, tuned_settings
from imagefeed.pipeline.tuner.search import Setting, choose, noise, score, search, without_drift
from imagefeed.pipeline.tuner.tune import Tuned, axes_of, tune
from tests.conftest import jpeg, pack, picture

ROOT = Path(__file__).parents[3]
START = Setting(2, 4, 8, 0.65)
CPU = torch.device("cpu")
SMALL = ("--crop-size", "64", "--device", "cpu", "--batch-size", "2")


@pytest.fixture(autouse=True)
def cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def two_cores(setting: Setting) -> float:
    """Decoding on two cores: a third thread is of no use, and 1 batch ahead is too few."""
    return 1250 * min(setting.num_threads, 2) * (1 - 0.45 * math.exp(-0.75 * setting.prefetch))


def gpu(setting: Setting) -> float:
    """Two decoders beside each other, fed by threads."""
    hardware, cuda = setting.hw_decoder_load / 18_000, (1 - setting.hw_decoder_load) / 12_000
    return (1 - 0.3 * math.exp(-0.8 * setting.prefetch)) / (max(hardware, cuda) + 1 / (6000 * setting.num_threads))


def cores_beside(setting: Setting) -> float:
    """The decoders of a GPU, cores that are faster, or both at once; each has its part of every batch."""
    cores = 1500 * min(setting.num_threads, 16) * (1 - 0.3 * math.exp(-0.8 * setting.prefetch))
    dali = gpu(setting._replace(num_threads=16))
    if setting.decoder != "both":
        return cores if setting.decoder == "native" else dali
    return min(dali / (1 - setting.native_share), cores / setting.native_share)


GPU_AXES = {
    "num_threads": (1, 2, 4, 8, 12, 16, 24),
    "hw_decoder_load": (0.0, 0.25, 0.5, 0.65, 0.8, 1.0),
    "prefetch": (1, 2, 3, 4, 6, 8),
}


@pytest.mark.parametrize(
    ("truth", "axes", "start"),
    [
        (two_cores, axes_of(2, CPU, cold=False), START),
        (gpu, GPU_AXES, START._replace(num_threads=16)),
        (cores_beside, axes_of(16, torch.device("cuda"), cold=False), START._replace(num_threads=16, decoder="dali")),
    ],
)
@pytest.mark.parametrize(("scatter", "bad", "needed"), [(0.01, 0, 96), (0.03, 0.05, 88)])
def test_search_finds_a_setting_within_three_percent_of_the_best(truth, axes, start, scatter, bad, needed):
    """In 96 of 100 runs of 80 measurements that scatter by 1 %; in 88 where they scatter by 3 % and each twentieth is far too
    slow. The machine's speed drifts by 15 % all the while."""
    best = max(truth(start._replace(**dict(zip(axes, values)))) for values in itertools.product(*axes.values()))
    good = 0
    for seed in range(100):
        own, measured = random.Random(seed), []

        def measure(setting, own=own, measured=measured, seed=seed):
            measured.append(setting)
            drift = 1 + 0.15 * math.sin(len(measured) / 9 + seed)
            disturbed = own.uniform(0.4, 0.9) if own.random() < bad else 1
            return truth(setting) * drift * disturbed * math.exp(own.gauss(0, scatter))

        rounds = search(axes, start, measure, lambda measured=measured: len(measured) / 80)
        assert len(measured) == 80
        good += truth(choose(rounds, start)) > 0.97 * best
    assert good >= needed


def test_score_takes_out_that_the_machine_slows_down():
    a, b, c = START, START._replace(prefetch=6), START._replace(prefetch=8)
    rounds = [{a: 100, b: 110}, {a: 50, b: 55, c: 60}, {b: 220, c: 240}]
    found = score(rounds)
    assert math.exp(found[b] - found[a]) == pytest.approx(1.1)
    assert math.exp(found[c] - found[a]) == pytest.approx(1.2)
    assert noise(rounds) == pytest.approx(0, abs=1e-9)
    assert [found[b] for found in without_drift(rounds)] == pytest.approx([math.exp(found[b])] * 3)


def test_of_equals_the_one_with_fewest_threads_is_chosen_and_then_the_nearest_to_the_defaults():
    fewer, deeper, slower = (START._replace(num_threads=1), START._replace(num_threads=1, prefetch=8), START._replace(prefetch=1))
    assert choose([{START: 1000, fewer: 995, deeper: 1001, slower: 900}] * 2, START) == fewer
    assert choose([{START: 1000, fewer: 980, deeper: 900, slower: 900}] * 2, START) == START


def test_the_defaults_stay_unless_another_setting_is_faster_beyond_the_noise():
    faster = START._replace(prefetch=8)
    scatter = (0.9, 1.0, 1.1, 0.95, 1.05)
    assert choose([{START: 1000 * s, faster: 1030 * t} for s, t in zip(scatter, scatter[::-1])], START) == START
    assert choose([{START: 1000 * s, faster: 1300 * t} for s, t in zip(scatter, scatter[::-1])], START) == faster
    assert choose([{START: 1000, faster: 1030} for _ in scatter], START) == faster


def test_nothing_is_chosen_on_a_single_window():
    assert choose([{START._replace(num_threads=1): 2000, START: 1000}], START) == START
    assert choose([{START: 1000, START._replace(num_threads=1): 3000}, {START: 1, START._replace(prefetch=2): 9}], START) == START


def test_reading_ahead_is_tuned_only_where_records_come_from_storage():
    assert "read_ahead" in axes_of(2, CPU, cold=True) and "read_ahead" not in axes_of(2, CPU, cold=False)
    assert axes_of(2, CPU, cold=False)["num_threads"] == (1, 2, 3)
    assert axes_of(64, CPU, cold=False)["num_threads"] == (4, 8, 16, 32, 48, 64, 96)
    assert "hw_decoder_load" in axes_of(2, torch.device("cuda"), cold=False)


def test_command_tunes_keeps_and_draws(tiny, tmp_path):
    plot = tmp_path / "tried.png"
    result = CliRunner().invoke(main, ["tune", str(tiny.root), *SMALL, "--seconds", "2", "--picture", str(plot)])
    assert result.exit_code == 0, result.output
    assert plot.read_bytes().startswith(b"\x89PNG") and plot.stat().st_size > 5000
    assert "chosen" in result.stdout and "default" in result.stdout
    assert re.search(r"^cache host: all 50 images fit \(0\.0 GB\); epochs after the first .* times as fast", result.stdout, re.M)
    found = tuned_settings(tiny, 2, crop_size=64, device="cpu")
    if "not saved: other programs took too much of the processors" in result.stdout:  # while this test ran
        assert found == {}
    else:
        assert {"num_threads", "prefetch"} <= set(found) <= {"num_threads", "prefetch", "cache"}


def test_what_was_found_is_kept_for_python_too_but_not_from_a_busy_machine(tiny):
    found = tune(tiny, None, 2, device="cpu", crop_size=64, seconds=1)
    key = key_of(tiny, None, 2, device="cpu", crop_size=64)
    assert save(key, dataclasses.replace(found, others=0.3)) is None
    assert tuned_settings(tiny, 2, crop_size=64, device="cpu") == {}
    assert save(key, dataclasses.replace(found, others=0.1)) == settings_path(key)
    settings = tuned_settings(tiny, 2, crop_size=64, device="cpu")
    assert settings == found.settings
    with ImageLoader(tiny, "train", 2, crop_size=64, **settings) as loader:
        assert next(iter(loader)).images.shape == (2, 3, 64, 64)


def test_from_storage_reading_ahead_is_tuned_and_storage_judged(tiny):
    found = tune(tiny, None, 2, device="cpu", crop_size=64, seconds=2, cold=True)
    assert set(found.settings) >= {"num_threads", "prefetch", "read_ahead"}
    assert any(note.startswith("storage: records that are not in memory come at") for note in found.notes)
    assert not any("shuffle" in name for name in found.settings)


def test_images_of_different_sizes_leave_the_cache_to_the_user(oblong):
    found = tune(oblong, None, 2, device="cpu", crop_size=64, seconds=1)
    assert "cache" not in found.settings and any("image sizes vary" in note for note in found.notes)


def test_bench_measures_the_same_steps_again_and_closes_what_takes_too_much_room(tiny):
    opened = []

    def open_loader(**options):
        opened.append(ImageLoader(tiny, "train", 2, crop_size=64, **options))
        return opened[-1]

    one, other = START, START._replace(prefetch=1)
    with Bench(open_loader, 0.01, 5, apart=False, room_bytes=1 << 40) as bench:
        assert bench.rate(one) > 0 and bench.rate(other) > 0 and bench.rate(one) > 0
        assert len(opened) == 2 and all(loader.position <= 5 for loader in opened)
    with Bench(open_loader, 0.01, 5, apart=True, room_bytes=1) as bench:
        assert bench.rate(one) > 0 and bench.rate(other) > 0 and bench.rate(one) > 0
        assert len(opened) == 5
        assert opened[2].position < opened[3].position  # each on a way of its own


def test_reading_into_memory_ends_after_the_epoch_or_in_time(tiny):
    with ImageLoader(tiny, "train", 2, crop_size=64) as loader:
        assert read_stretch(loader, deadline_s=math.inf) == 25
        assert read_stretch(loader, deadline_s=0) == 4


def put(key, /, **changes):
    path = settings_path(key)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = {
        "version": VERSION,
        "tuned": "2026-11-24",
        "settings": {"num_threads": 1, "prefetch": 3},
        "cache bytes": 0,
        "key": key,
    }
    path.write_text(json.dumps(file | changes))
    return path


def test_a_user_without_a_folder_for_settings_has_none(tiny, tmp_path, monkeypatch):
    """A container may know neither HOME nor the user's name, or give a HOME that cannot be written to."""

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    key = key_of(tiny, None, 2, device="cpu")
    start = Setting(1, 1, 0, 0.0)
    found = Tuned({}, start, start, (), [], (), 0.0, 0, 0.0)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(key) == ({}, "")
    with pytest.raises(UserError, match="not a directory; set XDG_CACHE_HOME to a folder that can be written to"):
        save(key, found)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setattr(Path, "home", no_home)
    assert load(key) == ({}, "") and tuned_settings(tiny, 2, device="cpu") == {}
    with pytest.raises(UserError, match="no home folder; set XDG_CACHE_HOME"):
        save(key, found)


def test_settings_are_found_for_the_same_machine_dataset_and_batch_alone(tiny, oblong):
    key = key_of(tiny, None, 2, device="cpu")
    put(key)
    assert tuned_settings(tiny, 2, device="cpu") == {"num_threads": 1, "prefetch": 3}
    assert tuned_settings(tiny, 2, device="cpu", split="val") == {}
    assert tuned_settings(tiny, 4, device="cpu") == {}
    assert tuned_settings(tiny, 2, device="cpu", crop_size=64) == {}
    assert tuned_settings(tiny, 2, device="cpu", random_resized_crop=True) == {}
    assert tuned_settings(tiny, 2, device="cpu", color_jitter=(0, 0.1, 0, 0)) == {}
    assert tuned_settings(oblong, 2, device="cpu") == {}
    for changed in ({"processor": "another"}, {"cores": 1000}, {"device": "NVIDIA H200"}):
        assert load(key | changed) == ({}, "")
        put(key, key=key | changed)  # copied from there
        assert load(key) == ({}, "")


@pytest.mark.parametrize(
    "changes",
    [
        {"settings": {"num_threads": 0}},
        {"settings": {"num_threads": True}},
        {"settings": {"cache": "device"}},
        {"settings": {"shuffle": "blocks"}},
        {"settings": [1]},
        {"tuned": "yesterday"},
        {"cache bytes": None},
    ],
)
def test_a_damaged_file_is_passed_over_with_a_sentence(tiny, caplog, changes):
    key = key_of(tiny, None, 2, device="cpu")
    path = put(key, **changes)
    with caplog.at_level(logging.WARNING):
        assert load(key) == ({}, "")
    assert f"{path}: corrupt" in caplog.text and "run imagefeed tune again" in caplog.text


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\xff"])
def test_a_file_that_is_no_json_is_passed_over(tiny, caplog, text):
    key = key_of(tiny, None, 2, device="cpu")
    put(key).write_bytes(text.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert load(key) == ({}, "")
    assert "corrupt" in caplog.text


def test_a_file_of_another_version_is_another_file(tiny, caplog):
    key = key_of(tiny, None, 2, device="cpu")
    put(key, version=VERSION - 1)
    with caplog.at_level(logging.WARNING):
        assert load(key) == ({}, "")
    assert not caplog.text


def test_a_cache_that_no_longer_fits_is_left_out(tiny):
    key = key_of(tiny, None, 2, device="cpu")
    put(key, settings={"prefetch": 3, "cache": "host"}, **{"cache bytes": 1 << 60})
    found, since = load(key)
    assert found == {"prefetch": 3}
    assert since.startswith("tuned settings of 2026-11-24 for this machine, without the cache: its ")


def test_training_takes_tuned_settings_the_command_line_wins_and_the_weights_stay_the_same(tmp_path):
    manifest = pack(tmp_path / "data", {"train": [jpeg(picture(n)) for n in range(8)]})
    key = key_of(manifest, None, 4, crop_size=64, device="cpu")
    losses = set()

    def line(*options):
        """What a run says of tuned settings."""
        run_dir = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        common = ["--device", "cpu", "--batch-size", "4", "--crop-size", "64", "--epochs", "2"]
        common += ["--schedule", "cosine", "--run-dir", str(run_dir)]
        result = CliRunner().invoke(train.main, [str(manifest.root), *common, *options])
        assert result.exit_code == 0, result.output
        entries = [json.loads(text) for text in (run_dir / "metrics.jsonl").read_text().splitlines()]
        losses.add(tuple(entry["loss/train"] for entry in entries if "loss/train" in entry))
        return "".join(said for said in result.stdout.splitlines() if said.startswith("tuned"))

    begin = "tuned settings of 2026-11-24 for this machine: "
    assert line() == ""
    put(key, settings={"num_threads": 1, "prefetch": 3, "cache": "host"})
    assert line() == f"{begin}threads 1, prefetch 3, cache host"
    assert line("--prefetch", "2") == f"{begin}threads 1, cache host"
    assert line("--prefetch", "4", "--threads", "2", "--cache", "none") == ""
    assert line("--no-tuned") == ""
    assert len(losses) == 1 and len(losses.pop()) >= 2


def test_profile_says_what_it_took_on_stderr(tiny):
    put(key_of(tiny, None, 2, crop_size=64, device="cpu"))
    result = CliRunner().invoke(main, ["profile", str(tiny.root), *SMALL, "--seconds", "1", "--json", "--threads", "2"])
    assert result.exit_code == 0, result.output
    assert "tuned settings of 2026-11-24 for this machine: prefetch 3\n" in result.stderr
    assert json.loads(result.stdout)["settings"]["prefetch"] == 3
    assert json.loads(result.stdout)["settings"]["threads"] == 2


def test_a_picture_that_cannot_be_is_refused_before_measuring(tiny, tmp_path, cache_folder):
    for name, message in (("tried.gif", "choose a name that ends in"), ("none/tried.png", "there is no folder")):
        result = CliRunner().invoke(main, ["tune", str(tiny.root), *SMALL, "--picture", str(tmp_path / name)])
        assert result.exit_code == 1 and message in result.stderr and result.stderr.count("\n") == 1
    assert not cache_folder.exists()


def test_an_interrupt_keeps_nothing(tiny, cache_folder):
    """Sent in the midst of it, or while the libraries load, whichever it is on this machine."""
    command = [sys.executable, "-m", "pipeline", "tune", str(tiny.root), *SMALL, "--seconds", "120"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(8)
        for _ in range(
            3
        ):  # Python drops a KeyboardInterrupt that arrives while an object is being destroyed; then one asks again
            process.send_signal(signal.SIGINT)
            try:
                output, error = process.communicate(timeout=15)
                break
            except subprocess.TimeoutExpired:
                continue
        else:
            process.kill()
            pytest.fail("it goes on after three interrupts")
    assert process.returncode == 130 and "interrupted" in error and output == ""
    assert not list(cache_folder.rglob("tune/*"))


@pytest.mark.gpu
def test_on_a_gpu_the_decoders_share_is_tuned(tiny):
    found = tune(tiny, None, 4, device="cuda", crop_size=64, seconds=20)
    assert set(found.settings) >= {"num_threads", "prefetch", "hw_decoder_load"}
    assert "device" not in found.settings.values()


def test_decoders_found_for_a_gpu_are_kept_with_their_share(tiny):
    """Under the key of another machine's GPU."""
    key = key_of(tiny, None, 2, device="cpu") | {"device": "NVIDIA H200"}
    chosen = Setting(16, 3, 8, 0.8, "both", 0.25)
    axes = axes_of(16, torch.device("cuda"), cold=False)
    settings = {name: getattr(chosen, name) for name in axes}
    save(key, Tuned(settings, chosen, chosen, tuple(axes), [], (), 0.0, 0, 0.0))
    assert load(key)[0] == {"decoder": "both", "num_threads": 16, "hw_decoder_load": 0.8, "native_share": 0.25, "prefetch": 3}
