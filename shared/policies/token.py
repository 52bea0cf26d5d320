"""The causal-language-model policy that text and vision-language trainers share.

It runs the body of a transformers model, takes the hidden states of the counted tokens alone and applies the
language-model head to them in chunks, inside the head's own module call: so a head that an engine shards or offloads
(DeepSpeed ZeRO-3, FSDP2) is gathered by the engine's own hooks, and logits `(B, T, V)` never exist. A prompt with
several completions is run once for all of them, where the model allows it (`shared.policies.prefix`).

It does not generate, and it does not know what an objective means: it is given one.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.objectives.logprobs import HeadTransform, TokenStats
from shared.policies.base import GroupedBatch, LogProbs
from shared.policies.head_call import AtHead, HeadCall, TokenObjective, teach
from shared.policies.prefix import PrefixSharing, along_completions, along_prompt, evaluating, trimmed

logger = logging.getLogger(__name__)


def head_transform(config: Any, *, temperature: float = 1.0) -> HeadTransform:
    """What a model's forward does to its logits after the head, read from its configuration.

    Gemma 2 and PaliGemma 2 cap them (`final_logit_softcapping`), Cohere multiplies (`logit_scale`), Granite divides
    (`logits_scaling`). Vision-language models keep these in their text configuration.
    """
    config = config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return HeadTransform(scale=scale, softcap=softcap, temperature=temperature)


def whole_rows(batch: GroupedBatch) -> GroupedBatch:
    """Prompts joined to their completions: right-padded rows `(B, L+T)` with no prompt of their own.

    Right padding leaves the positions of the tokens to the model, whatever its position encoding. Extras that stand
    beside the prompts' tokens go on as at the last of them.

    Raises:
        UserError: the prompts have extras of another shape (images) and several completions each.
    """
    if batch.prompt_ids.shape[1] == 0:
        return batch

    def join(prompt: Tensor, completion: Tensor) -> Tensor:
        return torch.cat([prompt.repeat_interleave(batch.group_size, 0), completion], 1)

    attention = join(batch.prompt_mask, batch.completion_attention)
    order = (attention == 0).to(torch.int8).argsort(dim=1, stable=True)  # real tokens first, in their own order
    width = int(attention.sum(1).max())
    rows = torch.arange(batch.rows, device=order.device)[:, None]

    def pack(joined: Tensor) -> Tensor:
        return joined[rows, order[:, :width]]

    along, others = along_prompt(batch)
    if others and batch.group_size > 1 and batch.alone is not None:
        return whole_rows(batch.alone().to(batch.completion_ids.device))
    if others and batch.group_size > 1:
        raise UserError(
            f"{', '.join(sorted(others))}: whole rows are not made of prompts with such inputs and "
            f"{batch.group_size} completions each, and this model cannot run a prompt once for its completions as it "
            "is set up. Switch activation checkpointing off where it is on, or use one completion a prompt."
        )
    return GroupedBatch.of_rows(
        pack(join(batch.prompt_ids, batch.completion_ids)),
        attention=pack(attention),
        mask=pack(join(torch.zeros_like(batch.prompt_mask), batch.completion_mask)),
        model_inputs=others | {k: pack(join(v, along_completions(k, v, batch))) for k, v in along.items()},
    )


def in_model_type(model: nn.Module, batch: GroupedBatch) -> GroupedBatch:
    """The batch with its images in the model's type where the weights are held in half precision.

    Autocast sees to it where they are not. Times, `(videos,)`, stay as exact as they are.
    """
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if dtype not in (torch.bfloat16, torch.float16):
        return batch
    extras = batch.model_inputs.items()
    pixels = {k: isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1 for k, v in extras}
    cast = {k: v.to(dtype) if pixels[k] else v for k, v in extras}
    return replace(batch, model_inputs=cast)


class TokenPolicy:
    """Log-probabilities of completion tokens under a transformers causal model, text-only or vision-language.

    Args:
        model: a transformers model with a language-model head, or a PEFT model around one. It is taught, in place,
            to answer `model(..., head_call=…)`; every other call goes on as before.
        temperature: divides the logits.
        share_prefix: run a prompt once for all of its completions, where that saves work and the model allows it.
            The figures are the same; active dropout draws once for a prompt and not for each completion.
    """

    def __init__(self, model: nn.Module, *, temperature: float = 1.0, share_prefix: bool = True):
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if getattr(inner.config.get_text_config(), "output_router_logits", False):
            raise UserError(
                "The model's configuration asks for the router's auxiliary loss (output_router_logits), which is not "
                "part of the objectives here. Set output_router_logits to False."
            )
        self.transform = head_transform(inner.config, temperature=temperature)
        self.fused = teach(inner)
        self._checked = not self.fused
        # Prompt learning puts tokens of its own before each row.
        learns_prompt = getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False)
        enabled = share_prefix and self.fused and not learns_prompt
        self.sharing = PrefixSharing(inner, getattr(inner, inner.base_model_prefix, None), enabled=enabled)

    def around(self, model: nn.Module, *, share_prefix: bool = True) -> TokenPolicy:
        """The same policy around another model, its reference."""
        return TokenPolicy(model, temperature=self.transform.temperature, share_prefix=share_prefix)

    def action_objective(
        self,
        model: nn.Module,
        batch: GroupedBatch,
        objective: TokenObjective,
        *,
        entropy: bool = False,
        entropy_weights: Tensor | None = None,
        values: bool = False,
    ) -> tuple[Tensor, TokenStats]:
        """Sum of an objective that is separable by token, with its gradient computed in the forward pass.

        Args:
            model: the model as the engine wraps it.
            batch: rows; N of their tokens are counted.
            objective: gets `(n,)` log-probabilities and which of the N tokens they are; gives `(n,)` weighted losses.
            entropy: also measure the policy's entropy at the counted tokens.
            entropy_weights: `(N,)`, row by row: adds `Σ weight · entropy` to the loss, with its gradient.
            values: also give what the model's critic says of the state before each token, with its gradient.

        Returns:
            The scalar loss and the statistics of the N tokens, row by row; but for the values they are detached.

        Raises:
            UserError: values are asked for, and the model cannot be asked for its states.
        """
        options = {"entropy_weights": entropy_weights, "values": "beside" if values else None}
        call = HeadCall(*_predicted(batch), self.transform, objective, entropy, **options)
        return self._run(model, batch, call)

    def log_probs(
        self,
        model: nn.Module,
        batch: GroupedBatch,
        *,
        entropy: bool = False,
        collision: bool = False,
        entropy_gradient: bool = False,
        values: bool = False,
    ) -> LogProbs:
        """Log-probabilities `(B, T)` of the completions' tokens; 0 where the mask is 0.

        Args:
            model: the model as the engine wraps it.
            batch: rows; the first token of a row that has no prompt is not counted, since nothing predicts it.
            entropy: also give the policy's entropy at each token.
            collision: also give log Σ_v p_v² at each token.
            entropy_gradient: give the entropy, differentiable as the log-probabilities are.
            values: also give what the model's critic says of the state before each token.
        """
        options = {"entropy": entropy, "collision": collision, "entropy_gradient": entropy_gradient}
        call = HeadCall(*_predicted(batch), self.transform, values="beside" if values else None, **options)
        _, stats = self._run(model, batch, call)
        return _on_grid(stats, _counted(batch))

    def values(self, model: nn.Module, batch: GroupedBatch) -> Tensor:
        """What the model's critic says of the state before each completion token, `(B, T)`; 0 where the mask is 0."""
        _, stats = self._run(model, batch, HeadCall(*_predicted(batch), self.transform, values="alone"))
        mask = _counted(batch)
        return stats.values.new_zeros(mask.shape).masked_scatter(mask, stats.values)

    def at_head(self, model: nn.Module, batch: GroupedBatch, function: AtHead, record: type) -> tuple[Tensor, Any]:
        """What a function makes of the head at the N counted tokens, inside the head's own call.

        For objectives of the whole distribution. Under an engine that shards, the weight is whole in that call alone.

        Args:
            model, batch: as of `log_probs`.
            function: gets the head or, of a model whose head cannot be run apart, its logits `(N, V)`, row by row;
                gives a scalar loss and figures, tensors or None.
            record: what the figures become: the class is called with them.
        """
        return self._run(model, batch, HeadCall(*_predicted(batch), self.transform, at_head=function, record=record))

    def _run(self, model: nn.Module, batch: GroupedBatch, call: HeadCall) -> tuple[Tensor, TokenStats]:
        """The call on a batch; its index says which completion tokens are meant and is turned into states."""
        if not self._checked:
            self._checked = True
            self.fused = self._agrees(model, call.targets)
        if call.values and not self.fused:
            raise UserError(
                "The states of this model cannot be asked for, since its head is more than a matrix product (it is "
                "quantised, or has an adapter), so that there are none for a value function. Leave the head plain."
            )
        batch = in_model_type(model, batch)
        if self.fused and self.sharing.applies(
            model, batch, functools.partial(self._figures, model, values=call.values)
        ):
            return _run_shared(model, batch, call)
        return self._run_rows(model, batch, call)

    def _run_rows(self, model: nn.Module, batch: GroupedBatch, call: HeadCall) -> tuple[Tensor, TokenStats]:
        rows = in_model_type(model, whole_rows(batch))
        call.index = _predicted(rows)[0] - 1
        inputs = {
            "input_ids": rows.completion_ids,
            "attention_mask": rows.completion_attention,
            "use_cache": False,
            **rows.model_inputs,
        }
        if self.fused:
            loss, *figures = model(**inputs, head_call=call)
        else:
            loss, *figures = _from_logits(model(**inputs).logits.flatten(0, 1)[call.index], call)
        return loss, call.record(*figures)

    def _figures(
        self, model: nn.Module, batch: GroupedBatch, shared: bool, values: str | None = None
    ) -> tuple[Tensor, bool]:
        call = HeadCall(*_predicted(batch), self.transform, values=values and "beside")
        _, stats = (_run_shared if shared else self._run_rows)(model, batch, call)
        return torch.stack([stats.logp, stats.values]) if values else stats.logp, call.half

    def _agrees(self, model: nn.Module, targets: Tensor) -> bool:
        """Whether head and transform give the model's own log-probabilities, on a few plain tokens.

        A model can do something to its logits that no configuration name tells of. Then its own forward is used:
        right, but with whole logits in memory.
        """
        ids = torch.cat([targets[:7], targets.new_zeros(2)]).unsqueeze(0)
        index = torch.arange(ids.shape[1] - 1, device=ids.device)
        call = HeadCall(index, ids[0, 1:], HeadTransform(self.transform.scale, self.transform.softcap))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
        with evaluating(model):
            own = model(**inputs).logits[0, :-1].float().log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)
            ours = model(**inputs, head_call=call)[1].float()
        tolerance = 0.25 if call.half else 1e-3
        agrees = bool((own - ours).abs().max() <= tolerance)
        if not agrees:
            logger.warning(
                "The model changes its logits in a way that its configuration does not tell: log-probabilities are "
                "taken from whole logits, which needs more memory."
            )
        return agrees


