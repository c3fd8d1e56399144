"""The page of the benchmarks is a function of their results, and what they share."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import harness
from benchmarks.all import JOBS, take_images
from benchmarks.data import repeat, stretch
from benchmarks.page import extend, facts, load, number, render, table, write
from benchmarks.peers import left_out, why
from imagefeed.dataset.manifest import Manifest
from imagefeed.dataset.reader import RecordReader

ROOT = Path(__file__).parent.parent
COMMITTED = ROOT / "benchmarks" / "results"
HEAD = {"date": "2026-11-22", "machine": "Two Cores", "versions": {"python": "3.11.7"}}
KILLS = HEAD | {"images": 3000, "kills": {"group": 36}, "datasets": 44}


def words(svg: str) -> list[str]:
    """What stands in a plot; where it stands may depend on the fonts at hand."""
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_the_committed_page_is_what_the_committed_results_give():
    files = render(load(COMMITTED))
    assert (ROOT / "docs" / "benchmarks.md").read_text() == files["benchmarks.md"], "run python -m benchmarks.page"
    plots = {name: text for name, text in files.items() if name.endswith(".svg")}
    assert {f"benchmarks/{path.name}" for path in (ROOT / "docs" / "benchmarks").iterdir()} == set(plots)
    for name, svg in plots.items():
        assert words((ROOT / "docs" / name).read_text()) == words(svg), name


def test_the_page_is_a_function_of_the_results():
    assert render(load(COMMITTED)) == render(load(COMMITTED))


def test_without_results_each_script_is_not_measured_yet():
    files = render({})
    assert list(files) == ["benchmarks.md"]
    said = re.findall(r"`python -m benchmarks\.(\w+)`: not measured yet\.", files["benchmarks.md"])
    saves = re.compile(r"^ *(harness\.)?save\(\S|harness\.Notes\(", re.M)
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("*.py") if saves.search(path.read_text())}
    assert scripts - {"harness"} == set(said)
    assert {job.script for job in JOBS} <= set(said)
    assert "## GPU\n\nAnd on a GPU?" in files["benchmarks.md"] and "Not measured yet. A figure above" in files["benchmarks.md"]


def test_of_a_machine_the_newest_result_counts_and_each_machine_is_shown(tmp_path):
    older = KILLS | {"date": "2026-11-21", "datasets": 1}
    other = KILLS | {"machine": "Another", "datasets": 7}
    for name, results in {"a": {"kills": KILLS}, "b": {"kills": older}, "c": {"kills": other}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(results))
    assert load(tmp_path) == {"kills": [other, KILLS]}
    page = render(load(tmp_path))["benchmarks.md"]
    assert "*`python -m benchmarks.kills` on Two Cores, 2026-11-22; python 3.11.7*" in page
    assert "| datasets | 44 |" in page and "| datasets | 7 |" in page and "| datasets | 1 |" not in page


def test_results_of_a_gpu_are_shown_under_their_questions_and_beside_the_goals():
    rows = {
        "alexnet: warm": {"together": 50_000.0, "of synthetic": 0.97, "of the smaller": 0.98},
        "alexnet: cold": {"left out": "no time"},
    }
    steps = {
        "alexnet-owt, bfloat16, batch 1024": {"images_per_second": 61_000.4, "rounds": [1.0], "to matrix products": 0.32},
        "alexnet, compiled, bfloat16, batch 1024": {"images_per_second": 54_900.0, "rounds": [1.0]},
    }
    results = {
        "ceilings-cuda": {"decode images/s, both": 61_234.5},
        "together-cuda": {"settings": {"num_threads": 16}, "rows": rows},
        "train-cuda": {"batch_size": 128, "rows": steps},
        "bench-cuda": {"raw": "1,000 records", "seconds": {"train": 90.0}, "not_run": {"preprocess": "it took longer than 15 s"}},
    }
    page = render({name: [HEAD | {"machine": "Two Cores, 1 Device"} | result] for name, result in results.items()})[
        "benchmarks.md"
    ]
    assert "| decode images/s, both | 61,234 |" in page
    assert "*`python -m benchmarks.train --device cuda` on Two Cores, 1 Device, 2026-11-22" in page
    assert "| alexnet: warm | 50,000 | 0.970 | 0.980 |  |\n| alexnet: cold |  |  |  | no time |" in page
    assert "| not run | preprocess it took longer than 15 s |" in page
    goals = page[page.index("## GPU") :]
    assert "| together, alexnet: warm, of the smaller | 0.980 | 0.950 |" in goals
    assert "| training, alexnet-owt, batch 1024, images/s | 61,000 | 60,000 |" in goals
    assert "| training, alexnet / alexnet-owt | 0.900 | 0.850 |" in goals and "Not measured yet." not in goals


def test_rates_stand_beside_their_ratios():
    rates = {
        "images_per_second": {"float32": [20.0, 30.0, 25.0], "DALI": [10.0, 11.0, 12.0]},
        "median": {"float32": 25.0, "DALI": 11.0},
    }
    files = render({"loader": [HEAD | rates | {"ratio": {"float32 / DALI": 2.5}, "left_out": {"FFCV": "no compiler"}}]})
    assert "|  | images/s | slowest - fastest round | float32 / this |" in files["benchmarks.md"]
    assert "| float32 | 25.0 | 20.0 - 30.0 |  |\n| DALI | 11.0 | 10.0 - 12.0 | 2.50 |" in files["benchmarks.md"]
    assert "| left out | FFCV no compiler |" in files["benchmarks.md"]
    assert {"float32", "DALI"} <= set(words(files["benchmarks/loader-rates-two-cores.svg"]))


def test_tunings_stand_beside_the_best_of_the_sweep():
    tuning = {"chosen": "num_threads 2, prefetch 6", "seconds": 58.0, "settings_tried": 9, "of_best": 0.99}
    result = {"best_of_sweep": "num_threads 2, prefetch 8", "swept": {"a": [1.0, 3.0], "b": [2.0]}, "defaults_of_best": 0.95}
    result |= {"tunings": [tuning | {"within_3_percent": True}, tuning | {"of_best": 0.9, "within_3_percent": False}]}
    page = render({"tune": [HEAD | result]})["benchmarks.md"]
    assert "| best of sweep | num_threads 2, prefetch 8 |\n| defaults of best | 0.950 |" in page
    assert "| num_threads 2, prefetch 6 | 58.0 | 9 | 0.990 | yes |" in page and "| 0.900 | no |" in page
    assert "swept:\n\n|  | median | lowest | highest |\n| --- | ---: | ---: | ---: |\n| a | 2.00 | 1.00 | 3.00 |" in page


def test_a_training_step_is_shown_beside_plain_pytorch():
    row = {"images_per_second": 20.0, "rounds": [19.0, 21.0, 20.0], "peak_bytes": 1_500_000_000}
    rows = {"plain, float32": row | {"to plain float32": 1.0}, "alexnet, float32": row | {"to plain float32": 1.5}, "lrn": row}
    files = render({"train": [HEAD | {"batch_size": 128, "rows": rows}]})
    assert "|  | images per second | peak bytes | to plain float32 |" in files["benchmarks.md"]
    assert "| alexnet, float32 | 20.0 | 1,500,000,000 | 1.50 |\n| lrn | 20.0 | 1,500,000,000 |  |" in files["benchmarks.md"]
    drawn = words(files["benchmarks/train-rates-two-cores.svg"])
    assert {"plain, float32", "alexnet, float32"} <= set(drawn) and "lrn" not in drawn


def test_causes_are_shown_beside_the_faults_that_were_made():
    tried = {"option": "--threads 2", "before": 10.0, "predicted": 20.0, "achieved": 21.0}
    right, wrong = {"named": "decode", "right": True, "tried": tried}, {"named": "crop", "right": False, "tried": None}
    result = {"seconds": 10.0, "right": 1, "of": 2, "prediction_errors": [0.05], "faults": {"one decode thread": [right, wrong]}}
    page = render({"profile_faults": [HEAD | result]})["benchmarks.md"]
    assert "1 of 2 right, each profiled for about 10 s." in page
    assert "gained what was predicted, within 10 %: 1 of 1." in page
    assert "| one decode thread | 1 of 2 | decode, crop | --threads 2: 20 and 21 |" in page


def test_results_of_a_day_go_to_one_file_and_replace_those_of_the_same_name(tmp_path):
    first = harness.save("kills", {"kills": 1}, folder=tmp_path)
    second = harness.save("scale", {"rows": []}, "numpy", folder=tmp_path)
    assert first == harness.save("kills", {"kills": 2}, folder=tmp_path) == second
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
    found = json.loads(first.read_text())
    assert first.stem == f"{harness.slug(found['kills']['machine'])}-{found['kills']['date']}"
    assert found["kills"]["kills"] == 2 and list(found["scale"]["versions"]) == ["python", "numpy"]


def test_growth_goes_on_along_the_line_through_the_two_sizes_next_to_it():
    assert extend([10, 100, 1000], [5.0, 1.0, 10.0], 2000) == 20
    assert extend([10, 100, 1000], [1.0, 2.0, 11.0], 500) == 6
    assert extend([10, 100], [5.0, 4.0], 1000) == 4  # what falls is noise
    assert extend([10], [5.0], 1000) == 5


def test_the_page_says_which_sizes_are_extrapolated_and_which_are_linked():
    step = {"seconds": [1.0, 3.0, 2.0], "peak_mb": [100.0], "before_mb": [50.0]}
    rows = [
        {"records": 1000, "stretched": False, "steps": {"build": step, "open": step}},
        {"records": 11_000, "stretched": True, "steps": {"open": step | {"seconds": [4.0]}}},
    ]
    growth = HEAD | {"images": 1000, "rounds": 3, "batch_size": 128, "rows": rows}
    files = render({"growth": [growth]})
    page = files["benchmarks.md"]
    assert "| seconds | 1,000 | 11,000 linked | 1,281,167 extrapolated | 100,000,000 extrapolated |" in page
    assert "| build | 2.00 |  | *2.00* | *2.00* |" in page
    assert "| open | 2.00 | 4.00 | *258* | *20,002* |" in page
    assert "| open | 100 | 100 | *100* | *100* |" in page
    assert "filled: measured; open, dotted: extrapolated" in words(files["benchmarks/growth-two-cores.svg"])


def test_plots_of_before_are_gone_when_the_page_is_drawn_again(tmp_path):
    page = tmp_path / "benchmarks.md"
    write({"benchmarks.md": "a", "benchmarks/old.svg": "<svg/>"}, page)
    write({"benchmarks.md": "b", "benchmarks/new.svg": "<svg/>"}, page)
    assert page.read_text() == "b"
    assert [path.name for path in (tmp_path / "benchmarks").iterdir()] == ["new.svg"]


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (1234.5, "1,234"), (99.96, "100"), (12.34, "12.3"), (0.01234, "0.0123"), (2e-6, "2.00e-06")]
)
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_what_a_result_holds_is_shown_whole():
    lines = facts(HEAD | {"a_b": {"c": 1, "d": [1.5, True]}, "rows": [{"x": 1, "y": {"z": None}}, {"x": 2}]})
    assert lines == [
        *table(["", ""], [["a b", "c 1, d 1.50, yes"]]),
        "",
        "rows:",
        "",
        "| x | y |",
        "| --- | ---: |",
        "| 1 | z  |",
        "| 2 |  |",
    ]


@pytest.mark.parametrize("job", JOBS, ids=lambda job: job.name)
def test_every_script_takes_the_arguments_that_make_bench_gives_it(job, tmp_path):
    """Both settings are parsed by the script's own command line."""
    script = __import__(f"benchmarks.{job.script}", fromlist=["main"])
    for arguments in (job.arguments, f"{job.arguments} {job.quick}"):
        words = [str(tmp_path) if word.isupper() else word for word in shlex.split(arguments)]
        script.main.make_context(job.script, words)


