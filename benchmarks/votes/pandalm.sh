#!/usr/bin/env bash
# Three people's votes into a store, prepared by majority and by skill, and a reward model (stories260K, whole weights)
# trained on each at two seeds.
#   RLHF_DATA=FOLDER benchmarks/votes/pandalm.sh        writes runs/pandalm (or $PANDALM_RUNS); finished runs are kept
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${RLHF_DATA:?set RLHF_DATA to the folder with models/stories260K and pref_pandalm_human.jsonl}"
[ ! -d .venv/bin ] || PATH=$PWD/.venv/bin:$PATH
export PATH OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
RUNS=${PANDALM_RUNS:-runs/pandalm}
mkdir -p "$RUNS"

[ -s "$RUNS/skill.jsonl" ] || python -m benchmarks.votes.pandalm import "$RUNS" | tee "$RUNS/import.txt"
for seed in 0 1; do
  for labels in majority skill; do
    run=$RUNS/$labels-seed$seed
    grep -qs '"finished": "' "$run/result.json" && continue
    echo "$run begins"
    python launch/reward.py --model_name_or_path "$RLHF_DATA/models/stories260K" --data "$RUNS/$labels.jsonl" \
      --output_dir "$run" --overwrite_output_dir true --seed "$seed" --validation_fraction 0.1 --test_fraction 0.25 \
      --max_prompt_length 192 --max_response_length 320 --use_peft false --learning_rate 1e-3 --num_train_epochs 2 \
      --per_device_train_batch_size 8 --center_rewards_coefficient 0 --logging_steps 25 >"$run.txt" 2>&1 ||
      { tail -n 20 "$run.txt" >&2 && exit 1; }
  done
done
python -m benchmarks.votes.pandalm report "$RUNS" | tee "$RUNS/report.txt"
