"""Learn from rewards of the model's own answers, each against the others of its prompt (RLOO).

With no arguments: a built-in small model writes reviews of films, and a reward model that RewardTrainer trained likes
them or not; about two minutes on two cores.

    accelerate launch scripts/rloo.py
    accelerate launch scripts/rloo.py --config run.yaml --learning_rate 1e-6 --num_generations 8
    accelerate launch scripts/rloo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name path/to/prompts.jsonl --reward_funcs runs/reward_modeling --output_dir out
    accelerate launch scripts/rloo.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft --lora_r 16 \\
        --dataset_name trl-lib/ultrafeedback-prompt --output_dir out \\
        --reward_funcs Skywork/Skywork-Reward-V2-Qwen3-0.6B
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/rloo.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name trl-lib/ultrafeedback-prompt \\
        --reward_funcs Skywork/Skywork-Reward-V2-Qwen3-0.6B --output_dir out

`trialign rloo` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("rloo", __doc__)
