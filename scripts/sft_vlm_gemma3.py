"""Fine-tune Gemma 3 on questions about one image or several.

With no arguments: a small built-in model of the Gemma 3 architecture on one picture and on two in a row, about two
minutes on two cores.

    accelerate launch scripts/sft_vlm_gemma3.py
    accelerate launch scripts/sft_vlm_gemma3.py --config run.yaml --learning_rate 1e-5
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml scripts/sft_vlm_gemma3.py \\
        --model_name_or_path google/gemma-3-4b-it --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \\
        --use_peft --lora_r 16 --lora_target_modules all-linear --dtype bfloat16 --output_dir out
    accelerate launch scripts/sft_vlm_gemma3.py --dataset_name path/to/MMIU --eval_fraction 0.05 \\
        --model_name_or_path google/gemma-3-4b-it --attn_implementation eager --freeze_vision_tower \\
        --use_peft --load_in_4bit --lora_target_modules all-linear --output_dir out
    accelerate launch scripts/sft_vlm_gemma3.py --dataset_name path/to/MMIU path/to/own.jsonl \\
        --model_name_or_path google/gemma-3-12b-it --image_splitting --max_length 8192 --output_dir out

Several images stand in a list `images` (or `input_image_path`), their places as `{"type": "image"}` parts or as
`<image>` in the text, so text and images may alternate. Rows of `question`, `context`, `options` and `output`, as in
MMIU, are read as they are; `--dataset_columns '{"theirs": "prompt"}'` names others. Each image takes 256 tokens, and
with `--image_splitting` (pan and scan) large ones are shown in crops too.

`trialign sft-vlm-gemma3` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("sft-vlm-gemma3", __doc__)
