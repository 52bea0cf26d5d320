"""Learn from pairs of a preferred and another picture for a prompt, against a reference model (Diffusion-DPO).

With no arguments: a built-in small pipeline that gives shapes the wrong colour, on built-in pairs, about two minutes
on two cores.

    accelerate launch scripts/diffusion_dpo.py
    accelerate launch scripts/diffusion_dpo.py --config run.yaml --learning_rate 1e-4
    accelerate launch scripts/diffusion_dpo.py --dataset_name path/to/folder \\
        --model_name_or_path stable-diffusion-v1-5/stable-diffusion-v1-5 --height 512 --width 512 --output_dir out
    accelerate launch --num_processes 8 scripts/diffusion_dpo.py --dataset_name yuvalkirstain/pickapic_v2 \\
        --model_name_or_path stabilityai/stable-diffusion-xl-base-1.0 --use_peft --lora_r 32 --precompute_latents \\
        --reward_funcs pickscore --output_dir out
    accelerate launch scripts/diffusion_dpo.py --dataset_name path/to/folder --timestep_sampling logit_normal \\
        --model_name_or_path stabilityai/stable-diffusion-3.5-medium --beta 2000 --output_dir out

`trialign diffusion-dpo` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("diffusion-dpo", __doc__)
