"""A prompt that is run once for its completions gives the figures and the gradients of whole rows."""

import logging

import pytest
import torch
from tiny_text import FAMILIES, VOCABULARY, build_causal
from torch.utils._python_dispatch import TorchDispatchMode

from shared.errors import UserError
from shared.policies import prefix
from shared.policies.base import GroupedBatch
from shared.policies.prefix import PrefixSharing, shared_hidden, trimmed
from shared.policies.token import TokenPolicy, whole_rows

WITHOUT_CACHE = ("mamba", "qwen3_next")
EAGER_ONLY = ("gemma2", "bloom")
CASES = [
    (family, attention)
    for family in FAMILIES
    if family not in WITHOUT_CACHE
    for attention in ("sdpa", "eager")
    if attention == "eager" or family not in EAGER_ONLY
]


def batch_of(group=2, prompts=(6, 10, 9), width=12, completions=8, seed=0):
    """Ragged rows with pad columns on both sides; the fourth completion is empty, one first token is not counted."""
    generator = torch.Generator().manual_seed(seed)
    rows = len(prompts) * group
    lengths = torch.tensor([[7, 3, 5, 0, 1, 6][i % 6] for i in range(rows)])
    prompt_mask = (torch.arange(width) >= width - torch.tensor(prompts)[:, None]).long()
    attention = (torch.arange(completions) < lengths[:, None]).long()
    mask = attention.clone()
    mask[1, 0] = 0
    return GroupedBatch(
        torch.randint(50, 300, prompt_mask.shape, generator=generator) * prompt_mask,
        prompt_mask,
        torch.randint(50, 300, attention.shape, generator=generator) * attention,
        attention,
        mask,
        group_size=group,
    )


def objective_of(policy, model, batch):
    """Loss and every gradient, of an objective that weighs each token differently."""
    count = int(batch.completion_mask.sum())
    weights = torch.linspace(0.2, 1, count) / count
    model.zero_grad()
    loss, stats = policy.action_objective(model, batch, lambda logp, at: weights[at] * logp.square(), entropy=True)
    loss.backward()
    return loss.detach(), stats, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(found, expected):
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[1][:3], expected[1][:3], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert found[2].keys() == expected[2].keys()
    for name, gradient in expected[2].items():
        scale = gradient.abs().max().item()
        torch.testing.assert_close(found[2][name], gradient, rtol=0, atol=1e-5 * max(scale, 1), msg=name)


