"""The documentation says what is there."""

import re
import shlex
from pathlib import Path

import click
import pytest

from imagefeed.cli import HOMES, load

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = {f"imagefeed {name}": load(name) for name in HOMES}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_and_option_has_help(name):
    command = COMMANDS[name]
    assert command.help and command.help[0].isupper() and command.help.rstrip().endswith(".")
    for option in command.params:
        assert isinstance(option, click.Argument) or option.help, option.name


@pytest.mark.parametrize("name", [name for name in COMMANDS if "sample" not in name])
def test_every_command_stands_in_the_readme(name):
    assert name in README


def test_the_readmes_commands_take_the_options_that_it_gives_them():
    """Each line of an indented block that calls a command is parsed by that command."""
    found = 0
    for line in re.findall(r"^    (imagefeed .+?)(?:  +#.*)?$", README, re.M):
        name = next(name for name in sorted(COMMANDS, key=len, reverse=True) if line.startswith(name))
        arguments = shlex.split(line.removeprefix(name))
        COMMANDS[name].make_context(name, arguments, resilient_parsing=False)
        found += 1
    assert found >= 5


def test_the_readmes_loader_runs_as_it_stands(tiny):
    code = re.search(r"((?:    .*\n|\n)+)", README.split("## Use the loader in your own loop")[1])[1]
    code = code.replace("/data/imagenet-256", str(tiny.root)).replace("batch_size=32", "batch_size=4, crop_size=32")
    code = "\n".join(line[4:] for line in code.splitlines())
    names: dict = {}
    exec(code.replace("range(90)", "range(1)").replace("...", "seen = images.shape"), names)
    assert names["seen"] == (4, 3, 32, 32)


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"])
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        if not link.startswith("http"):
            assert (path.parent / link).exists(), link
