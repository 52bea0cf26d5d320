"""Learn from rewards of a flow-matching model's own pictures, compared in groups (Flow-GRPO).

With no arguments: a built-in small model that often gives the drawn object another colour than the prompt names, about
five minutes of one core.

    accelerate launch scripts/flow_grpo.py
    accelerate launch scripts/flow_grpo.py --config run.yaml --sampler cps --window_size 2 --window random
    accelerate launch scripts/flow_grpo.py --model_name_or_path stabilityai/stable-diffusion-3.5-medium \\
        --dataset_name path/to/prompts.txt --reward_funcs ocr --num_inference_steps 10 --beta 0.04 --bf16 \\
        --use_peft --lora_r 32 --lora_alpha 64 --num_generations 24 --output_dir out
    accelerate launch scripts/flow_grpo.py --model_name_or_path black-forest-labs/FLUX.1-dev \\
        --dataset_name path/to/prompts.txt --reward_funcs pickscore hpsv2 --height 512 --width 512 \\
        --guidance_scale 3.5 --window_size 4 --window moving --solver dpm --gradient_checkpointing --bf16 \\
        --output_dir out
    accelerate launch --config_file shared/runtime/profiles/multi_gpu.yaml --num_processes 8 scripts/flow_grpo.py \\
        --model_name_or_path stabilityai/stable-diffusion-3.5-medium --dataset_name path/to/prompts.txt \\
        --reward_funcs hpsv2 --bf16 --output_dir out

`trialign flow-grpo` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("flow-grpo", __doc__)
