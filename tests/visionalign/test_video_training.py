"""Training on videos the whole way: supervised with held-out questions answered, and by rewards of written answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from test_video_batches import collator
from tiny_clips import FEW, chat, clip, mixed, noise
from tiny_online import even
from tiny_pictures import loud, make, picture, plain_log_probs, sampled
from tiny_videos import write_video
from transformers import AutoModelForImageTextToText, AutoProcessor

from shared.data.rows import ROW
from shared.data.schema import Kind
from shared.data.videos import Video
from shared.errors import DataError
from shared.policies.base import GroupedBatch
from shared.policies.token import TokenPolicy
from shared.runtime.generation import InProcessGenerator, Sampling
from visionalign import VLMSFTConfig, VLMSFTTrainer
from visionalign.prompting import VLMPrompts


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava"])
def test_training_answering_saving(family, tiny, tmp_path):
    path = write_video(str(tmp_path / "a.mp4"), noise(0, 8))
    rows = [*mixed(), {"messages": chat("And here?", "right"), "videos": [path], "kind": "direction"}]
    args = VLMSFTConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=3, max_steps=2, learning_rate=1e-2,
        save_strategy="no", eval_answers=6, max_new_tokens=2, disable_tqdm=True, logging_steps=1, video_num_frames=2,
        video_cache=str(tmp_path / "frames"),
    )  # fmt: skip
    trainer = VLMSFTTrainer(str(tiny(family)), args, train_dataset=rows, eval_dataset=rows)
    trainer.train()
    shown = [len(sample.images) for sample in trainer.report.samples]
    assert shown == [2, 1, 0, 4, 3, 2]
    assert all(sample.before is not None and sample.after is not None for sample in trainer.report.samples)
    assert list((tmp_path / "frames").rglob("*.np*"))

    trainer.save_model()
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    AutoProcessor.from_pretrained(tmp_path / "out")
    inputs, _ = trainer.data_collator.encode_prompts([trainer.train_dataset[at] for at in (0, 3)])
    with torch.no_grad():
        logits = [model(**inputs).logits for model in (trainer.model.eval(), again)]
    assert torch.equal(*logits)


def test_videos_are_decoded_in_data_workers_and_broken_ones_left_out(tiny, tmp_path):
    (tmp_path / "cut.mp4").write_bytes(Path(write_video(str(tmp_path / "a.mp4"), noise(0, 8))).read_bytes()[:700])
    rows = [{"messages": chat("What moves?", "left"), "videos": [str(tmp_path / "a.mp4")]} for _ in range(5)]
    rows.append({"messages": chat("What moves?", "left"), "videos": [str(tmp_path / "cut.mp4")]})
    args = VLMSFTConfig(
        output_dir=str(tmp_path / "out"), per_device_train_batch_size=2, num_train_epochs=1, eval_answers=0,
        save_strategy="no", disable_tqdm=True, video_num_frames=2, dataloader_num_workers=2, check_rows=0,
        on_bad_row="skip",
    )  # fmt: skip
    trainer = VLMSFTTrainer(str(tiny("qwen2_vl")), args, train_dataset=rows)
    trainer.train()
    assert trainer.state.global_step == 3
    assert any("row 5: left out" in note and "cut.mp4" in note for note in trainer.report.notes)


def prompts(path, **options):
    return VLMPrompts(collator(path, FEW, Kind.PROMPT_ONLY), **options)


def ask(text, **shown):
    return {"prompt": [{"role": "user", "content": text}], **shown}


ASKS = [
    ask("What moves?", videos=[clip(0)]),
    ask("What colour is it?", images=[picture(1)]),
    ask("How many?"),
    ask("First <video> then <video>, what?", videos=[clip(2, 2), clip(3, 4, 24, 24)]),
    ask("See <image> and <video> now.", videos=[clip(4)], images=[picture(5)]),
]


@pytest.mark.parametrize(
    "family", ["llava_next_video", "llava_onevision", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
)
def test_prompts_with_videos_are_run_once_for_their_group(family, tiny):
    """Put together they are the processor's batch; with completions the figures are those of whole rows."""
    encoder = prompts(tiny(family))
    made = encoder.prompts(ASKS)
    expected, _ = encoder.collator.encode_prompts(ASKS)
    found = encoder.inputs(made)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    model = loud(AutoModelForImageTextToText.from_pretrained(tiny(family)).eval())
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, 300, (2 * len(made), 4), generator=generator)
    ones = torch.ones_like(ids)

    def batch(prompts, group):
        inputs = encoder.inputs(prompts)
        ids_, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        return GroupedBatch(ids_, mask, ids, ones, ones, inputs, group)

    policy = TokenPolicy(model)
    with torch.no_grad():
        shared = policy.log_probs(model, batch(made, 2)).logp
        assert policy.sharing.applies(model, batch(made, 2), None)  # no disagreement was found
        whole = policy.log_probs(model, batch([each for each in made for _ in range(2)], 1)).logp
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_what_is_run_behind_a_long_video_stands_where_it_does_in_a_row(family, tiny):
    """Behind a video of more frames than places across, and few words: its last frame's time is no token's place."""
    encoder = VLMPrompts(collator(tiny(family), None, Kind.PROMPT_ONLY))
    made = encoder.prompts([ask("x <video>", videos=[{"frames": noise(0, 40, 16, 16), "fps": 0.5}])])
    model = loud(AutoModelForImageTextToText.from_pretrained(tiny(family)).eval())
    policy = TokenPolicy(model)
    written = InProcessGenerator(encoder.tokenizer).generate(
        model, encoder.inputs(made), 2, Sampling(max_new_tokens=6), random=torch.Generator().manual_seed(0)
    )
    ids = torch.nn.utils.rnn.pad_sequence(written.ids, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in written.ids], batch_first=True)

    def logp(prompts, group):
        inputs = encoder.inputs(prompts)
        prompt_ids, prompt_mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
        batch = GroupedBatch(prompt_ids, prompt_mask, ids, mask, mask, inputs, group)
        with torch.no_grad():
            return policy.log_probs(model, batch).logp, group == 1 or policy.sharing.applies(model, batch, None)

    whole, _ = logp(made * 2, 1)
    shared, is_shared = logp(made, 2)
    assert is_shared
    torch.testing.assert_close(shared, whole, rtol=1e-4, atol=1e-5)
    for at, row in enumerate(written.logp):
        torch.testing.assert_close(row, whole[at, : len(row)], rtol=1e-4, atol=1e-5)


