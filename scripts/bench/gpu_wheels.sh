#!/usr/bin/env bash
# Gathers the wheels that a GPU machine without a network lacks into one folder under 60 MB, and prints their sum:
#   scripts/bench/gpu_wheels.sh [FOLDER]        # gpu_wheels by default; for Python 3.12 on Linux, x86-64
# There, beside a copy of this repository:
#   python -m pip install --no-index --no-deps --target gpu_site gpu_wheels/*.whl && make gpu
set -euo pipefail
cd "$(dirname "$0")/../.."
folder=${1:-gpu_wheels}
python=.venv/bin/python
[ -x "$python" ] || python=${PYTHON:-python3}

# The versions of constraints.txt. torch, triton, tokenizers, sentencepiece, numpy and accelerate are there already.
wheels=(
  transformers huggingface_hub typer rich threadpoolctl protobuf filelock # what siglip_hf imports
  click shellingham annotated-doc markdown-it-py mdurl pygments httpx2    # what these import
  httpcore2 anyio certifi h11 idna truststore hf-xet
  pydantic pydantic-core annotated-types typing-inspection typing-extensions
  siglip-kernel open_clip_torch timm ftfy wcwidth                         # peers of the loss and the towers
  resvg-py                                                                # renders the checkpoint's pictures
)
mkdir -p "$folder"
"$python" -m pip download --quiet --disable-pip-version-check --dest "$folder" -c constraints.txt \
  --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none \
  --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 --platform any \
  --only-binary=:all: --no-deps "${wheels[@]}"

kilobytes=$(du -ck "$folder"/*.whl | tail -1 | cut -f1)
echo "$(ls "$folder"/*.whl | wc -l) wheels, $((kilobytes / 1000)) MB in $folder"
if [ "$kilobytes" -gt 60000 ]; then
  echo "more than 60 MB: leave something out" >&2
  exit 1
fi
