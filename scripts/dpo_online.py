"""Learn from pairs of the model's own answers, of which rewards or a judge prefer one (online DPO).

With no arguments: a built-in small model writes reviews of films, two of each, and a reward model that RewardTrainer
trained says which is better; a minute or two of one core.

    accelerate launch scripts/dpo_online.py
    accelerate launch scripts/dpo_online.py --config run.yaml --learning_rate 1e-6 --loss_type ipo
    accelerate launch scripts/dpo_online.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name path/to/prompts.jsonl --reward_funcs runs/reward_modeling --output_dir out
    accelerate launch scripts/dpo_online.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft --lora_r 16 \\
        --dataset_name trl-lib/ultrafeedback-prompt --output_dir out \\
        --judge "judge:http://localhost:8000/v1|Qwen/Qwen3-8B"
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/dpo_online.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name trl-lib/ultrafeedback-prompt \\
        --reward_funcs Skywork/Skywork-Reward-V2-Qwen3-0.6B --output_dir out

`trialign online-dpo` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("online-dpo", __doc__)
