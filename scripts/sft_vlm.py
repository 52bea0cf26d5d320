"""Fine-tune a vision-language model on questions and answers about images.

With no arguments: the built-in small model on the built-in shapes and digits, about two minutes on two cores.

    accelerate launch scripts/sft_vlm.py
    accelerate launch scripts/sft_vlm.py --dataset_name path/to/folder
    accelerate launch scripts/sft_vlm.py --config run.yaml --learning_rate 1e-5
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml scripts/sft_vlm.py \\
        --model_name_or_path HuggingFaceTB/SmolVLM-Instruct --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \\
        --use_peft --lora_r 16 --lora_target_modules all-linear --load_in_4bit --dtype bfloat16 --output_dir out

`trialign sft-vlm` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("sft-vlm", __doc__)
