"""Models by their published shape, documents by their published lengths."""

from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from unlearn_ds.data.corpus import CorpusWriter, corpus_path
from unlearn_ds.options import OptionError, did_you_mean

# name -> (config class of transformers, its arguments)
GEOMETRIES = {
    "tiny": (
        "LlamaConfig",
        {
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 32000,
        },
    ),
    "yi-6b": (
        "LlamaConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 64000,
        },
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "vocab_size": 128256,
        },
    ),
    "qwen2.5-7b": (
        "Qwen2Config",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    ),
}
# Documents of the GitHub forget set: 7.0 KB on average at about 3 bytes a token; the spread is that of a log-normal whose
# padding to 4096 comes out as the published 55-60 %.
_MEAN_TOKENS, _LOG_SPREAD, _PUBLISHED_SEQ_LEN = 2333, 1.4, 4096


def model_config(name_or_path: str, seq_len: int) -> Any:
    """The config of a geometry, of its first N layers (`yi-6b:12`), or of a model folder.

    Raises `OptionError` for a name that is none of these.
    """
    import transformers

    name, _, layers = name_or_path.partition(":")
    if name in GEOMETRIES and (not layers or layers.isdecimal()):
        class_name, arguments = GEOMETRIES[name]
        if layers:
            most = arguments["num_hidden_layers"]
            if not 1 <= int(layers) <= most:
                raise OptionError(f"--model {name_or_path}: {name} has 1 to {most} layers")
            arguments = arguments | {"num_hidden_layers": int(layers)}
        return getattr(transformers, class_name)(
            **arguments, max_position_embeddings=seq_len, tie_word_embeddings=False, bos_token_id=0, eos_token_id=1
        )
    if not Path(name_or_path).is_dir():
        raise OptionError(
            f"--model {name_or_path}: a model folder, or one of {', '.join(GEOMETRIES)}."
            f"{did_you_mean(name_or_path, GEOMETRIES)}"
        )
    return transformers.AutoConfig.from_pretrained(name_or_path)


def github_lengths(num_documents: int, seq_len: int, seed: int = 0) -> np.ndarray:  # (num_documents,) int64
    """Tokens per document, as on GitHub at sequences of 4096; for another `seq_len` scaled with it.

    The distribution's quantiles in random order: a few documents are as long on average, and as unequal, as many.
    """
    mean = _MEAN_TOKENS * seq_len / _PUBLISHED_SEQ_LEN
    normal = NormalDist(np.log(mean) - _LOG_SPREAD**2 / 2, _LOG_SPREAD)
    lengths = np.exp([normal.inv_cdf((i + 0.5) / num_documents) for i in range(num_documents)])
    return np.random.default_rng(seed).permutation(np.clip(lengths, 5, None).astype(np.int64))


def write_documents(data_dir: Path, num_documents: int, seq_len: int, vocab_size: int) -> None:
    """Random tokens in documents of GitHub's lengths: the sets `forget` and `retain` of the domain `github`."""
    for seed, name in enumerate(("forget", "retain")):
        rng = np.random.default_rng(seed)
        with CorpusWriter(corpus_path(data_dir, "github", name), vocab_size) as writer:
            for length in github_lengths(num_documents, seq_len, seed):
                writer.add(rng.integers(2, vocab_size, length))
