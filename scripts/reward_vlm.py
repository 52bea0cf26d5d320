"""Train a reward model of answers about images: it scores a chosen answer above a rejected one.

With no arguments: the built-in small model on pairs of descriptions of built-in pictures, about two minutes on two
cores.

    accelerate launch scripts/reward_vlm.py
    accelerate launch scripts/reward_vlm.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/reward_vlm.py --dataset_name path/to/folder \\
        --model_name_or_path HuggingFaceTB/SmolVLM-Instruct --freeze_vision_tower --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/reward_vlm.py \\
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name HuggingFaceH4/rlaif-v_formatted --use_peft \\
        --lora_r 16 --output_dir out

What is saved is a reward by its folder: `trialign grpo-vlm --reward_funcs out`. `trialign reward-vlm` is the same
without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("reward-vlm", __doc__)
