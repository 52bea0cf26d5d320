"""Fine-tune a language model on text, conversations, or prompts with completions.

With no arguments: the built-in small model on built-in arithmetic, about two minutes on two cores.

    accelerate launch scripts/sft.py
    accelerate launch scripts/sft.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/sft.py --dataset_name path/to/rows.jsonl \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --output_dir out
    accelerate launch scripts/sft.py --dataset_name trl-lib/Capybara --packing --learning_rate 2e-4 \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --use_peft --lora_r 16 --lora_alpha 32 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/sft.py \\
        --model_name_or_path Qwen/Qwen2.5-7B --dataset_name trl-lib/Capybara --output_dir out

`trialign sft` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("sft", __doc__)
