"""The trainers on preferences: what they learn, and that it does not depend on how a step is computed."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from tiny import build_lm

import textalign
from shared.errors import DataError, UserError
from shared.objectives.pair_losses import PAIRED as PAIRED_LOSSES
from shared.trainers.reference import AdapterOff, Cached, FrozenCopy, NoReference

COLOURS = ("red", "green", "blue", "yellow")
PAIRED = ("DPO", "CPO", "ORPO")
UNPAIRED = ("KTO", "BCO")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory):
    return str(build_lm(tmp_path_factory.mktemp("lm")))


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIALIGN_CACHE", str(tmp_path / "cache"))


def pairs(count=16):
    """Answers that name a colour are preferred to answers that name a shape."""
    shapes = ("circle", "square", "triangle")
    return [
        {
            "prompt": [{"role": "user", "content": f"What colour is {'the ' * (i % 3)}{shapes[i % 3]}?"}],
            "chosen": [{"role": "assistant", "content": COLOURS[i % 4]}],
            "rejected": [{"role": "assistant", "content": f"{shapes[(i + 1) % 3]} {shapes[i % 3]}"}],
        }
        for i in range(count)
    ]


def singles(count=16):
    return [
        {"prompt": row["prompt"], "completion": row["chosen" if i % 2 else "rejected"], "label": bool(i % 2)}
        for i, row in enumerate(pairs(count))
    ]


def make(name, model_path, folder, rows=None, **options):
    rest = {key: options.pop(key) for key in ("ref_model", "peft_config", "model", "judge") if key in options}
    config = {
        "output_dir": str(folder),
        "learning_rate": 5e-3,
        "per_device_train_batch_size": 8,
        "max_steps": 12,
        "eval_answers": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        **options,
    }
    rows = rows if rows is not None else pairs() if name in PAIRED else singles()
    return getattr(textalign, f"{name}Trainer")(
        rest.pop("model", model_path),
        args=getattr(textalign, f"{name}Config")(**config),
        train_dataset=rows,
        eval_dataset=rows,
        **rest,
    )


@pytest.mark.parametrize("name", PAIRED + UNPAIRED)
def test_training_prefers_the_preferred(name, model_path, tmp_path):
    trainer = make(name, model_path, tmp_path, max_steps=20)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    assert after["eval_rewards/accuracies"] > 0.9
    assert after["eval_rewards/chosen"] > after["eval_rewards/rejected"]
    if name != "CPO" and name != "ORPO":
        assert before["eval_rewards/accuracies"] == 0.5, "before training policy and reference are level"
    logged = trainer.state.log_history[0]
    metrics = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "logps/chosen", "logps/rejected"}
    assert metrics <= set(logged)
    assert "rewards/margins" in logged or name in UNPAIRED


def gradients(trainer, rows, cut, model=None):
    """Gradients of one optimizer step over `rows`, cut into micro-batches of `cut` rows."""
    model = trainer.model if model is None else model
    model.zero_grad()
    model.train()
    if hasattr(trainer, "_rewards"):
        trainer._rewards.zero_()  # every call is the first step of a run
    collated = [trainer.data_collator(rows[at : at + cut]) for at in range(0, len(rows), cut)]
    batches, items = trainer.get_batch_samples(iter(collated), len(collated), trainer.args.device)
    total = 0.0
    for batch in batches:
        loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=items)
        loss.backward()
        total += loss.item()
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def same(one, other, tolerance=1e-5):
    assert one[0] == pytest.approx(other[0], rel=tolerance, abs=tolerance)
    assert one[1].keys() == other[1].keys()
    for name, value in one[1].items():
        torch.testing.assert_close(value, other[1][name], rtol=1e-4, atol=tolerance, msg=name)


OPTIONS = {
    "DPO": {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    "CPO": {},
    "ORPO": {},
    "KTO": {"loss_type": "apo_zero_unpaired"},
    "BCO": {},
}


@pytest.mark.parametrize("name", PAIRED + UNPAIRED)
def test_a_step_does_not_depend_on_its_cut(name, model_path, tmp_path):
    """Rows have unlike lengths, so a mean of the micro-batches' means would be another loss."""
    trainer = make(name, model_path, tmp_path, **OPTIONS[name])
    trainer.model_wrapped = trainer.model
    perturb(trainer.model)
    rows = [trainer.train_dataset[i] for i in range(8)]
    whole = gradients(trainer, rows, 8)
    same(whole, gradients(trainer, rows, 2))
    if name != "KTO":
        same(whole, gradients(trainer, rows, 1))


