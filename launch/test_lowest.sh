#!/usr/bin/env bash
# What depends on versions, tested with the lowest ones that setup.py claims, in an environment of its own (.venv-lowest).
#
#   bash launch/test_lowest.sh [any argument of pytest]
#
# launch/lowest.lock says which versions, docs/versions.md what was run with them. Installing downloads 3 GB once (torch's CUDA build),
# which is why continuous integration does not run this: run it by hand when a version or a call of another package changes.
set -euo pipefail
ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv-lowest}"
LOCK="$ROOT/launch/lowest.lock"
EXTRAS=test
source "$ROOT/launch/environment.sh"
cd "$ROOT"
export PYTHONPATH="$ROOT${PYTHONPATH:+:$PYTHONPATH}" DS_ACCELERATOR=cpu
TESTS=(
    test_versions test_signatures test_attention test_flops                              # calls of torch and transformers
    test_kernels test_kernel_stats test_kernel_sequence test_kernel_door test_kernel_zero # loss ops, triton interpreted
    test_divergences test_row_losses test_token_losses test_kernel_compile                # and compiled
    test_layers test_architectures test_model_files test_activations test_weights test_composite # models of every family
    test_fixed_tensors test_tf32 test_fake_cuda                                            # what DeepSpeed and CUDA change
    test_engine test_export test_lora                                                     # two ranks of DeepSpeed
    test_loader test_plan test_documents test_readers test_tokenizer test_overlap test_interop test_forms_chats # data
    test_generate test_tasks test_verdict test_evaluation_table test_report                             # evaluation
    test_bench_loss test_bench_step test_gpu_check                                        # benchmarks
)
PATHS=()
for name in "${TESTS[@]}"; do
    PATHS+=(tests/*/"$name".py)
done
exec python -m pytest -n "${TEST_WORKERS:-2}" --dist loadfile "${PATHS[@]}" "$@"
