"""The generator gives what `model.generate` gives, each prompt run once, and log-probabilities of the policy."""

import logging

import pytest
import torch
from PIL import Image
from tiny import FAMILIES as VISION
from tiny import build_tokenizer
from tiny_text import FAMILIES as TEXT
from tiny_text import build_causal
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from shared.data.schema import Kind
from shared.errors import UserError
from shared.policies.base import GroupedBatch
from shared.policies.token import TokenPolicy
from shared.runtime import generation, generation_loop
from shared.runtime.generation import InProcessGenerator, Sampling
from visionalign.collators import VLMCollator
from visionalign.families import family_of, placeholder_ids

PAD, LENGTHS = 0, (6, 10, 9)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>", pad="<|endoftext|>")


def prompts(lengths=LENGTHS, width=12, seed=0):
    """Left-padded, with a column that is padding in every row where the width allows."""
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(50, 300, mask.shape, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids * mask, "attention_mask": mask}


def by_generate(model, inputs, most, ends=None, **options):
    """Greedy rows of transformers, cut after their first end token."""
    ends = list(ends) if ends else None
    options = {"do_sample": False, "max_new_tokens": most, "eos_token_id": ends, "pad_token_id": PAD, **options}
    tokens = model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :].tolist()
    at = [next((i + 1 for i, token in enumerate(row) if ends and token in ends), len(row)) for row in tokens]
    return [row[:end] for row, end in zip(tokens, at, strict=True)]


def greedy(generator, model, inputs, group=2, most=16, **options):
    return generator.generate(model, inputs, group, Sampling(max_new_tokens=most, temperature=0, **options))


def lists(rows):
    return [row.tolist() for row in rows]


def grouped(rows, group=2):
    return [row for row in rows for _ in range(group)]


def warnings(caplog):
    return [record for record in caplog.records if record.name.startswith("shared")]


def policy_batch(inputs, made, group):
    width = max(map(len, made.ids))
    ids, mask = torch.zeros(2, len(made.ids), width, dtype=torch.long)
    for row, tokens in enumerate(made.ids):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
    extras = {k: v for k, v in inputs.items() if k not in ("input_ids", "attention_mask")}
    return GroupedBatch(
        inputs["input_ids"], inputs["attention_mask"], ids, mask, mask, model_inputs=extras, group_size=group
    )


def assert_policy_agrees(model, inputs, made, group, temperature=1.0, atol=1e-5):
    batch = policy_batch(inputs, made, group)
    expected = TokenPolicy(model, temperature=temperature).log_probs(model, batch).logp
    for row, logp in enumerate(made.logp):
        assert logp.dtype == torch.float32 and len(logp) == len(made.ids[row])
        torch.testing.assert_close(logp, expected[row, : len(logp)].detach(), rtol=atol, atol=atol)


@pytest.mark.parametrize("lengths", [LENGTHS, (10, 10, 10)], ids=["padded", "equal"])
@pytest.mark.parametrize("family", TEXT)
def test_greedy_tokens_are_those_of_generate(family, lengths, tokenizer, caplog):
    model, inputs = build_causal(family), prompts(lengths)
    ends = sorted({row[5] for row in by_generate(model, inputs, 8)[:2]})  # so that two rows end early
    with caplog.at_level(logging.WARNING, logger="shared"):
        made = greedy(InProcessGenerator(tokenizer, end_ids=ends), model, inputs)
    expected = by_generate(model, inputs, 16, ends)
    assert lists(made.ids) == grouped(expected)
    assert made.finished == grouped([row[-1] in ends for row in expected]) and any(made.finished)
    assert (made.logp is None) == (family == "mamba") == bool(warnings(caplog))
    if made.logp is not None and family != "qwen3_next":  # whose rows would be run with padding elsewhere
        assert_policy_agrees(model, inputs, made, 2)


