"""Reference log-probabilities computed once: right figures under a key of what matters, whole or not at all."""

import contextlib
import copy
import itertools
import threading
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from shared.data.collators import PairCollator, UnpairedCollator
from shared.data.tokens import TokenTable
from shared.errors import UserError
from shared.policies.token import TokenPolicy
from shared.trainers import reference_cache
from shared.trainers.reference import AdapterOff, Cached, NoReference
from shared.trainers.reference_cache import PAIRED, precompute, weights_of_model, weights_of_name

SMALL = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
         "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
PAIRS = [
    {"prompt_ids": [3, 4], "chosen_ids": [5, 6, 2], "rejected_ids": [7, 2]},
    {"prompt_ids": [8, 9, 10, 11], "chosen_ids": [12, 2], "rejected_ids": [13, 14, 15, 2]},
    {"prompt_ids": [16], "chosen_ids": [17, 18, 19, 20, 2], "rejected_ids": [21, 2]},
]
SINGLE = [
    {"prompt_ids": row["prompt_ids"], "completion_ids": row["chosen_ids"], "label": n == 0}
    for n, row in enumerate(PAIRS)
]


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path))
    return tmp_path / "reference"


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL))


class Counting(AdapterOff):
    rows = 0

    def log_probs(self, model, batch):
        self.rows += batch.rows
        return super().log_probs(model, batch)


def run(model, accelerator, table=None, collator=None, **changed):
    reference = Counting(TokenPolicy(model))
    options = {"weights": weights_of_model(model), "model": model, "batch_size": 2, **changed}
    table = TokenTable.of_records(PAIRS) if table is None else table
    done = precompute(reference, table, collator or PairCollator(0), accelerator=accelerator, **options)
    return done, reference.rows


def own_figures(model, prompt, answer):
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).squeeze(1).numpy()


def test_each_token_has_its_figure_and_the_second_run_computes_nothing(model, accelerator, folder, capsys):
    table, rows = run(model, accelerator)
    assert rows == 6
    for row, given in zip(table, PAIRS, strict=False):
        for answer in ("chosen", "rejected"):
            expected = own_figures(model, given["prompt_ids"], given[f"{answer}_ids"])
            np.testing.assert_allclose(row[f"{answer}_ref_logp"], expected, atol=1e-5)
            assert row[f"{answer}_ref_logp"].dtype == np.float32
    (kept,) = folder.iterdir()
    (told,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("Reference"))
    assert told.startswith("Reference log-probabilities of train: 3 rows in ") and "rows/s" in told
    assert told.endswith(f"kept in {kept}")

    again, rows = run(model, accelerator, what="eval")
    assert rows == 0
    for first, second in zip(table, again, strict=False):
        np.testing.assert_array_equal(first["chosen_ref_logp"], second["chosen_ref_logp"])
    assert capsys.readouterr().out == f"Reference log-probabilities of eval: 3 rows from cache: {kept}\n"


def test_a_batch_of_the_rows_gives_what_the_reference_gave(model, accelerator):
    table, _ = run(model, accelerator)
    batch = PairCollator(0)([table[2], table[0]])
    live = AdapterOff(TokenPolicy(model)).log_probs(model, batch)
    torch.testing.assert_close(Cached().log_probs(model, batch), live, atol=1e-5, rtol=0)


def test_single_answers(model, accelerator):
    table, rows = run(model, accelerator, TokenTable.of_records(SINGLE), UnpairedCollator(0, kl=False))
    assert rows == 3
    expected = own_figures(model, SINGLE[1]["prompt_ids"], SINGLE[1]["completion_ids"])
    np.testing.assert_allclose(table[1]["completion_ref_logp"], expected, atol=1e-5)


def test_rows_may_be_selected_ones(model, accelerator):
    whole, _ = run(model, accelerator)
    part, rows = run(model, accelerator, TokenTable.of_records(PAIRS).select([2, 0]))
    assert rows == 4
    for at, row in enumerate((2, 0)):
        np.testing.assert_allclose(part[at]["rejected_ref_logp"], whole[row]["rejected_ref_logp"], atol=1e-6)


def test_the_key_is_of_what_matters(model, accelerator):
    run(model, accelerator)
    margins = TokenTable.of_records([{**row, "margin": 1.0} for row in PAIRS])
    assert run(model, accelerator, margins, batch_size=3)[1] == 0
    other = copy.deepcopy(PAIRS)
    other[0]["chosen_ids"][0] = 30
    assert run(model, accelerator, TokenTable.of_records(other))[1] == 6
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[0, 0] += 0.1
    assert run(model, accelerator)[1] == 6