def perturb(model):
    """Away from the reference, where the loss has a curvature."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("DPO", {"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}),
        ("DPO", {"use_weighting": True}),
        ("DPO", {"ld_alpha": 0.5}),
        ("DPO", {"loss_type": ["ipo"]}),
        ("CPO", {"loss_type": "simpo", "cpo_alpha": 0.0}),
        ("ORPO", {}),
        ("KTO", {}),
        ("BCO", {}),
    ],
)
def test_a_shared_prompt_changes_nothing(name, options, model_path, tmp_path):
    results = []
    for share in (True, False):
        trainer = make(name, model_path, tmp_path / str(share), share_prefix=share, **options)
        trainer.model_wrapped = trainer.model
        perturb(trainer.model)
        rows = [trainer.train_dataset[i] for i in range(8)]
        results.append(gradients(trainer, rows, 4))
    same(*results)


@pytest.mark.parametrize("loss", PAIRED_LOSSES)
def test_every_loss_trains(loss, model_path, tmp_path):
    smoothing = 0.1 if loss in ("exo_pair", "robust") else 0.0
    trainer = make("DPO", model_path, tmp_path, loss_type=[loss], label_smoothing=smoothing, max_steps=6)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before


def test_the_reference_by_what_is_given(model_path, tmp_path):
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM

    lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    assert isinstance(make("DPO", model_path, tmp_path / "a").reference, FrozenCopy)
    assert isinstance(make("DPO", model_path, tmp_path / "b", peft_config=lora).reference, AdapterOff)
    given = AutoModelForCausalLM.from_pretrained(model_path)
    assert isinstance(make("DPO", model_path, tmp_path / "c", ref_model=given).reference, FrozenCopy)
    assert isinstance(make("CPO", model_path, tmp_path / "d").reference, NoReference)
    shared = make("DPO", model_path, tmp_path / "e", ref_num_shared_layers=1)
    shared.train()
    assert shared.evaluate()["eval_rewards/accuracies"] > 0.9


def test_an_adapter_is_trained_and_its_base_is_the_reference(model_path, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = make("DPO", model_path, tmp_path, peft_config=lora, learning_rate=2e-2, max_steps=20)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "lora" not in n}
    trainer.train()
    assert trainer.evaluate()["eval_rewards/accuracies"] > 0.9
    for name, parameter in trainer.model.named_parameters():
        if name in base:
            assert torch.equal(parameter, base[name]), name
    trainer.save_model()
    assert (tmp_path / "adapter_config.json").is_file()


def test_a_reference_run_beforehand_gives_the_same_run_and_is_kept(model_path, tmp_path, capsys):
    plain = make("DPO", model_path, tmp_path / "plain", max_steps=4)
    plain.train()
    cached = make("DPO", model_path, tmp_path / "cached", max_steps=4, precompute_ref_log_probs=True)
    assert isinstance(cached.reference, Cached)
    cached.train()
    for one, other in zip(plain.state.log_history, cached.state.log_history, strict=True):
        if "loss" in one:
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    capsys.readouterr()
    make("DPO", model_path, tmp_path / "again", beta=0.5, learning_rate=1e-4, precompute_ref_log_probs=True)
    assert capsys.readouterr().out.count("from cache") == 2


def test_the_reference_follows_the_model(model_path, tmp_path):
    trainer = make(
        "DPO",
        model_path,
        tmp_path,
        sync_ref_model=True,
        ref_model_mixup_alpha=1.0,
        ref_model_sync_steps=4,
        max_steps=8,
        save_strategy="steps",
        save_steps=6,
    )
    trainer.train()
    # moved after the last step, so policy and reference are level again
    assert trainer.evaluate()["eval_rewards/margins"] == pytest.approx(0.0, abs=1e-4)
    assert load_file(tmp_path / "checkpoint-6" / "reference.safetensors")


@pytest.mark.parametrize("name", ["DPO", "KTO", "BCO"])
@pytest.mark.parametrize("options", [{}, {"sync_ref_model": True, "ref_model_sync_steps": 2}])
def test_a_resumed_run_is_the_same_run(name, options, model_path, tmp_path):
    if name != "DPO" and options:
        pytest.skip("the reference is kept by the same code")
    whole = make(name, model_path, tmp_path / "whole", max_steps=8, **options)
    whole.train()
    steps = {"save_strategy": "steps", "save_steps": 4}
    first = make(name, model_path, tmp_path / "cut", max_steps=8, **steps, **options)
    first.train()
    second = make(name, model_path, tmp_path / "cut", max_steps=8, **steps, **options)
    second.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    for (key, one), other in zip(whole.model.state_dict().items(), second.model.state_dict().values(), strict=True):
        assert torch.equal(one, other), key


def test_kto_estimates_its_reference_point_over_the_whole_step(model_path, tmp_path):
    trainer = make("KTO", model_path, tmp_path, learning_rate=0.0)
    trainer.model_wrapped = trainer.model
    rows = [trainer.train_dataset[i] for i in range(8)]
    gradients(trainer, rows, 4)
    assert trainer.kl < 1e-5, "at the start policy and reference are level, but for rounding"
    perturb(trainer.model)
    gradients(trainer, rows, 4)
    sums = torch.zeros(2)
    for at in (0, 4):
        sums += trainer._kl_sums(trainer.model, trainer.data_collator(rows[at : at + 4]))
    assert sums[1] == 8
    assert trainer.kl == pytest.approx(max(0.0, (sums[0] / sums[1]).item()), abs=1e-5)


def test_kto_keeps_its_reference_point_where_a_row_has_no_partner(model_path, tmp_path):
    trainer = make("KTO", model_path, tmp_path)
    trainer.model_wrapped = trainer.model
    trainer.kl = torch.tensor(3.0)
    trainer.prepare_step([trainer.data_collator([trainer.train_dataset[0]])])
    assert trainer.kl == 3


def test_kto_evaluation_does_not_depend_on_the_batch(model_path, tmp_path):
    """Each row's pair is the next row of its batch, so the batches' ends alone may differ."""
    found = []
    for size in (3, 16):
        trainer = make("KTO", model_path, tmp_path / str(size), per_device_eval_batch_size=size)
        perturb(trainer.model)
        found.append(trainer.evaluate()["eval_loss"])
        assert trainer.kl == 0, "an evaluation leaves the run as it is"
    assert found[0] == pytest.approx(found[1], abs=0.02)


def test_kto_pairs_fit_into_max_length(model_path, tmp_path):
    rows = singles(8)
    rows[0]["prompt"] = [{"role": "user", "content": "What colour is the circle? " * 4}]
    rows[1]["completion"] = [{"role": "assistant", "content": "red green " * 20}]
    trainer = make("KTO", model_path, tmp_path, rows=rows, max_length=80)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    whole = batch.prompt_mask.sum(1).repeat_interleave(2) + batch.completion_attention.sum(1)
    assert whole.max() <= 80


def test_a_bad_pair_is_named_by_its_own_row_and_can_be_left_out(model_path, tmp_path):
    rows = pairs(6)
    rows[3]["rejected"] = copy.deepcopy(rows[3]["chosen"])
    with pytest.raises(DataError, match="row 3"):
        make("KTO", model_path, tmp_path, rows=rows)
    assert len(make("KTO", model_path, tmp_path, rows=rows, on_bad_row="skip").train_dataset) == 10


def test_bco_shift_is_the_mean_reward_of_earlier_steps(model_path, tmp_path):
    trainer = make("BCO", model_path, tmp_path, max_steps=3)
    seen = []
    plain = trainer.compute_loss

    def watched(*args, **kwargs):
        seen.append(trainer._rewards.clone())
        return plain(*args, **kwargs)

    trainer.compute_loss = watched
    trainer.train()
    assert seen[0].tolist() == [0, 0, 0, 0]
    assert seen[1][1] == 8 and seen[2][1] == 16
    assert seen[2][0] != 0


def test_bco_weights_bad_rows_by_their_prompts(model_path, tmp_path):
    from transformers import AutoTokenizer

    def embed(input_ids, attention_mask):
        table = torch.nn.functional.one_hot(input_ids, 512).float() * attention_mask.unsqueeze(-1)
        return table.sum(1)

    rows = singles(16)
    for row in rows:  # good and bad rows have other prompts
        row["prompt"] = [{"role": "user", "content": "What colour" if row["label"] else "Where is it"}]
    trainer = textalign.BCOTrainer(
        model_path,
        args=textalign.BCOConfig(output_dir=str(tmp_path), max_steps=2, learning_rate=1e-3),
        train_dataset=rows,
        embedding_func=embed,
        embedding_tokenizer=AutoTokenizer.from_pretrained(model_path),
    )
    weights = trainer.train_dataset.columns["density_ratio"]
    labels = trainer.train_dataset.columns["label"]
    assert (weights[labels] == 1).all() and (weights[~labels] == 0.5).all(), "their prompts are no good row's"
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    assert "density_ratio" in batch.columns
    trainer.train()


def test_pairs_are_taken_as_single_answers(model_path, tmp_path):
    trainer = make("KTO", model_path, tmp_path, rows=pairs(8))
    assert len(trainer.train_dataset) == 16
    assert trainer.train_dataset.columns["label"].tolist() == [True, False] * 8


def test_the_judge_tells_who_wins(model_path, tmp_path):
    def judge(prompt, answer):
        assert prompt.startswith("What colour")
        return float(any(colour in answer for colour in COLOURS))

    options = {"eval_answers": 8, "max_new_tokens": 4, "max_steps": 25}
    trainer = make("ORPO", model_path, tmp_path, judge=judge, **options)
    trainer.train()
    before, after = trainer.report.before, trainer.report.after
    assert before["win_rate"] == 0.5 and before["judge_score"] < 0.5
    assert after["judge_score"] > 0.9 and after["win_rate"] > 0.7
    assert after["preference_accuracy"] > 0.9
    assert trainer.report.samples[0].columns["judged"] == "1.00"


def test_a_judge_by_its_path_and_one_that_fails(model_path, tmp_path):
    args = textalign.DPOConfig(output_dir=str(tmp_path), judge="math.nothing")
    with pytest.raises(UserError, match="no such function"):
        textalign.DPOTrainer(model_path, args=args, train_dataset=pairs())

    def judge(prompt, answer):
        return answer.no_such_attribute

    trainer = make("DPO", model_path, tmp_path, judge=judge, eval_answers=2, max_new_tokens=2)
    with pytest.raises(UserError, match="judge failed on answer 0"):
        trainer.train()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("DPO", {"loss_type": ["sigmiod"]}, "sigmoid"),
        ("DPO", {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "weight"),
        ("DPO", {"loss_type": ["exo_pair"]}, "label_smoothing"),
        ("DPO", {"beta": -1.0}, "beta"),
        ("DPO", {"ld_alpha": 2.0}, "ld_alpha"),
        ("KTO", {"per_device_train_batch_size": 1}, "at least 2"),
        ("KTO", {"loss_type": "kot"}, "kto"),
        ("KTO", {"beta": 0.0}, "beta"),
        ("KTO", {"desirable_weight": -1.0}, "desirable_weight"),
        ("BCO", {"beta": -1.0}, "beta"),
        ("BCO", {"min_density_ratio": 5.0, "max_density_ratio": 1.0}, "min_density_ratio"),
        ("KTO", {"precompute_ref_log_probs": True}, "precompute_ref_log_probs"),
        ("DPO", {"precompute_ref_log_probs": True, "sync_ref_model": True}, "exclude"),
        ("DPO", {"sync_ref_model": True, "ref_model_sync_steps": 0}, "ref_model_sync_steps"),
        ("DPO", {"ref_num_shared_layers": 9}, "num_shared_layers"),
    ],
)
def test_options_that_cannot_work(name, options, message, model_path, tmp_path):
    with pytest.raises(UserError, match=message):
        make(name, model_path, tmp_path, **options)


def test_rows_that_cannot_be_used(model_path, tmp_path):
    same_answers = pairs(4)
    same_answers[2]["rejected"] = copy.deepcopy(same_answers[2]["chosen"])
    with pytest.raises(DataError, match="row 2"):
        make("DPO", model_path, tmp_path, rows=same_answers)
    with pytest.raises(DataError, match="chosen"):
        make("DPO", model_path, tmp_path, rows=[{"prompt": "a", "completion": "b"}])


def test_no_dropout_is_left(model_path, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(model_path, attention_dropout=0.5)
    trainer = make("DPO", model_path, tmp_path, model=model, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(0.6931, abs=1e-4)


def test_a_config_of_another_trainer_is_named(model_path):
    with pytest.raises(UserError, match="DPOConfig"):
        textalign.DPOTrainer(model_path, args=textalign.CPOConfig(), train_dataset=pairs())
