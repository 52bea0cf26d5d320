"""What the shipped models reach on held-out rows; their cards tell it, and tests check that it is still so.

Rewards and answers by an option are not here: trainers measure what they train themselves.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image

from shared.builtin import adapter_path, graded, load_dataset, reviews, shapes, shapes_preference, tldr
from shared.builtin.models import load_model, load_processor
from shared.builtin.train_lm import complete, reply

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

TRIES = 8  # sampled answers to a question
BATCH = 100  # rows


class Sampled(NamedTuple):
    """Answers to questions of one kind: greedy, and `TRIES` to each sampled at temperature 1."""

    greedy: float  # share that is right
    right: float  # share of the sampled answers that is right
    reached: float  # share of the questions that one of their sampled answers is right to
    mixed: float  # share of the questions that some, but not all, of their sampled answers are right to


# ---- The reward model -----------------------------------------------------------------------------------------------


def reward_model() -> dict[str, str]:
    """Measured of `builtin/rm-reviews`, by what it is."""
    model, tokenizer = load_model("builtin/rm-reviews").eval(), load_processor("builtin/rm-reviews")
    return {
        "pairs of `builtin/reviews-preference` in order": f"{pairs_in_order(model, tokenizer, 'preference'):.1%}",
        "pairs of `builtin/reviews-graded` in order": f"{pairs_in_order(model, tokenizer, 'graded'):.1%}",
        "spoilt copies that the judge puts lower and it too": f"{spoilt_below(model, tokenizer, 300):.1%}",
        "copies with another film's name, or none, of which the same is true": (
            f"{spoilt_below(model, tokenizer, 300, [graded.misname]):.1%}"
        ),
        "rank correlation with the judge, reviews sampled from `builtin/lm-small-sft`": (
            f"{agreement(model, tokenizer, 400):.2f}"
        ),
    }


def reward_adapter() -> dict[str, str]:
    """Measured of `builtin/rm-reviews-adapter`, on its base."""
    from peft import PeftModel

    base = load_model("builtin/lm-small-sft", head="sequence-classification", num_labels=1)
    model = PeftModel.from_pretrained(base, adapter_path("builtin/rm-reviews-adapter")).eval()
    tokenizer = load_processor("builtin/lm-small-sft")
    return {
        "pairs of `builtin/reviews-preference` in order": f"{pairs_in_order(model, tokenizer, 'preference'):.1%}",
        "pairs of `builtin/reviews-graded` in order": f"{pairs_in_order(model, tokenizer, 'graded'):.1%}",
    }


@torch.no_grad()
def scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str], written: Sequence[str]
) -> torch.Tensor:
    """A reward model's scores (B,) of reviews."""
    found = []
    for at in range(0, len(prompts), BATCH):
        pairs = zip(prompts[at : at + BATCH], written[at : at + BATCH], strict=True)
        chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in pairs]
        inputs = tokenizer.apply_chat_template(
            chats, tokenize=True, return_dict=True, return_tensors="pt", padding=True
        )
        found.append(model(**inputs).logits[:, 0])
    return torch.cat(found)


def pairs_in_order(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, name: str) -> float:
    """The share of held-out pairs of `builtin/reviews-NAME` whose chosen review gets the higher score."""
    rows = load_dataset(f"builtin/reviews-{name}", "test")
    prompts, chosen, rejected = ([row[0]["content"] for row in rows[n]] for n in ("prompt", "chosen", "rejected"))
    above = scores(model, tokenizer, prompts, chosen) > scores(model, tokenizer, prompts, rejected)
    return above.float().mean().item()


def spoilt_below(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: int, ways: Sequence[Any] = tuple(graded.WAYS)
) -> float:
    """Of sound reviews of held-out films and copies spoilt in one of `ways`: the share of the copies that score below.

    Copies that the judge does not put lower by `graded.GAP` are left out.
    """
    rng = random.Random(0)
    prompts, sound, spoilt = [], [], []
    while len(prompts) < rows:
        film = rng.choice(reviews.films("test"))
        prompt, review = reviews.PROMPT.format(film=film), reviews.write(film, rng.random() < 0.7, 3, rng)
        copy = rng.choice(ways)(review, film, rng) or review
        if reviews.score(prompt, copy) <= reviews.score(prompt, review) - graded.GAP:
            prompts.append(prompt)
            sound.append(review)
            spoilt.append(copy)
    below = scores(model, tokenizer, prompts, spoilt) < scores(model, tokenizer, prompts, sound)
    return below.float().mean().item()


def agreement(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: int) -> float:
    """Rank correlation (Spearman) with the judge on so many reviews of held-out films by `builtin/lm-small-sft`."""
    films = reviews.films("test")
    prompts = [reviews.PROMPT.format(film=films[row % len(films)]) for row in range(rows)]
    writer = load_model("builtin/lm-small-sft").eval()
    written = reply(writer, tokenizer, [[{"role": "user", "content": p}] for p in prompts], 48, sample=True)
    judged = torch.tensor([reviews.score(p, review) for p, review in zip(prompts, written, strict=True)])
    return rank_correlation(scores(model, tokenizer, prompts, written), judged)


