"""Real text that every machine has, for the demo: Python's own sources and its language reference.

The sources stand in for the `github` domain: excerpts of disjoint files, dealt at random into forget, retain and approximate
so that the three are alike. The topics of `pydoc` stand in for the `general` domain.
"""

import json
import random
import sysconfig
from dataclasses import dataclass
from pathlib import Path

RELEARN_UPDATES = 8
RELEARN_LEARNING_RATE = 1e-3  # the demo's model is small: the default rate is one for models of billions
_EXCERPT_CHARS = 600  # about 230 tokens of the demo's tokenizer


@dataclass(frozen=True)
class DemoSizes:
    """How many documents each set gets."""

    forget: int = 64
    approximate: int = 64
    retain: int = 192
    general_retain: int = 64
    general_evaluation: int = 48


def _source_excerpts(count: int, rng: random.Random) -> list[str]:
    """One excerpt, cut at line ends, from each of `count` files of the standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and p.stat().st_size > 4000)
    rng.shuffle(files)
    excerpts = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        start = text.find("\n", rng.randrange(500, max(501, len(text) - 2 * _EXCERPT_CHARS))) + 1
        excerpt = text[start : start + _EXCERPT_CHARS]
        if len(excerpt) == _EXCERPT_CHARS and excerpt.isascii():
            excerpts.append(excerpt)
        if len(excerpts) == count:
            return excerpts
    raise ValueError(f"only {len(excerpts)} source files of this Python are usable, the demo needs {count}")


def _topic_excerpts(count: int, rng: random.Random) -> list[str]:
    """`count` disjoint excerpts of the language reference."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    starts = list(range(0, len(text) - _EXCERPT_CHARS, _EXCERPT_CHARS))
    if len(starts) < count:
        raise ValueError(f"the language reference gives {len(starts)} excerpts, the demo needs {count}")
    return [text[start : start + _EXCERPT_CHARS] for start in rng.sample(starts, count)]


def write_documents(folder: Path, sizes: DemoSizes, seed: int) -> dict[str, Path]:
    """Write one jsonl file (column `text`) per set and return their paths by `prepare`'s option name."""
    rng = random.Random(seed)
    sources = _source_excerpts(sizes.forget + sizes.approximate + sizes.retain, rng)
    topics = _topic_excerpts(sizes.general_retain + sizes.general_evaluation, rng)
    cuts = {
        "forget": sources[: sizes.forget],
        "approximate": sources[sizes.forget : sizes.forget + sizes.approximate],
        "retain": sources[sizes.forget + sizes.approximate :],
        "general_retain": topics[: sizes.general_retain],
        "general_evaluation": topics[sizes.general_retain :],
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for name, documents in cuts.items():
        paths[name] = folder / f"{name}.jsonl"
        paths[name].write_text("".join(json.dumps({"text": d}) + "\n" for d in documents), encoding="utf-8")
    return paths


def write_tokenizer(folder: Path, documents: list[Path], vocab_size: int) -> None:
    """Train a byte-level BPE on the documents and save it as a Hugging Face tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    texts = [json.loads(line)["text"] for path in documents for line in path.read_text(encoding="utf-8").splitlines()]
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=["<eos>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=trainer._tokenizer, eos_token="<eos>", pad_token="<eos>")
    tokenizer.save_pretrained(folder)


def write_config(folder: Path, vocab_size: int) -> None:
    """Save the config of a small Llama: only its shape, the weights come from training."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    ).save_pretrained(folder)
