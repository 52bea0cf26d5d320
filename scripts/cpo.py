"""Learn from pairs of a chosen and a rejected answer without a reference model (CPO, SimPO, AlphaPO).

With no arguments: the built-in small model on built-in reviews, about two minutes on two cores.

    accelerate launch scripts/cpo.py
    accelerate launch scripts/cpo.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/cpo.py --dataset_name path/to/rows.jsonl \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --output_dir out
    accelerate launch scripts/cpo.py --dataset_name trl-lib/ultrafeedback_binarized --loss_type simpo --cpo_alpha 0 \\
        --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --use_peft --lora_r 16 --lora_alpha 32 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/cpo.py \\
        --model_name_or_path Qwen/Qwen2.5-7B-Instruct --dataset_name trl-lib/ultrafeedback_binarized --output_dir out

`trialign cpo` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("cpo", __doc__)
