"""Adapters from options: which modules, which kind, on quantised weights too, saved and continued."""

import pytest
import torch
from torch import nn

from shared.errors import UserError
from shared.runtime.adapters import attach_adapter, lora_config
from shared.runtime.arguments import ModelArguments
from shared.runtime.models import load_model, model_init_kwargs, parameter_report

PROMPT = torch.tensor([[5, 6, 7, 8, 9, 10]])


def adapted(folder, **options):
    args = ModelArguments(use_peft=True, lora_r=4, **options)
    model = load_model(str(folder), head="image-text-to-text", frozen=True, **model_init_kwargs(args))
    return attach_adapter(model, lora_config(args))


def adapters(model) -> set[str]:
    """The modules with an adapter."""
    return {name.split(".lora_A")[0].removeprefix("base_model.model.") for name, _ in model.named_parameters()
            if ".lora_A" in name}  # fmt: skip


def step(model):
    """One step of plain gradient descent; True where every trained weight has got a gradient."""
    model.train()
    model(input_ids=PROMPT, labels=PROMPT).loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in trained:
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    return trained


def test_without_targets_a_model_unknown_to_peft_gets_all_linear_layers(tiny):
    model = adapted(tiny("llava"))
    linear = {
        name
        for name, module in model.get_base_model().named_modules()
        if isinstance(getattr(module, "base_layer", module), nn.Linear) and ".lora_" not in name
    }
    layers = {name.removesuffix(".base_layer") for name in linear}
    assert adapters(model) == {name for name in layers if name != "lm_head"}


def test_without_targets_pefts_own_choice_is_kept(tiny):
    model = load_model(str(tiny("lm")), head="causal-lm", frozen=True)
    config = lora_config(ModelArguments(use_peft=True))
    found = adapters(attach_adapter(model, config))
    assert {name.rsplit(".")[-1] for name in found} == {"q_proj", "v_proj"}  # PEFT's for llama


def test_the_users_configuration_is_not_changed(tiny):
    config = lora_config(ModelArguments(use_peft=True))
    attach_adapter(load_model(str(tiny("llava")), head="image-text-to-text", frozen=True), config)
    assert config.target_modules is None


def test_targets_by_name_by_pattern_and_excluded(tiny):
    names = adapters(adapted(tiny("llava"), lora_target_modules=["q_proj", "k_proj"]))
    assert {name.rsplit(".")[-1] for name in names} == {"q_proj", "k_proj"}
    names = adapters(adapted(tiny("llava"), lora_target_modules=[r".*language_model.*\.v_proj"]))
    assert len(names) == 2 and all("language_model" in name for name in names)
    names = adapters(adapted(tiny("llava"), lora_exclude_modules=[".*vision.*"]))
    assert names and not any("vision" in name for name in names)


def test_targets_that_match_nothing_are_the_users_error(tiny):
    with pytest.raises(UserError, match="LoRA cannot be put on this model.*qproj"):
        adapted(tiny("llava"), lora_target_modules=["qproj"])


def test_rslora_scales_by_the_root_of_the_rank(tiny):
    for options, scale in (({}, 32 / 4), ({"use_rslora": True}, 32 / 2)):
        model = adapted(tiny("llava"), lora_target_modules=["q_proj"], **options)
        scales = {m.scaling["default"] for m in model.modules() if hasattr(m, "lora_A")}
        assert scales == {scale}


@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}, {"load_in_8bit": True}], ids=["full", "4bit", "8bit"])
def test_dora_and_modules_to_save_train_on_quantised_weights(tiny, bits):
    model = adapted(
        tiny("llava"),
        lora_target_modules=[r".*language_model.*\.(q|v)_proj"],
        lora_modules_to_save=["lm_head", "multi_modal_projector"],
        use_dora=True,
        **bits,
    )
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert any("lora_magnitude_vector" in name for name in names)
    assert any("lm_head.modules_to_save" in name for name in names)
    assert any("multi_modal_projector.modules_to_save" in name for name in names)
    trained = step(model)
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert model.get_base_model().lm_head.modules_to_save["default"].weight.grad.abs().sum() > 0
    if bits:
        kinds = {type(p).__name__ for p in model.parameters() if not p.requires_grad}
        assert kinds & {"Params4bit", "Int8Params"}


def test_packed_weights_are_counted_one_by_one(tiny):
    counts = [
        int(parameter_report(adapted(tiny("llava"), **bits)).split(" of ")[1].split()[0].replace(",", ""))
        for bits in ({}, {"load_in_4bit": True}, {"load_in_8bit": True})
    ]
    assert counts[0] == counts[1] == counts[2]


def test_a_saved_adapter_is_continued_with_its_own_settings(tiny, tmp_path):
    first = adapted(tiny("llava"), lora_target_modules=["q_proj"], use_rslora=True, lora_dropout=0.0)
    step(first)
    first.save_pretrained(tmp_path)
    base = load_model(str(tiny("llava")), head="image-text-to-text", frozen=True)
    again = attach_adapter(base, path=str(tmp_path))
    assert again.peft_config["default"].r == 4 and again.peft_config["default"].use_rslora
    expected = {name: p for name, p in first.named_parameters() if "lora_" in name}
    found = {name: p for name, p in again.named_parameters() if "lora_" in name}
    assert found.keys() == expected.keys() and all(torch.equal(found[n], expected[n]) for n in found)
    assert all(parameter.requires_grad for parameter in found.values())


def test_a_folder_without_adapter_is_the_users_error(tiny, tmp_path):
    base = load_model(str(tiny("llava")), head="image-text-to-text", frozen=True)
    with pytest.raises(UserError, match="no adapter_config.json"):
        attach_adapter(base, path=str(tmp_path))
