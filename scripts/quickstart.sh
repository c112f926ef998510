#!/usr/bin/env bash
# On a fresh machine with Python 3.10 and pip: trains a KernelWarehouse network and its static twin on real handwritten
# digits by the same recipe, evaluates both from their checkpoints, and compares them in a table and a picture.
# Takes under four minutes on two CPU cores after the installation. Options of main.py are passed on.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup_env.sh

# Layers this small gain nothing from threads, and lose much when one waits for a busy core.
export OMP_NUM_THREADS=1
python=.venv/bin/python
output=output/quickstart
rm -rf "$output"
for name in resnet18 kw1x_resnet18; do
    run="$output/$name"
    $python main.py --kw_config "configs/quickstart/$name.json" --output_dir "$run" "$@"
    checkpoint=$(ls -t "$run"/checkpoint-[0-9]*.pth | head -n 1)
    $python main.py --kw_config "$run/config.json" --eval true --resume "$checkpoint"
done
$python scripts/compare_runs.py "$output"/*/
$python scripts/plot_run.py "$output"/*/ --output "$output/curves.png"
