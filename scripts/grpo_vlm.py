"""Learn from rewards of a vision-language model's own answers, compared in groups (GRPO and its family).

With no arguments: a built-in small model on questions about drawn shapes that it gets wrong (where, how many), about
three minutes on two cores.

    accelerate launch scripts/grpo_vlm.py
    accelerate launch scripts/grpo_vlm.py --config run.yaml --learning_rate 1e-6 --num_generations 16
    accelerate launch scripts/grpo_vlm.py --model_name_or_path Qwen/Qwen2.5-VL-3B-Instruct \\
        --dataset_name lmms-lab/multimodal-open-r1-8k-verified --reward_funcs accuracy_reward think_format_reward \\
        --use_peft --lora_r 16 --lora_target_modules q_proj v_proj --max_completion_length 1024 --output_dir out
    accelerate launch scripts/grpo_vlm.py --model_name_or_path HuggingFaceTB/SmolVLM2-2.2B-Instruct \\
        --dataset_name path/to/folder --reward_funcs "judge:http://127.0.0.1:8000|Qwen/Qwen2.5-VL-7B-Instruct" \\
        --freeze_vision_tower --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml --num_processes 8 scripts/grpo_vlm.py \\
        --model_name_or_path Qwen/Qwen2.5-VL-7B-Instruct --dataset_name lmms-lab/multimodal-open-r1-8k-verified \\
        --reward_funcs accuracy_reward --output_dir out

`trialign grpo-vlm` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("grpo-vlm", __doc__)
