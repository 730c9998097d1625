"""Every kernel set against the scalar one, in C (`tests/c/compare_kernels.c`); for Arm too, by an emulator."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ARM_COMPILER = "aarch64-linux-gnu-gcc"

pytestmark = pytest.mark.skipif(
    not shutil.which("cmake") or not (ROOT / "CMakeLists.txt").exists(), reason="this needs CMake and the sources"
)


def build(directory: Path, *options: str) -> Path:
    """Compiles the core and the program that compares; fails with the compiler's messages."""
    quick = ["-DCMAKE_BUILD_TYPE=Debug", "-DCMAKE_C_FLAGS_DEBUG=-O1"]
    for command in (
        ["cmake", "-S", str(ROOT), "-B", str(directory), *quick, *options],
        ["cmake", "--build", str(directory), "--target", "compare_kernels", "--parallel", "2"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return directory / "compare_kernels"


def compare(*command: str) -> list[str]:
    """Names of the sets that were compared; fails with the differences."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not shutil.which("cc") and not shutil.which("gcc"), reason="there is no C compiler")
def test_kernel_sets_agree(tmp_path):
    names = compare(str(build(tmp_path)))
    assert {"scalar"} <= set(names) <= {"scalar", "avx2", "avx_vnni", "avx512", "avx512_bf16", "neon", "neon_i8mm"}


@pytest.mark.skipif(not shutil.which(ARM_COMPILER), reason=f"{ARM_COMPILER} is not installed")
@pytest.mark.skipif(platform.machine() in ("aarch64", "arm64"), reason="this is an Arm machine")
def test_arm(tmp_path):
    """The whole core compiles for Arm without a warning; in an emulator its kernels agree with the scalar ones."""
    target = ["-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64", f"-DCMAKE_C_COMPILER={ARM_COMPILER}"]
    program = build(tmp_path, *target, "-DCMAKE_EXE_LINKER_FLAGS=-static")
    if emulator := shutil.which("qemu-aarch64"):
        assert compare(emulator, str(program)) == ["scalar", "neon", "neon_i8mm"]
