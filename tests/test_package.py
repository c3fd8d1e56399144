"""How the package is built, installed and put together."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

import imagefeed
from imagefeed import cli

ROOT = Path(__file__).parent.parent
ROOMS = [room for room in ("codec", "dataset", "model", "pipeline", "preprocess", "training") if (ROOT / room).is_dir()]
# What each room may import of the others.
IMPORTS = {
    "codec": set(),
    "dataset": {"codec"},
    "preprocess": {"codec", "dataset"},
    "model": {"dataset"},
    "pipeline": {"codec", "dataset", "model"},
    "training": {"dataset", "model", "pipeline"},
}
HEAVY = ("torch", "nvidia", "ray", "matplotlib")


def sources() -> list[Path]:
    """The product's Python files, relative to the root."""
    folders = [path for room in ROOMS for path in (ROOT / room).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in [*folders, *(ROOT / "imagefeed").glob("*.py")])


def module_name(path: Path) -> str:
    parts = [part for part in path.with_suffix("").parts if part != "__init__"]
    return ".".join(parts if parts[0] == "imagefeed" else ["imagefeed", *parts])


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports anywhere, and each name that it takes from one, as if it were a module too."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import"
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    """Runs a command to its end, outside the checkout's import path."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "GOMP_SPINCOUNT")}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, **options)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result


def in_new_python(code: str) -> str:
    return run(sys.executable, "-c", code, cwd=ROOT).stdout


@pytest.mark.parametrize("room", ROOMS)
def test_imports_between_rooms_go_one_way(room):
    for path in sources():
        if path.parts[0] == room:
            others = {name.split(".")[1] for name in imported(path) if name.startswith("imagefeed.")} - {room}
            assert others <= IMPORTS[room], path


@pytest.mark.parametrize("room", ["codec", "dataset", "preprocess"])
def test_what_packs_a_dataset_imports_neither_torch_nor_dali(room):
    for path in sources():
        if path.parts[0] == room:
            assert not {name.split(".")[0] for name in imported(path)} & {"torch", "nvidia"}, path


def test_the_loader_does_not_import_the_model():
    modules = {module_name(path): path for path in sources()}
    reached, new = set(), {"imagefeed.pipeline.loader"}
    while new:
        reached |= new
        new = {name for module in new for name in imported(modules[module]) if name in modules} - reached
    assert not [name for name in reached if name.startswith("imagefeed.model")]


def test_only_command_line_modules_import_click():
    users = {path for path in sources() if any(name.split(".")[0] == "click" for name in imported(path))}
    others = {str(path) for path in users if path.name not in ("cli.py", "options.py", "train.py")}
    assert others == set()


def test_one_module_imports_the_client_of_stores():
    users = {str(path) for path in sources() if any(name.split(".")[0] == "obstore" for name in imported(path))}
    assert users == {"dataset/objects.py"}


def test_no_function_is_longer_than_80_lines():
    long = {
        f"{path}:{node.name}"
        for path in sources()
        for node in ast.walk(ast.parse((ROOT / path).read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 80
    }
    assert long == set()


@pytest.mark.parametrize("name", imagefeed.__all__)
def test_public_names_are_there_and_documented(name):
    assert inspect.getdoc(getattr(imagefeed, name))
    assert name in dir(imagefeed)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'imagefeed' has no attribute 'Loader'"):
        _ = imagefeed.Loader


def test_the_package_is_typed():
    assert (ROOT / "imagefeed" / "py.typed").is_file()
    for path in [path for room in ROOMS for path in (ROOT / room).rglob("*.c")]:
        assert path.with_suffix(".pyi").is_file(), path


def test_the_version_has_one_home():
    assert re.search(r"^version = attr: imagefeed.__version__$", (ROOT / "setup.cfg").read_text(), re.M)
    assert version("imagefeed") == imagefeed.__version__


def test_importing_loads_no_torch_and_changes_no_environment_variable():
    code = f"""
import os, sys
before = dict(os.environ)
import imagefeed
assert not {{name.split(".")[0] for name in sys.modules}} & set({HEAVY})
for name in imagefeed.__all__:
    getattr(imagefeed, name)
assert os.environ == before, set(os.environ.items()) ^ set(before.items())
"""
    in_new_python(code)


def test_help_loads_no_heavy_library():
    """Not even the list of all commands, which imports the module of each."""
    code = f"""
