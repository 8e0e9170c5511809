"""The command lines of the published evaluation scripts."""

import pytest

from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.options import OptionError, parse

PUBLISHED = ["--model_name_or_path", "m", "--per_device_eval_batch_size", "1", "--do_eval", "--output_dir", "./output"]
PUBLISHED += ["--overwrite_output_dir", "--bf16", "True", "--tf32", "True", "--domain", "github"]


def test_the_published_command_line_is_understood():
    config = parse(EvaluateConfig, PUBLISHED, "unlearn-ds evaluate")
    assert (config.do_eval, config.tf32, config.bf16, config.domain) == (True, True, True, "github")
    assert config.notes() == [
        "--overwrite_output_dir: an evaluation of the same model is replaced without it, another model's is never"
    ]


@pytest.mark.parametrize(
    ("flag", "value", "answer"),
    [
        ("--max_eval_samples", "100", "--max_sequences N measures a seeded sample"),
        ("--torch_dtype", "float32", "--bf16 True measures in bf16, --bf16 False in fp32"),
        ("--tokenizer_name", "t", "unlearn-ds prepare --tokenizer_name_or_path"),
        ("--model_max_length", "512", "--seq_len is the longest sequence"),
        ("--do_eval", "False", "there is nothing else to do"),
    ],
)
def test_what_something_else_replaces_is_answered_with_it(flag, value, answer):
    with pytest.raises(OptionError, match=f"{flag} {value}: .*{answer}"):
        parse(EvaluateConfig, [*PUBLISHED, flag, value], "unlearn-ds evaluate")
