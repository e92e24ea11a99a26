"""Installs clapping_ds. Install torch first, in the build that suits the machine (see the Makefile)."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="clapping_ds",
    version="0.1.0",
    description="Compressed communication between pipeline stages for DeepSpeed and Megatron-Core",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["clapping_ds*"]),
    install_requires=[
        "torch>=2.7,<3",
        "triton>=3.3",
        "deepspeed>=0.19.4,<0.20",
        "pydantic>=2.7,<3",
        "numpy>=1.26",
    ],
    extras_require={
        "megatron": ["megatron-core>=0.16,<0.20"],
        "launch": ["tqdm>=4.60", "tokenizers>=0.20", "matplotlib>=3.8"],
        "dev": [
            "megatron-core>=0.16,<0.17",
            "tqdm>=4.60",
            "tokenizers>=0.20",
            "matplotlib>=3.8",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "peft>=0.15",
            "ruff>=0.9",
            "mypy>=1.10",
        ],
    },
)
