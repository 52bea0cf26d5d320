"""Learn from rewards of the model's own answers with a value function that judges each token (PPO).

With no arguments: a built-in small model writes reviews of films, and learns to write what a reward model that
RewardTrainer trained likes; about two minutes on two cores.

    accelerate launch scripts/ppo.py
    accelerate launch scripts/ppo.py --config run.yaml --learning_rate 3e-6 --num_ppo_epochs 4 --kl_coef 0.05
    accelerate launch scripts/ppo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name path/to/prompts.jsonl --reward_model_path runs/reward_modeling --output_dir out
    accelerate launch scripts/ppo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft --lora_r 16 \\
        --value_model adapter --dataset_name trl-lib/ultrafeedback-prompt --output_dir out \\
        --reward_funcs Skywork/Skywork-Reward-V2-Qwen3-0.6B
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/ppo.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name trl-lib/ultrafeedback-prompt \\
        --reward_model_path Skywork/Skywork-Reward-V2-Qwen3-0.6B --output_dir out

`trialign ppo` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("ppo", __doc__)
