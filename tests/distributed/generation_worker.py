"""Completions made by the processes of one launch, with their weights sharded; each process writes its own as JSON.

accelerate launch --config_file PROFILE generation_worker.py FOLDER MODEL
"""

import json
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from shared.runtime.generation import InProcessGenerator, Sampling

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
    return [
        {"ids": [row.tolist() for row in each.ids], "logp": [row.tolist() for row in each.logp]} for each in made
    ]


def loss_of(model, rank: int) -> torch.Tensor:
    batch = inputs(PROMPTS[rank])
    return model(**batch, labels=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)).loss


def main() -> None:
    folder, source = Path(sys.argv[1]), sys.argv[2]
    accelerator = Accelerator()
    if accelerator.state.deepspeed_plugin is not None:
        accelerator.state.deepspeed_plugin.deepspeed_config["train_micro_batch_size_per_gpu"] = 1
    model = AutoModelForCausalLM.from_pretrained(source)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    inner, rank = accelerator.unwrap_model(model), accelerator.process_index
    tokenizer = AutoTokenizer.from_pretrained(source)
    facts = {}
    for name, options in {"whole": {}, "layer by layer": {"gather_weights": False}}.items():
        facts[name] = completions(inner, tokenizer, PROMPTS[rank], **options)
    facts["losses"] = []
    for _ in range(3):
        loss = loss_of(model, rank)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        facts["losses"].append(loss.item())
    facts["elements here"] = sum(
        p.ds_tensor.numel() if hasattr(p, "ds_id") else getattr(p, "_local_tensor", p).numel()
        for p in inner.parameters()
    )
    facts["afterwards"] = completions(inner, tokenizer, PROMPTS[rank])
    (folder / f"{rank}.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