def rank_correlation(a_N: torch.Tensor, b_N: torch.Tensor) -> float:
    """Spearman's: the correlation of the ranks, equal values sharing their mean rank."""
    less = [(x[:, None] > x).sum(1) + (x[:, None] == x).sum(1) / 2 for x in (a_N, b_N)]
    return torch.corrcoef(torch.stack(less))[0, 1].item()


# ---- The vision-language model --------------------------------------------------------------------------------------


def vision_model() -> dict[str, str]:
    """Measured of `builtin/vlm-small-sft`, by what it is."""
    model, processor = load_model("builtin/vlm-small-sft").eval(), load_processor("builtin/vlm-small-sft")
    known = load_dataset("builtin/shapes", "test")
    told = {
        f"{kind}, greedy answers that are right": f"{share(model, processor, kind, known):.1%}"
        for kind in ("colour", "shape", "describe")
    }
    for kind in shapes.PROMPT_ROWS["test"]:
        found = sampled_answers(model, processor, kind)
        told |= {
            f"{kind}, greedy answers that are right": f"{found.greedy:.1%}",
            f"{kind}, answers sampled at temperature 1 that are right": f"{found.right:.1%}",
            f"{kind}, questions of which one of {TRIES} such answers is right": f"{found.reached:.1%}",
            f"{kind}, questions of which some of {TRIES} such answers are right, but not all": f"{found.mixed:.1%}",
        }
    return told


def draft() -> dict[str, str]:
    """Measured of `builtin/vlm-small-draft`, by what it is."""
    model, processor = load_model("builtin/vlm-small-draft").eval(), load_processor("builtin/vlm-small-draft")
    known = load_dataset("builtin/shapes", "test")
    greedy, sampled = (descriptions(model, processor, sample=sample) for sample in (False, True))
    return {
        "greedy descriptions that name what is not there": f"{greedy.hallucinated:.1%}",
        "descriptions sampled at temperature 1 that do": f"{sampled.hallucinated:.1%}",
        "shapes of the picture that greedy descriptions name": f"{greedy.recall:.1%}",
        **{
            f"{kind}, greedy answers that are right": f"{share(model, processor, kind, known):.1%}"
            for kind in ("colour", "shape")
        },
    }


class Described(NamedTuple):
    """Of descriptions of held-out pictures."""

    hallucinated: float  # share that names what is not there
    recall: float  # mean share of the picture's shapes that is named


def descriptions(
    model: PreTrainedModel, processor: ProcessorMixin, rows: int | None = None, *, sample: bool
) -> Described:
    """Descriptions of the held-out pictures of `builtin/shapes-preference`, of the first `rows` if given."""
    data = load_dataset("builtin/shapes-preference", "test")
    data = data.select([at for at, kind in enumerate(data["kind"]) if kind == "describe"][:rows])
    said = look(model, processor, data["prompt"][:], data["images"][:], sample=sample)
    judged = [
        (shapes_preference.hallucinates("", text, there), shapes_preference.recall("", text, there))
        for text, there in zip(said, data["shapes"], strict=True)
    ]
    return Described(*(sum(column) / len(judged) for column in zip(*judged, strict=True)))


def share(model: PreTrainedModel, processor: ProcessorMixin, kind: str, rows: Any) -> float:
    """The share of the questions of a kind in `builtin/shapes` that are answered rightly, greedily."""
    rows = rows.select([at for at, each in enumerate(rows["kind"]) if each == kind])
    asked = [chat[:1] for chat in rows["messages"]]
    said = look(model, processor, asked, rows["images"], sample=False)
    right = [chat[1]["content"][0]["text"] for chat in rows["messages"]]
    return sum(a == b for a, b in zip(said, right, strict=True)) / len(said)


def sampled_answers(
    model: PreTrainedModel, processor: ProcessorMixin, kind: str, questions: int | None = None
) -> Sampled:
    """Answers to the held-out questions of a kind in `builtin/shapes-prompts`, of the first `questions` if given."""
    rows = load_dataset("builtin/shapes-prompts", "test")
    rows = rows.select([at for at, each in enumerate(rows["kind"]) if each == kind][:questions])
    asked, images, right = rows["prompt"][:], rows["images"][:], rows["solution"][:]
    greedy = [a == b for a, b in zip(look(model, processor, asked, images, sample=False), right, strict=True)]
    many = [[each for each in column for _ in range(TRIES)] for column in (asked, images, right)]
    said = look(model, processor, many[0], many[1], sample=True)
    right_PG = torch.tensor([a == b for a, b in zip(said, many[2], strict=True)]).view(-1, TRIES).float()
    mean_P = right_PG.mean(1)
    return Sampled(
        sum(greedy) / len(greedy),
        mean_P.mean().item(),
        (mean_P > 0).float().mean().item(),
        ((mean_P > 0) & (mean_P < 1)).float().mean().item(),
    )


