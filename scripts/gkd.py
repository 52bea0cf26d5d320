"""Distil a larger model into a smaller one, on the data's answers and on the smaller one's own (GKD).

With no arguments: a built-in small model without its last layer learns from the whole one, on built-in arithmetic,
about two minutes on two cores.

    accelerate launch scripts/gkd.py
    accelerate launch scripts/gkd.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/gkd.py --dataset_name path/to/rows.jsonl \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct --output_dir out
    accelerate launch scripts/gkd.py --dataset_name trl-lib/chatbot_arena_completions --lmbda 1 --beta 1 \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --teacher_model_name_or_path Qwen/Qwen2.5-7B-Instruct \\
        --teacher_load_in_4bit --use_peft --lora_r 16 --lora_alpha 32 --learning_rate 2e-4 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/gkd.py \\
        --model_name_or_path Qwen/Qwen2.5-3B-Instruct --teacher_model_name_or_path Qwen/Qwen2.5-32B-Instruct \\
        --dataset_name trl-lib/chatbot_arena_completions --output_dir out

`trialign gkd` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("gkd", __doc__)
