"""A few rollouts of PPO in a tiny run, alone or as one of several ranks; what each saw goes to a
file.

deepspeed --num_accelerators 2 --no_local_rank tests/launch/ranks.py BASE SFT REWARDS OUT STAGE [HOW]

REWARDS are the folders of an ensemble, with commas between them. HOW is "packed", or "layers" where
ZeRO-3 is to fetch layer by layer what would fit as a whole.
"""

import json
import sys
from pathlib import Path

sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)

STEPS = 4


def rollouts(
    base: str, sft: str, rewards: list[str], world, stage: str | None, how: str | None = None
) -> dict:
    """Responses and metrics of each step, how often the parameters were gathered, and the saved
    files' tensors. how: "packed" is on a base in 4 bits, with moments in 8.
    """
    import tempfile

    import torch

    from reward.ensemble import ensemble_scorer
    from rlhf.data.records import Prompt
    from rlhf.model.adapters import lora_config
    from rlhf.model.loading import load_model
    from rlhf.options.ppo import PPOConfig
    from rlhf.ppo.batches import TrainingData
    from rlhf.ppo.rollout import role_scorer
    from rlhf.ppo.trainer import PPOTrainer
    from rlhf.ranks import divided
    from rlhf.ranks.deepspeed_config import read_deepspeed_config
    from rlhf.roles.one_base import Roles

    packed = how == "packed"
    if how == "layers":
        divided.SHARE_OF_FREE_MEMORY = 0.0
    options = PPOConfig(
        model_name_or_path="x", data=["x"], output_dir="x", reward=[{"model": "x"}], rollout_batch_size=7,
        total_episodes=7 * STEPS, per_device_train_batch_size=3, num_ppo_epochs=2, num_mini_batches=2,
        max_response_length=6, learning_rate=1e-2, missing_eos_score=None,
        optim="adamw_8bit" if packed else "adamw",
    )  # fmt: skip
    texts = ("one", "three", "seventeen", "a", "of it", "many things", "yes", "no")
    prompts = [
        {
            "prompt_ids": [5 + ord(c) % 200 for c in t],
            "record": Prompt(prompt=[{"role": "user", "content": t}]),
        }
        for t in texts
    ]
    torch.manual_seed(0)
    config = read_deepspeed_config(stage, world, options if packed else None)
    zero = config if config and config["zero_optimization"]["stage"] == 3 else None
    # a tiny model would not be cut into parts at all
    if zero:
        zero["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    initial = load_model(sft, quantization="nf4" if packed else None, zero=zero)
    roles = Roles(initial, lora_config(r=4), rewards[0], more_rewards=rewards[1:])

    # ranks make one pass of each member, and two
    pad_id = initial.tokenizer.pad_token_id
    members = {
        role: role_scorer(roles, pad_id, 3, role=role) for role in roles.reward_roles.values()
    }
    scorer = ensemble_scorer(members, "uncertainty")
    stops = [initial.tokenizer.eos_token_id, *range(3, 320, 9)]
    data = TrainingData(prompts, initial.tokenizer, stops)
    trainer = PPOTrainer(options, roles, scorer, data, world, deepspeed_config=config)
    gathers = []
    readable = trainer.learner.readable
    trainer.learner.readable = lambda: (gathers.append(1), readable())[1]
    seen = []
    for step in range(STEPS):
        metrics, rollout = trainer.step(step)
        kept = {k: v for k, v in metrics.items() if not k.startswith("time/")}
        seen.append(
            {"metrics": kept, "responses": rollout.samples.response_ids, "gathers": len(gathers)}
        )
    episodes = int(world.sum(trainer.budget.episodes))
    with tempfile.TemporaryDirectory() as folder:
        roles.save(folder, initial, writes=world.is_main)
        shapes = {
            str(p.relative_to(folder)): shapes_in(p)
            for p in sorted(Path(folder).rglob("*.safetensors"))
        }
    return {"steps": seen, "episodes": episodes, "shapes": shapes}


def shapes_in(path: Path) -> dict[str, list[int]]:
    from safetensors.torch import load_file

    return {name: list(tensor.shape) for name, tensor in load_file(path).items()}


def equal_tokens(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of tokens at which two sets of responses are the same."""
    pairs = [
        (a, b)
        for one, other in zip(ours, theirs, strict=True)
        for a, b in zip(one, other, strict=False)
    ]
    return sum(a == b for a, b in pairs) / max(sum(map(len, ours)), sum(map(len, theirs)))


if __name__ == "__main__":
    from rlhf.ranks.distributed import start
    from rlhf.startup import silence_libraries

    silence_libraries()
    here = start()
    base, sft, rewards, out, stage = sys.argv[1:6]
    result = rollouts(base, sft, rewards.split(","), here, stage, *sys.argv[6:])
    if here.is_main:
        Path(out).write_text(json.dumps(result))
    here.barrier()
    here.stop_watching()
