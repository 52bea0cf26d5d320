"""Summaries of posts by RLOO: rloo.py, which summarises built-in posts where no model is named.

With no arguments: a built-in small model writes one-sentence summaries, rewarded by a rule that counts the facts they
get right; about two minutes on two cores.

    accelerate launch scripts/rloo_tldr.py
    accelerate launch scripts/rloo_tldr.py --config run.yaml --learning_rate 3e-6 --beta 0.05
    accelerate launch scripts/rloo_tldr.py --model_name_or_path EleutherAI/pythia-1b-deduped \\
        --dataset_name trl-lib/tldr --reward_funcs path/to/reward_model --max_completion_length 53 --output_dir out
    accelerate launch scripts/rloo_tldr.py --model_name_or_path EleutherAI/pythia-1b-deduped --use_peft --lora_r 16 \\
        --dataset_name trl-lib/tldr --reward_funcs path/to/reward_model --max_completion_length 53 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero2.yaml --num_processes 8 scripts/rloo_tldr.py \\
        --model_name_or_path EleutherAI/pythia-1b-deduped --dataset_name trl-lib/tldr \\
        --reward_funcs path/to/reward_model --max_completion_length 53 --num_generations 4 --output_dir out

`trialign rloo-tldr` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("rloo-tldr", __doc__)
