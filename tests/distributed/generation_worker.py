"""Completions made by two processes with sharded weights, around some steps of training; each writes its own."""

import json
import os
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.runtime.generation import InProcessGenerator, Sampling

RATE, STEPS = 0.1, 3
ENDS = range(100, 160)
PROMPTS = ((6, 10, 9), (4, 7))  # of the processes: in chunks of one group they differ in number


def inputs(lengths) -> dict:
    mask = (torch.arange(12) >= 12 - torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(50, 300, mask.shape, generator=torch.Generator().manual_seed(len(lengths)))
    return {"input_ids": ids * mask, "attention_mask": mask}


def completions(model, tokenizer, lengths, **options) -> list[dict]:
    """Greedy ones and sampled ones."""
    generator = InProcessGenerator(tokenizer, end_ids=ENDS, max_rows=2, **options)
    model.eval()
    made = [
        generator.generate(model, inputs(lengths), 2, sampling, random=torch.Generator().manual_seed(5))
        for sampling in (Sampling(16, temperature=0), Sampling(16, stop=("red",)))
    ]
    model.train()
    return [{"ids": [row.tolist() for row in each.ids], "logp": [row.tolist() for row in each.logp]} for each in made]


def loss_of(model, rank: int) -> torch.Tensor:
    batch = inputs(PROMPTS[rank])
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


def engine_of(model, engine: str):
    """The wrapped model, and what takes a step on a loss."""
    if engine == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        for layer in (*model.model.layers, model):
            fully_shard(layer, mesh=mesh)
        optimizer = torch.optim.SGD(model.parameters(), lr=RATE)

        def step(loss):
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return model, step

    import deepspeed.comm

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # a minute of compiling
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {  # nothing is kept for being small or needed again soon
            "stage": 3,
            "stage3_param_persistence_threshold": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
            "stage3_prefetch_bucket_size": 0,
        },
        "zero_allow_untested_optimizer": True,
    }
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    wrapped, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)

    def step(loss):
        wrapped.backward(loss)
        wrapped.step()

    return wrapped, step


def elements_here(model) -> int:
    """What this process holds of the weights: its share, and what of others' it has not given back."""
    return sum(
        p.ds_tensor.numel() + p.numel() if hasattr(p, "ds_id") else getattr(p, "_local_tensor", p).numel()
        for p in model.parameters()
    )


def one_of_two(rank: int, engine: str, source: str, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    tokenizer = AutoTokenizer.from_pretrained(source)
    facts = {}
    for with_generation in (True, False):
        inner = AutoModelForCausalLM.from_pretrained(source)
        model, step = engine_of(inner, engine)
        if with_generation:
            for name, options in {"whole": {}, "layer by layer": {"gather_weights": False}}.items():
                facts[name] = completions(inner, tokenizer, PROMPTS[rank], **options)
        losses = []
        for _ in range(STEPS):
            loss = loss_of(model, rank)
            step(loss)
            losses.append(loss.item())
        after = completions(inner, tokenizer, PROMPTS[rank], gather_weights=with_generation)
        facts["with" if with_generation else "without"] = losses, after
        facts["elements here"] = facts.get("elements here", []) + [elements_here(inner)]
    Path(folder, f"{rank}.json").write_text(json.dumps(facts))
    torch.distributed.destroy_process_group()
