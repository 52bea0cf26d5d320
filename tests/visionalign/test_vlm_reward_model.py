"""A trained reward model that sees, as a reward: its scores are the trainer's own, and it is loaded by its name."""

import copy

import numpy as np
import pytest
import torch
from tiny import FAMILIES
from tiny_online import history
from tiny_pairs import pair_collator, pairs_about
from tiny_pictures import asks, loud, make, picture, seen_by
from transformers import AutoModelForImageTextToText, AutoModelForSequenceClassification, AutoProcessor, AutoTokenizer

import shared.builtin
from shared.errors import DataError, UserError
from shared.policies.score import ScorePolicy
from shared.rewards.base import FunctionReward, Sample
from shared.rewards.loading import load_reward
from shared.rewards.models import RewardModel, tell_padding
from visionalign import VLMRewardModel

QUESTION = "What colour is the circle?"


def asking(image, text=QUESTION):
    """A prompt as VLM trainers hand it to rewards."""
    return [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def scored(tiny, tmp_path_factory):
    """`scored("llava")` is the folder of a model that scores, as a trainer saves it."""
    import visionalign.rewards  # noqa: F401  (registers the classes)

    made = {}

    def get(family):
        if family not in made:
            folder = made[family] = tmp_path_factory.mktemp(f"scored-{family}")
            torch.manual_seed(0)
            model = loud(AutoModelForSequenceClassification.from_pretrained(tiny(family), num_labels=1))
            processor = AutoProcessor.from_pretrained(tiny(family))
            tell_padding(model, processor.tokenizer)
            model.save_pretrained(folder)
            processor.save_pretrained(folder)
        return made[family]

    return get


def spread(rows):
    """Prompts, answers and images of pairs, an answer a row."""
    prompts = [row["prompt"] for row in rows for _ in range(2)]
    answers = [row[name] for row in rows for name in ("chosen", "rejected")]
    return prompts, answers, [row["images"] for row in rows for _ in range(2)]


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_training(family, scored, caplog):
    folder = scored(family)
    rows = pairs_about(family, 3)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.no_grad():
        expected = ScorePolicy(model).rewards(model, pair_collator(folder)(rows)).tolist()
    prompts, answers, images = spread(rows)
    caplog.clear()
    for size in (1, 5):
        found = VLMRewardModel(str(folder), batch_size=size)(prompts, answers, images=images, kind=["colour"] * 6)
        assert found == pytest.approx(expected, abs=1e-4) and all(isinstance(score, float) for score in found)
    assert len({round(score, 4) for score in found}) == 6 and "LOAD REPORT" not in caplog.text


@pytest.fixture
def reward(scored):
    return VLMRewardModel(str(scored("llava")))


def test_images_of_a_group_are_seen_once(reward):
    images = [picture(1)]
    question = [
        {"role": "user", "content": [{"type": "image", "image": images[0]}, {"type": "text", "text": QUESTION}]}
    ]
    answers = ["red", "a blue square", "one", "two", "green"]
    expected = [reward([copy.copy(question)], [answer])[0] for answer in answers]
    reward([question] * 5, answers)  # the first use of shared prompts compares
    with seen_by(reward.model) as seen:
        assert reward([question] * 5, answers) == pytest.approx(expected, abs=1e-5)
    with seen_by(reward.model) as one:
        reward([question], ["red"])
    assert seen == one
    # as a trainer hands them over: messages, and the images once more as a column
    messages = [[{"role": "assistant", "content": answer}] for answer in answers]
    assert reward([question] * 5, messages, images=[images] * 5) == pytest.approx(expected, abs=1e-5)
    beside = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    assert reward([beside] * 5, messages, images=[images] * 5) == pytest.approx(expected, abs=1e-5)
    assert reward([QUESTION] * 5, answers, images=[images] * 5) == pytest.approx(expected, abs=1e-5)
    assert reward([QUESTION] * 5, answers, image=images * 5) == pytest.approx(expected, abs=1e-5)


def test_generated_images_are_what_their_prompts_describe(reward):
    drawn = [picture(seed, 32, 40) for seed in (1, 2)]
    wanted = ["a red circle", "two green squares"]
    explicit = [asking(each, "Describe the image.") for each in drawn]
    expected = reward(explicit, wanted)
    assert reward(wanted, images=drawn) == pytest.approx(expected, abs=1e-5)
    assert reward(wanted, drawn) == pytest.approx(expected, abs=1e-5)
    pixels = [torch.from_numpy(np.array(each)).permute(2, 0, 1) / 255 for each in drawn]
    assert reward(wanted, images=pixels) == pytest.approx(expected, abs=1e-5)
    samples = [Sample(prompt, image) for prompt, image in zip(wanted, pixels, strict=True)]
    assert FunctionReward(reward)(samples, {}).tolist() == pytest.approx(expected, abs=1e-5)
    reward.question = "What is it?"
    assert reward(wanted, images=drawn) != pytest.approx(expected, abs=1e-5)
    with pytest.raises(DataError, match=r"row 1: the image is a tensor \(40, 32\) of float32, expected \(3, H, W\)"):
        reward(wanted, images=[drawn[0], pixels[0][0]])
    with pytest.raises(DataError, match="row 0: an image is ndarray, expected a PIL image"):
        reward(wanted, [np.array(each) for each in drawn])
    with pytest.raises(UserError, match="give completions, or the generated images"):
        reward(wanted)


def test_an_empty_answer_has_a_score_too(reward):
    found = reward([QUESTION, QUESTION], ["", "red"], images=[[picture(1)]] * 2)
    assert found[0] != found[1] and reward([], []) == []
    assert reward([QUESTION], [[{"role": "assistant", "content": ""}]], images=[[picture(1)]]) == pytest.approx(
        found[:1]
    )


def test_by_name_it_is_a_reward_of_vision_grpo(scored, tiny, tmp_path, monkeypatch):
    folder = scored("llava")
    monkeypatch.setitem(shared.builtin.MODELS, "builtin/scored", folder)
    for spec in (str(folder), "builtin/scored", AutoModelForSequenceClassification.from_pretrained(folder)):
        assert isinstance(load_reward(spec, device="cpu").function, VLMRewardModel)
    trainer = make(tiny("qwen2_vl"), tmp_path, "qwen2_vl", reward=str(folder), rows=asks("qwen2_vl", 2), max_steps=1)
    told = []
    plain = VLMRewardModel.__call__

    def call(self, prompts, completions=None, **columns):
        told.append((prompts, completions, plain(self, prompts, completions, **columns)))
        return told[-1][2]

    monkeypatch.setattr(VLMRewardModel, "__call__", call)
    trainer.train()
    prompts, completions, scores = told[0]
    assert len(scores) == 8 and completions[0][0]["role"] == "assistant"
    alone = [VLMRewardModel(str(folder))([prompts[at]], [completions[at]])[0] for at in (0, 7)]
    assert alone == pytest.approx([scores[0], scores[7]], abs=1e-5)
    assert history(trainer, "reward") == pytest.approx([sum(scores) / 8], rel=1e-3)


def test_a_model_that_was_trained_on_text_alone_goes_on_reading_text(scored, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(scored("gemma3"))
    tokenizer = AutoTokenizer.from_pretrained(scored("gemma3"))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for reward in (load_reward(str(tmp_path)), load_reward(model, processing_class=tokenizer)):
        assert isinstance(reward.function, RewardModel)
    shows = asking(picture(1))
    for prompts, answers in (([shows], ["red"]), (["a circle"], [picture(1)]), (["a circle"], None)):
        with pytest.raises(UserError, match="reads text alone, and what it is to score has images.*VLMRewardTrainer"):
            reward.function(prompts, answers)


def test_what_gives_no_score_is_refused(scored, tiny, tmp_path):
    with pytest.raises(UserError, match="LlavaForConditionalGeneration, which gives no score.*VLMRewardTrainer"):
        VLMRewardModel(str(tiny("llava")))
    answering = AutoModelForImageTextToText.from_pretrained(tiny("llava"))
    for spec in (str(tiny("llava")), answering):
        with pytest.raises(UserError, match="LlavaForConditionalGeneration, which gives no score.*VLMRewardTrainer"):
            load_reward(spec)
    model = AutoModelForSequenceClassification.from_pretrained(scored("llava"))
    with pytest.raises(UserError, match="processor is missing"):
        VLMRewardModel(model)
    with pytest.raises(UserError, match="give the model's processor"):
        VLMRewardModel(model, AutoTokenizer.from_pretrained(scored("llava")))
    with pytest.raises(UserError, match="batch_size 0"):
        VLMRewardModel(str(scored("llava")), batch_size=0)
    with pytest.raises(UserError, match="cannot be loaded"):
        VLMRewardModel(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="text-only"):
        VLMRewardModel(AutoModelForSequenceClassification.from_pretrained(tiny("lm"), num_labels=1), object())
    with pytest.raises(DataError, match="row 1"):
        VLMRewardModel(str(scored("llava")))([QUESTION] * 2, ["red"] * 2, images=[[picture(1)], ["no/such/file.png"]])
