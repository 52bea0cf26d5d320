"""Denoisers made ready for training, written, read back by plain diffusers, and resumed."""

import copy
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig
from tiny_pipelines import SIZE, tiny_pipeline

from diffusionalign.pipelines.loading import LORA_FILE, load_pipeline, open_pipeline
from diffusionalign.pipelines.preparing import prepare_denoiser
from diffusionalign.pipelines.saving import DiffusionTrainerMixin, restore_denoiser, save_denoiser
from shared.errors import UserError
from shared.trainers.base import AlignTrainer
from shared.trainers.config import AlignConfig

SMALL = LoraConfig(r=2, lora_alpha=6, target_modules=["to_q", "to_v"])


def arguments(**changed):
    usual = {
        "bf16": False,
        "fp16": False,
        "model_init_kwargs": None,
        "should_log": False,
        "device": "cpu",
        "seed": 0,
        "activation_checkpointing": False,
        "activation_checkpointing_kwargs": None,
    }
    return SimpleNamespace(**(usual | changed))


def prepared(kind="sd", peft_config=SMALL, pipeline=None, **changed):
    """An adapter, and its denoiser ready for training."""
    args = arguments(**changed)
    adapter = open_pipeline(pipeline or tiny_pipeline(kind), args, peft_config)
    return adapter, prepare_denoiser(adapter, peft_config, args)


def trained(model):
    """The parameters that are trained, by name; all moved, as if they had been."""
    random = torch.Generator().manual_seed(1)
    found = {name: each for name, each in model.named_parameters() if each.requires_grad}
    for each in found.values():
        each.data += 0.1 * torch.randn(each.shape, generator=random)
    return found


def picture(pipeline):
    """One picture by the pipeline's own call."""
    name = type(pipeline).__name__
    options = {"max_sequence_length": 8} if "3" in name or "Flux" in name else {}
    options |= {"height": SIZE, "width": SIZE, "num_inference_steps": 2, "output_type": "pt"}
    return pipeline("a red circle", generator=torch.Generator().manual_seed(0), **options).images


# ---- Made ready ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sd3", "flux"])
def test_a_lora_on_the_attention_by_default(kind):
    adapter, model = prepared(kind, "lora", bf16=True)
    names = {name for name, each in model.named_parameters() if each.requires_grad}
    assert names and all("attn" in name and "lora_" in name for name in names)
    assert {each.dtype for each in model.parameters() if each.requires_grad} == {torch.float32}
    assert adapter.dtype == torch.bfloat16 and adapter.pipeline.vae.dtype == torch.bfloat16
    assert model.peft_config["default"].lora_alpha == 2 * model.peft_config["default"].r
    frozen = [each for part in (adapter.pipeline.vae, adapter.pipeline.text_encoder) for each in part.parameters()]
    assert not any(each.requires_grad for each in frozen)


def test_full_training_is_in_float32():
    adapter, model = prepared(peft_config=None, bf16=True)
    assert model is adapter.denoiser is adapter.pipeline.unet
    assert {(each.dtype, each.requires_grad) for each in model.parameters()} == {(torch.float32, True)}
    assert adapter.pipeline.vae.dtype == torch.bfloat16


def test_parts_loaded_in_half_precision_stay_in_it():
    for given in (None, {"dtype": "auto"}):
        pipeline = tiny_pipeline("sd").to(torch.bfloat16)
        assert prepared(pipeline=pipeline, model_init_kwargs=given)[0].dtype == torch.bfloat16
    pipeline = tiny_pipeline("sd").to(torch.bfloat16)
    assert prepared(pipeline=pipeline, model_init_kwargs={"dtype": "float32"})[0].dtype == torch.float32


def test_layers_of_t5_that_overflow_stay_in_float32():
    pipeline = prepared("sd3", fp16=True)[0].pipeline
    block = pipeline.text_encoder_3.encoder.block[0].layer[-1].DenseReluDense
    assert block.wo.weight.dtype == torch.float32 and block.wi.weight.dtype == torch.float16


def test_there_is_no_dropout():
    config = LoraConfig(r=2, lora_dropout=0.5, target_modules=["to_q"])
    _, model = prepared(peft_config=config)
    assert not any(module.p for module in model.modules() if isinstance(module, torch.nn.Dropout))


