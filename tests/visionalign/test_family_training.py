"""Every family goes the whole way: rows to loss, training step, saving, reloading by transformers, generating."""

import pytest
import torch
from PIL import Image
from tiny import FAMILIES
from transformers import AutoModelForImageTextToText, AutoProcessor

from shared.objectives.supervised import nll
from visionalign import VLMSFTConfig, VLMSFTTrainer

SEVERAL = tuple(family for family in FAMILIES if family != "paligemma")  # which answers one question about one image


def row(*images, answer="red", question="what is it"):
    pictures = [Image.new("RGB", size, colour) for size, colour in images]
    parts = [{"type": "image"}] * len(pictures) + [{"type": "text", "text": question}]
    return {
        "images": pictures,
        "messages": [
            {"role": "user", "content": parts},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ],
    }


RED, BLUE = ((48, 40), (200, 20, 20)), ((40, 48), (20, 20, 200))


def rows_for(family):
    one = [row(RED), row(BLUE, answer="blue", question="which colour")]
    several = [row(RED, BLUE, answer="red blue"), row(BLUE, answer="blue")] if family in SEVERAL else []
    return one + several


@pytest.fixture(params=FAMILIES)
def trainer(request, tiny, tmp_path):
    args = VLMSFTConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, learning_rate=1e-3, save_strategy="no",
        eval_answers=4, max_new_tokens=3, disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    rows = rows_for(request.param)
    return VLMSFTTrainer(str(tiny(request.param)), args, train_dataset=rows, eval_dataset=rows)


def test_loss_equals_the_models_own_and_the_run_saves_what_reloads(trainer, tmp_path):
    model = trainer.model.eval()
    for start in range(0, len(trainer.train_dataset), 2):
        batch = trainer.data_collator([trainer.train_dataset[start], trainer.train_dataset[start + 1]])
        labels = batch.completion_ids.masked_fill(batch.completion_mask == 0, -100)
        with torch.no_grad():
            own = model(
                input_ids=batch.completion_ids,
                attention_mask=batch.completion_attention,
                labels=labels,
                **batch.model_inputs,
            ).loss
            count = batch.completion_mask.sum()
            ours, _ = trainer.policy.action_objective(model, batch, lambda logp, at, n=count: nll(logp) / n)
        assert ours.item() == pytest.approx(own.item(), rel=1e-5)
    assert trainer.policy.fused

    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer.train()
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert len(trainer.report.samples) == len(trainer.train_dataset)  # answers were generated
    assert {"loss", "mean_token_accuracy"} <= set(trainer.report.curves)

    trainer.save_model()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path).eval()
    AutoProcessor.from_pretrained(tmp_path)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    inputs, _ = trainer.data_collator.encode_prompts([trainer.train_dataset[0]])
    tokens = again.generate(**inputs, max_new_tokens=2, do_sample=False)
    assert tokens.shape[1] <= inputs["input_ids"].shape[1] + 2
