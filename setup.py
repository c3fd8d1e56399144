"""Only what setup.cfg cannot say: the C extensions, and the links in the sdist."""

from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.sdist import sdist


def extension(name: str, *libraries: str) -> Extension:
    return Extension(
        f"imagefeed.{name}",
        [name.replace(".", "/") + ".c"],
        libraries=list(libraries),
        depends=[str(path) for path in Path(name.partition(".")[0]).glob("*.h")],
        # -ffp-contract=off: a*b+c must round alike on every machine, or they would store different bytes.
        # -fno-math-errno: a sqrtf that sets errno keeps its loop scalar.
        extra_compile_args=["-O3", "-std=c11", "-Wall", "-ffp-contract=off", "-fno-math-errno"],
        py_limited_api=True,
    )


class LinkingSdist(sdist):
    """Keeps the links in imagefeed/ as links, where setuptools would copy each folder: what is unpacked is like a clone."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        links = [path for path in Path("imagefeed").iterdir() if path.is_symlink()]
        super().make_release_tree(base_dir, [file for file in files if not {Path(file), *Path(file).parents} & {*links}])
        for link in links:
            (Path(base_dir) / link).symlink_to(link.readlink())


setup(
    ext_modules=[
        extension("codec.decoder"),
        extension("codec.libjpeg", "jpeg"),
        extension("dataset.gather"),
        extension("pipeline.augment_kernels"),
        extension("model.kernels"),
    ],
    cmdclass={"sdist": LinkingSdist},
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
