"""Train a process reward model: a token classifier that says after each step whether it is right.

With no arguments: the built-in small model on built-in calculations, about two minutes on two cores.

    accelerate launch scripts/prm.py
    accelerate launch scripts/prm.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/prm.py --dataset_name path/to/rows.jsonl \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir out
    accelerate launch scripts/prm.py --dataset_name trl-lib/math_shepherd --learning_rate 1e-5 \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft --lora_r 16 --lora_alpha 32 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/prm.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name trl-lib/math_shepherd --output_dir out

`trialign prm` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("prm", __doc__)
