"""Learn which own answers are preferred to those of a mixture of model and reference (Nash-MD).

With no arguments: a built-in small model writes reviews of films, and so does its mixture with the reference; a reward
model that RewardTrainer trained says how likely the model's is to be preferred; a minute or two of one core.

    accelerate launch scripts/nash_md.py
    accelerate launch scripts/nash_md.py --config run.yaml --learning_rate 1e-6 --mixture_coef 0.25
    accelerate launch scripts/nash_md.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name path/to/prompts.jsonl --reward_funcs runs/reward_modeling --output_dir out
    accelerate launch scripts/nash_md.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft --lora_r 16 \\
        --dataset_name trl-lib/ultrafeedback-prompt --output_dir out \\
        --judge "judge:http://localhost:8000/v1|Qwen/Qwen3-8B"
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/nash_md.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name trl-lib/ultrafeedback-prompt \\
        --reward_funcs Skywork/Skywork-Reward-V2-Qwen3-0.6B --output_dir out

`trialign nash-md` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("nash-md", __doc__)
