"""The commands build, verify, inspect and sample: what they print, and how they refuse."""

import inspect
import json
import shutil
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from imagefeed import build as build_dataset
from imagefeed.preprocess.cli import main
from tests.rawtree import make_raw_tree

HEAVY = ("numpy", "PIL", "torch", "nvidia", "ray", "matplotlib", "scipy", "ffmpeg", "pyarrow", "rich")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    return make_raw_tree(tmp_path_factory.mktemp("raw"), {"train": 4, "val": 1})


@pytest.fixture(scope="module")
def built(raw, tmp_path_factory):
    out = tmp_path_factory.mktemp("built")
    build_dataset(raw, out, size=32, workers=1)
    return out


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_build_verify_and_inspect_print_what_they_did(raw, tmp_path):
    out = tmp_path / "out"
    result = run("build", raw, out, "--size", 32, "--workers", 1)
    assert result.exit_code == 0, result.output
    *table, worker, last = result.stdout.splitlines()
    assert table == [
        f"{raw}: read as folders",
        "  split  role   images  classes  labels",
        "  train  train      12        3  known   training split",
        "  val    val         3        3  known",
        "  3 classes, sorted by name: n01440764, n02084071, n04037443",
    ]
    assert worker.startswith("1 worker; libjpeg ")
    assert run("build", raw, "--dry-run").stdout.splitlines() == table
    assert last.startswith(f"{out}: 15 records in 2 shards, 0.0 MB; ") and "no image rejected or converted" in last
    result = run("verify", out, "--workers", 1)
    assert (result.exit_code, result.stdout.split("; ")[0]) == (0, f"{out}: 15 records intact")
    result = run("verify", out, "--deep", "--workers", 1)
    assert result.stdout.startswith(f"{out}: 15 records intact, decode, and match the statistics; ")
    lines = run("inspect", out).stdout.splitlines()
    assert lines[0] == f"{out}: format 1, 3 classes"
    assert "12 records      1 shard " in lines[1] and "4 per class, largest 33.3%" in lines[1]
    assert any(line.startswith("  duplicates none") for line in lines)


def test_inspect_prints_json_and_draws_a_contact_sheet(built, tmp_path):
    result = run("inspect", built, "--json", "--picture", tmp_path / "sheet.png")
    assert json.loads(result.stdout)["splits"]["val"]["records"] == 3
    assert result.stderr == f"{tmp_path / 'sheet.png'}: contact sheet\n"
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_verify_prints_a_line_for_each_problem(built, tmp_path):
    copy = shutil.copytree(built, tmp_path / "copy")
    (copy / "val-00000-of-00001.idx").unlink()
    (copy / "statistics.npz").write_bytes(b"")
    result = run("verify", copy, "--workers", 1)
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "statistics.npz: its content is not what was written; delete this file and run build again, which writes the whole "
        "dataset anew",
        "val-00000-of-00001.idx: the file is missing; run build again",
    ]
    assert result.stderr == f"Error: {copy}: 2 problems in 15 records; see the lines above\n"


def test_too_many_bad_images_name_the_option(raw, tmp_path):
    work = shutil.copytree(raw, tmp_path / "raw")
    (work / "train" / "n01440764" / "text.JPEG").write_text("not a picture")
    result = run("build", work, tmp_path / "out", "--size", 32, "--workers", 1)
    assert result.exit_code == 1
    assert "1 of 16 images are bad, more than the 1.00% that --max-rejected allows" in result.stderr


