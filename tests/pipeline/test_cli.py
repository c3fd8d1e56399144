"""Commands and their options: help in sections, old names, lowered batches, and what importing them costs."""

import re
import subprocess
import sys

import pytest
from click.testing import CliRunner

from imagefeed.dataset.errors import UserError
from imagefeed.pipeline.cli import main
from imagefeed.pipeline.loader import ImageLoader
from imagefeed.pipeline.options import AUGMENTATION, OLD_FLAGS, OPTIONS, READING
from imagefeed.pipeline.plan import fill_batch
from imagefeed.preprocess.build import build
from tests.rawtree import make_raw_tree


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("command", list(main.commands))
def test_help_shows_few_options_first_and_the_rest_in_sections(command):
    for flag in ("-h", "--help"):
        text = run(command, flag).output
        sections = re.split(r"^(\w[\w ]+):\n", text, flags=re.M)[1:]
        titles, bodies = sections[::2], sections[1::2]
        assert titles[0] == "Options" and len(re.findall("^  -", bodies[0], re.M)) <= 25
        assert titles[1:] == {"profile": ["Images", "Speed and memory"], "tune": ["Images"], "audit": []}[command]
    if command == "profile":
        assert all(option.flag in bodies[1] for option in AUGMENTATION) and all(option.flag in bodies[2] for option in READING)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        *(([flag, "1"], 2, f"{flag} is now {new}") for flag, new in OLD_FLAGS.items()),
        (["--shuffle", "some"], 2, "is not one of global, blocks, node-blocks, none"),
        (["--std", "0.2,0.2,0.2"], 2, "'0.2,0.2,0.2' is not one of none, dataset, imagenet, or three numbers"),
        (["--color-jitter", "1,1,1"], 2, "'1,1,1' is not four numbers"),
        (["--cache-bytes", "7 apples"], 2, "'7 apples' is not a number of bytes, such as 500_000_000, or 500M on a command line"),
        (["--threads", "0"], 2, "'0' is not a whole number of at least 1"),
        (["--crop-size", "63"], 2, "nets take crops of 64 pixels or more"),
        (["--crop-size", "300"], 1, "crops of 300 pixels do not fit its images of 256; lower --crop-size, or"),
        (["--cache", "device", "--random-resized-crop"], 1, "use --cache none with --random-resized-crop or --color-jitter"),
        (["--split", "test"], 1, "no split named 'test'; it has train, val"),
        (["--html", "none/page.html"], 1, "there is no folder none; make it, or choose another"),
    ],
    ids=str,
)
def test_refused(tiny, arguments, code, message):
    result = run("profile", tiny.root, "--device", "cpu", "--batch-size", 2, *arguments)
    assert result.exit_code == code and message in " ".join(result.stderr.split())
    assert code == 2 or result.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("flag", "text", "value"),
    [
        ("--mean", "123.675,116.28,103.53", (123.675, 116.28, 103.53)),
        ("--mean", "imagenet", "imagenet"),
        ("--cache-bytes", "1.5G", 1_500_000_000),
        ("--cache-bytes", "500MB", 500_000_000),
        ("--color-jitter", "0.4,0.4,0.4,0.1", (0.4, 0.4, 0.4, 0.1)),
        ("--threads", "3", 3),
    ],
)
def test_options_on_a_command_line_are_arguments_of_the_loader(flag, text, value):
    context = main.commands["profile"].make_context("profile", ["out", flag, text])
    (name,) = (option.name for option in OPTIONS.values() if option.flag == flag)
    assert context.params[name] == value


def test_errors_of_the_library_name_arguments_and_those_of_commands_options():
    assert UserError("lower `batch_size`, or use `cache=none`").of_command() == "lower --batch-size, or use --cache none"
    assert UserError("run `imagefeed verify OUT`").of_command() == "run `imagefeed verify OUT`"


def test_a_batch_size_that_the_split_does_not_fill_is_lowered():
    sentence = "batch size 40: the 40 records of split train do not fill one of 128"
    assert fill_batch("train", 40, 128) == (40, sentence)
    assert fill_batch("train", 40, 40) == (40, "")
    sentence = "batch size 20 on each of 2 ranks: the 40 records of split train do not fill one of 128"
    assert fill_batch("train", 40, 64, 2) == (20, sentence)
    assert fill_batch("train", 3, 64, 4)[0] == 1


def test_a_dataset_without_a_training_split_is_measured_with_a_word(tmp_path):
    build(make_raw_tree(tmp_path / "raw", {"val": 4}) / "val", tmp_path / "out", split="val", size=32)
    result = run("audit", tmp_path / "out", "--batch-size", 4)
    assert (result.exit_code, result.stderr) == (0, f"{tmp_path / 'out'}: no split to train on; reads val\n")
    assert run("audit", tmp_path / "out", "--batch-size", 4, "--split", "val").stderr == ""


def test_commands_lower_it_with_a_sentence(tiny):
    result = run("audit", tiny.root, "--world-size", 2)
    assert result.exit_code == 0
    assert result.stderr == "batch size 25 on each of 2 ranks: the 50 records of split train do not fill one of 256\n"


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import imagefeed.pipeline.cli", {"torch", "nvidia", "matplotlib", "scipy", "PIL", "rich", "ray"}),
        ("from imagefeed import ImageLoader", {"nvidia.dali", "matplotlib", "scipy", "PIL", "rich", "ray"}),
    ],
)
def test_an_import_loads_nothing_heavy(code, absent):
    check = f"{code}; import sys; print(*sorted({absent!r} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout == "\n"


def test_without_dali_the_error_says_how_to_install_it(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    monkeypatch.delattr("nvidia.dali", raising=False)
    with ImageLoader(tiny.root, "train", 4, crop_size=32, decoder="dali") as loader, pytest.raises(UserError) as error:
        next(iter(loader))
    for command in ("pip install '.[dali13]' for CUDA 13", "pip install '.[dali12]' for CUDA 12"):
        assert command in str(error.value)
