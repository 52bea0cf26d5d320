"""Learn from pairs of a chosen and a rejected answer about images, against a reference model (DPO, MPO, mDPO, …).

With no arguments: a built-in small model that names shapes which are not in the picture, on built-in pairs, about two
minutes on two cores.

    accelerate launch scripts/dpo_vlm.py
    accelerate launch scripts/dpo_vlm.py --config run.yaml --learning_rate 1e-6
    accelerate launch scripts/dpo_vlm.py --dataset_name path/to/folder \\
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --max_pixels 501760 --output_dir out
    accelerate launch scripts/dpo_vlm.py --dataset_name HuggingFaceH4/rlaif-v_formatted \\
        --model_name_or_path HuggingFaceTB/SmolVLM-Instruct --use_peft --lora_r 16 --lora_alpha 32 \\
        --loss_type sigmoid bco_pair sft --loss_weights 0.8 0.2 1.0 --output_dir out
    accelerate launch scripts/dpo_vlm.py --dataset_name HuggingFaceH4/rlaif-v_formatted \\
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --image_loss_weight 1 --anchor_loss_weight 1 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/dpo_vlm.py \\
        --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --dataset_name HuggingFaceH4/rlaif-v_formatted \\
        --precompute_ref_log_probs --output_dir out

`trialign dpo-vlm` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("dpo-vlm", __doc__)
