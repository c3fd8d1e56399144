"""Only what setup.cfg cannot say: the extensions that decode and rescale (preprocess) and crop (pipeline)."""

from setuptools import Extension, setup


def extension(name: str, *libraries: str) -> Extension:
    return Extension(
        name,
        [name.replace(".", "/") + ".c"],
        libraries=list(libraries),
        # No contraction of a*b+c: every machine must compute the same weights, and so store the same bytes.
        extra_compile_args=["-O3", "-std=c11", "-Wall", "-ffp-contract=off"],
        py_limited_api=True,
    )


setup(
    ext_modules=[extension("preprocess.codec", "jpeg"), extension("pipeline.kernels")],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
