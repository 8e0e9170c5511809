"""The options of a run: what each method needs, and errors for what cannot take effect."""

import shlex

import pytest

from unlearn_ds.config import RunConfig
from unlearn_ds.evaluation.options import EvaluateConfig
from unlearn_ds.objectives import OBJECTIVES
from unlearn_ds.options import OptionError, parse

BASE = ["--target_model_name_or_path", "m", "--output_dir", "o"]
PUBLISHED = """
--target_model_name_or_path m --per_device_train_batch_size 1 --per_device_eval_batch_size 4
--gradient_accumulation_steps 85 --do_unlearn --output_dir ./output --overwrite_output_dir --num_train_epochs 1
--logging_steps 1 --learning_rate 3e-5 --warmup_ratio 0.03 --overwrite_cache --save_steps 8 --save_total_limit 1
--fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer' --bf16 True --tf32 True
--weight_decay 0. --output_sufix wd0 --lr_scheduler_type "cosine" --unlearn_method random_label
--completely_random True --domain github
"""


def run(*words: str) -> RunConfig:
    return parse(RunConfig, [*BASE, *words], "t")


def test_published_command_line_is_understood():
    config = parse(RunConfig, shlex.split(PUBLISHED), "t")
    assert config.objective_name == "random_label"
    assert config.learning_rate == 3e-5
    assert str(config.run_dir) == "output-wd0"
    assert any("--fsdp:" in note and "ZeRO-3" in note for note in config.notes())
    assert any("--leaf_modules" in note for note in config.notes())


def test_accumulation_that_a_global_batch_size_overrules_is_said():
    words = ["--unlearn_method", "gradient_ascent", "--gradient_accumulation_steps", "85"]
    assert run(*words).notes() == []
    assert "no effect beside --global_batch_size" in run(*words, "--global_batch_size", "8").notes()[0]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--unlearn_method gradient_ascent", "gradient_ascent"),
        ("--unlearn_method random_label --completely_random True", "random_label"),
        ("--unlearn_method random_label --top_k 1 --rm_groundtruth True", "adversarial"),
        ("--unlearn_method adversarial", "adversarial"),
        ("--unlearn_method ascent_plus_descent", "ascent_plus_descent"),
        ("--unlearn_method ascent_plus_descent --general True", "ascent_plus_descent"),
        ("--unlearn_method ascent_plus_kl_divergence", "ascent_plus_kl_divergence"),
        ("--unlearn_method ascent_plus_kl_divergence --general True", "ascent_plus_kl_divergence"),
        ("--unlearn_method finetune", "finetune"),
        ("--unlearn_method retrain --model_name_or_path b", "retrain"),
    ],
)
def test_methods(words, name):
    config = run(*words.split())
    assert config.objective_name == name
    assert config.method is OBJECTIVES[name]


def test_adversarial_is_top_1_without_the_truth():
    assert run("--unlearn_method", "adversarial").sampling == (1, None, True)
    assert run(*["--unlearn_method", "random_label", "--top_p", "0.9"]).sampling == (None, 0.9, False)


def test_every_objective_starts_an_epoch_and_has_a_sign():
    for objective in OBJECTIVES.values():
        assert objective.terms
        assert objective.summary
        assert all(term.factor in (-1.0, 1.0) for term in objective.terms)
        assert all(term.role in ("forget", "retain") for term in objective.terms)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--unlearn_method gradient_ascend", r"Did you mean 'gradient_ascent'\?"),
        ("--unlearn_method random_label", "needs --completely_random True, or --top_k"),
        ("--unlearn_method random_label --completely_random --top_k 2", "takes no --top_k"),
        ("--unlearn_method gradient_ascent --top_k 2", "are for random_label, not for gradient_ascent"),
        ("--unlearn_method gradient_ascent --completely_random", "is for random_label"),
        ("--unlearn_method gradient_ascent --general True", "gradient_ascent uses none"),
        ("--unlearn_method gradient_ascent --train_on retain", "for finetune and retrain"),
        ("--unlearn_method gradient_ascent --random_init", "needs a trained model"),
        ("--unlearn_method gradient_ascent --retain_weight 2", "pair forget with retain, not for gradient_ascent"),
        ("--unlearn_method finetune --retain_ratio 2", "pair forget with retain, not for finetune"),
        ("--unlearn_method gradient_ascent --do_unlearn False", "there is nothing else to do.*unlearn-ds evaluate"),
        ("--unlearn_method gradient_ascent --lora_alpha 8", "--lora_alpha and --lora_export need --lora_r"),
        ("--unlearn_method finetune --general --train_on retain", "both choose the data"),
        ("--unlearn_method retrain", "needs --model_name_or_path"),
        ("--unlearn_method gradient_ascent --seq_len 0", "--seq_len 0: must be above 0"),
        ("--unlearn_method gradient_ascent --seq_len 4", "at least 5"),
        ("--unlearn_method gradient_ascent --learning_rate -1", "must not be negative"),
        ("--unlearn_method gradient_ascent --global_batch_size 0", "at least 1"),
        ("--unlearn_method gradient_ascent --max_steps 0", "-1 for num_train_epochs"),
        ("--unlearn_method random_label --top_p 2", "above 0 and at most 1"),
        ("--unlearn_method gradient_ascent --warmup_ratio 2", "between 0 and 1"),
        ("--unlearn_method gradient_ascent --activation_checkpointing some", "every n-th layer as a number"),
        ("--unlearn_method gradient_ascent --resume --overwrite_output_dir", "contradict each other"),
        ("--unlearn_method gradient_ascent --lr_scheduler_type cosin", r"Did you mean 'cosine'\?"),
        ("--unlearn_method gradient_ascent --loss_impl cuda", "choose one of auto, triton, chunked, reference"),
    ],
)
def test_what_cannot_take_effect_is_refused(words, message):
    with pytest.raises(OptionError, match=message):
        run(*words.split())


def test_target_model_is_required():
    with pytest.raises(OptionError, match="needs --target_model_name_or_path"):
        parse(RunConfig, ["--unlearn_method", "gradient_ascent", "--output_dir", "o"], "t")


def test_evaluate_options():
    with pytest.raises(OptionError, match="at least 2"):
        parse(EvaluateConfig, ["--model_name_or_path", "m", "--max_sequences", "1"], "t")
    with pytest.raises(OptionError, match="--seq_len 0: must be above 0"):
        parse(EvaluateConfig, ["--model_name_or_path", "m", "--seq_len", "0"], "t")
