"""Tokens of a geometric mixture: against products of softmaxes by brute force, and against its parts alone."""

import copy

import pytest
import torch
from tiny import build_tokenizer
from tiny_online import perturb
from tiny_text import build_causal

from shared.errors import UserError
from shared.policies.prefix import evaluating
from shared.runtime.generation import InProcessGenerator, Mixture, Part, Sampling
from shared.runtime.references import create_reference_model


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(["<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>", pad="<|endoftext|>")


def inputs_of(lengths=(6, 9), width=11):
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(50, 300, mask.shape, generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids * mask, "attention_mask": mask}


def two(family="qwen2", spread=6.0):
    """A model and another one, whose distributions are far from flat and from each other."""
    model = build_causal(family).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(spread)
    other = copy.deepcopy(model)
    perturb(other)
    return model, other


def write(model, tokenizer, *, group=3, most=5, temperature=0.8, seed=0, **options):
    generator = InProcessGenerator(tokenizer, end_ids=range(100, 140), **options)
    sampling = Sampling(max_new_tokens=most, temperature=temperature)
    return generator.generate(model, inputs_of(), group, sampling, random=torch.Generator().manual_seed(seed))


@torch.no_grad()
def product(models, weights, row, temperature):
    """`(T, V)` log of the normalised product of tempered softmaxes after each token of a row `(T,)`."""
    chances = [(model(input_ids=row[None]).logits[0] / temperature).softmax(-1).double() for model in models]
    mixed = torch.stack([chance**weight for chance, weight in zip(chances, weights, strict=True)]).prod(0)
    return (mixed / mixed.sum(-1, keepdim=True)).log()


def expected(models, weights, done, temperature=0.8, group=3):
    """The log-probabilities of what was written."""
    given, found = inputs_of(), []
    for at, ids in enumerate(done.ids):
        prompt = given["input_ids"][at // group][given["attention_mask"][at // group].bool()]
        row = torch.cat([prompt, ids])
        logp = product(models, weights, row, temperature)[len(prompt) - 1 : -1]
        found.append(logp.gather(1, ids[:, None]).squeeze(1).float())
    return found


def same(found, other):
    for one, two in zip(found, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["qwen2", "mistral", "gpt2"])
@pytest.mark.parametrize("share", [0.3, 0.5])
def test_a_mixture_is_the_product_of_its_parts(family, share, tokenizer):
    models, weights = two(family), (1 - share, share)
    done = write(Mixture(tuple(map(Part, models, weights))), tokenizer, most=12)
    assert len({tuple(ids.tolist()) for ids in done.ids}) > 3
    same(done.logp, expected(models, weights, done))
    apart = [(a - b).abs().max() for a, b in zip(done.logp, expected(models, (1, 0), done), strict=True)]
    assert max(apart) > 0.1, "and is not the model alone"
    chunked = write(Mixture(tuple(map(Part, models, weights))), tokenizer, most=12, max_rows=3)
    assert [ids.tolist() for ids in chunked.ids] == [ids.tolist() for ids in done.ids]


def test_first_tokens_come_as_often_as_the_product_says(tokenizer):
    models, weights = two(), (0.4, 0.6)
    done = write(Mixture(tuple(map(Part, models, weights))), tokenizer, group=4000, most=1)
    prompt = inputs_of()["input_ids"][0][-6:]
    chance = product(models, weights, prompt, 0.8)[-1].exp()
    counts = torch.bincount(torch.cat(done.ids[:4000]), minlength=len(chance)).double() / 4000
    top = chance.topk(5).indices
    assert chance[top].sum() > 0.1
    torch.testing.assert_close(counts[top], chance[top], rtol=0, atol=4 * float((chance[top] / 4000).max().sqrt()))
    alone = product(models, (1, 0), prompt, 0.8)[-1].exp()
    assert (counts[top] - alone[top]).abs().max() > 0.02


def test_the_ends_of_a_mixture_are_its_parts(tokenizer):
    model, other = two()
    for at, part in enumerate((model, other)):
        mixed = write(Mixture((Part(model, 1.0 - at), Part(other, float(at)))), tokenizer)
        alone = write(part, tokenizer)
        assert [ids.tolist() for ids in mixed.ids] == [ids.tolist() for ids in alone.ids]
        same(mixed.logp, alone.logp)


def test_a_model_with_its_adapter_off_is_a_part(tokenizer):
    """The same model twice, switched between passes: as a copy of its base would be."""
    from peft import LoraConfig, get_peft_model

    from shared.trainers.reference_adapter import adapter_in_use

    base, _ = two()
    copied = create_reference_model(base)
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")).eval()
    perturb(model, seed=3)
    off = Part(model, 0.5, lambda: adapter_in_use(model, None))
    done = write(Mixture((Part(model, 0.5), off)), tokenizer)
    same(done.logp, expected((model, copied), (0.5, 0.5), done))
    alone = Part(model, 1.0, off.around)
    same(write(Mixture((alone,)), tokenizer).logp, write(copied, tokenizer).logp)


def test_a_reference_that_shares_layers_is_a_part(tokenizer):
    model, _ = two()
    reference = create_reference_model(model, num_shared_layers=1)
    perturb(model)
    with evaluating(model):
        done = write(Mixture((Part(model, 0.5), Part(reference, 0.5))), tokenizer)
        same(done.logp, expected((model, reference), (0.5, 0.5), done))


def test_embeddings_of_unlike_numbers(tokenizer):
    model, other = two()
    other.resize_token_embeddings(other.config.vocab_size + 8)
    alone = build_causal("mamba").eval()  # is run by transformers' generate
    alone.resize_token_embeddings(model.config.vocab_size + 8)
    for writer, share in ((other, 0.5), (other, 1.0), (alone, 1.0)):
        with torch.no_grad():
            writer.get_output_embeddings().weight[-8:] = 9.0
        done = write(Mixture((Part(model, 1 - share), Part(writer, share))), tokenizer)
        assert max(int(ids.max()) for ids in done.ids) < model.config.vocab_size


def test_mixtures_that_cannot_be_written(tokenizer):
    model, other = two()
    for weights in ((0.0, 0.0), (-0.1, 1.1), (float("nan"), 1.0)):
        with pytest.raises(UserError, match="at least 0, and not all of them 0"):
            Mixture((Part(model, weights[0]), Part(other, weights[1])))
    with pytest.raises(ValueError, match="training mode"):
        write(Mixture((Part(model, 0.5), Part(other.train(), 0.5))), tokenizer)
    with pytest.raises(UserError, match="MambaForCausalLM .*cannot"):
        write(Mixture((Part(build_causal("mamba").eval(), 0.5), Part(model, 0.5))), tokenizer)