REFUSALS = {
    "build {raw} {out} --size 15": (2, "15 is not in the range 16<=x<=4096"),
    "build {raw} {out} --quality 101": (2, "101 is not in the range 1<=x<=100"),
    "build {raw} {out} --range 4095": (2, "'4095' is not LOW,HIGH with LOW below HIGH, such as 0,4095"),
    "build {raw} {out} --range 9,-9": (2, "Error: --range is 9,-9; choose LOW,HIGH with LOW below HIGH, such as 0,4095"),
    "build {raw} {out} --range -1024,x": (2, "'-1024,x' is not LOW,HIGH with LOW below HIGH, such as 0,4095"),
    "build {raw} {out} --seed -1": (2, "-1 is not in the range 0<=x<=4294967295"),
    "build {raw} {out} --max-rejected 2": (2, "2.0 is not in the range 0.0<=x<=1.0"),
    "build {raw} {out} --workers 0": (2, "0 is not in the range x>=1"),
    "build {raw} {out} --frames-per-second 0": (2, "Error: --frames-per-second is 0.0; choose a number above 0"),
    "build {raw} {out} --fit warp": (2, "'warp' is not one of 'crop', 'short'"),
    "build {raw} {out} --layout zip": (2, "'zip' is not one of 'folders', 'archives', 'kaggle', 'csv', 'lists', 'parquet'"),
    "build {raw} {out} --engine dask": (2, "'dask' is not one of 'process', 'ray'"),
    "build {raw} {out} --address 10.0.0.1:6379": (2, "Error: --address is for a Ray cluster; set --engine to ray as well"),
    "build {raw} {out} --part 0/3": (2, "'0/3' is not K/N with K from 1 to N, such as 3/8"),
    "build {raw} {out} --part 4/3": (2, "'4/3' is not K/N with K from 1 to N, such as 3/8"),
    "build {raw} {out} --part 1": (2, "'1' is not K/N with K from 1 to N, such as 3/8"),
    "build {raw} {out} --part a/b": (2, "'a/b' is not K/N with K from 1 to N, such as 3/8"),
    "build {raw} {out} --part 1/0": (2, "'1/0' is not K/N with K from 1 to N, such as 3/8"),
    "build {raw}": (2, "Missing argument 'OUT'"),
    "build {raw} {raw}/out": (1, "Error: {raw}/out: lies in the folder of the raw images, {raw}; choose an OUT outside of it"),
    "build {out} {out}": (1, "Error: {out}: no such folder; check the path of the raw images"),
    "build {raw} {built}": (1, "Error: {built}: begun with size 32, this call says 256; use the same, or choose another OUT"),
    "verify {out}": (1, "Error: {out}: there is no such folder; build a dataset there with: imagefeed build RAW {out}"),
    "verify {raw}": (1, "Error: {raw}: no dataset.json, so this is no dataset or an incomplete one; make or finish it"),
    "inspect {raw}": (1, "Error: {raw}: no dataset.json, so this is no dataset or an incomplete one; make or finish it"),
    "inspect {built} --picture a.txt": (1, "Error: a.txt: not the name of a picture; end it in one of .png, .jpg, .pdf, .svg"),
    "sample {out} --classes 1": (2, "1 is not in the range 2<=x<=1080"),
    "sample {out} --classes 1081": (2, "1081 is not in the range 2<=x<=1080"),
    "sample {out} --seed -1": (2, "-1 is not in the range x>=0"),
    "sample {out} --images 19": (1, "19 images are too few for 10 classes"),
    "sample {raw}": (1, "Error: {raw}: holds train, which is not part of this sample"),
}


@pytest.mark.parametrize("command", REFUSALS)
def test_what_cannot_be_done_is_refused_in_one_sentence(raw, built, tmp_path, command):
    paths = {"raw": raw, "built": built, "out": tmp_path / "out"}
    code, message = REFUSALS[command]
    result = run(*command.format(**paths).split())
    assert result.exit_code == code, result.output
    assert result.stdout.count("\n") <= 6 and message.format(**paths) in result.stderr.splitlines()[-1]
    assert not (tmp_path / "out" / "train").exists()


def test_the_options_of_build_are_the_arguments_of_the_function():
    given = {name: argument.default for name, argument in inspect.signature(build_dataset).parameters.items()}
    del given["raw"], given["out"], given["on_progress"]
    assert {option.name: option.default for option in main.commands["build"].params if isinstance(option, click.Option)} == given


@pytest.mark.parametrize("name", main.commands)
@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_every_command_and_option_has_help(name, flag):
    result = run(name, flag)
    assert result.exit_code == 0 and main.commands[name].help
    assert all(option.help for option in main.commands[name].params if isinstance(option, click.Option))


def test_help_loads_no_heavy_library():
    code = f"import sys, imagefeed.preprocess.cli; print([name for name in {HEAVY} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "[]\n"
