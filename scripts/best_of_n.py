"""Sample several answers to each held-out prompt and keep the best by a reward (best of n): nothing is trained.

With no arguments: a built-in small model writes reviews of films, and a reward model chooses among 1, 2, 4, 8 and 16
of them; under a minute on two cores. The table tells the mean reward for each n, that of the rule that judges reviews
beside it, and how far best of n is from the model, as a KL divergence (log n - (n - 1) / n, an upper bound).

    python scripts/best_of_n.py
    python scripts/best_of_n.py --config run.yaml --sample_size 64 --temperature 0.8
    python scripts/best_of_n.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct \\
        --dataset_name trl-lib/ultrafeedback-prompt --max_rows 200 --sample_size 16 --n_candidates 4 \\
        --reward_funcs Skywork/Skywork-Reward-V2-Qwen3-0.6B --output_file best.jsonl
    python scripts/best_of_n.py --model_name_or_path lvwerra/gpt2-imdb --dataset_name path/to/prompts.jsonl \\
        --reward_funcs sentiment-analysis:lvwerra/distilbert-imdb:POSITIVE --max_new_tokens 32

The output file has rows of `prompt` and `completion`, which scripts/sft.py trains on.
"""

from shared.runtime.command import run_command
from textalign.best_of_n_run import main

if __name__ == "__main__":
    run_command(lambda: main(description=__doc__))