@pytest.mark.parametrize("peft_config", [SMALL, None])
def test_blocks_compute_in_training_as_they_sample(peft_config):
    adapter, model = prepared(peft_config=peft_config)
    for mode in (True, False):
        assert model.train(mode) is model and model.training == mode
        assert not any(block.training for block in adapter.denoiser.modules() if block is not adapter.denoiser)
    copied = copy.deepcopy(model).train()
    assert copied.training and not model.training


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LoraConfig(target_modules=["q_proj"]), "LoRA cannot be put on this model: .*q_proj.* not found"),
        (LoraConfig(modules_to_save=["conv_in"]), "modules_to_save=.*diffusers could not load"),
        (LoraConfig(bias="all"), "bias='all'"),
        (LoraConfig(init_lora_weights="pissa"), "init_lora_weights='pissa'"),
        ({"r": 4}, "peft_config is a dict: give 'lora'"),
        ("/no/such/adapter", "adapter '/no/such/adapter': no such folder"),
    ],
)
def test_adapters_that_cannot_be(config, words):
    with pytest.raises(UserError, match=words):
        prepared(peft_config=config)


def test_a_pipeline_that_has_an_adapter():
    adapter, _ = prepared()
    with pytest.raises(UserError, match="has an adapter already: take it off"):
        prepare_denoiser(adapter, "lora", arguments())


@pytest.mark.parametrize("kind", ["sd", "flux"])
def test_recomputed_activations_give_the_same_gradient(kind):
    def gradients(**changed):
        adapter, model = prepared(kind, **changed)
        trained(model)
        told = adapter.encode_prompts(["a"])
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        if changed:
            assert adapter.pipeline.vae.is_gradient_checkpointing and adapter.denoiser.is_gradient_checkpointing
        adapter.decode(adapter.predict(model, latents, torch.tensor([500]), told)).sum().backward()
        return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}

    plain, again = gradients(), gradients(activation_checkpointing=True)
    assert all(torch.allclose(plain[name], again[name], atol=1e-6) for name in plain)
    with pytest.raises(UserError, match="use_reentrant"):
        prepared(activation_checkpointing=True, activation_checkpointing_kwargs={"use_reentrant": True})


def test_trackers_can_write_the_configuration():
    _, model = prepared()
    assert '"sample_size": 8' in model.config.to_json_string()


# ---- Written and read ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_plain_diffusers_loads_what_was_trained(kind, tmp_path):
    adapter, model = prepared(kind)
    before = picture(adapter.pipeline)
    trained(model)
    learnt = picture(adapter.pipeline)
    assert (learnt - before).abs().max() > 1e-3
    save_denoiser(adapter, model, tmp_path / "lora")
    plain = tiny_pipeline(kind)
    plain.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(picture(plain), learnt, atol=1e-6, rtol=0)


def test_a_whole_pipeline_is_written(tmp_path):
    adapter, model = prepared("sd3", peft_config=None)
    trained(model)
    save_denoiser(adapter, model, tmp_path)
    loaded = load_pipeline(str(tmp_path))
    torch.testing.assert_close(picture(loaded), picture(adapter.pipeline), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=4, lora_alpha=9, use_rslora=True, target_modules=["to_k"], rank_pattern={".*attn1.to_k": 2}),
        LoraConfig(r=2, use_dora=True, target_modules=["to_q"]),
    ],
)
def test_settings_of_an_adapter_are_kept(config, tmp_path):
    adapter, model = prepared(peft_config=config)
    trained(model)
    save_denoiser(adapter, model, tmp_path)
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(tmp_path)
    torch.testing.assert_close(picture(plain), picture(adapter.pipeline), atol=1e-6, rtol=0)


def test_an_adapter_is_gone_on_with(tmp_path):
    adapter, model = prepared()
    learnt = trained(model)
    save_denoiser(adapter, model, tmp_path)
    continued, again = prepared(peft_config=str(tmp_path), bf16=True)
    found = {name: each for name, each in again.named_parameters() if each.requires_grad}
    assert continued.dtype == torch.bfloat16 and again.peft_config["default"].lora_alpha == 6
    assert found.keys() == learnt.keys()  # exactly, though the denoiser is in half precision
    assert all(torch.equal(found[name], learnt[name]) for name in found)
    assert not continued.pipeline.text_encoder._hf_peft_config_loaded
    with pytest.raises(UserError, match="cannot be gone on with: it has no weights for it"):
        prepared("sd3", peft_config=str(tmp_path))


