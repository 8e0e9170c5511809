#!/usr/bin/env bash
# Fetch the packages that a GPU machine without network may lack, as wheels for its Python: what a run needs, and the peers that the
# loss kernels are measured beside.
#
#   bash launch/gpu_wheels.sh [OUT]                  here, with network         (default: output/gpu_wheels)
#   bash launch/gpu_wheels.sh --install OUT [DIR]    there                      (default: /tmp/site; prints the PYTHONPATH)
#
#   TARGET_PYTHON   of that machine                                             (default: 3.12)
#   PART_MIB        the peers come in parts of at most this                     (default: 40)
#   PYTHON          the interpreter whose pip is used                           (default: python3)
#
# OUT/base holds DeepSpeed and what it and the data pipeline import (a few MiB), OUT/peers liger-kernel, quack-kernels and theirs
# (about 75 MiB, split into parts that one can copy one at a time). torch, triton, transformers and numpy must be there already. The
# newest peers are taken, the rest is as in launch/requirements.lock. Linux on x86-64.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
PYTHON="${PYTHON:-python3}"
TARGET_PYTHON="${TARGET_PYTHON:-3.12}"

if [ "${1:-}" = --install ]; then
    FROM="${2:?gpu_wheels: --install OUT: which folder?}"
    SITE="${3:-/tmp/site}"
    WHEELS="$(mktemp -d)"
    trap 'rm -rf "$WHEELS"' EXIT
    cp "$FROM"/base/*.whl "$WHEELS"
    if compgen -G "$FROM/peers/part-*" >/dev/null; then
        cat "$FROM"/peers/part-* | tar --extract --directory "$WHEELS"
    fi
    exec_pip=("$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade --target "$SITE")
    "${exec_pip[@]}" "$WHEELS"/*.whl
    # A folder on the PYTHONPATH is not searched for .pth files, by which CuTe's package names its own folder: this does it.
    "$PYTHON" -c 'import os, sys; print(f"import site\n\nsite.addsitedir({os.path.abspath(sys.argv[1])!r})")' "$SITE" >"$SITE/sitecustomize.py"
    printf 'export PYTHONPATH=%q\n' "$SITE"
    exit
fi

OUT="${1:-output/gpu_wheels}"
mkdir -p "$OUT"
rm -rf "$OUT/base" "$OUT/peers"
WHEELS="$(mktemp -d)"
trap 'rm -rf "$WHEELS"' EXIT
platforms=()
for tag in manylinux1 manylinux2014 manylinux_2_{17,24,27,28,31,34,35}; do
    platforms+=(--platform "${tag}_x86_64")
done
fetch() { # folder, requirement...
    local folder="$1"
    shift
    "$PYTHON" -m pip download --quiet --no-deps --only-binary=:all: --implementation cp --python-version "$TARGET_PYTHON" \
        "${platforms[@]}" --dest "$folder" "$@"
}
locked() { # package: its line in the lock file
    grep -E "^$1==" launch/requirements.lock | cut -d ';' -f 1
}
wants() { # a wheel, a package: the version that the wheel asks for exactly
    unzip -p "$1" '*.dist-info/METADATA' | grep -oE "^Requires-Dist: $2==[0-9][0-9a-z.]*" | head -n 1 | cut -d ' ' -f 2
}

# DeepSpeed comes as source alone; it is Python, its extensions are built where they are first used.
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel --quiet --no-deps --wheel-dir "$OUT/base" "$(locked deepspeed)"
fetch "$OUT/base" hjson "$(locked pydantic)" annotated-types typing-inspection "$(locked datasketch)" "$(locked xxhash)"
fetch "$OUT/base" "$(wants "$OUT"/base/pydantic-*.whl pydantic-core)"

fetch "$WHEELS" liger-kernel quack-kernels nvidia-cutlass-dsl apache-tvm-ffi torch-c-dlpack-ext einops
for part in base cu13; do
    version="$(wants "$WHEELS"/nvidia_cutlass_dsl-*.whl nvidia-cutlass-dsl-libs-base | cut -d = -f 3)"
    fetch "$WHEELS" "nvidia-cutlass-dsl-libs-$part==$version"
done
fetch "$WHEELS" "$(wants "$WHEELS"/nvidia_cutlass_dsl_libs_base-*.whl nvidia-cutlass-dsl-libs-core)"
"$PYTHON" - "$WHEELS" <<'PY'
"""Repack the large wheels with a stronger compression that pip reads just as well."""
import sys
import zipfile
from pathlib import Path

for wheel in Path(sys.argv[1]).glob("*.whl"):
    if wheel.stat().st_size > 16 << 20:
        packed = wheel.with_suffix(".tmp")
        with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as target:
            for name in source.namelist():
                target.writestr(source.getinfo(name), source.read(name), compress_type=zipfile.ZIP_LZMA)
        packed.replace(wheel)
PY
mkdir -p "$OUT/peers"
tar --create --directory "$WHEELS" . | split --bytes "${PART_MIB:-40}M" - "$OUT/peers/part-"
du -ah --apparent-size "$OUT" | sort -k 2
