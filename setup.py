"""Packaging of unlearn-ds. `kernels/` and `ds_configs/` stand at the top level and install inside `unlearn_ds`."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = "0.1.0"

setup(
    name="unlearn-ds",
    version=VERSION,
    description="Make a pre-trained language model forget: the seven methods of ACL 2024 on DeepSpeed ZeRO-3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10,<3.14",
    packages=[*find_packages(include=["unlearn_ds", "unlearn_ds.*"]), "unlearn_ds.kernels", "unlearn_ds.ds_configs"],
    # No __init__.py in kernels/: a top-level package of that name would hide Hugging Face's `kernels`.
    package_dir={"unlearn_ds.kernels": "kernels", "unlearn_ds.ds_configs": "ds_configs"},
    package_data={"unlearn_ds.ds_configs": ["*.json"], "unlearn_ds.evaluation": ["*.html"]},
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8",
        "transformers>=5,<6",
        "accelerate>=1.1",
        "datasets>=4",
        "safetensors>=0.5",
        "tokenizers>=0.22",
        "pyarrow>=17",
        "numpy>=2",
        "scipy>=1.13",
        "pyyaml>=6",
        "tqdm>=4.66",
        "matplotlib>=3.9",
        "psutil>=5.9",
        "datasketch>=1.6",
        "jinja2>=3.1",
        "xxhash>=3.4",
        "triton>=3.6; platform_system == 'Linux'",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "wandb": ["wandb>=0.19"],
        "lora": ["peft>=0.18"],
        "tasks": ["lm-eval>=0.4.9"],
        "bench": ["liger-kernel", "quack-kernels", "cut-cross-entropy"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6",
            "megatron-core>=0.16",
            "ruff>=0.12",
            "scikit-learn>=1.5",
            "lm-eval>=0.4.9",
            "wandb>=0.19",
            "peft>=0.18",
        ],
    },
    entry_points={"console_scripts": ["unlearn-ds=unlearn_ds.cli:main"]},
)
