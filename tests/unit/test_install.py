"""Installing without root: Debian packages unpacked into a prefix, found by builds and loaders."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
#include <cstdio>
#include <opencv2/opencv.hpp>
#include <jpeglib.h>
#include <turbojpeg.h>
#define XXH_INLINE_ALL
#include <xxhash.h>
int main() {
    cv::Mat picture(8, 8, CV_8UC3, cv::Scalar(1, 2, 3)), half;
    cv::resize(picture, half, cv::Size(4, 4), 0, 0, cv::INTER_AREA);
    tjhandle handle = tjInitDecompress();
    jpeg_error_mgr errors;
    std::printf("%d %d %d %d\\n", half.rows, handle != nullptr, jpeg_std_error(&errors) == &errors,
                XXH3_64bits("a", 1) != 0);
}
"""


def install(*options: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(ROOT / "install.sh"), *map(str, options)], text=True,
                          capture_output=True, timeout=280)


def test_a_program_builds_against_the_prefix_and_loads_from_it_alone(tmp_path: Path) -> None:
    for needed in ("apt-get", "dpkg", "g++"):
        if not shutil.which(needed):
            pytest.skip(f"{needed} is not here")
    prefix = tmp_path / "prefix"
    done = install("--prefix", prefix, "--native-only")
    if re.search("Could not (resolve|connect)|Failed to fetch|Unable to locate", done.stderr):
        pytest.skip("Debian's packages cannot be downloaded here: "
                    f"{done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    (tmp_path / "program.cpp").write_text(PROGRAM)
    build = (f". {prefix}/environment.sh; g++ -o program program.cpp $LDFLAGS "
             "$(pkg-config --cflags --libs opencv4 libturbojpeg libjpeg)")
    done = subprocess.run(["bash", "-ec", build], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    done = subprocess.run([tmp_path / "program"], env={}, capture_output=True, text=True)
    assert done.stdout.split() == ["4", "1", "1", "1"], done.stderr
    loaded = subprocess.run(["ldd", tmp_path / "program"], env={"PATH": "/usr/bin:/bin"},
                            capture_output=True, text=True, check=True).stdout
    assert "not found" not in loaded
    paths = re.findall(r"=> (\S+)", loaded)
    runtime = re.compile(r"/lib(c|m|dl|rt|pthread|stdc\+\+|gcc_s)[.-]")
    assert [path for path in paths if not path.startswith(str(prefix)) and
            not runtime.search(path)] == []
    assert {Path(path).name.split(".")[0] for path in paths} >= {
        "libopencv_core", "libopencv_imgproc", "libturbojpeg", "libjpeg", "libtbb"}
    marker = (prefix / "complete").stat().st_mtime_ns
    assert install("--prefix", prefix, "--native-only").returncode == 0
    assert (prefix / "complete").stat().st_mtime_ns == marker, "the second time has nothing to do"


@pytest.mark.parametrize(("options", "code", "message"), [
    (["--prefx", "x"], 2, "--prefx: no such option"),
    (["--prefix"], 2, "--prefix: name a folder"),
    (["--offline", "EMPTY", "--prefix", "EMPTY"], 1, "holds no debs/*.deb; fill it with "
                                                     "./install.sh --download")])
def test_a_mistake_is_told_before_anything_is_done(tmp_path: Path, options: list[str], code: int,
                                                   message: str) -> None:
    done = install(*(str(tmp_path) if option == "EMPTY" else option for option in options))
    assert done.returncode == code
    assert message in done.stderr
