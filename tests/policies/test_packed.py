"""Documents that share a row are answered for, and learnt from, as if each stood alone."""

import pytest
import torch
from tiny_text import build_causal

from shared.data.collators import SupervisedCollator
from shared.data.packing import pack_table
from shared.data.tokens import TokenTable
from shared.errors import UserError
from shared.policies.packed import Isolation, PackedPolicy, block_mask, one_row
from shared.policies.token import TokenPolicy

LENGTHS = (9, 17, 4, 12, 7)
BY_POSITIONS = ["qwen2", "qwen3", "llama", "mistral", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "phi"]
IMPLEMENTATIONS = [(family, "eager") for family in [*BY_POSITIONS, "falcon"]] + [
    (family, "sdpa") for family in [*BY_POSITIONS, "falcon"] if family != "gemma2"
]


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(5)
    rows = [torch.randint(3, 340, (length,), generator=generator).tolist() for length in LENGTHS]
    learnt = [bytes([0, *(at % 4 != 1 for at in range(length - 1))]) for length in LENGTHS]
    records = [{"input_ids": ids, "learnt": mask} for ids, mask in zip(rows, learnt, strict=True)]
    return TokenTable.of_records(records)


def layouts(table):
    """The same documents padded, in one row, and packed into two rows of different length."""
    together = pack_table(table, 30, "bfd")
    assert len(together) == 2
    return {
        "padded": SupervisedCollator(0)([table[at] for at in range(len(table))]),
        "one row": SupervisedCollator(0, padding_free=True)([table[at] for at in range(len(table))]),
        "packed": SupervisedCollator(0, pad_to_multiple_of=32)([together[0], together[1]]),
    }


def gradients(policy, model, batch):
    model.zero_grad()
    loss, stats = policy.action_objective(model, batch, lambda logp, at: -logp * torch.exp(logp.detach()) / 40)
    loss.backward()
    return loss.detach(), stats, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def check_gradients(policy, model, documents):
    """Those of packed documents are those of the documents alone."""
    batches = layouts(documents)
    expected, alone, gradient = gradients(TokenPolicy(model), model, batches["padded"])
    for layout in ("one row", "packed"):
        loss, stats, found = gradients(policy, model, batches[layout])
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        assert sorted(stats.logp.tolist()) == pytest.approx(sorted(alone.logp.tolist()), abs=1e-4)
        assert found.keys() == gradient.keys()
        for name in gradient:
            torch.testing.assert_close(found[name], gradient[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "attention"), IMPLEMENTATIONS)
def test_gradients_are_those_of_the_documents_alone(family, attention, documents):
    model = build_causal(family, attention=attention)
    policy = PackedPolicy(model)
    check_gradients(policy, model, documents)
    # Falcon learnt to tell documents apart by positions in transformers 5.24
    assert policy.isolation is Isolation.POSITIONS or family == "falcon"


def test_a_model_that_cannot_keep_documents_apart_is_refused(documents):
    model = build_causal("bloom")
    policy = PackedPolicy(model)
    check_refused(policy, model, documents)


def test_falcon_with_alibi_keeps_documents_apart_or_is_refused(documents):
    """The former since transformers 5.24."""
    model = build_causal("falcon_alibi")
    policy = PackedPolicy(model)
    try:
        check_gradients(policy, model, documents)
    except UserError:
        check_refused(PackedPolicy(model), model, documents)


def check_refused(policy, model, documents):
    with pytest.raises(UserError, match="packing: with .* attention this model does not keep .*Leave packing out"):
        policy.log_probs(model, layouts(documents)["packed"])
    plain = layouts(documents)["padded"]
    torch.testing.assert_close(policy.log_probs(model, plain).logp, TokenPolicy(model).log_probs(model, plain).logp)


@pytest.mark.parametrize("family", ["mamba", "qwen3_next"])
def test_a_model_with_a_running_state_is_refused_at_once(family):
    with pytest.raises(UserError, match="padding_free: .* would carry one document into the next"):
        PackedPolicy(build_causal(family), option="padding_free")


def test_a_model_that_ignores_what_it_is_told_is_found_out(documents):
    model = build_causal("llama")
    body = model.model.forward

    def deaf(*args, position_ids=None, attention_mask=None, **kwargs):
        return body(*args, **kwargs)

    model.model.forward = deaf
    with pytest.raises(UserError, match="one document moves the log-probabilities of the next"):
        PackedPolicy(model).log_probs(model, layouts(documents)["packed"])


def test_positions_that_go_on_are_found_out(documents):
    model = build_causal("gpt2")
    body = model.transformer.forward

    def unplaced(*args, position_ids=None, **kwargs):  # the mask is kept, the positions run through the row
        return body(*args, **kwargs)

    policy = PackedPolicy(model)
    policy._ways = lambda: [Isolation.BLOCK_MASK]
    model.transformer.forward = unplaced
    with pytest.raises(UserError, match="differ by .* from those of the documents alone"):
        policy.log_probs(model, layouts(documents)["packed"])


def test_the_test_leaves_mode_and_randomness_as_they_were(documents):
    model = build_causal("llama").train()
    model.model.layers[0].eval()
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    PackedPolicy(model).log_probs(model, layouts(documents)["packed"])
    assert torch.equal(torch.rand(1), expected)
    assert model.training and not model.model.layers[0].training


def test_log_probs_stand_where_their_tokens_stand(documents):
    model = build_causal("qwen3")
    batches = layouts(documents)
    expected = TokenPolicy(model).log_probs(model, batches["padded"])
    packed = PackedPolicy(model).log_probs(model, batches["packed"])
    assert packed.mask.sum() == expected.mask.sum()
    own = batches["packed"].completion_ids * packed.mask.long()
    theirs = batches["padded"].completion_ids * expected.mask.long()
    assert sorted(own[own > 0].tolist()) == sorted(theirs[theirs > 0].tolist())
    assert ((packed.logp != 0) == packed.mask.bool()).all()


def test_flash_attention_gets_one_row(documents):
    batch = layouts(documents)["packed"]
    row = one_row(batch)
    assert row.completion_ids.shape == row.completion_mask.shape == (1, sum(LENGTHS))
    assert row.completion_attention.all() and row.completion_mask.sum() == batch.completion_mask.sum()
    positions = row.model_inputs["position_ids"][0]
    assert sorted(torch.diff((positions == 0).nonzero().squeeze(1), append=torch.tensor([len(positions)]))) == sorted(
        LENGTHS
    )
    model = build_causal("llama")
    policy = PackedPolicy(model)
    expected = policy.log_probs(model, batch)
    policy._one_row = True
    found = policy.log_probs(model, batch)
    torch.testing.assert_close(found.logp, expected.logp, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.mask, expected.mask)


def test_the_block_mask():
    mask = block_mask(torch.tensor([[0, 1, 0, 1, 2, 0]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
