"""Only what setup.cfg cannot say: the extensions that decode and rescale (preprocess), crop (pipeline), normalise (model)."""

from setuptools import Extension, setup


def extension(name: str, *libraries: str) -> Extension:
    return Extension(
        name,
        [name.replace(".", "/") + ".c"],
        libraries=list(libraries),
        # No contraction of a*b+c: every machine must compute the same weights, and so store the same bytes. sqrtf must not
        # set errno, or loops with it stay scalar.
        extra_compile_args=["-O3", "-std=c11", "-Wall", "-ffp-contract=off", "-fno-math-errno"],
        py_limited_api=True,
    )


setup(
    ext_modules=[extension("preprocess.codec", "jpeg"), extension("pipeline.kernels"), extension("model.kernels")],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
