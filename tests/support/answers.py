"""Tables of answers for the tests of their metrics."""

import numpy as np

from unlearn_ds.measures.answers import Answers


def make_answers(tokens, **more):
    """Of question -> [(log-probs (n,), hits (n,)) of each answer]."""
    flat = [(index, *one) for index, group in tokens.items() for one in group]
    log_prob = np.concatenate([one[1] for one in flat]).astype(float)
    count = len(log_prob)
    given = {"mean_logp": np.full(count, -3.0), "second_moment": np.full(count, 11.0)} | more
    return Answers(
        index=np.array([one[0] for one in flat]),
        bounds=np.cumsum([0, *(len(one[1]) for one in flat)]),
        log_prob=log_prob,
        correct=np.concatenate([one[2] for one in flat]),
        **given,
    )


def uniform_answers(vocab_size, lengths):
    """Of a model whose logits are all equal; question -> tokens of each answer."""
    level = -np.log(vocab_size)
    tokens = {i: [(np.full(n, level), np.zeros(n, bool)) for n in group] for i, group in lengths.items()}
    count = sum(map(sum, lengths.values()))
    return make_answers(tokens, mean_logp=np.full(count, level), second_moment=np.full(count, level**2))


def random_answers(seed, num_questions, several=1, shift=0.0):
    """Of random numbers; `shift` is added to every log-prob."""
    rng = np.random.default_rng(seed)
    tokens = {}
    for index in range(num_questions):
        lengths = rng.integers(2, 12, several)
        tokens[index] = [(-rng.exponential(1.5, n) - shift, rng.random(n) < 0.6) for n in lengths]
    count = sum(len(one[0]) for group in tokens.values() for one in group)
    mean = -rng.uniform(1, 3, count)
    return make_answers(
        tokens,
        mean_logp=mean,
        second_moment=mean**2 + rng.uniform(0.2, 2, count),
        zlib_bytes=rng.integers(20, 90, num_questions * several),
    )
