"""Only what setup.cfg cannot say: the C extensions."""

from setuptools import Extension, setup


def extension(name: str, *libraries: str) -> Extension:
    return Extension(
        f"imagefeed.{name}",
        [name.replace(".", "/") + ".c"],
        libraries=list(libraries),
        # -ffp-contract=off: a*b+c must round alike on every machine, or they would store different bytes.
        # -fno-math-errno: a sqrtf that sets errno keeps its loop scalar.
        extra_compile_args=["-O3", "-std=c11", "-Wall", "-ffp-contract=off", "-fno-math-errno"],
        py_limited_api=True,
    )


setup(
    ext_modules=[
        extension("preprocess.codec", "jpeg"),
        extension("dataset.gather"),
        extension("pipeline.kernels"),
        extension("model.kernels"),
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
