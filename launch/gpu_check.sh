#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests of the kernels on the device, then the benchmarks.
#
#   bash launch/gpu_check.sh [OUTPUT_DIR] [cuda|cpu] [STEP ...]
#
#   OUTPUT_DIR    where the results go                             (default: output/gpu_check)
#   cuda | cpu    `cpu` walks through the same steps with small shapes, to check the script itself (default: cuda)
#   STEP          which of them, where time is short               (default: tests kernels step reference)
#
#     tests       the kernels against fp64, attention, loader, on the device         tests.log, tests.xml
#     kernels     loss kernels beside every installed peer                      kernels.json, kernels.png
#     step        whole updates of GA, GA+GD and GA+KL beside the published way step.json, step.png, traces/
#     reference   GA+KL with a cached reference beside GA+GD                    reference.json, reference.png, traces/
#
# The model is Yi-6B's shape at 4096 tokens with random weights where its training state fits (130 GiB), else a shape of 1.5 billion
# parameters. Run it in an environment that has the package and pytest (launch/environment.sh makes one), on one GPU; no network.
# OUTPUT_DIR gets gpu.txt and summary.json beside the above. The exit code is 0 if every step succeeded; a step that fails or
# outruns its time (10 minutes each) does not keep the next from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT="${1:-output/gpu_check}"
DEVICE="${2:-cuda}"
shift $(($# < 2 ? $# : 2))
CHOSEN=("$@")
[ $# -gt 0 ] || CHOSEN=(tests kernels step reference)
PYTHON="${PYTHON:-python3}"
LIMIT_S=600
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

case "$DEVICE" in
cuda)
    memory="$("$PYTHON" -c 'import torch; print(torch.cuda.mem_get_info()[1] >> 30 if torch.cuda.is_available() else 0)')"
    if [ "$memory" -eq 0 ]; then
        echo "gpu_check: torch sees no CUDA device; 'bash launch/gpu_check.sh $OUT cpu' checks the script alone" >&2
        exit 2
    fi
    TESTS=(tests/test_kernels.py tests/test_kernel_stats.py tests/test_kernel_sequence.py tests/test_kernels_gpu.py
        tests/test_attention.py tests/test_loader.py)
    KERNELS=(--repeats 10)
    MODEL=yi-6b
    if [ "$memory" -lt 130 ]; then
        # Llama-3.2-1B's shape with its own output projection: state, activations and the baseline's whole logits fit 80 GB.
        MODEL="$OUT/llama-1b"
        mkdir -p "$MODEL"
        cat >"$MODEL/config.json" <<'JSON'
{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
 "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
 "max_position_embeddings": 4096, "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1}
JSON
    fi
    UPDATES=(--model "$MODEL" --seq_len 4096 --activation_checkpointing full --global_batch_size 8 --num_ranks 1
        --warmup_steps 2 --steps 4)
    ;;
cpu)
    TESTS=(tests/test_kernel_stats.py)
    KERNELS=(--device cpu --shapes 128,64,2000 --repeats 2)
    UPDATES=(--model tiny --seq_len 64 --global_batch_size 2 --warmup_steps 1 --steps 1 --num_ranks 1)
    ;;
*)
    echo "gpu_check: device '$DEVICE': cuda or cpu" >&2
    exit 2
    ;;
esac

failed=0
done_steps=()
step() { # name, command...
    local name="$1" started code
    shift
    started=$SECONDS
    echo "== $name: $*"
    timeout --kill-after=10 "$LIMIT_S" "$@" 2>&1 | tee "$OUT/$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed=1
    done_steps+=("{\"name\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - started))}")
}
bench() { # name, command of unlearn-ds bench, its options...
    local name="$1" command="$2"
    shift 2
    step "$name" "$PYTHON" -m unlearn_ds.cli bench "$command" --json "$OUT/$name.json" "$@"
}
updates() { # name, options of unlearn-ds bench step...
    local name="$1"
    shift
    bench "$name" step "${UPDATES[@]}" --traces "$OUT/traces" --keep_logs "$OUT/logs" "$@"
}

for chosen in "${CHOSEN[@]}"; do
    case "$chosen" in
    tests | kernels | step | reference) ;;
    *)
        echo "gpu_check: step '$chosen': tests, kernels, step or reference" >&2
        exit 2
        ;;
    esac
done
mkdir -p "$OUT"
command -v nvidia-smi >/dev/null && nvidia-smi -q >"$OUT/gpu.txt"
for chosen in "${CHOSEN[@]}"; do
    case "$chosen" in
    tests) step tests "$PYTHON" -m pytest -q --junitxml="$OUT/tests.xml" "${TESTS[@]}" ;;
    kernels) bench kernels kernels "${KERNELS[@]}" ;;
    step) updates step --method gradient_ascent ascent_plus_descent ascent_plus_kl_divergence --baseline ;;
    reference)
        updates reference --method ascent_plus_descent ascent_plus_kl_divergence --reference cache --rounds 2
        ;;
    esac
done

commit="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
printf '{"device": "%s", "commit": "%s", "date": "%s", "steps": [%s]}\n' "$DEVICE" "$commit" "$(date -u +%F)" \
    "$(IFS=,; echo "${done_steps[*]}")" >"$OUT/summary.json"
cat "$OUT/summary.json"
exit $failed
