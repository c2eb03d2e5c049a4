#!/usr/bin/env bash
# PPO by the recipe of arXiv 2403.17031 on the sandbox, one run for each seed, then its table.
#   benchmarks/experiments/ppo_recipe.sh 0 1 2 3 4
# Needs runs/quickstart (make quickstart): its SFT policy, reward model and pairs. The seeds are PPO's own; these three
# stay. A run that is done is not made again, one that was cut off goes on.
set -euo pipefail
cd "$(dirname "$0")/../.."
out=${OUT:-runs/recipe}
for seed in "$@"; do
  .venv/bin/python launch/ppo.py --config benchmarks/experiments/ppo_recipe.yaml --seed "$seed" --output_dir "$out/seed-$seed"
done
.venv/bin/python -m benchmarks.experiments.ppo_recipe "$out"/seed-*
