"""Every option of a run: frozen dataclasses that validate and touch nothing.

The docstring under a field is its help text on the command line.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from unlearn_ds.conditions import check_guards
from unlearn_ds.limits import check_numbers, check_together
from unlearn_ds.methods import check_method, expanded
from unlearn_ds.mixture import parse_mixture
from unlearn_ds.objectives import OBJECTIVES, Objective, PairLoss, SequenceLoss, TokenLoss
from unlearn_ds.options import check_choices, check_name
from unlearn_ds.update_rule import UpdateRule


@dataclass(frozen=True)
class RunConfig:
    """The options of one training run: an unlearning method, a fine-tuning or a retraining."""

    unlearn_method: str
    """what to do: gradient_ascent, random_label, adversarial, ascent_plus_descent, ascent_plus_kl_divergence, npo,
    npo_plus_descent, simnpo, simnpo_plus_descent, wga, satimp, tnpo, wtnpo, unlikelihood, ce_u, unilogit, jensun, undial,
    shred, max_entropy, inverted_hinge, pdu, dpo, idk_dpo, alt_po, flat, idk, rmu, adaptive_rmu, circuit_breakers, own (with
    --objective), finetune or retrain; or a trainer of Open-Unlearning's, such as GradDiff: `unlearn-ds train --list_methods`"""
    output_dir: str
    """where run.json, metrics.jsonl, checkpoints/, model/ and evaluation.json go"""
    objective: str | None = None
    """FILE.py:NAME: a loss of your own in the place of the forget term's, as a function of log p of each target
    (docs/methods.md); the file is run as code"""
    preset: str | None = None
    """take what the best public source used for a method, where no option says otherwise: `unlearn-ds train --list_methods`"""
    target_model_name_or_path: str | None = None
    """the model that must forget: a folder or a hub name"""
    model_name_or_path: str | None = None
    """the model that `retrain` starts from"""
    tokenizer_name_or_path: str | None = None
    """tokenizer exported with the model (default: the model's own)"""
    trust_remote_code: bool = False
    """run code that comes with the model; off unless you trust its authors"""
    random_init: bool = False
    """start from random weights: only the model's config is read"""

    domain: str = "github"
    """the domain to forget: corpora are read from DATA_DIR/DOMAIN"""
    data_dir: str = "data"
    """folder made by `unlearn-ds prepare`"""
    general: bool = False
    """take retain data from DATA_DIR/general instead of the domain"""
    train_on: tuple[str, ...] = ()
    """corpora that `finetune` and `retrain` read, such as `forget retain general` (default: retain)"""
    seq_len: int = 4096
    """longest sequence, in tokens; documents are cut into pieces of this length"""
    packing: bool = True
    """several sequences in one row, if the model keeps them apart; False: one a row, padded to the longest beside it"""
    retain_loss: Literal["none", "cross_entropy", "kl", "reverse_kl", "jsd", "hidden"] | None = None
    """the retain term beside any forget term: none, cross_entropy (lower the loss of retain), or stay close to the original
    model there by kl, reverse_kl or jsd (Jensen-Shannon), or in the states of --layer by hidden (default: the method's own)"""
    forget_weight: float = 1.0
    """weight of the forget term"""
    retain_ratio: float = 1.0
    """retain sequences per forget sequence, for the methods that use both"""
    retain_weight: float = 1.0
    """weight of a retain sequence relative to a forget sequence"""
    retain_target: float | None = None
    """a retain loss to keep to: after every update the retain weight, which starts at retain_weight, rises by how far the
    retain loss is above it, or falls, and not below 0"""
    retain_target_rate: float = 1.0
    """retain_target: how much of that difference the weight moves by"""
    retain_target_warmup: float = 0.0
    """retain_target: epochs at the start in which the weight stays"""
    retain_sets: tuple[str, ...] = ()
    """sets that retain sequences come from, with their shares, such as `retain:2 general:1` (default: retain alone)"""
    pairs_set: str | None = None
    """dpo, idk_dpo, alt_po, flat and idk: the set of the domain with other answers to the questions of forget (default:
    refusals for idk_dpo, flat and idk, alternates for the others)"""
    average: Literal["sequence", "token"] = "sequence"
    """what the loss of an update is averaged over: its sequences, or the target tokens of each set, as most trainers do"""
    completely_random: bool = False
    """random_label: draw labels uniformly from the vocabulary"""
    top_k: int | None = None
    """random_label: draw labels from the original model's k most likely tokens"""
    top_p: float | None = None
    """random_label: draw labels from the original model's most likely tokens of this total probability"""
    rm_groundtruth: bool = False
    """random_label: never draw the true token"""
    beta: float | None = None
    """npo, simnpo, dpo, idk_dpo, alt_po, tnpo and wtnpo: how soon the pull weakens (default: 0.1 for npo and dpo with its kin,
    4.5 for simnpo, 4 for the others); wga and satimp: power of p (default: 1 for wga, 5 for satimp); undial and shred: how far
    the original's logit of the true token is taken down (default: 10)"""
    beta2: float | None = None
    """satimp: power of 1 - p (default: 1)"""
    alpha: float | None = None
    """wtnpo: power of p (default: 1.5)"""
    lowest_percent: float | None = None
    """shred: share of a sequence's positions, in percent, at which the true token is taken down: those where the original model
    found it least likely (default: 20)"""
    gamma: float | None = None
    """simnpo: margin (default: 0)"""
    layer: tuple[int, ...] = ()
    """rmu, adaptive_rmu, circuit_breakers and --retain_loss hidden: the decoder layers, counted from 0, whose output is meant
    (default: a quarter of the way up, 7 of 32; for circuit_breakers a third and two thirds)"""
    steering_coefficient: float | None = None
    """rmu: length of the vector that forget states are steered to (default: 2); adaptive_rmu: the same in mean norms of the
    original model's states (default: 5)"""
    substitute_text: str = "No Idea"
    """jensun: what forget tokens are pulled towards, over and over"""
    cache_dir: str | None = None
    """where what the original model says (labels, losses, hidden states) is kept, once computed (default: beside the corpus)"""
    overwrite_cache: bool = False
    """compute what the original model says again even if the cache matches"""

    num_train_epochs: float = 1.0
    """passes over the first corpus of the method"""
    max_steps: int = -1
    """stop after this many updates; -1 for num_train_epochs"""
    global_batch_size: int | None = None
    """sequences per update (default: per_device_train_batch_size x ranks x gradient_accumulation_steps)"""
    per_device_train_batch_size: int | Literal["auto"] = 1
    """rows of seq_len tokens in one forward and backward of a rank, or auto: as many as make it faster and fit (needs
    global_batch_size); an update does not depend on it"""
    gradient_accumulation_steps: int = 1
    """only sets global_batch_size; the real number of micro-steps follows from packing"""
    learning_rate: float = 2e-5
    """peak learning rate"""
    optim: Literal["adamw", "sign_sgd", "sign_adam"] = "adamw"
    """the update: AdamW, or every weight by learning_rate, against the sign of its gradient (sign_sgd) or along that of Adam's
    direction (sign_adam)"""
    sam_rho: float | None = None
    """SAM: take the forget gradient at weights that are moved by so much along it (published: 0.01 on MUSE, 0.1 on WMDP), in a
    second pass over the forget sequences; needs ZeRO-3"""
    gru: Literal["alone", "with_retain"] | None = None
    """GRU: take out of the forget gradient what opposes the retain gradient, and update by the rest alone, or with the retain
    gradient added; needs ZeRO-3"""
    lr_scheduler_type: Literal[
        "linear", "cosine", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial", "inverse_sqrt"
    ] = "cosine"
    """schedule, one of transformers' own"""
    warmup_ratio: float = 0.03
    """share of the updates spent warming up (rounded up)"""
    warmup_steps: int = 0
    """updates spent warming up; wins over warmup_ratio"""
    weight_decay: float = 0.0
    """decoupled weight decay (not on biases and norms)"""
    adam_beta1: float = 0.9
    """AdamW's first-moment decay, and sign_adam's"""
    adam_beta2: float = 0.999
    """AdamW's second-moment decay"""
    adam_epsilon: float = 1e-8
    """AdamW's denominator offset"""
    max_grad_norm: float = 1.0
    """clip the gradient to this norm; 0 for no clipping"""
    max_skipped_steps: int = 3
    """stop after this many updates in a row whose gradient was not finite"""
    seed: int = 42
    """seed of the data order, the random labels and random weights"""

    deepspeed: str = "zero3"
    """a file of DeepSpeed options, or one of those shipped: zero3, zero3_offload, zero3_hpz, zero3_zeropp, zero2,
    zero1"""
    bf16: bool | Literal["auto"] = "auto"
    """bf16 parameters with fp32 master weights; False trains in fp32; auto: bf16 where the device has instructions for it"""
    optimizer_states: Literal["fp32", "bf16"] = "fp32"
    """AdamW's master weights and moments; in bf16 they take 6 bytes a parameter instead of 12, and small updates are lost
    (docs/engine.md)"""
    attn: str = "auto"
    """attention for packed rows: auto, varlen (torch), sdpa, flash_attention_2, flash_attention_3 or flash_attention_4"""
    activation_checkpointing: str = "auto"
    """recompute activations in backward: none, full, every n-th layer as a number, offloaded (full, with the layers' inputs
    in host memory) or auto (the fastest of these that fits); the result is the same"""
    leaf_modules: bool = True
    """ZeRO-3 gathers a decoder layer in one piece"""
    torch_compile: bool = False
    """compile each decoder layer"""
    reference: Literal["live", "cache"] = "live"
    """the original model for KL and for hidden states: live (a frozen engine beside the trained one) or cache (its hidden
    states of the retain data, computed once and kept beside the corpus)"""
    trainable: tuple[str, ...] = ()
    """train only the parameters whose whole name one of these regular expressions matches, such as
    'model\\.layers\\.[567]\\.mlp\\.down_proj\\.weight'; the others are frozen (default: all are trained)"""
    lora_r: int | None = None
    """train adapters of this rank instead of the weights (needs peft)"""
    lora_alpha: float = 16.0
    """adapters are scaled by lora_alpha / lora_r"""
    lora_target: tuple[str, ...] = ()
    """names of the matrices that get adapters (default: every linear layer but the output projection)"""
    lora_export: Literal["merged", "adapter"] = "merged"
    """write the model with the adapters merged into its weights, or the adapter alone"""
    loss_impl: Literal["auto", "triton", "chunked", "reference"] = "auto"
    """implementation of the loss head"""
    loss_workspace_mib: float | Literal["auto"] = "auto"
    """memory that the loss may use for logits, in MiB; auto: 1024, for KL on a GPU up to 4096 where there is room"""
    loading: Literal["auto", "transformers"] = "auto"
    """auto: each rank reads its own slices of the weights where the files' layout allows it; transformers: never"""
    num_threads: int | None = None
    """CPU threads of a rank (default: the machine's cores shared out)"""

    save_steps: int = 0
    """save a resumable checkpoint every this many updates; 0 for none"""
    save_total_limit: int | None = None
    """keep only this many newest checkpoints"""
    resume: bool = False
    """go on from the newest checkpoint in output_dir"""
    auto_resume: bool = False
    """go on from the newest checkpoint in output_dir if there is one, else start afresh: for batch scripts that are
    started again"""
    hang_timeout: float = 600.0
    """seconds after which an update that also takes ten times the usual is a hang: all ranks write their stacks and
    leave; 0 for never"""
    overwrite_output_dir: bool = False
    """clear output_dir if an earlier run left something there"""
    output_sufix: str = ""
    """appended to output_dir (spelling of the published command line)"""
    export: bool = True
    """write the model to output_dir/model when done"""
    do_eval: bool = False
    """evaluate the result on all corpora when done"""
    per_device_eval_batch_size: int = 4
    """rows in one forward of the evaluation"""
    eval_steps: int = 0
    """measure a fixed subset of each corpus every this many updates, before the first and after the last; 0 for never"""
    eval_sequences: int = 64
    """sequences of each corpus in that subset"""
    stop_when: tuple[str, ...] = ()
    """stop at the first of these that holds: 'forget_ppl>=approximate' (what the starting model had there),
    'forget_ppl>=retrained' (what the retrained_model has there), 'mia_auc<=0.5', 'retain_acc<=30'; needs eval_steps"""
    stop_tolerance: str | None = None
    """how near to what stop_when names the run must end, such as 5%: if the last updates went past it, the weights between the
    last two measured states that hit it are taken, or else the nearest"""
    retrained_model: str | None = None
    """evaluated folder (or the model/ in it) of a model that never saw the forget set: what stop_when compares with, what
    load_best aims at, what limits of damage allow for, and the yardstick of do_eval"""
    max_retain_ppl_increase: str | None = None
    """stop when retain perplexity rose by more than this, such as 10%, over the start (or a worse retrained_model's), and go
    back to the last state where it had not"""
    load_best: bool = False
    """end with the measured state nearest to a good verdict: forget like approximate was, retain like it was"""
    profile_steps: str | None = None
    """FIRST:LAST updates to profile: a trace per rank and a table of where the time went, in output_dir/profile"""
    logging_steps: int = 1
    """write metrics every this many updates"""
    report_to: Literal["none", "wandb"] = "none"
    """also log to wandb (its key comes from the environment)"""
    run_name: str | None = None
    """name of the run in wandb (default: the output folder's name)"""
    disable_tqdm: bool = False
    """no progress bar"""

    do_unlearn: bool = True
    """accepted for the published command line"""
    tf32: bool = False
    """TF32 for the matrix products of an update in fp32, on the GPU; in bf16 there is none that it should round"""
    fsdp: str | None = None
    """accepted for the published command line: DeepSpeed's ZeRO-3 (--deepspeed) takes its place"""
    fsdp_transformer_layer_cls_to_wrap: str | None = None
    """accepted for the published command line: layers are found by themselves (--leaf_modules)"""

    def __post_init__(self) -> None:
        check_choices(self)
        check_name("domain", self.domain)
        if self.output_sufix:
            check_name("output_sufix", self.output_sufix)
        check_method(self)
        check_numbers(self)
        check_together(self)
        check_guards(self)

    @classmethod
    def expanded(cls, options: dict[str, Any]) -> dict[str, Any]:
        """The options of a command or file with what a preset, or a name of the method's elsewhere, stands for."""
        return expanded(options)

    @property
    def objective_name(self) -> str:
        """The row of `objectives.OBJECTIVES` that the method and its flags name."""
        if self.unlearn_method == "random_label" and not self.completely_random:
            return "adversarial"
        return self.unlearn_method

    @property
    def method(self) -> Objective:
        return OBJECTIVES[self.objective_name].with_retain(self.retain_loss)

    @property
    def planned_retain_weight(self) -> float:
        """The retain weight in the plan, which knows no step: with a target it is multiplied while the run lasts."""
        return self.retain_weight if self.retain_target is None else 1.0

    @property
    def retain_mixture(self) -> dict[str, float]:
        """Set -> share of the retain sequences; empty where `--retain_sets` is not given."""
        return parse_mixture("retain_sets", self.retain_sets)

    @property
    def update_rule(self) -> UpdateRule:
        """How the gradient of an update is made."""
        return UpdateRule(self.sam_rho, self.gru)

    @property
    def sequence_loss(self) -> SequenceLoss | PairLoss | None:
        """The objective's term of whole sequences with the run's beta and gamma."""
        return self.with_numbers(self.method.sequence_loss)

    @property
    def token_loss(self) -> TokenLoss | None:
        """What stands in the place of cross-entropy on forget, with the run's numbers."""
        return self.with_numbers(self.method.token_loss)

    def with_numbers(self, form: Any) -> Any:
        """A term's form with the run's numbers; None for None."""
        names = () if form is None else form.numbers
        return form and replace(form, **{name: value for name in names if (value := getattr(self, name)) is not None})

    @property
    def sampling(self) -> tuple[int | None, float | None, bool]:
        """(top_k, top_p, whether the truth is banned) of sampled labels; `adversarial` is short for (1, None, True)."""
        if self.unlearn_method == "adversarial" and self.top_k is None and self.top_p is None:
            return 1, None, True
        return self.top_k, self.top_p, self.rm_groundtruth

    @property
    def start_model(self) -> str:
        """The model whose weights training starts from."""
        return self.model_name_or_path if self.unlearn_method == "retrain" else self.target_model_name_or_path

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir + (f"-{self.output_sufix}" if self.output_sufix else ""))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, sort_keys=True)

    def notes(self) -> list[str]:
        """What the user should know about options that do not act as written."""
        notes = []
        if self.global_batch_size is not None and self.gradient_accumulation_steps != 1:
            notes.append("--gradient_accumulation_steps: has no effect beside --global_batch_size")
        if self.sam_rho is not None and self.bf16 is True:
            notes.append(
                "--sam_rho: a weight in bf16 stays, or goes to the next bf16 number, further than its share; `sam_shift` in "
                "metrics.jsonl is how far all went together. With --bf16 False they go as far as they should"
            )
        if self.fsdp is not None:
            notes.append("--fsdp: DeepSpeed ZeRO-3 shards parameters, gradients and optimizer here; see --deepspeed")
        if self.fsdp_transformer_layer_cls_to_wrap is not None:
            notes.append(
                "--fsdp_transformer_layer_cls_to_wrap: decoder layers are found by themselves; see --leaf_modules"
            )
        return notes
