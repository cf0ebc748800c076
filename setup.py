"""Packaging of rmcore, and the build of its C++ kernels through CMakeLists.txt.

The kernels are optional. If torch, CMake or a compiler is missing at build time, the build prints one line, the
installation succeeds, and rmcore runs on its PyTorch reference kernels. Otherwise (pip install --no-build-isolation, so
that the build sees torch) it writes one library into rmcore/ops/, for the instruction set of this machine and the
installed torch. The settings of the tools are in pyproject.toml.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (ROOT / "rmcore" / "__init__.py").read_text()).group(1)
SCHEMAS = re.search(r"^SCHEMAS = (\d+)", (ROOT / "rmcore" / "ops" / "__init__.py").read_text(), re.MULTILINE).group(1)

SERVE = ["fastapi", "uvicorn", "prometheus_client"]


def find_program(name: str) -> str | None:
    """The path of a program in the bin folder of the running Python, which may not be on PATH, else on PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


class BuildKernels(build_ext):
    """Runs CMake and writes rmcore_cpu_<instruction set>_torch<version>_schemas<n>.so where rmcore/ops looks for it."""

    def run(self) -> None:
        inplace = self.inplace or getattr(self, "editable_mode", False)
        output = ROOT / "rmcore" / "ops" if inplace else Path(self.build_lib).resolve() / "rmcore" / "ops"
        try:
            self.build_kernels(output)
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            print(f"rmcore: C++ kernels not built, the PyTorch reference kernels will run: {error}", file=sys.stderr)

    def build_kernels(self, output: Path) -> None:
        import torch
        import torch.utils

        cmake = find_program("cmake")
        if cmake is None:
            raise RuntimeError("cmake not found (pip install cmake)")
        capability = torch.backends.cpu.get_cpu_capability()
        capability = capability if capability in ("AVX512", "AVX2") else "DEFAULT"
        minor_version = ".".join(torch.__version__.split(".")[:2])
        name = f"rmcore_cpu_{capability.lower()}_torch{minor_version}_schemas{SCHEMAS}"
        build = Path(self.build_temp).resolve() / name
        configure = [
            cmake,
            f"-S{ROOT}",
            f"-B{build}",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DRMCORE_TORCH_DIR={torch.utils.cmake_prefix_path}",
            f"-DRMCORE_CAPABILITY={capability}",
            f"-DRMCORE_NAME={name}",
            f"-DRMCORE_OUTPUT_DIR={output}",
        ]
        ninja = find_program("ninja")
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        shutil.rmtree(build, ignore_errors=True)  # CMake would reuse the configuration of another torch
        if subprocess.run(configure).returncode != 0:
            # With a CUDA build of torch, find_package(Torch) needs the CUDA toolkit; these kernels do not.
            shutil.rmtree(build, ignore_errors=True)
            subprocess.run([*configure, "-DRMCORE_FIND_TORCH=OFF"], check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", str(min(os.cpu_count() or 1, 4))], check=True)

    def get_outputs(self) -> list[str]:
        return []  # CMake writes the library to its place, so setuptools has nothing to copy

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    name="rmcore",
    version=VERSION,
    description="Reward models from preference pairs, each distinct token computed once",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=[*find_packages(include=["rmcore", "rmcore.*"]), "rmcore.inspect"],  # which has no __init__.py
    package_data={"rmcore": ["py.typed", "**/*.json", "**/*.jinja", "**/*.css", "bench/nullgpu/*.c"]},
    ext_modules=[Extension("rmcore.ops.kernels", sources=[])],
    cmdclass={"build_ext": BuildKernels},
    install_requires=[
        "torch>=2.11",
        "transformers>=5.3",
        "datasets",
        "safetensors",
        "huggingface_hub",
        "pyyaml",
        "tensorboard",
        "numpy",
        "pydantic>=2",
        "rich",
        "matplotlib",
        "filelock",
        "xxhash",
        "jinja2",
    ],
    extras_require={
        "dev": [
            "pytest",
            "pytest-timeout",
            "hypothesis",
            "scikit-learn",
            "scipy",
            "ruff",
            "mypy",
            "types-PyYAML",
            "triton; sys_platform == 'linux'",
            "httpx",
            "peft",
            "bitsandbytes>=0.48",
            *SERVE,
        ],
        "bench": ["trl", "accelerate"],
        "serve": SERVE,
        "wandb": ["wandb"],
        "trackio": ["trackio"],
        "mlflow": ["mlflow"],
        "lora": ["peft"],
        "fp8": ["torchao"],
        "bitsandbytes": ["bitsandbytes>=0.48"],
        "recurrent": ["flash-linear-attention", "causal-conv1d", "mamba-ssm"],
    },
    entry_points={"console_scripts": ["rmcore = rmcore.__main__:main"]},
)