def test_images_are_spread_over_the_classes_of_a_raw_tree(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.all.IMAGES", 4)
    for label in "abcd":
        (tmp_path / "raw" / label).mkdir(parents=True)
        for n in range(3):
            (tmp_path / "raw" / label / f"{n}.jpg").write_bytes(b"%s%d" % (label.encode(), n))
    assert take_images(tmp_path / "raw", tmp_path / "out") == "4 of 12, 4 classes"
    assert sorted(path.read_bytes() for path in (tmp_path / "out").glob("*/*")) == [b"a0", b"b0", b"c0", b"d0"]


def test_images_are_repeated_as_links(tmp_path):
    (tmp_path / "images" / "ant").mkdir(parents=True)
    image = tmp_path / "images" / "ant" / "x.jpg"
    image.write_bytes(b"x")
    repeat([image], tmp_path / "raw", 3)
    assert sorted(path.name for path in (tmp_path / "raw" / "ant").iterdir()) == ["0-x.jpg", "1-x.jpg", "2-x.jpg"]
    assert image.stat().st_nlink == 4


def test_growth_measures_a_stretched_dataset_which_has_each_record_so_many_times(tiny, tmp_path):
    stretch(tiny.root, tmp_path / "out", 3, linked=True)
    stretched = Manifest.load(tmp_path / "out")
    before, after = RecordReader(tiny, "train"), RecordReader(stretched, "train")
    assert len(after) == 3 * len(before) == sum(stretched.split("train").counts)
    assert [after.jpeg(n).tobytes() for n in range(len(after))] == 3 * [jpeg.tobytes() for jpeg in map(before.jpeg, range(50))]
    command = [sys.executable, "-m", "benchmarks.growth", stretched.root, "--step", "resume in the middle"]
    found = json.loads(subprocess.check_output(command, cwd=ROOT))
    assert set(found) == {"seconds", "peak_mb", "before_mb"}
    assert found["seconds"] > 0 and found["peak_mb"] >= found["before_mb"] > 0


def test_why_a_peer_is_not_installed_is_told_in_pips_words(tmp_path):
    output = "Collecting ffcv\n  error: subprocess-exited-with-error\n  KeyError: 'pkg-config'\nERROR: Failed to build ffcv\n"
    assert why(output) == "KeyError: 'pkg-config'"
    assert why("WARNING: NewConnectionError\nERROR: No matching distribution\n") == "no package index can be reached"
    (tmp_path / "bin").mkdir()
    assert left_out(str(tmp_path / "bin" / "python")) == {}
    (tmp_path / "peers.json").write_text('{"ffcv": "KeyError"}')
    assert left_out(str(tmp_path / "bin" / "python")) == {"ffcv": "KeyError"}
