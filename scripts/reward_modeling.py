"""Train a reward model: a sequence classifier that scores a chosen answer above a rejected one.

With no arguments: the built-in small model on built-in reviews, about two minutes on two cores.

    accelerate launch scripts/reward_modeling.py
    accelerate launch scripts/reward_modeling.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/reward_modeling.py --dataset_name path/to/rows.jsonl \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir out
    accelerate launch scripts/reward_modeling.py --dataset_name trl-lib/ultrafeedback_binarized --output_dir out \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --center_rewards_coefficient 0.01 --use_peft --lora_r 16
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/reward_modeling.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name trl-lib/ultrafeedback_binarized --output_dir out

`trialign reward` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("reward", __doc__)