def test_an_adapter_of_other_hands(tmp_path):
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    adapter, model = prepared(peft_config=LoraConfig(r=4, lora_alpha=4, target_modules=["to_q"]))
    trained(model)
    named = {name.removeprefix("base_model.model."): value for name, value in get_peft_model_state_dict(model).items()}
    older = convert_state_dict_to_diffusers(named)  # as the scripts of diffusers write them
    assert not set(older) & set(named)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=older)
    continued, _ = prepared(peft_config=str(tmp_path))
    torch.testing.assert_close(picture(continued.pipeline), picture(adapter.pipeline), atol=1e-6, rtol=0)

    text = {"text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight": torch.zeros(2, 16)}
    text |= {"text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight": torch.zeros(16, 2)}
    layers = {"unet_lora_layers": named, "text_encoder_lora_layers": text}
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    with pytest.raises(UserError, match="changes text_encoder, which are not trained here"):
        prepared(peft_config=str(tmp_path))


@pytest.mark.parametrize("peft_config", [SMALL, None])
def test_weights_are_put_into_the_parameters_that_are_there(peft_config, tmp_path):
    adapter, model = prepared(peft_config=peft_config)
    learnt = trained(model)
    save_denoiser(adapter, model, tmp_path, whole=False)
    assert {path.name for path in tmp_path.iterdir()} == ({LORA_FILE} if peft_config else {"unet"})
    adapter, model = prepared(peft_config=peft_config)
    held = {name: each for name, each in model.named_parameters() if each.requires_grad}
    restore_denoiser(adapter, model, tmp_path)
    now = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert all(now[name] is held[name] for name in held)  # an optimizer that holds them trains what is seen
    assert now.keys() == learnt.keys() and all(torch.equal(now[name], learnt[name]) for name in now)


