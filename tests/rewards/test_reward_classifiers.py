"""A classifier as a reward: which label, in what measure, of which text."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from shared.errors import UserError
from shared.rewards.base import Sample
from shared.rewards.classifiers import ClassifierReward
from shared.rewards.loading import load_reward

TEXTS = [" red square", " blue", " a green circle left of it", ""]


def build(tiny, names, seed=0):
    torch.manual_seed(seed)
    labels = dict(enumerate(names))
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny("lm"), num_labels=len(names), id2label=labels, label2id={name: at for at, name in labels.items()}
    )
    with torch.no_grad():
        model.score.weight.mul_(20)
    return model.eval(), AutoTokenizer.from_pretrained(tiny("lm"))


def logits(model, tokenizer, texts):
    with torch.no_grad():
        rows = [tokenizer(text or tokenizer.pad_token, return_tensors="pt")["input_ids"] for text in texts]
        return torch.cat([model(input_ids=row).logits for row in rows]).float()


def test_the_positive_label_s_chance_or_log_odds(tiny):
    model, tokenizer = build(tiny, ["POSITIVE", "NEGATIVE"])
    expected = logits(model, tokenizer, TEXTS)
    prompts = [[{"role": "user", "content": "Describe"}]] * 4
    answers = [[{"role": "assistant", "content": text}] for text in TEXTS]
    reward = ClassifierReward(model, tokenizer, batch_size=3)
    assert reward(prompts, answers, kind=None) == pytest.approx(expected.softmax(1)[:, 0].tolist(), abs=1e-5)
    odds = ClassifierReward(model, tokenizer, output="logit")(prompts, answers)
    assert odds == pytest.approx((expected[:, 0] - expected[:, 1]).tolist(), abs=1e-4)
    other = ClassifierReward(model, tokenizer, label="negative")(prompts, answers)
    assert other == pytest.approx(expected.softmax(1)[:, 1].tolist(), abs=1e-5)
    assert reward([], []) == [] and len(set(odds)) == 4


def test_of_many_labels_one_is_named(tiny):
    model, tokenizer = build(tiny, ["sad", "glad", "cross"])
    expected = logits(model, tokenizer, TEXTS)
    prompts = [""] * 4
    for label in ("glad", 1, "1"):
        found = ClassifierReward(model, tokenizer, label=label)(prompts, TEXTS)
        assert found == pytest.approx(expected.softmax(1)[:, 1].tolist(), abs=1e-5)
    odds = ClassifierReward(model, tokenizer, label="glad", output="logit")(prompts, TEXTS)
    chance = expected.softmax(1)[:, 1]
    assert odds == pytest.approx((chance / (1 - chance)).log().tolist(), abs=1e-3)
    with pytest.raises(UserError, match="labels are sad, glad, cross; none of them is named positive"):
        ClassifierReward(model, tokenizer)
    with pytest.raises(UserError, match="labels are sad, glad, cross; there is no 'happy'"):
        ClassifierReward(model, tokenizer, label="happy")
    model.config.problem_type = "multi_label_classification"
    apart = ClassifierReward(model, tokenizer, label="glad")(prompts, TEXTS)
    assert apart == pytest.approx(expected[:, 1].sigmoid().tolist(), abs=1e-5)


def test_two_unnamed_labels_and_one_alone(tiny):
    assert ClassifierReward(*build(tiny, ["LABEL_0", "LABEL_1"])).label == 1
    model, tokenizer = build(tiny, ["score"])
    found = ClassifierReward(model, tokenizer, output="logit")([""], TEXTS[:1])
    assert found == pytest.approx(logits(model, tokenizer, TEXTS[:1])[:, 0].tolist(), abs=1e-5)


def test_what_is_scored(tiny):
    model, tokenizer = build(tiny, ["neg", "pos"])
    prompt, answer = "What colour is the circle ?", " red"
    chat = [{"role": "system", "content": "Describe"}, {"role": "user", "content": prompt}]
    said = [{"role": "assistant", "content": answer}]
    cases = [
        ("auto", prompt, answer, prompt + answer),
        ("auto", chat, said, answer),
        ("completion", prompt, answer, answer),
        ("both", prompt, answer, prompt + answer),
        ("both", chat, said, f"Describe\n{prompt}\n{answer}"),
    ]
    for scored, asked, reply, text in cases:
        found = ClassifierReward(model, tokenizer, scored=scored)([asked], [reply])
        assert found == pytest.approx(logits(model, tokenizer, [text]).softmax(1)[:, 1].tolist(), abs=1e-5), scored


def test_of_a_long_text_the_end_counts(tiny):
    model, tokenizer = build(tiny, ["neg", "pos"])
    reward = ClassifierReward(model, tokenizer, max_length=6)
    side = tokenizer.truncation_side
    end = " green circle left of the square"
    assert len(tokenizer(end)["input_ids"]) >= 6
    assert reward([""], [" red" * 30 + end]) == pytest.approx(reward([""], [" blue" * 9 + end]), abs=1e-6)
    assert tokenizer.truncation_side == side


def test_by_name_pipeline_and_module(tiny, tmp_path):
    model, tokenizer = build(tiny, ["neg", "pos"])
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    expected = logits(model, tokenizer, TEXTS).softmax(1)
    rows = [Sample("", text) for text in TEXTS]
    specs = {
        f"sentiment-analysis:{tmp_path}": 1,
        f"sentiment-analysis:{tmp_path}:neg": 0,
        f"text-classification:{tmp_path}:1": 1,
    }
    for spec, label in specs.items():
        reward = load_reward(spec, device="cpu")
        assert reward(rows, {}).tolist() == pytest.approx(expected[:, label].tolist(), abs=1e-5)
        assert reward.__name__ == tmp_path.name + spec.partition(str(tmp_path))[2]
    odds = load_reward(f"sentiment-analysis:{tmp_path}:neg|output=logit|batch_size=1", device="cpu")
    assert odds(rows, {}).tolist() == pytest.approx(expected[:, 0].logit().tolist(), abs=1e-4)
    with pytest.raises(UserError, match="'logit' is no name=value"):
        load_reward(f"sentiment-analysis:{tmp_path}:neg|logit")
    for reward in (
        load_reward(model, processing_class=tokenizer),
        load_reward(pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")),
    ):
        assert reward(rows, {}).tolist() == pytest.approx(expected[:, 1].tolist(), abs=1e-5)
    with pytest.raises(UserError, match="with 2 labels is no reward model.*sentiment-analysis:MODEL:LABEL"):
        load_reward(str(tmp_path))


def test_what_cannot_be_is_refused(tiny, tmp_path):
    model, tokenizer = build(tiny, ["neg", "pos"])
    for options, words in (
        ({"output": "odds"}, "output is 'odds'; allowed: prob, logit"),
        ({"scored": "prompt"}, "scored is 'prompt'; allowed: auto, completion, both"),
        ({"batch_size": 0}, "batch_size 0"),
    ):
        with pytest.raises(UserError, match=words):
            ClassifierReward(model, tokenizer, **options)
    with pytest.raises(UserError, match="tokenizer is missing"):
        ClassifierReward(model)
    with pytest.raises(UserError, match="is a LlamaForCausalLM, which has no labels"):
        ClassifierReward(str(tiny("lm")))
    with pytest.raises(UserError, match="no such folder"):
        ClassifierReward(str(tmp_path / "missing"))
    generator = pipeline("text-classification", model=model, tokenizer=tokenizer, device="cpu")
    generator.task = "text-generation"
    with pytest.raises(UserError, match="pipeline for text-generation"):
        load_reward(generator)
