"""From a language model to an assistant that people prefer, in three stages on one data set (StackLLaMA).

1. `sft`: the model learns to write as the better answers are written (SFTTrainer);
2. `reward`: a score is learnt from pairs of a better and a worse answer (RewardTrainer);
3. `rl`: the model learns from its own answers by that score (PPOTrainer).

Each stage trains LoRA adapters. That of the first is merged into its base, which the two others start from; in the
third stage the policy, its critic and the reward model are adapters on that one base (`adapter:reward`), so that one
base is in memory. At last the policy's adapter is merged too. A table tells what each stage reached on held-out rows.

With no arguments a built-in small model learns to write reviews of films: some four minutes of one core.

    python scripts/stack_llama.py
    python scripts/stack_llama.py --stages rl
    python scripts/stack_llama.py --recipes scripts/stack_llama --output_dir runs/stack_llama_7b

`scripts/stack_llama/` has the options for huggyllama/llama-7b and lvwerra/stack-exchange-paired, as in the original
(https://huggingface.co/blog/stackllama), on 8 GPUs: copy the three files, change them, and name their folder. The
stages are runs of `trialign` in the output folder, and their paths are in it; by hand they are

    mkdir -p runs/stack_llama && cd runs/stack_llama
    trialign sft --config ../../scripts/stack_llama/sft.yaml
    python -c "from shared.runtime.adapters import merge_adapter as merge; merge('sft', 'sft-merged')"
    trialign reward --config ../../scripts/stack_llama/reward.yaml
    trialign ppo --config ../../scripts/stack_llama/rl.yaml
    python -c "from shared.runtime.adapters import merge_adapter as merge; merge('rl', 'final')"
"""

from shared.runtime.command import run_command
from textalign.stack_llama_run import main

if __name__ == "__main__":
    run_command(lambda: main(description=__doc__))
