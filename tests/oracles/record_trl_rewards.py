"""Records what trl's own reward functions give, for tests/rewards/test_reward_rules.py. trl is needed here alone.

    pip install trl==1.16.0 math-verify==0.9.0
    python tests/oracles/record_trl_rewards.py        # writes trl-rewards-1.16.0.json

Where trl differs from what the suite gives, and why: a completion that is nothing but the solution (`7` for `7`) is
wrong in trl, for it is no LaTeX; here it is right. No such completion is recorded.
"""

import json
from pathlib import Path

import trl
from trl import rewards

ANSWERS = [  # completion, solution
    (r"\boxed{\frac{1}{3}}", r"\frac{1}{3}"),
    (r"\boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    (r"My answer is \boxed{7}.", "7"),
    (r"\boxed{8}", "7"),
    (r"\boxed{7.0}", "7"),
    (r"\boxed{-7}", "-7"),
    (r"\boxed{007}", "7"),
    (r"\boxed{0.5}", "1/2"),
    (r"\boxed{1/2}", "0.5"),
    (r"\boxed{50\%}", "0.5"),
    (r"\boxed{50}%", "50"),
    (r"\boxed{50} percent", "50"),
    (r"\boxed{7 \text{ cm}}", "7"),
    (r"\boxed{3} or \boxed{7}", "7"),
    (r"$3$, so \boxed{7}", "7"),
    (r"\boxed{7", "7"),
    (r"\boxed{}", "7"),
    (r"\boxed{7}", "cat"),
    (r"\boxed{x}", "$x$"),
    (r"\boxed{2x + 1}", "$1 + 2x$"),
    (r"\boxed{(1, 2)}", "$(1, 2)$"),
    (r"\boxed{\{1, 2\}}", r"$\{2, 1\}$"),
    (r"\boxed{1000}", "1,000"),
    (r"\boxed{0.1234567}", "0.1234568"),
    (r"\boxed{0.123456}", "0.123457"),
    ("the answer is 7", "7"),
    ("$7$", "7"),
    ("", "7"),
    ("anything", "cat"),
    ("The final answer is $7$. I hope it is correct.", "The final answer is $7$."),
]
REASONED = [
    (r"<think> so </think> The answer is \boxed{\frac{1}{3}}", r"\frac{1}{3}"),
    (r"<think> so </think> The answer is \boxed{\frac{1}{2}}", r"\frac{1}{3}"),
    (r"<think> maybe \boxed{\frac{1}{3}}", r"\frac{1}{3}"),
    (r"<think> \boxed{3} </think> \boxed{4} </think> \boxed{7}", "7"),
    (r"<think> \boxed{7} </think> nothing", "7"),
    (r"</think>\boxed{7}", "cat"),
    (r"\boxed{7}", "cat"),
]
FORMATS = [
    "<think>\nso\n</think>\nanswer",
    "<think>so</think>",
    "<think>so\nanswer",
    "<think><think>so</think>answer",
    "<think>so</think> <think>again</think>",
    " <think>so</think> answer",
    "so</think> answer",
    "<think></think>answer\nmore",
    "<think>so</think></think>answer",
    "answer\n<think>so</think>",
    "",
]
IDS = [[], [1], [1, 2], [1, 2, 3, 4], [5, 5, 5, 5, 5], [1, 2, 1, 2, 1, 2], [7] * 50, list(range(80)), [1] * 90,
       [1] * 100, [1] * 101, [3, 4] * 60]  # fmt: skip


def chat(texts):
    return [[{"role": "assistant", "content": text}] for text in texts]


def main():
    right, wrong = r"\boxed{7}", r"\boxed{8}"
    record = {
        "accuracy": {"pairs": ANSWERS, "values": rewards.accuracy_reward(*columns(ANSWERS))},
        "reasoning": {"pairs": REASONED, "values": rewards.reasoning_accuracy_reward(*columns(REASONED))},
        "format": {"texts": FORMATS, "values": rewards.think_format_reward(chat(FORMATS))},
        "ids": IDS,
        "repetition": [
            {"options": options, "values": rewards.get_repetition_penalty_reward(**options)(IDS)}
            for options in ({}, {"ngram_size": 1}, {"ngram_size": 2, "max_penalty": -0.5})
        ],
        "overlong": [
            {"options": options, "values": rewards.get_soft_overlong_punishment(**options)(IDS)}
            for options in (
                {"max_completion_len": 100, "soft_punish_cache": 20},
                {"max_completion_len": 90, "soft_punish_cache": 0},
                {"max_completion_len": 50, "soft_punish_cache": 50},
            )
        ],
        "cosine": [
            {
                "options": options,
                "completion": completion,
                "solution": solution,
                "values": rewards.get_cosine_scaled_reward(**options)(
                    chat([completion] * len(IDS)), [solution] * len(IDS), IDS
                ),
            }
            for options in (
                {"max_len": 100},
                {"max_len": 60, "min_value_wrong": -10.0, "max_value_wrong": -5.0, "min_value_correct": 0.1,
                 "max_value_correct": 2.0},
            )
            for completion, solution in ((right, "7"), (wrong, "7"), (right, "cat"))
        ],
    }  # fmt: skip
    path = Path(__file__).with_name(f"trl-rewards-{trl.__version__}.json")
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def columns(pairs):
    return chat([completion for completion, _ in pairs]), [solution for _, solution in pairs]


if __name__ == "__main__":
    main()