@pytest.mark.parametrize(
    ("saved", "kind", "config", "words"),
    [
        (SMALL, "sd", None, "is a checkpoint of a LoRA, not of a UNet2D"),
        (None, "sd", SMALL, "is a checkpoint of a whole denoiser, not of a LoRA on a UNet2D"),
        (None, "sd3", None, "is a checkpoint of another kind of model, not of a SD3"),
        (SMALL, "sdxl", SMALL, "is not a checkpoint of this pipeline: .* there, .* here"),
        (SMALL, "sd", LoraConfig(r=2, lora_alpha=7, target_modules=["to_q", "to_v"]), "lora_alpha=6, this one has 7"),
        (SMALL, "sd", LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_v"]), r"\(2, .*\) there, \(3, "),
    ],
)
def test_checkpoints_of_others(saved, kind, config, words, tmp_path):
    adapter, model = prepared(peft_config=saved)
    save_denoiser(adapter, model, tmp_path, whole=False)
    adapter, model = prepared(kind, config)
    before = {name: each.clone() for name, each in model.named_parameters()}
    with pytest.raises(UserError, match=words):
        restore_denoiser(adapter, model, tmp_path)
    assert all(torch.equal(before[name], each) for name, each in model.named_parameters())


# ---- In a run ------------------------------------------------------------------------------------------------------


@dataclass
class Config(AlignConfig):
    model_init_kwargs: dict | None = None


class DenoisingTrainer(DiffusionTrainerMixin, AlignTrainer):
    """Learns to tell the noise of noise."""

    def __init__(self, args, peft_config=SMALL):
        self.adapter = open_pipeline(tiny_pipeline("sd"), args, peft_config)
        model = prepare_denoiser(self.adapter, peft_config, args)
        random = torch.Generator().manual_seed(2)
        rows = [{"latents": torch.randn(4, 8, 8, generator=random), "time": 7 * i} for i in range(16)]
        super().__init__(model, args, train_dataset=rows, eval_dataset=rows[:2])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        told = self.adapter.encode_prompts(["a"] * len(inputs["time"]))
        predicted = self.adapter.predict(model, inputs["latents"], inputs["time"], told)
        return ((predicted - inputs["latents"]) ** 2).mean()

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        with torch.no_grad():
            return self.compute_loss(model, inputs), None, None


def run(folder, peft_config=SMALL, steps=4, resume=None, **options):
    args = Config(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=2,
        learning_rate=0.01,
        lr_scheduler_type="constant",
        save_steps=2,
        eval_answers=0,
        disable_tqdm=True,
        **options,
    )
    trainer = DenoisingTrainer(args, peft_config)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def weights(trainer):
    return {name: each.detach().clone() for name, each in trainer.model.named_parameters() if each.requires_grad}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of a LoRA and one of full training, each of four steps; their folders are not to be written to."""
    folders = {"lora": tmp_path_factory.mktemp("lora_run"), "full": tmp_path_factory.mktemp("full_run")}
    return {kind: run(folder, None if kind == "full" else SMALL) for kind, folder in folders.items()}


def halfway(trainer, folder):
    """The folder of a copy of a run, as it was after two steps."""
    shutil.copytree(trainer.args.output_dir, folder / "again")
    shutil.rmtree(folder / "again" / "checkpoint-4")
    return folder / "again"


@pytest.mark.parametrize("kind", ["lora", "full"])
def test_a_resumed_run_goes_on_bit_for_bit(kind, runs, tmp_path):
    whole = runs[kind]
    resumed = run(halfway(whole, tmp_path), None if kind == "full" else SMALL, resume=True)
    found, expected = weights(resumed), weights(whole)
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    restore_denoiser(resumed.adapter, resumed.model, tmp_path / "again" / "checkpoint-2")
    assert any(not torch.equal(expected[name], value) for name, value in weights(resumed).items())
    # what it trains is what it shows and saves, and not another adapter beside it
    held = {id(each) for group in resumed.optimizer.param_groups for each in group["params"]}
    assert {id(each) for each in resumed.model.parameters() if each.requires_grad} == held
    assert list(getattr(resumed.adapter.denoiser, "peft_config", [])) == (["default"] if kind == "lora" else [])


def test_the_end_of_a_run_is_what_plain_diffusers_loads(runs, tmp_path, monkeypatch):
    lora, full = runs["lora"], runs["full"]
    lora.save_model(str(tmp_path / "lora"))
    full.save_model(str(tmp_path / "full"))
    plain = tiny_pipeline("sd")
    plain.load_lora_weights(tmp_path / "lora")
    torch.testing.assert_close(picture(plain), picture(lora.adapter.pipeline), atol=1e-6, rtol=0)
    loaded = load_pipeline(str(tmp_path / "full"))
    torch.testing.assert_close(picture(loaded), picture(full.adapter.pipeline), atol=1e-6, rtol=0)
    checkpoint = Path(full.args.output_dir) / "checkpoint-2"
    assert not (checkpoint / "model_index.json").exists() and not (checkpoint / "training_args.bin").exists()
    monkeypatch.setattr(Config, "should_save", property(lambda self: False))
    lora.save_model(str(tmp_path / "other"))  # as processes beside the first do
    assert not (tmp_path / "other").exists()
    assert lora.title() == "Denoising: StableDiffusionPipeline"


def test_a_run_refuses_the_checkpoint_of_another(runs, tmp_path):
    with pytest.raises(UserError, match="is a checkpoint of a whole denoiser, not of a LoRA"):
        run(halfway(runs["full"], tmp_path), resume=True)


def test_a_run_with_recomputed_activations(runs, tmp_path):
    again = weights(run(tmp_path, activation_checkpointing=True))
    plain = weights(runs["lora"])
    assert all(torch.allclose(plain[name], again[name], atol=1e-5) for name in plain)


def test_the_best_checkpoint_is_what_is_left(tmp_path, monkeypatch):
    losses = iter([1.0, 2.0])
    real = DenoisingTrainer.evaluate

    def evaluate(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        found["eval_loss"] = next(losses)
        return found

    monkeypatch.setattr(DenoisingTrainer, "evaluate", evaluate)
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = run(tmp_path, metric_for_best_model="eval_loss", greater_is_better=False, **options)
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-2"
    last = weights(trainer)
    restore_denoiser(trainer.adapter, trainer.model, tmp_path / "checkpoint-2")
    assert all(torch.equal(last[name], value) for name, value in weights(trainer).items())
    restore_denoiser(trainer.adapter, trainer.model, tmp_path / "checkpoint-4")
    assert any(not torch.equal(last[name], value) for name, value in weights(trainer).items())