import sys
from imagefeed.cli import main
main(["--help"], standalone_mode=False)
print(*{{name.split(".")[0] for name in sys.modules}} & set({HEAVY}))
"""
    assert in_new_python(code).splitlines()[-1] == ""


def test_the_command_lists_its_commands_with_their_help():
    result = CliRunner().invoke(cli.main, ["-h"], prog_name="imagefeed")
    assert result.exit_code == 0
    listed = re.findall(r"^  (\w+)  +([A-Z].{10,})$", result.stdout.split("Commands:")[1], re.M)
    assert [name for name, _ in listed] == list(cli.HOMES)


def test_the_command_tells_its_version():
    assert CliRunner().invoke(cli.main, ["--version"]).stdout == f"imagefeed {imagefeed.__version__}\n"


@pytest.mark.parametrize(
    "arguments, message", [(["pack"], "No such command 'pack'."), (["build", "--sise", "3"], "No such option")]
)
def test_wrong_usage_exits_with_2(arguments, message):
    result = CliRunner().invoke(cli.main, arguments)
    assert result.exit_code == 2 and message in result.stderr


@pytest.mark.parametrize("name", cli.HOMES)
def test_each_command_answers_to_h(name):
    result = CliRunner().invoke(cli.main, [name, "-h"], prog_name="imagefeed")
    assert result.exit_code == 0 and result.stdout.startswith(f"Usage: imagefeed {name} [OPTIONS]")


@pytest.fixture(scope="module")
def sdist(tmp_path_factory) -> Path:
    """The sdist of a copy of the checkout, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "*.so", "*.egg-info", "__pycache__", "build", "bench", "demo", "runs")
    copy = shutil.copytree(ROOT, folder / "copy", symlinks=True, ignore=ignored)
    shutil.copytree(ROOT / ".ci", copy / ".ci")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", folder, cwd=copy)
    with tarfile.open(folder / f"imagefeed-{imagefeed.__version__}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"imagefeed-{imagefeed.__version__}"


@pytest.fixture(scope="module")
def wheel(sdist) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "-q", ".", "--no-deps", "--no-build-isolation", "-w", sdist.parent, cwd=sdist)
    (path,) = sdist.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel) -> Path:
    """The programs of an environment with the wheel, which finds what imagefeed depends on in the environment of the tests."""
    folder = wheel.parent / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", folder)
    programs = folder / "bin"
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-deps", "--no-index", wheel)
    packages = Path(sysconfig.get_path("purelib", vars={"base": folder}))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return programs


def test_the_sdist_is_like_a_clone(sdist):
    for room in ROOMS:
        assert (sdist / "imagefeed" / room).readlink() == Path("..", room)
    tracked = run("git", "ls-files", cwd=ROOT).stdout.splitlines() if (ROOT / ".git").exists() else []
    assert {name for name in tracked if not (sdist / name).exists()} <= {".gitignore"}
    assert not [*sdist.rglob("*.so"), *sdist.rglob("*.pyc")]


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert not [name for name in held if not name.startswith("imagefeed/")]
    for room in ROOMS:
        for path in (ROOT / room).rglob("*"):
            name = f"imagefeed/{path.relative_to(ROOT)}"
            if path.suffix in (".py", ".pyi", ".j2"):
                assert name in held
            elif path.suffix == ".c":
                assert name.removesuffix("c") + "abi3.so" in held and name not in held
    assert {"imagefeed/cli.py", "imagefeed/py.typed", "imagefeed/train.py"} <= held


def test_the_wheel_says_under_which_license_it_is(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
        assert any(name.endswith("/licenses/LICENSE") for name in archive.namelist())
    assert "\nLicense-Expression: Apache-2.0\n" in metadata and "\nAuthor: imagefeed contributors\n" in metadata


def test_the_wheel_works_beside_a_users_files_of_the_same_names(installed, tmp_path):
    """From a folder whose own modules, each of a name that our checkout has too, cannot be imported."""
    for name in [*ROOMS, "benchmarks", "tests"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(f"raise ImportError('the user has {name} here')\n")
    for name in ("train", "model", "cli"):
        (tmp_path / f"{name}.py").write_text(f"raise ImportError('the user has {name}.py here')\n")
    (tmp_path / "own.py").write_text(
        "import imagefeed\n"
        "assert 'environment' in imagefeed.__file__, imagefeed.__file__\n"
        "with imagefeed.ImageLoader('data', 'train', batch_size=4, crop_size=64) as loader:\n"
        "    print(*next(iter(loader)).images.shape)\n"
    )
    imagefeed_command = installed / "imagefeed"
    run(imagefeed_command, "sample", "raw", "--images", 48, "--classes", 2, cwd=tmp_path)
    run(installed / "python", "-m", "imagefeed", "build", "raw", "data", "--size", 64, "--workers", 2, cwd=tmp_path)
    run(imagefeed_command, "verify", "data", cwd=tmp_path)
    assert run(installed / "python", "own.py", cwd=tmp_path).stdout.split()[-4:] == ["4", "3", "64", "64"]
    # As torchrun starts it; `imagefeed train` is the same module.
    launcher = [installed / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    training = ["--device", "cpu", "--batch-size", 4, "--epochs", 1, "--crop-size", 64]
    run(*launcher, "-m", "imagefeed.train", "data", *training, cwd=tmp_path)
    assert (tmp_path / "runs" / "data" / "metrics.jsonl").is_file()
