"""Fine-tune Gemma 3, whose chat template ends a turn with a token of its own.

With no arguments: a small built-in model of the Gemma 3 architecture on built-in data, about two minutes on two cores.

    accelerate launch scripts/sft_gemma3.py
    accelerate launch scripts/sft_gemma3.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/sft_gemma3.py --dataset_name path/to/rows.jsonl \\
        --model_name_or_path google/gemma-3-1b-it --eos_token '<end_of_turn>' --output_dir out
    accelerate launch scripts/sft_gemma3.py --dataset_name trl-lib/Capybara --eos_token '<end_of_turn>' \\
        --model_name_or_path google/gemma-3-1b-it --use_peft --lora_r 16 --lora_alpha 32 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/sft_gemma3.py \\
        --model_name_or_path google/gemma-3-27b-it --eos_token '<end_of_turn>' --dataset_name trl-lib/Capybara

`trialign sft-gemma3` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("sft-gemma3", __doc__)
