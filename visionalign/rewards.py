"""A trained reward model that sees, as a reward function: `f(prompts, completions, **columns) -> list[float]`.

What is scored is read, written and processed as in training. Importing this module tells transformers of the score
classes of the tested families, so that `AutoModelForSequenceClassification` loads what VLMRewardTrainer saved. The way
in by name is shared.rewards.loading; judges that answer in words and rewards by rule are there too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import CONFIG_MAPPING

from shared.data.conversation import Conversation
from shared.data.rows import ROW
from shared.data.schema import Kind, to_conversation
from shared.errors import DataError, UserError
from shared.policies.base import GroupedBatch
from shared.policies.score import ScorePolicy, inner_model
from shared.rewards.base import text_of
from shared.rewards.models import HUB_OPTIONS, ModelReward, base_config, kind_of_scorer, load_scorer, tell_padding
from shared.rewards.pictures import to_pil
from shared.runtime.scorers import register_scorer
from shared.trainers.token_rollouts import Prompt
from visionalign.collators import VLMCollator
from visionalign.families import FAMILIES, family_of
from visionalign.pairs import VLMPairCollator, question_of

for _family in FAMILIES:
    register_scorer(CONFIG_MAPPING[_family])


@dataclass
class _Answers:
    """Answers in a row that have one prompt: their tokens, and their places in the call."""

    prompt: Prompt
    ids: list[list[int]]
    places: list[int]


class VLMRewardModel(ModelReward):
    """Scores answers to prompts with images, or images made of prompts, by a reward model that VLMRewardTrainer made.

    Args:
        model: hub id, folder or built-in name of a vision-language model with a score head of one label, or of an
            adapter trained on one; or a loaded model.
        processor: the model's; loaded beside a model that is given by name.
        batch_size: answers that are scored at once. A prompt's images are processed and seen once for answers that
            stand together, as those of a group do.
        question: what a generated image is said to be the answer to; one that the model was trained on.
        max_completion_length: longer answers lose their end, as in training.
        max_pixels: images with more pixels are made smaller, as in training.
        template_kwargs: more variables for the chat template.
        device: where a model that is given by name is put; None: the accelerator that is current at the first call.
        options: more for `from_pretrained`, such as `dtype` or `revision`.

    Raises:
        UserError: the model cannot be loaded, has no score head, or sees nothing.

    Example:
        >>> reward = VLMRewardModel("runs/reward_vlm")  # doctest: +SKIP
        >>> reward(["What colour is the circle?"], ["red"], images=[[picture]])  # doctest: +SKIP
        [2.4]
        >>> reward(["a red circle"], images=[generated])  # doctest: +SKIP
        [1.9]
    """

    needs = "processor"

    def __init__(
        self,
        model: str | nn.Module,
        processor: Any = None,
        *,
        batch_size: int = 16,
        question: str = "Describe the image.",
        max_completion_length: int | None = None,
        max_pixels: int | None = None,
        template_kwargs: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ):
        super().__init__(model, processor, batch_size=batch_size, device=device, options=options)
        if not kind_of_scorer(self.model).endswith("ForSequenceClassification"):
            raise UserError(f"A {type(self.model).__name__} judges steps; a reward of images has one score an answer.")
        family = family_of(inner_model(self.model).config)
        if not hasattr(self.processor, "tokenizer"):
            raise UserError(f"processor is a {type(self.processor).__name__}: give the model's processor of images.")
        self.question = question
        collator = VLMCollator(
            self.processor,
            family=family,
            kind=Kind.PROMPT_ONLY,
            max_pixels=max_pixels,
            template_kwargs=template_kwargs,
        )
        self.tokenizer = self.processor.tokenizer
        self.pairs = VLMPairCollator(collator)
        self.max_completion_length = max_completion_length
        tell_padding(self.model, self.tokenizer)
        self.policy = ScorePolicy(self.model)

    def load(self, name: str, processor: Any, options: dict[str, Any]) -> tuple[nn.Module, Any]:
        register_scorer(type(base_config(name, **{key: options[key] for key in HUB_OPTIONS if key in options})))
        return load_scorer(name, processor, options, auto="AutoProcessor")

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] | None = None,
        *,
        images: Sequence[Any] | None = None,
        videos: Sequence[Any] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Scores of completions, or of generated images: how well each fits its prompt.

        Args:
            prompts: strings, or lists of messages, whose parts may hold the images.
            completions: strings or lists of messages; None, or images: what was generated is scored, the question
                asked about it and its prompt the answer.
            images: without completions one generated image a prompt, a PIL image (or what data sets have in its
                place) or a tensor `(3, H, W)` between 0 and 1; with them each prompt's images, where its parts do not
                hold them.
            videos: each prompt's videos, likewise.
            columns: the rows' other columns; `image` and `video` are taken where `images` and `videos` are not given.

        Raises:
            UserError: neither completions nor images.
            DataError: a row that cannot be written or read, named by its place.
        """
        images = columns.get("image") if images is None else images
        videos = columns.get("video") if videos is None else videos
        shown = images if completions is None else completions
        if shown is None:
            raise UserError("There is nothing to score: give completions, or the generated images.")
        if completions is None or (len(shown) and all(map(_is_image, shown))):
            pairs = zip(prompts, shown, strict=True)
            rows = [self._generated(prompt, image, at) for at, (prompt, image) in enumerate(pairs)]
        else:
            nothing = [None] * len(prompts)
            seen = [nothing if each is None else each for each in (images, videos)]
            each = enumerate(zip(prompts, completions, *seen, strict=True))
            rows = [_row(at, *values) for at, values in each]
        scores = [0.0] * len(rows)
        groups = self._groups(rows)
        for size in sorted({len(group.ids) for group in groups}):
            alike = [group for group in groups if len(group.ids) == size]
            found = self.in_batches(alike, _length, self._scores, batch_size=max(1, self.batch_size // size))
            for group, values in zip(alike, found, strict=True):
                for at, value in zip(group.places, values, strict=True):
                    scores[at] = value
        return scores

    def _generated(self, prompt: Any, image: Any, at: int) -> dict[str, Any]:
        """The row in which a generated image is described by its prompt."""
        several = image if isinstance(image, (list, tuple)) else [image]
        parts = [{"type": "image", "image": _picture(each, at)} for each in several]
        asked = [{"role": "user", "content": [*parts, {"type": "text", "text": self.question}]}]
        return {ROW: at, "prompt": asked, "completion": text_of(prompt)}

    def _groups(self, rows: Sequence[dict[str, Any]]) -> list[_Answers]:
        """The rows as tokens; those in a row that have one prompt together, no more than a batch takes."""
        groups: list[_Answers] = []
        last: dict[str, Any] = {}
        for at, row in enumerate(rows):
            chat, ids = self._answered(row, at)
            together = all(row.get(name) is last.get(name) for name in ("prompt", "images", "videos"))
            if not (groups and together and len(groups[-1].ids) < self.batch_size):
                prompt, _ = self.pairs.prompts.made(question_of(chat))
                groups.append(_Answers(prompt, [], []))
            groups[-1].ids.append(ids[: self.max_completion_length])
            groups[-1].places.append(at)
            last = row
        return groups

    def _answered(self, row: dict[str, Any], at: int) -> tuple[Conversation, list[int]]:
        """A row's chat, and the tokens of its answer."""
        columns = {name: value for name, value in row.items() if name != ROW and value is not None}
        if text_of(row["completion"]).strip():
            chat = to_conversation(columns, at, Kind.PROMPT_COMPLETION)
            return chat, self.pairs.answer_ids(chat, "completion")
        # nothing was answered: no row of a data set is like it, yet it has a score
        return to_conversation({**columns, "completion": "."}, at, Kind.PROMPT_COMPLETION), [
            self.tokenizer.eos_token_id
        ]

    @torch.no_grad()
    def _scores(self, groups: Sequence[_Answers]) -> list[list[float]]:
        """Scores of groups of one size."""
        device, size = self.place(), len(groups[0].ids)
        answers = [torch.tensor(ids) for group in groups for ids in group.ids]
        ids = pad_sequence(answers, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        attention = pad_sequence([torch.ones_like(answer) for answer in answers], batch_first=True)
        empty = ids.new_zeros(len(groups), 0)
        batch = GroupedBatch(empty, empty, ids, attention, attention, group_size=size)
        batch = self.pairs.behind(batch, [group.prompt for group in groups])
        return self.policy.rewards(self.model, batch.to(device)).view(-1, size).tolist()


def _row(at: int, prompt: Any, completion: Any, images: Any, videos: Any) -> dict[str, Any]:
    """A row of a prompt and its completion; what the prompt's parts hold is not given twice."""
    row = {ROW: at, "prompt": prompt, "completion": completion, "images": images, "videos": videos}
    if isinstance(completion, str) and not isinstance(prompt, str):
        row["completion"] = [{"role": "assistant", "content": completion}]
    contents = [] if isinstance(prompt, str) else [turn.get("content") or "" for turn in prompt]
    parts = [part for content in contents if not isinstance(content, str) for part in content]
    for kind in ("image", "video"):
        if any(part.get(kind) is not None for part in parts):
            row[f"{kind}s"] = None
    return row


def _length(group: _Answers) -> int:
    return len(group.prompt.ids) + max(map(len, group.ids))


def _is_image(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray)) or hasattr(value, "convert")


def _picture(image: Any, at: int) -> Any:
    """A tensor `(3, H, W)` between 0 and 1 as a PIL image; anything else as it is."""
    try:
        return to_pil(image)
    except DataError as error:
        raise DataError(f"row {at}: {error}") from error
