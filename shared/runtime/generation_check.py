"""Whether the decoding loop gives a model's own logits, asked once before it is used.

The tokens are those of transformers' own `generate`, so that a near tie between two does not look like a fault.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.runtime.generation_loop import DIVERGED, Passes, rows_of, split_extras, trimmed

_TOKENS = 4
_PROMPT = 64  # tokens of a prompt


def disagreement(model: nn.Module, passes: Passes, inputs: dict[str, Any]) -> str | None:
    """How the loop's logits differ from those of `generate` on the tokens that `generate` chooses; None: they do not.

    Args:
        model: what generates.
        passes: of the same model.
        inputs: left-padded prompts `(P, L)` and extras, on its device; what is run of them is short.

    Raises:
        UserError: the logits of `generate` are not numbers.
    """
    sample = trimmed(_sample(inputs))
    out = model.generate(
        **sample,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_k=None,
        top_p=None,
        max_new_tokens=_TOKENS,
        min_new_tokens=_TOKENS,
        return_dict_in_generate=True,
        output_logits=True,
        use_cache=True,
        pad_token_id=0,
    )
    tokens = out.sequences[:, -_TOKENS:]
    logits, past = passes.prefill(sample)
    rows = torch.arange(len(tokens), device=tokens.device)
    past = past.expand(rows, 2, _TOKENS, keep=False)
    figures, expected = [logits], [out.logits[0]]
    rows = rows.repeat_interleave(2)
    for at in range(1, _TOKENS):
        logits, past = passes.step(past, tokens[rows, at - 1])
        figures.append(logits)
        expected.append(out.logits[at][rows])
        if at == 1:  # then without the first prompt's first row
            rows, past = rows[1:], past.select(torch.arange(1, len(rows), device=rows.device))
    if any(bool(each.isnan().any()) for each in expected):
        raise UserError(DIVERGED)
    if any(bool(each.isnan().any()) for each in figures):
        return "its logits are not numbers then"
    apart = torch.cat([_apart(a.float(), b.float()) for a, b in zip(figures, expected, strict=True)])
    half = logits.dtype != torch.float32 or torch.is_autocast_enabled(logits.device.type)
    scale = max(1.0, max(each[each.isfinite()].abs().max().item() for each in expected))
    # Rounding shifts single logits by more in half precision than a real error shifts the mean.
    worst, bound = (apart.mean().item(), 0.02 * scale) if half else (apart.max().item(), 1e-4 * scale)
    return None if worst <= bound else f"its logits differ by {worst:.2g}"


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """How far numbers are apart; equal infinities are not."""
    return torch.where(one == other, 0.0, one - other).abs().flatten()


def _sample(inputs: dict[str, Any]) -> dict[str, Any]:
    """Two short prompts, the second cut, so that there is padding to get wrong; with images, all prompts."""
    if split_extras(inputs)[1]:
        return inputs
    prompts = torch.tensor([0, min(1, len(inputs["input_ids"]) - 1)], device=inputs["input_ids"].device)
    sample = {k: v[:, -_PROMPT:] for k, v in rows_of(inputs, prompts).items()}
    mask = sample["attention_mask"].clone()
    mask[1] *= mask[1].cumsum(0) > mask[1].sum() // 2
    return sample | {"attention_mask": mask}
