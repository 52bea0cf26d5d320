"""Learn from rewards of the model's own answers, compared in groups (GRPO and its family).

With no arguments: a built-in small model on built-in arithmetic, about three minutes on two cores.

    accelerate launch scripts/grpo.py
    accelerate launch scripts/grpo.py --config run.yaml --learning_rate 1e-6 --recipe dapo
    accelerate launch scripts/grpo.py --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \\
        --dataset_name path/to/rows.jsonl --reward_funcs my_rewards.brevity think_format_reward \\
        --reward_weights 1 0.2 --output_dir out
    accelerate launch scripts/grpo.py --model_name_or_path Qwen/Qwen2.5-1.5B-Instruct \\
        --dataset_name trl-lib/DeepMath-103K --reward_funcs accuracy_reward --use_peft --lora_r 16 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/grpo.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name trl-lib/DeepMath-103K \\
        --reward_funcs accuracy_reward --recipe gspo --max_completion_length 2048 --output_dir out

`trialign grpo` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("grpo", __doc__)