def look(
    model: PreTrainedModel, processor: ProcessorMixin, asked: Sequence[Any], images: Sequence[Any], *, sample: bool
) -> list[str]:
    """The model's answers to questions about one picture each."""
    texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in asked]
    inputs = processor(text=texts, images=list(images), return_tensors="pt", padding=True, padding_side="left")
    return complete(model, processor.tokenizer, inputs, 16, sample=sample)


# ---- The reward model that sees -------------------------------------------------------------------------------------

# A reward: `(prompts, completions, images=…)`, or of generated images `(prompts, images=…)`, gives a score each.
Score = Callable[..., Sequence[float]]


def seeing_reward_model(score: Score) -> dict[str, str]:
    """Measured of `builtin/rm-shapes`, by what it is.

    Args:
        score: the model as a reward.
    """
    return {
        "pairs of `builtin/shapes-preference` in order": f"{answers_in_order(score):.1%}",
        "rank correlation with the judge, descriptions sampled from `builtin/vlm-small-draft`": (
            f"{agreement_on_pictures(score):.2f}"
        ),
        "descriptions that score higher with their picture than with one that differs in one thing": (
            f"{pictures_in_order(score, 200, near=True):.1%}"
        ),
        "descriptions that score higher with their picture than with any other": (
            f"{pictures_in_order(score, 200, near=False):.1%}"
        ),
    }


def answers_in_order(score: Score, rows: int | None = None) -> float:
    """The share of held-out pairs of `builtin/shapes-preference` whose chosen answer gets the higher score."""
    data = load_dataset("builtin/shapes-preference", "test")
    data = data.select(range(rows or len(data)))
    prompts, images = data["prompt"][:], data["images"][:]
    chosen, rejected = (score(prompts, data[name][:], images=images) for name in ("chosen", "rejected"))
    return _share_above(chosen, rejected)


def agreement_on_pictures(score: Score) -> float:
    """Rank correlation (Spearman) with the judge on descriptions of held-out pictures by `builtin/vlm-small-draft`."""
    data = load_dataset("builtin/shapes-preference", "test")
    data = data.select([at for at, kind in enumerate(data["kind"]) if kind == "describe"])
    writer, processor = load_model("builtin/vlm-small-draft").eval(), load_processor("builtin/vlm-small-draft")
    prompts, images = data["prompt"][:], data["images"][:]
    said = look(writer, processor, prompts, images, sample=True)
    judged = shapes_preference.shapes_reward(prompts, said, data["shapes"][:])
    return rank_correlation(torch.tensor(score(prompts, said, images=images)), torch.tensor(judged))


def pictures_in_order(score: Score, pairs: int, *, near: bool) -> float:
    """The share of descriptions that score higher as prompts of the right picture than of a wrong one.

    Args:
        score: the model as a reward of generated images.
        pairs: held-out descriptions.
        near: the wrong picture is spoilt in one way of `shapes_preference.WAYS`; else it is of any other shapes.
    """
    rng = random.Random(0)
    prompts, right, wrong = [], [], []
    while len(prompts) < pairs:
        told, other = ([(s.form, s.colour) for s in shapes.draw_layout(rng)] for _ in range(2))
        other = shapes_preference.spoil(told, rng) if near else other
        if set(other) == set(told) or len({form for form, _ in other}) < len(other):
            continue  # the same, or two of one form, as in no picture
        drawn = [shapes.lay(each, rng) for each in (told, other)]
        if shapes.split_of(drawn[0]) == "test":
            prompts.append(shapes_preference.describe(told))
            for column, layout in zip((right, wrong), drawn, strict=True):
                column.append(Image.fromarray(shapes.paint(layout, rng)))
    return _share_above(score(prompts, images=right), score(prompts, images=wrong))


def _share_above(scores: Sequence[float], others: Sequence[float]) -> float:
    return sum(a > b for a, b in zip(scores, others, strict=True)) / len(scores)


# ---- The model that sums up -----------------------------------------------------------------------------------------


def summaries() -> dict[str, str]:
    """Measured of `builtin/lm-tldr-sft`, by what it is."""
    model, tokenizer = load_model("builtin/lm-tldr-sft").eval(), load_processor("builtin/lm-tldr-sft")
    greedy, sampled = (summary_scores(model, tokenizer, sample=sample) for sample in (False, True))
    return {
        "mean score of greedy summaries": f"{sum(greedy) / len(greedy):.2f}",
        "mean score of summaries sampled at temperature 1": f"{sum(sampled) / len(sampled):.2f}",
        "such summaries that are right in all": f"{sum(score == 1 for score in sampled) / len(sampled):.1%}",
    }


def summary_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: int | None = None, *, sample: bool
) -> list[float]:
    """Scores of the model's summaries of held-out posts of `builtin/tldr-prompts`, of the first `rows` if given."""
    data = load_dataset("builtin/tldr-prompts", "test")
    data = data.select(range(rows or len(data)))
    inputs = tokenizer(data["prompt"][:], return_tensors="pt", padding=True, padding_side="left")
    written = complete(model, tokenizer, inputs, 48, sample=sample)
    return tldr.summary_reward(data["prompt"], written, data["facts"])