def test_learning_from_rewards_on_videos(tiny, tmp_path):
    seen = []

    def reward(prompts, completions, completion_ids, videos=None, **columns):
        seen.append((prompts[0], videos))
        return even(completion_ids)

    rows = [ask("What <video> moves?", videos=[clip(at)], number=at) for at in range(4)]
    trainer = make(tiny("qwen2_5_vl"), tmp_path, reward=reward, rows=rows, video_num_frames=2, eval_answers=2,
                   eval_dataset=rows[:2], max_new_tokens=2)  # fmt: skip
    rollout = sampled(trainer, [trainer.train_dataset[0], trainer.train_dataset[1]])
    batch = trainer.actor.batch(rollout, list(range(8)), 4)
    logp = trainer.policy.log_probs(trainer.model, batch).logp
    for at in (0, 5):
        ids = rollout.actions.ids[at]
        alone = plain_log_probs(trainer, trainer.train_dataset[at // 4], ids)
        torch.testing.assert_close(logp[at, : len(ids)].detach(), alone, rtol=1e-4, atol=1e-5)
    trainer.train()
    prompt, videos = next(call for call in seen if len(call[1]) == 8)
    (part,) = [part for part in prompt[0]["content"] if part["type"] == "video"]
    assert isinstance(part["video"], Video) and part["video"].frames.shape == (2, 32, 40, 3)
    assert len(videos[0]) == 1
    assert all(sample.images for sample in trainer.report.samples)


def test_prompts_of_a_sharded_model_all_show_the_same(tiny):
    encoder = prompts(tiny("qwen2_vl"), needs_image=True)
    encoder.prompts(ASKS[:1])
    encoder.prompts([ASKS[3]])
    for row in (ASKS[1], ASKS[4]):
        with pytest.raises(DataError, match="row 7: does not show what the first prompt shows"):
            encoder.prompts([{**row, ROW: 7}])
    with pytest.raises(DataError, match="row 7: has no image"):
        encoder.prompts([{**ASKS[2], ROW: 7}])
    with pytest.raises(DataError, match="row 7: its prompt has .* videos with video_num_frames or video_max_pixels"):
        prompts(tiny("qwen2_vl"), longest=10).prompts([{**ASKS[0], ROW: 7}])