def test_shares_of_several_processes_make_one_table(model, accelerator, monkeypatch):
    """Two threads stand for two processes."""
    expected, _ = run(model, accelerator)
    met, brought = threading.Barrier(2), [None, None]

    def gather(mine):
        brought[int(threading.current_thread().name)] = mine[0]
        met.wait(30)
        all_shares = list(brought)
        met.wait(30)
        return all_shares

    def work(rank):
        own = copy.deepcopy(model)
        process = types.SimpleNamespace(
            process_index=rank, num_processes=2, device=torch.device("cpu"), autocast=contextlib.nullcontext
        )
        reference = AdapterOff(TokenPolicy(own))
        table = TokenTable.of_records(PAIRS)
        found[rank] = reference_cache._computed(reference, table, PairCollator(0), PAIRED, own, process, 2)

    found = {}
    monkeypatch.setattr(reference_cache, "gather_object", gather)
    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for name in ("chosen_ref_logp", "rejected_ref_logp"):
        assert len({len(share) for share in brought}) == 2  # three rows: one process has one row more
        for rank in range(2):
            values = np.concatenate(found[rank][name])
            np.testing.assert_allclose(values, expected.columns[name].values, atol=1e-5)


def test_an_interrupted_run_leaves_nothing(model, accelerator, folder, monkeypatch):
    saved = np.save
    calls = itertools.count()

    def interrupted(path, array):
        if next(calls) == 1:
            raise KeyboardInterrupt
        saved(path, array)

    monkeypatch.setattr(np, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(model, accelerator)
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(np, "save", saved)
    assert run(model, accelerator)[1] == 6


def test_a_reference_is_made_only_where_it_is_needed(model, accelerator):
    run(model, accelerator)

    def never():
        raise AssertionError("made although everything is known")

    options = {"weights": weights_of_model(model), "model": model, "batch_size": 2, "accelerator": accelerator}
    precompute(never, TokenTable.of_records(PAIRS), PairCollator(0), **options)
    table = precompute(NoReference, TokenTable.of_records(PAIRS), PairCollator(0), **{**options, "weights": "other"})
    assert not table[0]["chosen_ref_logp"].any()


def test_an_adapter_that_does_not_run_does_not_count(model):
    alone = weights_of_model(model)
    torch.manual_seed(1)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    off = weights_of_model(adapted, AdapterOff(TokenPolicy(adapted)))
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_A" in n).add_(1.0)
    assert weights_of_model(adapted, AdapterOff(TokenPolicy(adapted))) == off
    running = AdapterOff(TokenPolicy(adapted), "default")
    with_it = weights_of_model(adapted, running)
    assert with_it not in (off, alone)
    with torch.no_grad():
        next(p for n, p in adapted.named_parameters() if "lora_A" in n).add_(1.0)
    assert weights_of_model(adapted, running) != with_it


def test_a_model_with_its_adapter_off_counts_as_its_base(model):
    alone = weights_of_model(model)
    layouts = (
        {"target_modules": ["q_proj"]},
        {"target_modules": ["up_proj", "embed_tokens"], "modules_to_save": ["lm_head"]},
        {"target_modules": ["v_proj"], "trainable_token_indices": [3]},
    )
    for options in layouts:
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(**options, task_type="CAUSAL_LM"))
        assert weights_of_model(adapted, AdapterOff(TokenPolicy(adapted))) == alone


def test_an_adapter_that_runs_counts_with_its_strength(model):
    found = set()
    for alpha in (8, 8, 16):
        torch.manual_seed(1)
        config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=alpha)
        adapted = get_peft_model(copy.deepcopy(model), config, adapter_name=f"made{len(found)}")
        found.add(weights_of_model(adapted, AdapterOff(TokenPolicy(adapted), f"made{len(found)}")))
    assert len(found) == 2


def test_the_configuration_counts_with_the_weights(model):
    first = weights_of_model(model)
    model.config.eos_token_id, model.config._name_or_path = 7, "elsewhere"
    assert weights_of_model(model) == first
    model.config.rms_norm_eps = 1e-3
    assert weights_of_model(model) != first


def test_a_folder_counts_with_its_files(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    key = weights_of_name(name, dtype="float32")
    assert key == weights_of_name(name, dtype="float32") != weights_of_name(name, dtype="bfloat16")
    with open(tmp_path / "model" / "model.safetensors", "ab") as file:
        file.write(b" ")
    assert weights_of_name(name, dtype="float32") != key
    assert weights_of_name("builtin/lm-small") is None  # its weights are drawn


def test_streams_are_refused(model, accelerator):
    with pytest.raises(UserError, match="streamed"):
        run(model, accelerator, table=iter(PAIRS))
    with pytest.raises(UserError, match="no answers"):
        run(model, accelerator, table=TokenTable.of_records([{"input_ids": [1, 2]}]))
