"""Train a diffusion model on the gradient of a differentiable reward (AlignProp, DRaFT, ReFL).

With no arguments: a built-in small model that often gives the drawn object another colour than the prompt names, about
two minutes on two cores.

    accelerate launch scripts/alignprop.py
    accelerate launch scripts/alignprop.py --config run.yaml --learning_rate 1e-4 --backprop_strategy full
    accelerate launch scripts/alignprop.py --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --dataset_name path/to/prompts.txt --reward_funcs "aesthetic:openai/clip-vit-large-patch14|path/to/head" \\
        --use_peft --lora_r 4 --num_inference_steps 50 --gradient_checkpointing --output_dir out
    accelerate launch scripts/alignprop.py --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --dataset_name path/to/prompts.txt --reward_funcs pickscore --backprop_strategy draft_lv --output_dir out
    accelerate launch scripts/alignprop.py --model_name_or_path stabilityai/stable-diffusion-3.5-medium \\
        --dataset_name path/to/prompts.txt --reward_funcs hpsv2 colourfulness_reward --reward_weights 1 0.1 \\
        --backprop_strategy refl --num_inference_steps 28 --bf16 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/multi_gpu.yaml --num_processes 8 scripts/alignprop.py \\
        --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --dataset_name path/to/prompts.txt \\
        --reward_funcs clip --gradient_checkpointing --bf16 --output_dir out

`trialign alignprop` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("alignprop", __doc__)
