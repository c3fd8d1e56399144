"""Only what setup.cfg cannot say: the extension that decodes and rescales (preprocess/codec.c)."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "preprocess.codec",
            ["preprocess/codec.c"],
            libraries=["jpeg"],
            # No contraction of a*b+c: every machine must compute the same weights, and so store the same bytes.
            extra_compile_args=["-O3", "-std=c11", "-ffp-contract=off"],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
