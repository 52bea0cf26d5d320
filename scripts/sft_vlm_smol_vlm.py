"""Fine-tune SmolVLM on questions about one image or several.

With no arguments: a small built-in model of the SmolVLM architecture on one picture and on two in a row, about two
minutes on two cores. For speed its pictures are shown whole (`image_splitting: false`).

    accelerate launch scripts/sft_vlm_smol_vlm.py
    accelerate launch scripts/sft_vlm_smol_vlm.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/sft_vlm_smol_vlm.py --model_name_or_path HuggingFaceTB/SmolVLM-Instruct \\
        --dataset_name HuggingFaceM4/the_cauldron --dataset_config ai2d --eval_fraction 0.02 \\
        --image_longest_edge 1152 --use_peft --lora_target_modules all-linear --dtype bfloat16 --output_dir out
    accelerate launch scripts/sft_vlm_smol_vlm.py --model_name_or_path HuggingFaceTB/SmolVLM-256M-Instruct \\
        --dataset_name path/to/folder --image_splitting false --freeze_vision_tower --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml scripts/sft_vlm_smol_vlm.py \\
        --model_name_or_path HuggingFaceTB/SmolVLM2-2.2B-Instruct --dataset_name HuggingFaceM4/ChartQA \\
        --image_longest_edge 768 --processor_kwargs '{"resample": 2}' --output_dir out

Each image is enlarged or made smaller until its longer edge has `--image_longest_edge` pixels, cut into pieces (of 384
pixels in SmolVLM-Instruct, of 512 in the smaller ones) and shown as a whole besides; a piece takes 64 to 81 tokens.
`--image_splitting false` shows the whole alone: a tenth of the tokens and of the time, for less detail. The columns
`texts` of the_cauldron, and `query` with `label` of ChartQA, are read as they are.

`trialign sft-vlm-smol` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("sft-vlm-smol", __doc__)
