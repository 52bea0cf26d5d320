"""Fine-tune a vision-language model on questions and answers about videos.

With no arguments: the built-in small video model on built-in clips of moving shapes, about two minutes on two cores.
Frames are decoded in data workers, ahead of the step; `--video_cache` keeps them on disk.

    accelerate launch scripts/sft_video_llm.py
    accelerate launch scripts/sft_video_llm.py --dataset_name path/to/folder --video_num_frames 8 --video_cache
    accelerate launch scripts/sft_video_llm.py --config run.yaml --learning_rate 1e-5
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml scripts/sft_video_llm.py \\
        --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct --dataset_name path/to/folder --video_fps 2 \\
        --video_max_frames 64 --video_max_pixels 200704 --use_peft --lora_r 16 --lora_target_modules all-linear \\
        --dtype bfloat16 --video_cache --dataloader_num_workers 8 --output_dir out

`trialign sft-video` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("sft-video", __doc__)
