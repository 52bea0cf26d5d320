"""Learn from rewards of a diffusion pipeline's own pictures, by their clean latents alone (DiffusionNFT).

With no arguments: a built-in small flow-matching pipeline learns to give shapes the colour that the prompt names,
about five minutes of one core.

    accelerate launch scripts/diffusion_nft.py
    accelerate launch scripts/diffusion_nft.py --config run.yaml --learning_rate 1e-4
    accelerate launch scripts/diffusion_nft.py --dataset_name prompts.txt --reward_funcs pickscore \\
        --model_name_or_path stabilityai/stable-diffusion-3.5-medium --use_peft --lora_r 32 --output_dir out
    accelerate launch --num_processes 8 scripts/diffusion_nft.py --dataset_name prompts.txt --reward_funcs hpsv2 \\
        --model_name_or_path black-forest-labs/FLUX.1-dev --guidance_scale 3.5 --nft_beta 0.1 --output_dir out

`trialign diffusion-nft` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("diffusion-nft", __doc__)