def vision(tiny, family):
    """A model, a generator of 20 tokens for it, and two prompts with pictures of different sizes."""
    config, processor = AutoConfig.from_pretrained(tiny(family)), AutoProcessor.from_pretrained(tiny(family))
    model = AutoModelForImageTextToText.from_pretrained(tiny(family)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(4)
    collate = VLMCollator(processor, family=family_of(config), kind=Kind.MESSAGES)
    noise = torch.Generator().manual_seed(0)

    def row(text, width):
        picture = torch.randint(0, 255, (32, width, 3), generator=noise, dtype=torch.uint8)
        chat = [{"role": "user", "content": text}, {"role": "assistant", "content": "red"}]
        return {"messages": chat, "images": [Image.fromarray(picture.numpy())]}

    inputs, _ = collate.encode_prompts([row("What colour is the circle?", 32), row("Where?", 48)])
    return model, processor.tokenizer, placeholder_ids(processor, config), inputs


@pytest.mark.parametrize("family", VISION)
def test_pictures_are_seen_as_generate_sees_them(family, tiny, caplog):
    model, tokenizer, images, inputs = vision(tiny, family)
    with caplog.at_level(logging.WARNING, logger="shared"):
        made = greedy(InProcessGenerator(tokenizer, end_ids=[], suppressed=images), model, inputs)
    expected = by_generate(model, inputs, 16, suppress_tokens=sorted(images))
    assert lists(made.ids) == grouped(expected) and not warnings(caplog)
    # a chunk of one group: the prompts with their pictures are still run together
    chunked = greedy(InProcessGenerator(tokenizer, end_ids=[], suppressed=images, max_rows=2), model, inputs)
    assert lists(chunked.ids) == lists(made.ids)
    if family != "paligemma":  # whose rows need to be told where the prompt ends
        assert_policy_agrees(model, inputs, made, 2, atol=1e-4)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.3}])
def test_sampled_rows(options, tokenizer):
    """What is drawn depends on the generator's state alone, and its log-probabilities are the policy's."""
    model, inputs = build_causal("mistral"), prompts()
    sampling = Sampling(max_new_tokens=12, **options)

    def made(seed, **settings):
        generator = InProcessGenerator(tokenizer, end_ids=range(100, 130), **settings)
        return generator.generate(model, inputs, 4, sampling, random=torch.Generator().manual_seed(seed))

    first = made(0)
    assert lists(first.ids) == lists(made(0).ids) != lists(made(1).ids)
    assert lists(made(0, max_rows=4).ids) == lists(first.ids)
    assert len(set(map(tuple, lists(first.ids)))) > 6 and 0 < sum(first.finished) < 12
    assert_policy_agrees(model, inputs, first, 4, sampling.temperature)


def test_without_a_generator_torch_draws(tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(lists(InProcessGenerator(tokenizer).generate(model, inputs, 2, Sampling(max_new_tokens=4)).ids))
    assert made[0] == made[1]


def passes_of(model, run):
    """The rows and columns of each pass that `run` makes."""
    shapes = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, args, out: shapes.append(tuple(args[0].shape)))
    run()
    hook.remove()
    return shapes


