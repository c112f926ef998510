#!/usr/bin/env bash
# Packs what a GPU machine without a package registry may lack into carry/, which git ignores:
#
#     pack_device.sh [ARCHIVE ...]
#
# Wheels of pure Python, for any processor. What is compiled (torch, torchvision, Triton, NumPy, Pillow, SciPy,
# scikit-learn, matplotlib, safetensors, PyYAML) has to be there. Each ARCHIVE, such as one of images, is put beside
# them. scripts/gpu/unpack.sh, sourced there, makes it all known to Python.
set -euo pipefail
cd "$(dirname "$0")/.."

most=$((48 << 20)) # bytes: the checkout is to stay below 64 MiB with them
wheels=("timm>=1.0.19" "tensorboardX>=2.6" "webdataset>=1.0" braceexpand "six>=1.16" "tqdm>=4.66" packaging)

python=python3
[ ! -x .venv/bin/python ] || python=.venv/bin/python
rm -rf carry
mkdir -p carry/wheels
if ! "$python" -m pip --version >/dev/null 2>&1; then
    echo "error: $python has no pip, which fetches the wheels" >&2
    exit 1
fi
"$python" -m pip download --quiet --no-deps --only-binary=:all: --platform any --implementation py --abi none \
    --python-version 3.12 --dest carry/wheels "${wheels[@]}"
for archive in "$@"; do
    cp "$archive" carry/
done
bytes=$(find carry -type f -printf '%s\n' | awk '{ sum += $1 } END { print sum }')
if [ "$bytes" -gt "$most" ]; then
    echo "error: carry/ has $bytes bytes, $most are the most; leave out an archive" >&2
    exit 1
fi
echo "carry/: $(find carry -type f | wc -l) files, $((bytes >> 10)) KiB"
