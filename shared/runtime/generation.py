"""Answers from a model in this process, by transformers' own generate; greedy, for evaluation."""

from __future__ import annotations

from typing import Any

import torch


def greedy_answers(model: Any, inputs: dict[str, Any], tokenizer: Any, *, max_new_tokens: int) -> list[str]:
    """The most likely continuation of each prompt, as text without special tokens.

    Args:
        model: a transformers model that generates, or a PEFT model around one.
        inputs: left-padded `input_ids` `(B, L)`, `attention_mask`, and whatever else the model takes.
        tokenizer: decodes; its end-of-sequence token ends an answer, besides those of the model.
        max_new_tokens: the longest answer, in tokens.
    """
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    with torch.no_grad():
        tokens = model.generate(
            **inputs,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            max_new_tokens=max_new_tokens,
            use_cache=True,
            eos_token_id=sorted(end for end in ends if end is not None),
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