def test_prompts_run_once_and_finished_rows_leave(tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    rows = by_generate(model, inputs, 16)
    ends = [next(token for token in rows[0][3:12] if token not in rows[0][:3] + rows[1] + rows[2])]
    count = rows[0].index(ends[0]) + 1
    generator = InProcessGenerator(tokenizer, end_ids=ends)
    greedy(generator, model, inputs)  # the first use runs its check as well
    shapes = passes_of(model, lambda: greedy(generator, model, inputs))
    # the last token of a row is not run
    assert shapes == [(3, 10)] + [(6, 1)] * (count - 1) + [(4, 1)] * (16 - count)
    shapes = passes_of(model, lambda: greedy(generator, model, {k: v[:1] for k, v in inputs.items()}))
    assert shapes == [(1, 6)] + [(2, 1)] * (count - 1)  # nothing is left to do
    chunked = InProcessGenerator(tokenizer, end_ids=ends, max_rows=3)
    greedy(chunked, model, inputs)
    shapes = passes_of(model, lambda: greedy(chunked, model, inputs))
    assert shapes[: count + 1] == [(1, 6), *[(2, 1)] * (count - 1), (1, 10)]


def test_logits_of_prompts_are_made_at_their_last_tokens_alone(tokenizer):
    model, seen = build_causal("qwen2"), []
    model.lm_head.register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    generator = InProcessGenerator(tokenizer)
    greedy(generator, model, prompts(), most=3)
    assert set(seen) == {1}


def test_long_completions_make_room_and_windows_move_on(tokenizer, monkeypatch):
    monkeypatch.setattr("shared.runtime.generation_cache._ROOM", 2)
    monkeypatch.setattr(generation_loop, "_SHARE", 2.0)  # so rows leave only where the cache is copied anyway
    for family in ("gemma3_text", "qwen3_next"):
        model, inputs = build_causal(family), prompts()
        rows = by_generate(model, inputs, 60)
        ends = [rows[0][10]]
        made = greedy(InProcessGenerator(tokenizer, end_ids=ends), model, inputs, most=60)
        assert lists(made.ids) == grouped(by_generate(model, inputs, 60, ends))


def test_stop_strings_end_rows(tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    rows = by_generate(model, inputs, 16)
    stop = tokenizer.decode(rows[1][6:8])
    cut = [next((n for n in range(17) if stop in tokenizer.decode(row[:n])), 16) for row in rows]
    assert cut[1] <= 8
    for most in (16, 7, 9):
        made = greedy(InProcessGenerator(tokenizer, end_ids=[]), model, inputs, most=most, stop=(stop,))
        assert lists(made.ids) == grouped([row[: min(end, most)] for row, end in zip(rows, cut, strict=True)])
        assert made.finished == grouped([stop in tokenizer.decode(row[:most]) for row in rows])
        assert [len(logp) for logp in made.logp] == [len(row) for row in made.ids]


def test_a_stop_string_before_an_end_token_cuts_all_the_same(tokenizer):
    """What is looked at every few tokens: by then a row may have both."""
    model, inputs = build_causal("qwen2"), prompts()
    rows = by_generate(model, inputs, 16)
    for at in range(3, 8):
        for after in (1, 2, 3):
            stop, end = tokenizer.decode(rows[1][at - 1 : at + 1]), rows[1][at + after]
            assert stop
            made = greedy(InProcessGenerator(tokenizer, end_ids=[end]), model, inputs, stop=(stop,))
            for row, found, finished in zip(grouped(rows), lists(made.ids), made.finished, strict=True):
                stopped = next((n for n in range(17) if stop in tokenizer.decode(row[:n])), 17)
                ended = row.index(end) + 1 if end in row else 17
                assert found == row[: min(stopped, ended)] and finished == (min(stopped, ended) < 17)


@pytest.mark.parametrize("sampling", [{"temperature": 0}, {"temperature": 1}, {"top_k": 5, "top_p": 0.9}])
def test_a_model_that_has_diverged_is_told(sampling, tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    generator = InProcessGenerator(tokenizer, end_ids=[])
    with torch.no_grad():
        for before in (True, False):  # found by the first use's check, and later on
            if not before:
                generator.generate(model, inputs, 2, Sampling(max_new_tokens=3, **sampling))
            weight = model.model.norm.weight.clone()
            model.model.norm.weight.fill_(float("nan"))
            with pytest.raises(UserError, match="logits are not numbers .* lower learning_rate"):
                generator.generate(model, inputs, 2, Sampling(max_new_tokens=3, **sampling))
            model.model.norm.weight.copy_(weight)
            generator = InProcessGenerator(tokenizer, end_ids=[])


def test_processes_agree_on_how_they_generate(tokenizer, monkeypatch, caplog):
    """Another process cannot use the loop: its rows would have no log-probabilities, so this one's have none."""
    model, inputs, asked = build_causal("qwen2"), prompts(), []
    expected = by_generate(model, inputs, 4)

    def of_all(mine, op=None):
        asked.append(int(mine))
        mine.fill_(1)

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING, logger="shared"):
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda *_: 2)
        patch.setattr(torch.distributed, "all_reduce", of_all)
        generator = InProcessGenerator(tokenizer, end_ids=[])
        for _ in range(2):
            made = greedy(generator, model, inputs, most=4)
            assert made.logp is None and lists(made.ids) == grouped(expected)
    assert asked == [0] and "another process" in caplog.text


def test_end_tokens_are_those_of_model_and_tokenizer(tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    rows = by_generate(model, inputs, 16)
    model.generation_config.eos_token_id = [rows[0][2], 5]
    made = greedy(InProcessGenerator(tokenizer), model, inputs)
    ends = [rows[0][2], 5, tokenizer.eos_token_id]
    assert lists(made.ids) == grouped(by_generate(model, inputs, 16, ends))
    assert made.finished[0] and made.ids[0][-1] == rows[0][2]


def test_one_new_token(tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    made = greedy(InProcessGenerator(tokenizer, end_ids=[]), model, inputs, most=1)
    assert lists(made.ids) == grouped(by_generate(model, inputs, 1)) and not any(made.finished)


def test_the_penalty_is_that_of_generate(tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    made = greedy(InProcessGenerator(tokenizer, end_ids=[]), model, inputs, repetition_penalty=1.8)
    expected = by_generate(model, inputs, 16, repetition_penalty=1.8)
    assert lists(made.ids) == grouped(expected) != grouped(by_generate(model, inputs, 16))


@pytest.mark.parametrize("how", ["weights", "autocast"])
def test_half_precision(how, tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    model = model.to(torch.bfloat16) if how == "weights" else model
    with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        made = InProcessGenerator(tokenizer).generate(model, inputs, 2, Sampling(max_new_tokens=8))
        expected = TokenPolicy(model).log_probs(model, policy_batch(inputs, made, 2)).logp
    for row, logp in enumerate(made.logp):
        assert logp.dtype == torch.float32
        assert (logp - expected[row, : len(logp)].detach()).abs().mean() < 0.2


def test_images_are_cast_to_half_precision_weights(tiny):
    model, tokenizer, images, inputs = vision(tiny, "llava")
    made = greedy(InProcessGenerator(tokenizer, suppressed=images), model.bfloat16(), inputs, most=3)
    assert made.logp is not None


def test_adapters_and_no_trace_of_generation(tokenizer):
    from peft import LoraConfig, get_peft_model

    inputs = prompts()
    model = get_peft_model(build_causal("qwen2"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    model.eval()
    made = greedy(InProcessGenerator(tokenizer, end_ids=[]), model, inputs)
    assert made.logp is not None
    assert lists(made.ids) == grouped(by_generate(model, inputs, 16))
    with model.disable_adapter():
        assert lists(made.ids) != grouped(by_generate(model, inputs, 16))
    assert not any(each.requires_grad or each.is_inference() for each in (*made.ids, *made.logp))
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    with pytest.raises(ValueError, match="eval"):
        greedy(InProcessGenerator(tokenizer), model, inputs)


def test_prompt_learning_adapters_are_left_to_generate(tokenizer, caplog):
    from peft import PromptTuningConfig, get_peft_model

    model = get_peft_model(build_causal("qwen2"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with caplog.at_level(logging.WARNING, logger="shared"):
        made = greedy(InProcessGenerator(tokenizer, end_ids=[]), model.eval(), prompts(), most=4)
    assert made.logp is None and len(made.ids) == 6 and "its adapter" in caplog.text


def test_checkpointing_does_not_switch_the_cache_off(tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    model.gradient_checkpointing_enable()
    generator = InProcessGenerator(tokenizer, end_ids=[])
    greedy(generator, model.eval(), inputs)
    assert passes_of(model, lambda: greedy(generator, model, inputs, most=3)) == [(3, 10), (6, 1), (6, 1)]


class Odd(torch.nn.Module):
    """Weights that the loop's passes of single tokens go through differently."""

    def forward(self, hidden):
        return hidden + (0.5 if hidden.shape[1] == 1 and hidden.shape[0] > 2 else 0)


def test_a_model_that_disagrees_is_left_to_generate(tokenizer, caplog):
    model, inputs = build_causal("qwen2"), prompts()
    expected = by_generate(model, inputs, 8)
    model.model.norm = torch.nn.Sequential(model.model.norm, Odd())
    generator = InProcessGenerator(tokenizer, end_ids=[])
    with caplog.at_level(logging.WARNING, logger="shared"):
        for _ in range(2):
            made = greedy(generator, model, {k: v[:2] for k, v in inputs.items()}, most=8)
    assert lists(made.ids) == grouped(expected[:2]) and made.logp is None
    assert len(warnings(caplog)) == 1 and "its logits differ" in caplog.text


@pytest.mark.parametrize("max_rows", [None, 4])
def test_rows_by_generate(max_rows, tokenizer):
    """What cannot use the loop obeys the same settings."""
    model, inputs = build_causal("mamba"), prompts()
    rows = by_generate(model, inputs, 12)
    stop = tokenizer.decode(rows[1][4:6])
    cut = [next((n for n in range(13) if stop in tokenizer.decode(row[:n])), 12) for row in rows]
    generator = InProcessGenerator(tokenizer, end_ids=[rows[0][3]], max_rows=max_rows)
    made = greedy(generator, model, inputs, most=12, stop=(stop,))
    ends = [
        min(end, row.index(rows[0][3]) + 1 if rows[0][3] in row else 12) for row, end in zip(rows, cut, strict=True)
    ]
    if max_rows is None:  # mamba sees padding, so that rows depend on the batch they are in
        assert lists(made.ids) == grouped([row[:end] for row, end in zip(rows, ends, strict=True)])
        assert made.finished[0] and made.finished[2]

    def sampled(seed):
        state = torch.get_rng_state()
        made = generator.generate(
            model, inputs, 2, Sampling(max_new_tokens=6), random=torch.Generator().manual_seed(seed)
        )
        assert torch.equal(state, torch.get_rng_state())
        return lists(made.ids)

    assert sampled(0) == sampled(0) != sampled(1)
    assert len(sampled(0)) == 6


def test_limits(tokenizer):
    with pytest.raises(UserError, match="10 tokens and 60 new ones are more than the 64 positions"):
        greedy(InProcessGenerator(tokenizer), build_causal("gpt2"), prompts(), most=60)
    with pytest.raises(UserError, match="max_rows"):
        InProcessGenerator(tokenizer, max_rows=0)


def test_greedy_answers(tokenizer):
    model, inputs = build_causal("qwen2"), prompts()
    rows = by_generate(model, inputs, 6, [1, tokenizer.eos_token_id])
    found = generation.greedy_answers(model, inputs, tokenizer, max_new_tokens=6)
    assert found == tokenizer.batch_decode(rows, skip_special_tokens=True)
