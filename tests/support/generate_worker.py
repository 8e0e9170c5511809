"""On every rank: generation in every way, from the model in a folder; rank 0 writes RANKS.json there."""

import json
import sys
from pathlib import Path

import numpy as np
import torch

from tests.support.runs import VOCAB_SIZE, write_corpora
from unlearn_ds.cluster import distributed
from unlearn_ds.data.micro_batch import pack
from unlearn_ds.engine.generate import Decoding, generate
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.evaluation.subject import load_subject
from unlearn_ds.model.loss_head import StatsCall

DECODINGS = {
    "greedy": (5, Decoding(8, batch_size=2)),
    "sampled": (5, Decoding(8, temperature=1.0, top_p=0.9, num_samples=2, seed=3, batch_size=3)),
    "few": (1, Decoding(4, batch_size=4)),
}


def main(folder: Path) -> None:
    device = distributed.init_distributed(1)
    words = {"model_name_or_path": str(folder / "model"), "seq_len": 64, "bf16": False}
    data = folder / "data"
    distributed.on_main(lambda: str(write_corpora(data)))
    subject = load_subject(EvaluateConfig(**words, data_dir=str(data)), device)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(4, VOCAB_SIZE, length) for length in (3, 9, 5, 5, 12)]
    rows, text = torch.arange(5, device=device), torch.arange(10, 16, device=device)

    def asked() -> list[float]:
        return subject.engine.ask(pack([text]), StatsCall(rows, text[1:]))[0].tolist()

    result = {"asked before": asked()}
    for name, (count, decoding) in DECODINGS.items():
        for whole in (True, False):
            found = generate(subject.engine.engine.module, prompts[:count], decoding, None, device, whole=whole)
            key = f"{name} {'on a whole copy' if whole else 'sharded'}"
            result[key] = [[[*one.tokens.tolist(), one.stopped] for one in samples] for samples in found]
    result["asked after"] = asked()
    if distributed.is_main():
        (folder / f"{distributed.world_size()}.json").write_text(json.dumps(result))
    distributed.shut_down()


if __name__ == "__main__":
    main(Path(next(word for word in sys.argv[1:] if not word.startswith("--local_rank"))))