def tokens_run(model, run):
    """The tokens that the body embeds while `run` runs, call by call."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    run()
    hook.remove()
    return [tuple(shape) for shape in seen]


def is_shared(policy, model, batch):
    policy.log_probs(model, batch)  # the first use runs its check as well
    return len(tokens_run(model, lambda: policy.log_probs(model, batch))) == 2


@pytest.mark.parametrize(("family", "attention"), CASES)
def test_loss_and_gradients_equal_those_of_whole_rows(family, attention):
    model = build_causal(family, attention=attention).train()
    batch = batch_of(group=2 if attention == "sdpa" else 4)
    policy = TokenPolicy(model)
    found = objective_of(policy, model, batch)
    assert is_shared(policy, model, batch)
    assert_same(found, objective_of(TokenPolicy(model, share_prefix=False), model, batch))


@pytest.mark.parametrize("family", ["qwen2", "mistral", "bloom"])
def test_log_probs_stand_where_their_tokens_stand(family):
    model, batch = build_causal(family), batch_of(group=4)
    found = TokenPolicy(model).log_probs(model, batch, entropy=True, collision=True)
    expected = TokenPolicy(model, share_prefix=False).log_probs(model, batch, entropy=True, collision=True)
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(found, name), values, rtol=1e-5, atol=1e-5)
    assert torch.equal(found.mask, batch.completion_mask.float())

    prompt = batch.prompt_ids[2][batch.prompt_mask[2].bool()]
    row = torch.cat([prompt, batch.completion_ids[8, :5]])
    alone = model(input_ids=row[None]).logits[0].log_softmax(-1)
    expected = alone[len(prompt) - 1 : -1].gather(1, batch.completion_ids[8, :5, None]).squeeze(1)
    torch.testing.assert_close(found.logp[8, :5], expected, rtol=1e-5, atol=1e-5)


def test_each_prompt_is_run_once_and_padding_not_at_all():
    model, batch = build_causal("qwen2"), batch_of(group=4)
    policy = TokenPolicy(model)
    policy.log_probs(model, batch)
    # 10 tokens in the longest prompt; 7 in the longest completion, whose last predicts nothing
    assert tokens_run(model, lambda: policy.log_probs(model, batch)) == [(3, 10), (12, 6)]
    plain = TokenPolicy(model, share_prefix=False)
    plain.log_probs(model, batch)
    assert tokens_run(model, lambda: plain.log_probs(model, batch)) == [(12, 17)]


def test_only_counted_tokens_cost_a_run():
    model, batch = build_causal("qwen2"), batch_of(group=4)
    batch.completion_mask[:, 2:] = 0
    policy = TokenPolicy(model)
    policy.log_probs(model, batch)
    assert tokens_run(model, lambda: policy.log_probs(model, batch)) == [(3, 10), (12, 1)]
    batch.completion_mask[:] = 0
    loss, stats = policy.action_objective(model, batch, lambda logp, at: -logp)
    loss.backward()
    assert loss == 0 and stats.logp.shape == (0,)


class LogitRows(TorchDispatchMode):
    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, torch.Tensor) and tensor.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, tensor.numel() // VOCABULARY)
        return out


def test_logits_exist_for_counted_tokens_alone():
    model, batch = build_causal("qwen2"), batch_of(group=4)
    policy = TokenPolicy(model)
    policy.log_probs(model, batch)
    counted = int(batch.completion_mask.sum())
    with LogitRows() as seen:
        objective_of(policy, model, batch)
    assert seen.rows == max(counted, 32)  # 32: the head's own weight, transposed


def test_an_empty_prompt_beside_others():
    model, batch = build_causal("qwen2"), batch_of(prompts=(6, 0, 9))
    policy = TokenPolicy(model)
    found = policy.log_probs(model, batch)
    assert is_shared(policy, model, batch)
    expected = TokenPolicy(model, share_prefix=False).log_probs(model, batch)
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-5, atol=1e-5)
    assert found.mask[2:4, 0].tolist() == expected.mask[2:4, 0].tolist() == [0, 0]


def test_positions_stay_inside_a_table_of_learnt_ones():
    # 60 + 4 tokens fill GPT-2's table of 64; the other row's completion is longer
    model, batch = build_causal("gpt2"), batch_of(prompts=(60, 8, 8, 8), width=60, completions=30)
    batch.completion_attention = (torch.arange(30) < torch.tensor([4, 3, 5, 30, 2, 2, 2, 2])[:, None]).long()
    batch.completion_mask = batch.completion_attention.clone()
    shared = shared_hidden(model.transformer, trimmed(batch))
    assert shared.shape == (8, 31, 32) and shared.isfinite().all()


@pytest.mark.parametrize("family", WITHOUT_CACHE)
def test_models_that_keep_more_than_keys_and_values_run_whole_rows(family):
    model, batch = build_causal(family), batch_of()
    policy = TokenPolicy(model)
    found = objective_of(policy, model, batch)
    assert not is_shared(policy, model, batch)
    assert_same(found, objective_of(TokenPolicy(model, share_prefix=False), model, batch))


def test_activation_checkpointing_rules_sharing_out_while_training():
    model, batch = build_causal("qwen2").train(), batch_of()
    expected = objective_of(TokenPolicy(model, share_prefix=False), model, batch)
    model.activation_checkpointing_enable()
    policy = TokenPolicy(model)
    assert not is_shared(policy, model, batch)
    assert_same(objective_of(policy, model, batch), expected)
    model.eval()
    with torch.no_grad():
        assert is_shared(policy, model, batch)


def test_wrapped_layers_rule_sharing_out_under_gradient():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model, batch = build_causal("qwen2").train(), batch_of()
    expected = objective_of(TokenPolicy(model, share_prefix=False), model, batch)[0]
    model.model.layers[0] = checkpoint_wrapper(model.model.layers[0])
    policy = TokenPolicy(model)
    assert not is_shared(policy, model, batch)
    torch.testing.assert_close(objective_of(policy, model, batch)[0], expected)


@pytest.mark.parametrize(
    ("changed", "shared"),
    [
        ({"group": 4}, True),
        ({"group": 1}, False),
        ({"group": 2, "prompts": (1, 1, 1)}, False),  # 3 * 1 + 6 * 7 tokens against 6 * 8
        ({"group": 2, "prompts": (0, 0, 0)}, False),
    ],
)
def test_a_batch_is_shared_where_that_saves_tokens(changed, shared):
    model, batch = build_causal("qwen2"), batch_of(**changed)
    policy = TokenPolicy(model)
    assert is_shared(policy, model, batch) is shared


def test_rows_without_a_prompt_of_their_own_are_not_shared():
    model = build_causal("qwen2")
    rows = whole_rows(batch_of())
    policy = TokenPolicy(model)
    assert not is_shared(policy, model, rows)


def test_lora_gets_the_same_gradients():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model, batch = build_causal("qwen2"), batch_of(group=4)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "k_proj"], init_lora_weights=False))
    adapted.train()
    policy = TokenPolicy(adapted)
    found = objective_of(policy, adapted, batch)
    assert is_shared(policy, adapted, batch)
    assert len(found[2]) == 8 and all("lora" in name for name in found[2])
    assert_same(found, objective_of(TokenPolicy(adapted, share_prefix=False), adapted, batch))


def test_prompt_learning_runs_whole_rows():
    from peft import PromptTuningConfig, get_peft_model

    adapted = get_peft_model(build_causal("qwen2"), PromptTuningConfig("CAUSAL_LM", num_virtual_tokens=3))
    policy = TokenPolicy(adapted)
    with torch.no_grad():
        assert not policy.sharing.applies(adapted, batch_of(), lambda batch, shared: pytest.fail("no need to try"))


def test_a_model_in_half_precision_is_shared():
    model, batch = build_causal("qwen2").to(torch.bfloat16), batch_of()
    policy = TokenPolicy(model)
    found = policy.log_probs(model, batch).logp
    assert is_shared(policy, model, batch)
    expected = TokenPolicy(model, share_prefix=False).log_probs(model, batch).logp
    assert (found - expected).abs().max() < 0.25


def forgetting(forward):
    """A body that takes a cache and looks at none of it."""

    def run(*args, past_key_values=None, position_ids=None, attention_mask=None, use_cache=None, **kwargs):
        return forward(*args, **kwargs, use_cache=use_cache)

    return run


def failing(forward):
    def run(*args, past_key_values=None, position_ids=None, **kwargs):
        if past_key_values is not None:
            raise NotImplementedError("no cache in this model")
        return forward(*args, position_ids=position_ids, **kwargs)

    return run


@pytest.mark.parametrize(("broken", "reason"), [(forgetting, "differ by"), (failing, "no cache in this model")])
def test_a_model_that_fails_its_check_runs_whole_rows_ever_after(broken, reason, caplog):
    model, batch = build_causal("qwen2").train(), batch_of()
    model.model.forward = broken(model.model.forward)
    policy = TokenPolicy(model)
    with caplog.at_level(logging.WARNING):
        assert not is_shared(policy, model, batch)
        policy.log_probs(model, batch)
    messages = [record.message for record in caplog.records if "whole row" in record.message]
    assert len(messages) == 1 and reason in messages[0] and "Qwen2ForCausalLM" in messages[0]
    assert model.training and all(module.training for module in model.modules())


def test_memory_that_runs_out_in_the_check_is_no_verdict():
    model, batch = build_causal("qwen2"), batch_of()

    def figures(batch, shared):
        if shared:
            raise torch.OutOfMemoryError("full")
        return torch.zeros(3), False

    with pytest.raises(torch.OutOfMemoryError):
        PrefixSharing(model, model.model).applies(model, batch, figures)


@pytest.mark.parametrize(
    ("others_save", "other_disagrees", "shared"), [(10.0, 0, True), (-1e3, 0, False), (10.0, 1, False)]
)
def test_processes_of_a_sharded_model_decide_alike(monkeypatch, others_save, other_disagrees, shared):
    model, batch = build_causal("qwen2"), batch_of(group=4)
    answers = iter([others_save, other_disagrees])
    monkeypatch.setattr(prefix, "is_sharded", lambda model: True)
    monkeypatch.setattr(prefix, "_sum", lambda value, batch: value + next(answers))
    sharing = PrefixSharing(model, model.model)
    assert sharing.applies(model, batch, lambda batch, shared: (torch.zeros(3), False)) is shared


def test_extras_beside_the_prompts_tokens_go_along():
    batch = batch_of()
    batch.model_inputs = {"token_type_ids": torch.arange(36).reshape(3, 12)}
    short = trimmed(batch)
    assert short.model_inputs["token_type_ids"].tolist() == [list(range(i, i + 10)) for i in (2, 14, 26)]
    rows = whole_rows(batch)
    assert rows.model_inputs["token_type_ids"][1].tolist()[:9] == [6, 7, 8, 9, 10, 11, 11, 11, 11]
    batch.model_inputs = {"pixel_values": torch.zeros(3, 3, 4, 4)}
    with pytest.raises(UserError, match="pixel_values.*2 completions"):
        whole_rows(batch)


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_images_are_seen_once_for_all_completions_of_their_prompt(family, tiny):
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = AutoModelForImageTextToText.from_pretrained(tiny(family)).eval()
    processor = AutoProcessor.from_pretrained(tiny(family), padding_side="left")
    turns = [
        [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        for text in ("Describe", "How many shapes ?")
    ]
    images = [[Image.new("RGB", (32, 32), colour)] for colour in ("red", "blue")]
    text = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
    inputs = dict(processor(images=images, text=text, return_tensors="pt", padding=True))
    batch = batch_of(prompts=(4, 4))
    batch.prompt_ids, batch.prompt_mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    batch.model_inputs = inputs

    policy, plain = TokenPolicy(model), TokenPolicy(model, share_prefix=False)
    found = policy.log_probs(model, batch).logp
    assert is_shared(policy, model, batch)
    expected = torch.stack([plain.log_probs(model, batch.member(i)).logp for i in range(2)], 1).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# the prompts' lengths in the batches of two processes, and the calls of the body that a step then takes in both:
# one saves nothing but the other does; one has no prompt
UNEQUAL = [(((6, 10, 9), (1, 1, 1)), 2), (((6, 10, 9), (0, 0, 0)), 1)]


def one_of_two_processes(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = build_causal("qwen2").train()
    policy = TokenPolicy(model)
    mesh = init_device_mesh("cpu", (2,))
    for layer in (*model.model.layers, model):
        fully_shard(layer, mesh=mesh)

    def step(batch):
        model.zero_grad()
        policy.action_objective(model, batch, lambda logp, at: -logp)[0].backward()

    calls, gradients = [], []
    for prompts, _ in UNEQUAL:
        batch = batch_of(group=4, prompts=prompts[rank], seed=rank)
        step(batch)
        calls.append(len(tokens_run(model, lambda batch=batch: step(batch))))
        gradients.append({name: p.grad.full_tensor() for name, p in model.named_parameters()})
    torch.save((calls, gradients), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_processes_of_a_sharded_model_run_the_same_layers(tmp_path):
    torch.multiprocessing.spawn(one_of_two_processes, (str(tmp_path),), nprocs=2)
    model = build_causal("qwen2").train()
    plain = TokenPolicy(model, share_prefix=False)
    of_ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert [calls for calls, _ in of_ranks] == [[calls for _, calls in UNEQUAL]] * 2
    for i, (prompts, _) in enumerate(UNEQUAL):
        model.zero_grad()
        for rank in range(2):
            batch = batch_of(group=4, prompts=prompts[rank], seed=rank)
            plain.action_objective(model, batch, lambda logp, at: -logp / 2)[0].backward()
        for name, parameter in model.named_parameters():
            scale = parameter.grad.abs().max().item()
            for _, gradients in of_ranks:
                torch.testing.assert_close(gradients[i][name], parameter.grad, rtol=0, atol=1e-5 * max(scale, 1))
