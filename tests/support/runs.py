"""What several tests build: tiny models and corpora, and real runs under the real launcher."""

import json
import subprocess
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.paths import ROOT
from tests.support.patience import finish
from unlearn_ds.cluster.processes import rank_command, rank_environment
from unlearn_ds.data.corpus import CorpusWriter, corpus_path

VOCAB_SIZE = 131


def tiny_config(tied: bool = False) -> Any:
    """A two-layer Llama that an update takes milliseconds on."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        initializer_range=0.2,
    )


def save_tiny_model(folder: Path, tied: bool = False, seed: int = 0) -> Path:
    """Write random weights, in fp32, as a Hugging Face folder."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(tiny_config(tied), dtype=torch.float32).save_pretrained(folder)
    return folder


def write_corpora(data_dir: Path, num_documents: int = 12, longest: int = 40, seed: int = 0) -> Path:
    """Random documents of 6 to `longest` tokens for every set of the domain `github` and for `general`."""
    rng = np.random.default_rng(seed)
    sets = [("github", name) for name in ("forget", "retain", "approximate")]
    sets += [("general", name) for name in ("retain", "evaluation")]
    for domain, name in sets:
        path = corpus_path(data_dir, domain, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with CorpusWriter(path, VOCAB_SIZE) as writer:
            for _ in range(num_documents):
                writer.add(rng.integers(2, VOCAB_SIZE, rng.integers(6, longest)))
    return data_dir


@contextmanager
def saved_for_backward(model: torch.nn.Module, counts: Callable[[], bool] = lambda: True) -> Iterator[dict[int, Any]]:
    """Storages, parameters left out, that autograd keeps of what the block computes while `counts()` holds."""
    parameters = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    saved = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if counts() and storage._cdata not in parameters:
            saved[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def environment(**extra: str) -> dict[str, str]:
    """The environment of a child process: one thread, no warnings."""
    return rank_environment(**({"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"} | extra))


def launch(module: str, arguments: list[str], num_ranks: int = 1, **extra: str) -> subprocess.CompletedProcess[str]:
    """Run a module as a plain process, or on several ranks under the deepspeed launcher."""
    return finish(rank_command(module, arguments, num_ranks), ROOT, environment(**extra))


def run_training(arguments: list[str], num_ranks: int = 1, **extra: str) -> list[dict[str, Any]]:
    """Run `unlearn_ds.train` and return the lines of its metrics.jsonl; fails with the run's own output."""
    finished = launch("unlearn_ds.train", arguments, num_ranks, **extra)
    assert finished.returncode == 0, finished.stdout[-4000:] + finished.stderr[-4000:]
    output = Path(arguments[arguments.index("--output_dir") + 1])
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


@contextmanager
def forbidding_syncs() -> Iterator[None]:
    """Within, a wait of the host for the CUDA device raises; after it nothing does, whatever happened.

    torch warns whenever the mode is set, which is an error where warnings are.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Synchronization debug mode is a prototype")
        try:
            torch.cuda.set_sync_debug_mode("error")
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