def _counted(batch: GroupedBatch) -> Tensor:
    """`(B, T)` bool: the counted tokens that have a predecessor to predict them."""
    counted = batch.completion_mask.bool()
    if counted.shape[1]:
        counted = counted.clone()
        counted[:, 0] &= batch.prompt_mask.bool().any(1).repeat_interleave(batch.group_size)
    return counted


def _predicted(batch: GroupedBatch) -> tuple[Tensor, Tensor]:
    """Where the counted tokens stand in the flattened `(B*T,)` completions, and what they are; both `(N,)`."""
    index = _counted(batch).flatten().nonzero().squeeze(1)
    return index, batch.completion_ids.flatten()[index]


def _on_grid(stats: TokenStats, mask: Tensor) -> LogProbs:
    def put(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.new_zeros(mask.shape).masked_scatter(mask, values)

    logp, entropy, correct, collision, values = map(put, stats)
    return LogProbs(logp, mask.to(logp.dtype), entropy, correct, collision, values)


def _run_shared(model: nn.Module, batch: GroupedBatch, call: HeadCall) -> tuple[Tensor, TokenStats]:
    """The call on a batch whose prompts are run once; the states after the last counted token are not computed."""
    row, column = call.index // batch.completion_ids.shape[1], call.index % batch.completion_ids.shape[1]
    call.prefix = trimmed(batch, int(column.max()) if len(column) else 1)
    call.index = row * (1 + call.prefix.completion_ids.shape[1]) + column
    loss, *figures = model(head_call=call)
    return loss, call.record(*figures)


def _from_logits(logits: Tensor, call: HeadCall) -> tuple[Tensor | None, ...]:
    """The loss and the token figures from the model's own logits `(N, V)` of the counted tokens."""
    logits = logits.float() / call.transform.temperature
    if call.at_head is not None:
        return call.at_head(logits)
    logp_all = logits.log_softmax(-1)
    logp = logp_all.gather(1, call.targets.unsqueeze(1)).squeeze(1)
    fixed = logp_all.detach()
    bonus = call.entropy_weights is not None
    of = logp_all if bonus or call.entropy_gradient else fixed
    entropy = -(of.exp() * of).sum(-1) if call.entropy or of is logp_all else None
    collision = (2 * fixed).logsumexp(-1) if call.collision else None
    correct = fixed.argmax(-1) == call.targets
    if call.objective is None:
        return logp.new_zeros(()), logp, entropy, correct, collision
    loss = call.objective(logp, slice(0, logp.shape[0])).sum()
    if bonus:
        loss = loss + (call.entropy_weights * entropy).sum()
        entropy = entropy.detach()
    return loss, logp.detach(), entropy, correct, collision
