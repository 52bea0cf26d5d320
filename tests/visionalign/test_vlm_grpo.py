"""VLMGRPOTrainer: the sampler agrees with the policy in every family, images are seen once a group, and it learns."""

import json

import pytest
import torch
from tiny import FAMILIES
from tiny_online import history
from tiny_pictures import asks, loud, make, picture, plain_log_probs, sampled, seen_by

from shared.errors import DataError, UserError
from visionalign.families import placeholder_ids

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(params=FAMILIES)
def family(request, tiny):
    return request.param, tiny(request.param)


def rows_of(values, lengths):
    return [row[:length] for row, length in zip(values, lengths.tolist(), strict=True)]


def agrees(trainer, rollout, rows, group_size):
    """The policy's log-probabilities of some rows of a rollout are those of its sampler."""
    batch = trainer.actor.batch(rollout, rows, group_size)
    found = trainer.policy.log_probs(trainer.model, batch).logp
    for row, logp in zip(rows, rows_of(found, rollout.lengths[rows]), strict=True):
        torch.testing.assert_close(logp.detach(), rollout.logp[row], **CLOSE)
    return batch


def test_the_policy_gives_the_samplers_log_probabilities(family, tmp_path, monkeypatch):
    """With shared prompts, one completion a prompt, whole rows, and activation checkpointing."""
    name, path = family
    rows = asks(name)
    trainer = make(path, tmp_path, name, max_completion_length=7)
    loud(trainer.model)
    rollout = sampled(trainer, rows)
    assert trainer.policy.fused
    assert all(trainer.actor.engine._able.values()), "no family falls back to transformers' generate"
    everything = list(range(rollout.rows))
    batch = agrees(trainer, rollout, everything, 4)
    assert trainer.policy.sharing._possible
    agrees(trainer, rollout, everything[::4], 1)
    agrees(trainer, rollout, [4, 5, 20, 21], 2)

    for row, (ids, logp) in enumerate(zip(rollout.actions.ids, rollout.logp, strict=True)):
        if row % 4 == 1:
            torch.testing.assert_close(plain_log_probs(trainer, rows[row // 4], ids), logp, **CLOSE)

    monkeypatch.setattr(trainer.policy.sharing, "_possible", False)
    assert batch.alone is not None
    agrees(trainer, rollout, everything, 4)
    monkeypatch.undo()
    trainer.model.activation_checkpointing_enable()
    agrees(trainer, rollout, everything, 4)


def test_the_gradient_is_that_of_whole_rows(family, tmp_path, monkeypatch):
    name, path = family
    trainer = make(path, tmp_path, name)
    loud(trainer.model)
    rollout = sampled(trainer, asks(name, 3))
    gradients = []
    for shared in (True, False):
        monkeypatch.setattr(trainer.policy.sharing, "_possible", shared)
        trainer.model.zero_grad()
        batch = trainer.actor.batch(rollout, list(range(12)), 4)
        logp = trainer.policy.log_probs(trainer.model, batch).logp
        (logp * torch.linspace(-1, 1, logp.numel()).view_as(logp)).sum().backward()
        gradients.append({n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    size = max(value.abs().max().item() for value in gradients[1].values())
    for key, value in gradients[1].items():
        assert (gradients[0][key] - value).abs().max() <= 2e-5 * size, key
    assert any("vision" in key or "visual" in key for key, value in gradients[0].items() if value.abs().max() > 0)


def test_images_are_encoded_once_a_prompt(family, tmp_path):
    """Once in writing and once in the update, whatever G is; and once in the reference."""
    name, path = family
    trainer = make(path, tmp_path, name, rows=asks(name, 2), beta=0.1, learning_rate=1e-3)
    trainer.train()  # the first use of a model compares its ways of being run
    assert all(value == value for value in history(trainer, "loss")) and len(history(trainer, "kl")) == 2
    trainer.model_wrapped = trainer.model
    prompts = trainer.actor.encoder.prompts([trainer.train_dataset[at] for at in range(2)])
    with seen_by(trainer.model) as once, torch.no_grad():
        trainer.model(**trainer.actor.encoder.inputs(prompts))
    with seen_by(trainer.model) as writing:
        batches, items = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, "cpu")
    with seen_by(trainer.model) as update:
        loss = trainer.compute_loss(trainer.model, batches[0], num_items_in_batch=items)
        loss.backward()
    assert batches[0].batch.rows == 8
    assert len(once) > 0 and writing == once == update


def test_image_tokens_are_never_written(family, tmp_path):
    """Not even where the model thinks them certain, and they still count in the log-probabilities."""
    name, path = family
    trainer = make(path, tmp_path, name, eval_dataset=asks(name, 2))
    places = sorted(placeholder_ids(trainer.actor.encoder.collator.processor, family=trainer.actor.encoder.family))
    head = trainer.model.get_output_embeddings()
    plain = head.forward

    def pushed(hidden, **kwargs):
        if kwargs:
            return plain(hidden, **kwargs)
        logits = plain(hidden).clone()
        logits[..., places] += 30.0
        return logits

    head.forward = pushed
    for mode in ("train", "eval", "greedy"):
        rollout = sampled(trainer, asks(name, 3), mode=mode)
        written = {token for ids in rollout.actions.ids for token in ids.tolist()}
        assert written and not written & set(places)
    logp = sampled(trainer, asks(name, 3)).logp
    assert logp is None or max(float(row.max()) for row in logp) < -20


# ---- One family ----------------------------------------------------------------------------------------------------


def test_the_reward_rises(tiny, tmp_path):
    trainer = make(
        tiny("llava"),
        tmp_path,
        rows=asks("llava", 8),
        max_steps=25,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
    )
    trainer.train()
    rewards = history(trainer, "reward")
    assert sum(rewards[:2]) / 2 < 0.6
    assert sum(rewards[-3:]) / 3 > 0.75


def test_an_adapter_on_the_language_model_learns_and_its_base_is_the_reference(tiny, tmp_path):
    from peft import LoraConfig

    targets = r".*language_model.*(v_proj|down_proj)|lm_head"
    lora = LoraConfig(r=8, lora_alpha=32, target_modules=targets, task_type="CAUSAL_LM")
    trainer = make(
        tiny("llava"),
        tmp_path,
        rows=asks("llava", 8),
        peft_config=lora,
        beta=0.02,
        max_steps=20,
        learning_rate=3e-2,
        lr_scheduler_type="constant",
        per_device_train_batch_size=16,
    )
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora" not in n}
    moved = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora" in n}
    assert moved and all("language_model" in n or "lm_head" in n for n in moved)
    trainer.train()
    kl, rewards = history(trainer, "kl"), history(trainer, "reward")
    assert abs(kl[0]) < 1e-4 and kl[-1] > 1e-3
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").is_file()


def test_the_reference_sees_the_images(tiny, tmp_path):
    """β's divergence is that of a copy of the model before training, images and all."""
    trainer = make(tiny("qwen2_vl"), tmp_path, "qwen2_vl", beta=0.1, ref_model=str(tiny("qwen2_vl")))
    rows = asks("qwen2_vl", 3)
    rollout = sampled(trainer, rows)
    trainer.model_wrapped = trainer.model
    batch = trainer.actor.batch(rollout, list(range(12)), 4)
    found = trainer.reference.log_probs(trainer.model, batch)
    for row in (0, 5, 10):
        expected = plain_log_probs(trainer, rows[row // 4], rollout.actions.ids[row])
        torch.testing.assert_close(found[row, : len(expected)], expected, **CLOSE)
    loud(trainer.model)
    torch.testing.assert_close(trainer.reference.log_probs(trainer.model, batch), found, **CLOSE)


def test_rewards_get_the_images_and_the_other_columns(tiny, tmp_path):
    seen = []

    def reward(prompts, completions, images, number, completion_ids, **_):
        for prompt, completion, own, at in zip(prompts, completions, images, number, strict=True):
            placed = [part["image"] for part in prompt[0]["content"] if part["type"] == "image"]
            assert len(placed) == len(own) and all(one is two for one, two in zip(placed, own, strict=True))
            assert [image.tobytes() for image in own] == [i.tobytes() for i in asks("llava")[at]["images"]]
            assert completion[0]["role"] == "assistant"
            seen.append((at, len(own)))
        return [float(len(ids)) for ids in completion_ids]

    trainer = make(tiny("llava"), tmp_path, reward=reward, max_steps=3, shuffle_dataset=False)
    trainer.train()
    assert [at for at, _ in seen] == [at for at in range(6) for _ in range(4)]
    assert {count for _, count in seen} == {0, 1, 2}


def noisy(completion_ids, **_):
    return torch.rand(len(completion_ids)).tolist()


@pytest.mark.parametrize("name", ["qwen2_vl", "idefics3"])
def test_a_run_goes_on_in_the_middle_of_a_round(name, tiny, tmp_path):
    def run(folder, resume=None, **options):
        shape = {"per_device_train_batch_size": 4, "steps_per_generation": 4, "num_iterations": 2, "max_steps": 6}
        trainer = make(tiny(name), folder, name, reward=noisy, beta=0.1, sample_every=1, **shape, **options)
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        return trainer

    saving = {"save_strategy": "steps", "save_steps": 3, "save_total_limit": None}
    whole = run(tmp_path / "whole")
    cut = run(tmp_path / "cut", **saving)
    state = torch.load(tmp_path / "cut" / "checkpoint-3" / "online-0.pt", weights_only=True)
    assert 0 < state["buffer"]["cursor"] < 8
    torch.manual_seed(99)
    after = run(tmp_path / "cut", resume=tmp_path / "cut" / "checkpoint-3", **saving)
    for other in (cut, after):
        for (key, one), two in zip(whole.model.state_dict().items(), other.model.state_dict().values(), strict=True):
            assert torch.equal(one, two), key
        assert history(other, "reward") == history(whole, "reward")


def test_an_evaluation_and_the_answers_before_and_after(tiny, tmp_path):
    rows = [{**row, "kind": "odd" if row["number"] % 2 else "plain"} for row in asks("llava", 5)]
    options = {"eval_dataset": rows, "eval_answers": 4, "num_generations_eval": 3, "per_device_eval_batch_size": 2}
    trainer = make(tiny("llava"), tmp_path, **options)
    found = trainer.evaluate()
    assert found == {k: pytest.approx(v) for k, v in trainer.evaluate().items() if "per_second" not in k} | {
        k: v for k, v in found.items() if "per_second" in k or "runtime" in k
    }
    assert {"eval_reward", "eval_pass@1", "eval_pass@3", "eval_completions/mean_length"} <= found.keys()
    trainer.train()
    assert trainer.report.before.keys() == trainer.report.after.keys() == {"even", "even/odd", "even/plain"}
    sample = trainer.report.samples[0]
    assert len(sample.images) == 1 and sample.question == "What colour is circle?"


def test_the_reports_tables_show_the_images(tiny, tmp_path):
    rows = [{"prompt": "What colour?", "images": [picture(1), picture(2, 700, 300)]}, asks("llava", 4)[3]]
    trainer = make(tiny("llava"), tmp_path, rows=rows, max_steps=1, shuffle_dataset=False)
    trainer.train()
    table = json.loads((tmp_path / "report" / "report.json").read_text())["rollouts"][0]
    assert [len(prompt["completions"]) for prompt in table["prompts"]] == [4, 4]
    assert table["prompts"][0]["prompt"] == "What colour?"
    shown = trainer.report.rollouts[0].rows
    assert [len(row.images) for row in shown] == [2] * 4 + [0] * 4
    assert [(image.width, image.height) for image in shown[0].images] == [(32, 40), (256, 110)]
    assert shown[0].images[0].address in (tmp_path / "report" / "index.html").read_text()


def test_frozen_parts_stay(tiny, tmp_path):
    trainer = make(tiny("llava"), tmp_path, freeze_vision_tower=True, freeze_projector=True, max_steps=1)
    before = {n: p.clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and not any("vision_tower" in n or "projector" in n for n in changed)


# ---- What cannot be done -------------------------------------------------------------------------------------------


def test_options_that_other_libraries_take(tiny, tmp_path):
    from transformers import TrainingArguments

    from visionalign import VLMGRPOConfig, VLMGRPOTrainer

    args = VLMGRPOConfig(output_dir=str(tmp_path), trust_remote_code=False)
    assert args.model_init_kwargs == {"trust_remote_code": False}
    plain = TrainingArguments(output_dir=str(tmp_path), max_steps=3, learning_rate=0.5)
    trainer = VLMGRPOTrainer(str(tiny("llava")), noisy, plain, train_dataset=asks("llava"))
    assert (trainer.args.max_steps, trainer.args.learning_rate, trainer.args.beta) == (3, 0.5, 0.0)


def test_mistakes_are_told_in_a_sentence(tiny, tmp_path, monkeypatch):
    from visionalign import VLMGRPOTrainer

    llava = tiny("llava")
    with pytest.raises(UserError, match="text-only"):
        make(tiny("lm"), tmp_path)
    with pytest.raises(DataError, match=r"row 0: its prompt has \d\d tokens, max_prompt_length is 12"):
        make(llava, tmp_path, max_prompt_length=12)
    with pytest.raises(DataError, match="row 0: has no image"):
        make(tiny("paligemma"), tmp_path, rows=[{"prompt": "What?", "images": []}] * 4)
    with pytest.raises(UserError, match="use_vllm: a server's completions endpoint takes tokens alone"):
        make(llava, tmp_path, use_vllm=True)
    with pytest.raises(UserError, match="vllm_mode is not an option of VLMGRPOConfig. Leave it out"):
        make(llava, tmp_path, vllm_mode="colocate")
    with pytest.raises(UserError, match="ref_model_name_or_path: there is no reference where beta is 0"):
        make(llava, tmp_path, ref_model_name_or_path="no/such")
    held_out = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": asks("llava", 2)}
    with monkeypatch.context() as patched:
        patched.setattr("visionalign.policy_gradient.load_vlm", None)
        for options, message in (
            ({"top_p": 2.0}, "top_p"),
            ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
            ({"metric_for_best_model": "eval_loss", **held_out}, "metric_for_best_model eval_loss"),
        ):
            with pytest.raises(UserError, match=message):
                make(llava, tmp_path, **options)
    with pytest.raises(UserError, match="There is no reward"):
        make(llava, tmp_path, reward=None)
    with pytest.raises(UserError, match="VLMGRPOConfig"):
        VLMGRPOTrainer(str(llava), noisy, object(), train_dataset=asks("llava"))
    with pytest.raises(UserError, match="no argument tools"):
        VLMGRPOTrainer(str(llava), noisy, train_dataset=asks("llava"), tools=[])
    with pytest.raises(UserError, match="answr"):
        make(llava, tmp_path, reward=lambda completions, answr: [0.0])
    with pytest.raises(DataError):
        make(llava, tmp_path, rows=[{"prompt": "What?", "images": ["/no/such/file.png"]}] * 4)
