"""Teach a language model to be less rude, by PPO: a classifier of toxic text is the reward.

With no arguments: a built-in small model that writes comments, most of them rude in mild words, and a small
classifier; about a minute on two cores. Held-out openings are continued before, during and after: the log has the mean
toxicity of sampled comments, by the classifier that is learnt from and, as `rude_reward`, by a list of words that is
not, and the share of comments that are whole sentences still.

    accelerate launch scripts/detoxification.py
    accelerate launch scripts/detoxification.py --config run.yaml --learning_rate 1e-5
    accelerate launch scripts/detoxification.py --model_name_or_path EleutherAI/gpt-neo-125m \\
        --dataset_name allenai/real-toxicity-prompts --dataset_columns '{"prompt.text": "prompt"}' \\
        --eval_fraction 0.01 --reward_funcs \\
        "text-classification:facebook/roberta-hate-speech-dynabench-r4-target:nothate|output=logit" \\
        --per_device_train_batch_size 64 --max_completion_length 30 --learning_rate 1.47e-5 --output_dir out
    accelerate launch scripts/detoxification.py --model_name_or_path EleutherAI/gpt-j-6b --use_peft --dtype bfloat16 \\
        --dataset_name path/to/toxic_prompts.jsonl --max_completion_length 30 --output_dir out \\
        --reward_funcs "text-classification:facebook/roberta-hate-speech-dynabench-r4-target:nothate|output=logit"
    accelerate launch --config_file shared/runtime/profiles/zero2.yaml --num_processes 8 scripts/detoxification.py \\
        --config run.yaml

The text that is scored is prompt and continuation together. `trialign detoxification` is the same without the
launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("detoxification", __doc__)
