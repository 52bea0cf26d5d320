"""Fine-tune on chosen answers and away from rejected ones, in one stage and without a reference (ORPO).

With no arguments: the built-in small model on built-in reviews, about two minutes on two cores.

    accelerate launch scripts/orpo.py
    accelerate launch scripts/orpo.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/orpo.py --dataset_name path/to/rows.jsonl \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --output_dir out
    accelerate launch scripts/orpo.py --dataset_name trl-lib/ultrafeedback_binarized --beta 0.1 \\
        --model_name_or_path Qwen/Qwen2.5-0.5B --use_peft --lora_r 16 --lora_alpha 32 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/orpo.py \\
        --model_name_or_path Qwen/Qwen2.5-7B --dataset_name trl-lib/ultrafeedback_binarized --output_dir out

`trialign orpo` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("orpo", __doc__)
