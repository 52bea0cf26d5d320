"""Summaries of posts by PPO: ppo.py, which summarises built-in posts where no model is named.

With no arguments: a built-in small model writes one-sentence summaries, rewarded by a rule that counts the facts they
get right; its critic is a head of its own. About two minutes on two cores.

    accelerate launch scripts/ppo_tldr.py
    accelerate launch scripts/ppo_tldr.py --config run.yaml --learning_rate 3e-6 --kl_coef 0.05
    accelerate launch scripts/ppo_tldr.py --model_name_or_path cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr \\
        --reward_model_path cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr --dataset_name trl-lib/tldr \\
        --response_length 53 --missing_eos_penalty 1.0 --output_dir out
    accelerate launch scripts/ppo_tldr.py --model_name_or_path cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr \\
        --reward_model_path cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr --dataset_name trl-lib/tldr \\
        --use_peft --lora_r 16 --value_model shared --response_length 53 --output_dir out
    accelerate launch --config_file shared/runtime/profiles/zero2.yaml --num_processes 8 scripts/ppo_tldr.py \\
        --model_name_or_path cleanrl/EleutherAI_pythia-1b-deduped__sft__tldr --dataset_name trl-lib/tldr \\
        --reward_model_path cleanrl/EleutherAI_pythia-1b-deduped__reward__tldr --output_dir out

`trialign ppo-tldr` is the same without the launcher's words; it starts one process for each GPU.
"""

from shared.runtime.run import run_script

if __name__ == "__main__":
    run_script("ppo-tldr", __doc__)
