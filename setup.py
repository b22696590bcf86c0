"""Builds the native decoder; everything else about the package stands in pyproject.toml.

The result is a plain shared library without a Python API, loaded with ctypes. It must run on any
x86-64 node whatever node built it, so there is no -march here: hot loops carry their own clones.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "resnet_dist.data._native",
            sources=["resnet_dist/data/native/decode.cpp", "resnet_dist/data/native/resize.cpp"],
            depends=["resnet_dist/data/native/native.h"],
            language="c++",
            libraries=["jpeg"],  # libjpeg-turbo; Debian: libjpeg62-turbo-dev, libxxhash-dev
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-fno-math-errno",
                                "-Wall", "-Wextra", "-Wno-clobbered"],
        ),
        Extension(
            "data_prep._native",
            sources=["data_prep/native/jpeg.cpp"],
            language="c++",
            libraries=["jpeg"],
            extra_compile_args=["-O3", "-std=c++17", "-fvisibility=hidden", "-Wall", "-Wextra",
                                "-Wno-clobbered"],
        ),
    ]
)
