#!/usr/bin/env bash
# SFT, reward model, DPO and PPO on a real model (260,032 parameters) and real data, through the real doors.
#   RLHF_DATA=FOLDER benchmarks/real/data_sets.sh [polite|voice] ...     both without a name; finished runs are kept
# Writes runs/real/{polite,voice}/: yardstick, sft, reward, referee, dpo, ppo, report. Two programs run at a time, on one
# core each. REAL_RUNS=FOLDER writes elsewhere.
set -euo pipefail
cd "$(dirname "$0")/../.."
: "${RLHF_DATA:?set RLHF_DATA to the folder with models/stories260K and the .jsonl files}"
for name in "$@"; do
  case $name in polite | voice) ;; *) echo "unknown data '$name', expected polite or voice" >&2 && exit 2 ;; esac
done
[ ! -d .venv/bin ] || PATH=$PWD/.venv/bin:$PATH
export PATH OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_DISABLE_TELEMETRY=1
BASE=$RLHF_DATA/models/stories260K
RUNS=${REAL_RUNS:-runs/real}

finished() { grep -qs '"finished": "' "$1/result.json"; }

door() { # door PROGRAM RUN PORT [--option value ...]
  local program=$1 run=$2 port=$3
  shift 3
  if finished "$run"; then echo "$run: finished before, kept" && return; fi
  mkdir -p "$run"
  echo "$run: begins, log in $run/log.txt"
  local began=$SECONDS
  if ! deepspeed --num_accelerators 1 --master_port "$port" "launch/$program.py" --output_dir "$run" \
    --overwrite_output_dir true --deepspeed zero0 "$@" >"$run/log.txt" 2>&1; then
    tail -n 20 "$run/log.txt" >&2
    return 1
  fi
  grep -h "^$program: done" "$run/log.txt" | sed "s|^|($((SECONDS - began)) s) |"
}

pipeline() { # pipeline NAME SFT-DATA PAIRS MAX_PROMPT MAX_RESPONSE SAMPLES_PER_PROMPT
  local run=$RUNS/$1 sft_data=$RLHF_DATA/$2 pairs=$RLHF_DATA/$3
  local splits=(--validation_fraction 0.1 --test_fraction 0.15)
  local limits=(--max_prompt_length "$4" --max_response_length "$5")
  local common=("${splits[@]}" "${limits[@]}" --on_error skip --logging_steps 25)
  local whole=(--use_peft false --learning_rate 1e-3 --num_train_epochs 5 --center_rewards_coefficient 0)
  local lora=(--lora_r 32 --lora_alpha 64)

  # the referee learns from the other half of the groups, from the base, with another seed: no method ever sees it
  door reward "$run/referee" 29601 --model_name_or_path "$BASE" --data "$pairs" "${common[@]}" "${whole[@]}" \
    --half b --seed 1 --per_device_train_batch_size 8 &
  local other=$!
  door sft "$run/sft" 29602 --model_name_or_path "$BASE" --data "$sft_data" "${common[@]}" --use_peft false \
    --learning_rate 2e-3 --num_train_epochs 4 --warmup_steps 10 --per_device_train_batch_size 16
  wait $other

  { # the yardstick's recipe, on all training groups; beside it, DPO
    door reward "$run/yardstick" 29603 --model_name_or_path "$BASE" --data "$pairs" "${common[@]}" "${whole[@]}" \
      --validation_fraction 0 --per_device_train_batch_size 8
    door dpo "$run/dpo" 29605 --model_name_or_path "$run/sft" --data "$pairs" "${common[@]}" "${lora[@]}" --half a \
      --learning_rate 3e-4 --beta 0.3 --num_train_epochs 2 --warmup_steps 5 --per_device_train_batch_size 16
  } &
  other=$!
  door reward "$run/reward" 29604 --model_name_or_path "$run/sft" --data "$pairs" "${common[@]}" "${lora[@]}" --half a \
    --learning_rate 3e-3 --num_train_epochs 5 --per_device_train_batch_size 16
  door ppo "$run/ppo" 29606 --model_name_or_path "$run/sft" --data "$pairs" "${common[@]}" "${lora[@]}" --half a \
    --reward "[{model: $run/reward}]" --total_episodes 2048 --rollout_batch_size 128 --generation_batch_size 128 \
    --num_ppo_epochs 2 --num_mini_batches 2 --per_device_train_batch_size 64 --learning_rate 1e-3 \
    --value_learning_rate 4e-3 --kl_coef 0.1 --missing_eos_score -3 --logging_steps 1
  wait $other

  if [ ! -s "$run/report/report.json" ]; then
    rlhf compare "$run/sft" "$run/dpo" "$run/ppo" --prompts "$pairs" --referee "[{model: $run/referee}]" \
      "${splits[@]}" "${limits[@]}" --samples_per_prompt "$6" --batch_size 128 --output_dir "$run/report" \
      >"$run/compare.txt" 2>"$run/compare.log" || { tail -n 20 "$run/compare.log" >&2 && return 1; }
  fi
}

[ $# -gt 0 ] || set -- polite voice
for name in "$@"; do
  if [ "$name" = polite ]; then
    pipeline polite sft_rasbt_instruct.jsonl pref_rasbt_polite.jsonl 128 192 2
  else
    pipeline voice sft_voice_professional.jsonl pref_voice_professional_over_witty.jsonl 96 128 1
  fi
done
for name in "$@"; do
  echo && echo "== $name" && cat "$RUNS/$name/compare.txt" && python -m benchmarks.real.data_sets "$name" "$RUNS/$name"
done
