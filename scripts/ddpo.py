"""Learn from rewards of a diffusion model's own pictures, a denoising step as the action (DDPO).

With no arguments: a built-in small model that often gives the drawn object another colour than the prompt names, about
four minutes of one core.

    accelerate launch scripts/ddpo.py
    accelerate launch scripts/ddpo.py --config run.yaml --learning_rate 1e-4 --advantages prompt
    accelerate launch scripts/ddpo.py --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --dataset_name path/to/prompts.txt --reward_funcs "aesthetic:openai/clip-vit-large-patch14|path/to/head" \\
        --use_peft --lora_r 4 --per_device_train_batch_size 8 --gradient_accumulation_steps 4 --bf16 --output_dir out
    accelerate launch scripts/ddpo.py --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 \\
        --dataset_name path/to/prompts.txt --reward_funcs pickscore jpeg_compressibility_reward \\
        --reward_weights 1 0.01 --num_inference_steps 20 --window_size 4 --window random --solver dpm \\
        --gradient_checkpointing --bf16 --output_dir out
    accelerate launch scripts/ddpo.py --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 \\
        --dataset_name path/to/prompts.txt --reward_funcs "judge:http://127.0.0.1:8000|Qwen/Qwen2.5-VL-7B-Instruct" \\
        --async_reward_computation --generation_rows 8 --generation_batch_size 64 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/multi_gpu.yaml --num_processes 8 scripts/ddpo.py \\
        --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --dataset_name path/to/prompts.txt \\
        --reward_funcs hpsv2 --beta 0.01 --bf16 --output_dir out

`trialign ddpo` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("ddpo", __doc__)
