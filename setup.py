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
        "torch>=2.11.0",
        "deepspeed>=0.19.8",
        "transformers>=5.17.0,<6",
        "accelerate>=1.1.0",
        "datasets>=4.0.0",
        "safetensors>=0.8.0",
        "tokenizers>=0.23.1",
        "pyarrow>=17.0.0",
        "numpy>=2.0.0",
        "scipy>=1.13.0",
        "pyyaml>=6.0.1",
        "tqdm>=4.66.3",
        "matplotlib>=3.9.0",
        "psutil>=5.9.0",
        "datasketch>=1.6.0",
        "pydantic>=2.9.0",
        "jinja2>=3.1.0",
        "xxhash>=3.4.1",
        "triton>=3.6.0; platform_system == 'Linux'",
    ],
    extras_require={
        "flash": ["flash-attn>=2.7"],
        "wandb": ["wandb>=0.19.0"],
        "lora": ["peft>=0.18.0"],
        "tasks": ["lm-eval>=0.4.9"],
        "benchmarks": ["rouge-score>=0.1.2"],
        "tune": ["optuna>=5.0.0"],
        "bench": ["liger-kernel", "quack-kernels", "cut-cross-entropy"],
        "test": [
            "pytest>=8.0.0",
            "pytest-xdist>=3.6.1",
            "hypothesis>=6.100.0",
            "megatron-core>=0.16.0",
            "ruff>=0.12.0",
            "import-linter>=2.7",
            "markdown-it-py>=3.0.0",
            "scikit-learn>=1.5.0",
            "lm-eval>=0.4.9",
            "rouge-score>=0.1.2",
            "wandb>=0.19.0",
            "peft>=0.18.0",
            "optuna>=5.0.0",
        ],
    },
    entry_points={"console_scripts": ["unlearn-ds=unlearn_ds.cli:main"]},
)
