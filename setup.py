"""Builds the native decoders and loops; everything else about the package stands in pyproject.toml.

The results are plain shared libraries without a Python API, loaded with ctypes. They must run on
any x86-64 node whatever node built it, so there is no -march here: hot loops choose their code when
they run.
"""

from setuptools import Extension, setup

NATIVE = "resnet_dist/data/decode/native"
SHARED = [f"{NATIVE}/{name}.h" for name in ("codes", "strict")]  # the conversion includes them, too
# Byte loops of a few instructions run up to half slower where chance lays them over a cache line.
FLAGS = ["-O3", "-std=c++17", "-fvisibility=hidden", "-falign-loops=32", "-Wall", "-Wextra"]

setup(
    ext_modules=[
        Extension(
            "resnet_dist.data.decode._native",
            sources=[f"{NATIVE}/{name}.cpp"
                     for name in ("decode", "huffman", "kernels", "ops", "resize",
                                  "taps")],
            depends=[*SHARED, f"{NATIVE}/native.h", f"{NATIVE}/huffman.h"],
            language="c++",
            libraries=["jpeg"],  # libjpeg-turbo; Debian: libjpeg-dev, libxxhash-dev
            extra_compile_args=[*FLAGS, "-fno-math-errno", "-Wno-clobbered"],
        ),
        Extension(
            "resnet_dist.kernels._native",
            sources=["resnet_dist/kernels/native/batch_norm.cpp"],
            language="c++",
            # -fopenmp: torch's runtime, loaded before, serves both by its name.
            extra_compile_args=[*FLAGS, "-fno-math-errno", "-Wno-psabi", "-fopenmp"],
            extra_link_args=["-fopenmp"],
        ),
        Extension(
            "data_prep.encode._native",
            sources=[f"data_prep/encode/native/{name}.cpp"
                     for name in ("inspect", "measure", "pixels", "plain", "reencode", "restarts")],
            depends=[*SHARED, *(f"data_prep/encode/native/{name}.h"
                                for name in ("codec", "plain", "segments", "shrink"))],
            include_dirs=[NATIVE],
            language="c++",
            libraries=["jpeg"],
            extra_compile_args=[*FLAGS, "-Wno-clobbered"],
        ),
    ]
)
