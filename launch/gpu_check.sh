#!/usr/bin/env bash
# Everything that needs a GPU, in one command: the tests of the kernels on the device, then the benchmarks.
#
#   bash launch/gpu_check.sh [OUTPUT_DIR] [cuda|cpu]        (default: output/gpu_check cuda; under 20 minutes, no network)
#
# Run it inside an environment that has the package and pytest (launch/environment.sh makes one), on a machine with a CUDA
# device. `cpu` walks through the same steps with small shapes and Triton's interpreter, to check the script itself.
# OUTPUT_DIR gets tests.log, tests.xml, kernels.json, kernels.png, step.json, gpu.txt and summary.json. The exit code is 0 if
# every step succeeded; a step that fails or runs out of its time does not keep the next from running.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
OUT="${1:-output/gpu_check}"
DEVICE="${2:-cuda}"
PYTHON="${PYTHON:-python3}"
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

case "$DEVICE" in
cuda)
    "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || {
        echo "gpu_check: torch sees no CUDA device; 'bash launch/gpu_check.sh $OUT cpu' checks the script alone" >&2
        exit 2
    }
    TESTS=(tests/test_kernels.py tests/test_kernel_stats.py tests/test_kernel_sequence.py tests/test_kernels_gpu.py)
    KERNELS=(--repeats 10)
    # Llama-3.2-1B's shape with its own output projection: state, activations and the whole logits of the baseline fit 80 GB.
    mkdir -p "$OUT/llama-1b"
    cat >"$OUT/llama-1b/config.json" <<'JSON'
{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 2048, "intermediate_size": 8192,
 "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256,
 "max_position_embeddings": 4096, "tie_word_embeddings": false, "bos_token_id": 0, "eos_token_id": 1}
JSON
    STEP=(--model "$OUT/llama-1b" --method gradient_ascent ascent_plus_descent ascent_plus_kl_divergence --baseline
        --activation_checkpointing full --global_batch_size 8 --steps 4)
    ;;
cpu)
    TESTS=(tests/test_kernel_stats.py)
    KERNELS=(--device cpu --shapes 128,64,2000 --repeats 2)
    STEP=(--model tiny --seq_len 64 --global_batch_size 2 --warmup_steps 1 --steps 1 --num_ranks 1)
    ;;
*)
    echo "gpu_check: device '$DEVICE': cuda or cpu" >&2
    exit 2
    ;;
esac

failed=0
steps=()
step() { # name, seconds, command...
    local name="$1" limit="$2" started code
    shift 2
    started=$SECONDS
    echo "== $name: $*"
    timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$OUT/$name.log"
    code=${PIPESTATUS[0]}
    [ "$code" -eq 0 ] || failed=1
    steps+=("{\"name\": \"$name\", \"exit_code\": $code, \"seconds\": $((SECONDS - started))}")
}

command -v nvidia-smi >/dev/null && nvidia-smi -q >"$OUT/gpu.txt"
step tests 540 "$PYTHON" -m pytest -q --junitxml="$OUT/tests.xml" "${TESTS[@]}"
step kernels 360 "$PYTHON" -m unlearn_ds.cli bench kernels --json "$OUT/kernels.json" "${KERNELS[@]}"
step step 240 "$PYTHON" -m unlearn_ds.cli bench step --json "$OUT/step.json" "${STEP[@]}"

commit="$(git rev-parse HEAD 2>/dev/null || echo unknown)"
printf '{"device": "%s", "commit": "%s", "date": "%s", "steps": [%s]}\n' "$DEVICE" "$commit" "$(date -u +%F)" \
    "$(IFS=,; echo "${steps[*]}")" >"$OUT/summary.json"
cat "$OUT/summary.json"
exit $failed
