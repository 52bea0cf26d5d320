"""Adapters of pipelines: what they compute is what diffusers' own call computes; what they refuse."""

import json
from types import SimpleNamespace

import pytest
import torch
from tiny_pipelines import PIPELINES, SIZE, tiny_pipeline

from diffusionalign.pipelines import base
from diffusionalign.pipelines.loading import adapter_of, load_pipeline, open_pipeline
from diffusionalign.sampling import denoise
from diffusionalign.steps import Sampler
from shared.errors import UserError

PROMPTS = ["a red circle", "blue"]
TOKENS = 8  # of T5: as many as a pipeline takes by itself would be slow


def adapted(kind, **options):
    return adapter_of(tiny_pipeline(kind), max_sequence_length=TOKENS, **options)


def seeded():
    return torch.Generator().manual_seed(0)


def shown(adapter, steps=4, **options):
    """The pipeline's own pictures, (2, 3, H, W)."""
    if adapter.max_sequence_length:
        options["max_sequence_length"] = adapter.max_sequence_length
    given = {"height": SIZE, "width": SIZE, "num_inference_steps": steps, "output_type": "pt", **options}
    return adapter.pipeline(PROMPTS, generator=seeded(), **given).images


@torch.no_grad()
def drawn(adapter, steps=4, negative=None, guidance_scale=1.0):
    """Ours, from the same noise."""
    told = adapter.encode_prompts(PROMPTS)
    negative = adapter.encode_prompts([negative]) if negative else None
    schedule = adapter.schedule(steps, SIZE, SIZE)

    def predict(latents, at):
        rest = {"negative": negative, "guidance_scale": guidance_scale}
        return adapter.predict(adapter.denoiser, latents, schedule.timesteps[at], told, **rest)

    noise = torch.randn((2, *adapter.latent_shape(SIZE, SIZE)), generator=seeded())
    return adapter.decode(denoise(predict, noise, schedule, Sampler("ode")).final)


@pytest.mark.parametrize("kind", PIPELINES)
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_pictures_are_those_of_the_pipeline(kind, guidance_scale):
    adapter = adapted(kind)
    theirs = shown(adapter, guidance_scale=guidance_scale)
    torch.testing.assert_close(drawn(adapter, guidance_scale=guidance_scale), theirs, atol=1e-5, rtol=0)
    assert theirs.std() > 0.05


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3"])
def test_guidance_changes_pictures_and_a_negative_prompt_does_too(kind):
    adapter = adapted(kind)
    theirs = shown(adapter, guidance_scale=4.0, negative_prompt=["ugly"] * 2)
    ours = drawn(adapter, negative="ugly", guidance_scale=4.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (ours - drawn(adapter, guidance_scale=4.0)).abs().max() > 1e-4
    assert (ours - drawn(adapter)).abs().max() > 1e-4


def test_flux_is_told_the_scale_and_its_quick_kind_is_not():
    assert (drawn(adapted("flux"), guidance_scale=4.0) - drawn(adapted("flux"))).abs().max() > 1e-4
    assert torch.equal(drawn(adapted("flux-schnell"), guidance_scale=4.0), drawn(adapted("flux-schnell")))


@pytest.mark.parametrize("kind", ["sd", "sdxl", "sd3", "flux"])
def test_rows_may_differ_in_their_timesteps(kind):
    adapter = adapted(kind)
    told, latents = adapter.encode_prompts(PROMPTS), torch.randn(2, 4, 8, 8, generator=seeded())
    times = adapter.schedule(4, SIZE, SIZE).timesteps[[0, 2]]
    both = adapter.predict(adapter.denoiser, latents, times, told, guidance_scale=3.0)
    for row in range(2):
        one = {name: value[row : row + 1] for name, value in told.items()}
        place = slice(row, row + 1)
        alone = adapter.predict(adapter.denoiser, latents[place], times[place], one, guidance_scale=3.0)
        torch.testing.assert_close(both[place], alone, atol=1e-5, rtol=1e-4)


def test_half_precision_in_float32_out():
    pipeline = tiny_pipeline("sd").to(torch.bfloat16)
    adapter = adapter_of(pipeline)
    assert adapter.dtype == torch.bfloat16
    told, latents = adapter.encode_prompts(PROMPTS), torch.randn(2, 4, 8, 8)
    assert told["embeds"].dtype == torch.bfloat16
    found = adapter.predict(adapter.denoiser, latents, torch.tensor([5, 9]), told, guidance_scale=2.0)
    assert found.dtype == torch.float32 and adapter.decode(latents).dtype == torch.float32


# ---- Prompts -------------------------------------------------------------------------------------------------------


def test_a_prompt_is_encoded_once_and_by_itself(monkeypatch):
    adapter = adapted("sd")
    calls = []
    monkeypatch.setattr(adapter, "encode", lambda text, real=adapter.encode: calls.append(text) or real(text))
    with torch.inference_mode():
        first = adapter.encode_prompts(["a", "b", "a"])
    again = adapter.encode_prompts(["b"])
    assert calls == ["a", "b"]
    assert torch.equal(first["embeds"][1:2], again["embeds"])
    weight = torch.ones(16, requires_grad=True)
    (adapter.encode_prompts(["a"])["embeds"] * weight).sum().backward()  # tensors of inference mode would fail here
    monkeypatch.setattr(base, "CACHE_BYTES", first["embeds"][:1].nbytes)
    adapter.encode_prompts(["c"])
    adapter.encode_prompts(["a"])
    assert calls == ["a", "b", "c", "a"]


def test_no_prompt_is_zeros_where_the_pipeline_says_so():
    adapter = adapted("sdxl")
    assert not adapter.encode_prompts([None])["pooled"].any()
    assert adapter.encode_prompts([""])["pooled"].any()
    adapter = adapted("sd")
    assert torch.equal(adapter.encode_prompts([None])["embeds"], adapter.encode_prompts([""])["embeds"])


def test_sdxl_is_told_the_numbers_of_a_picture():
    adapter = adapted("sdxl")
    told, latents, times = adapter.encode_prompts(PROMPTS), torch.randn(2, 4, 8, 8), torch.tensor([5, 5])
    plain = adapter.predict(adapter.denoiser, latents, times, told)
    own = {**told, "time_ids": torch.tensor([[16.0, 16, 0, 0, 16, 16], [64, 32, 3, 4, 16, 16]])}
    found = adapter.predict(adapter.denoiser, latents, times, own)
    assert torch.equal(plain[0], found[0]) and not torch.equal(plain[1], found[1])
    assert adapter.predict(adapter.denoiser, latents, times, own, guidance_scale=2.0).shape == latents.shape


def test_length_of_text():
    pipeline = tiny_pipeline("sd3")
    assert adapter_of(pipeline).encode_prompts(["a"])["embeds"].shape[1] == 16 + 256  # as the pipeline's own call
    pipeline.text_encoder_3 = None
    assert adapter_of(pipeline).encode_prompts(["a"])["embeds"].shape[1] == 16 + 16
    assert adapted("flux").encode_prompts(["a"])["embeds"].shape[1] == TOKENS


# ---- Sizes ---------------------------------------------------------------------------------------------------------


def test_sizes():
    assert adapted("sd").size == (16, 16) and adapted("sd").latent_shape() == (4, 8, 8)
    assert adapted("sd3").latent_shape(32, 16) == (4, 16, 8)
    assert adapted("flux").latent_shape(16, 24) == (4, 8, 12)


@pytest.mark.parametrize(
    ("kind", "height", "width", "words"),
    [
        ("sd", 20, 16, "height=20: StableDiffusionPipeline takes multiples of 8 pixels, for example 16 or 24"),
        ("sdxl", 16, 3, "width=3: .* multiples of 8"),
        ("sd3", 18, 16, "height=18: .* multiples of 4"),
        ("sd3", 36, 16, "positions for 32 pixels a side"),
        ("flux", 16, 18, "width=18: .* multiples of 4"),
        ("sd", -8, 16, "height=-8"),
    ],
)
def test_a_size_that_cannot_be(kind, height, width, words):
    adapter = adapted(kind)
    with pytest.raises(UserError, match=words):
        adapter.latent_shape(height, width)


def test_flow_levels_depend_on_the_size_where_the_scheduler_says_so():
    adapter = adapted("flux")
    small, large = adapter.schedule(4, 16, 16), adapter.schedule(4, 256, 256)
    assert (large.sigmas[1:-1] > small.sigmas[1:-1]).all()


# ---- Pictures ------------------------------------------------------------------------------------------------------


def test_pictures_come_in_slices_and_clamped_or_with_gradient():
    adapter = adapted("sd")
    latents = 3 * torch.randn(3, 4, 8, 8, generator=seeded())
    whole = adapter.decode(latents)
    assert whole.shape == (3, 3, 16, 16) and whole.min() == 0 and not whole.requires_grad
    torch.testing.assert_close(adapter.decode(latents, slice_size=2), whole, atol=1e-6, rtol=0)
    latents.requires_grad_()
    kept = adapter.decode(latents)
    assert kept.min() < 0
    assert torch.equal(kept.detach().clamp(0, 1), whole)
    kept.sum().backward()
    assert latents.grad.abs().min() >= 0 and latents.grad.any()
    assert all(parameter.grad is None for parameter in adapter.pipeline.vae.parameters())


def test_the_vae_of_sdxl_overflows_in_float16():
    adapter, plain = (
        adapter_of(tiny_pipeline("sdxl").to(torch.float16)),
        adapter_of(tiny_pipeline("sd").to(torch.half)),
    )
    assert adapter.vae.dtype == torch.float32 and plain.vae.dtype == torch.float16
    assert adapter.dtype == torch.float16


@pytest.mark.parametrize("kind", ["sd", "sd3"])
def test_latents_of_pictures_are_in_the_scale_of_sampling(kind):
    adapter, images = adapted(kind), torch.rand(2, 3, 16, 16, generator=seeded())
    config, vae = adapter.pipeline.vae.config, adapter.pipeline.vae
    posterior = vae.encode(images * 2 - 1).latent_dist
    expected = (posterior.mean - (config.shift_factor or 0)) * config.scaling_factor
    mean = adapter.encode_images(images, sample=False)
    torch.testing.assert_close(mean, expected)
    first, again = (adapter.encode_images(images, random=seeded(), slice_size=1) for _ in range(2))
    assert torch.equal(first, again)
    noise = (first - mean) / config.scaling_factor / posterior.std
    torch.testing.assert_close(noise, torch.randn(noise.shape, generator=seeded()), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(adapter.decode(mean), (vae.decode(posterior.mean)[0] / 2 + 0.5).clamp(0, 1))
    with pytest.raises(UserError, match="height=10"):
        adapter.encode_images(torch.rand(1, 3, 10, 16))


# ---- Loading -------------------------------------------------------------------------------------------------------


def arguments(**changed):
    usual = {"bf16": False, "fp16": False, "model_init_kwargs": None, "should_log": True}
    return SimpleNamespace(**(usual | changed))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sd")
    tiny_pipeline("sd").save_pretrained(path)
    return path


def types(pipeline):
    return {name: getattr(pipeline, name).dtype for name in ("unet", "vae", "text_encoder")}


def test_number_types(folder):
    half, whole = torch.bfloat16, torch.float32
    assert set(types(open_pipeline(str(folder), arguments(), "lora").pipeline).values()) == {whole}
    assert set(types(open_pipeline(str(folder), arguments(bf16=True), "lora").pipeline).values()) == {half}
    full = open_pipeline(str(folder), arguments(bf16=True), None)
    assert types(full.pipeline) == {"unet": whole, "vae": half, "text_encoder": half}
    asked = open_pipeline(str(folder), arguments(bf16=True, model_init_kwargs={"dtype": "float32"}), "lora")
    assert set(types(asked.pipeline).values()) == {whole}
    pipeline = tiny_pipeline("sd")
    assert open_pipeline(pipeline, arguments(), "lora").pipeline is pipeline


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"attn_implementation": "sdpa"}, "attn_implementation: diffusers chooses"),
        ({"quantization_config": object()}, "quantization_config: pipelines are not quantised"),
        ({"trust_remote_code": True}, "trust_remote_code: no code"),
        ({"device_map": "auto"}, "device_map: pipelines take dtype"),
        ({"dtype": "int8"}, "dtype 'int8': give auto"),
    ],
)
def test_options_of_loading_that_do_not_apply(folder, given, words):
    with pytest.raises(UserError, match=words):
        open_pipeline(str(folder), arguments(model_init_kwargs=given), "lora")
    none = {"attn_implementation": None, "trust_remote_code": False, "revision": "main", "dtype": "auto"}
    assert open_pipeline(str(folder), arguments(model_init_kwargs=none), "lora").dtype == torch.float32


def test_folders_that_hold_no_pipeline(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        load_pipeline(str(tmp_path / "missing"))
    with pytest.raises(UserError, match="holds no pipeline"):
        load_pipeline(str(tmp_path))
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    with pytest.raises(UserError, match="is a LoRA adapter: name its pipeline"):
        load_pipeline(str(tmp_path))
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    with pytest.raises(UserError, match="WanPipeline is not a pipeline that can be trained here; these are: Stable"):
        load_pipeline(str(tmp_path))


def test_no_pickle_is_read(tmp_path):
    pipeline = tiny_pipeline("sd")
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    torch.save(pipeline.unet.state_dict(), tmp_path / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be loaded: .*safetensors"):
        load_pipeline(str(tmp_path))


def test_parts_that_cannot_be_trained(folder, capsys):
    from diffusers import CMStochasticIterativeScheduler, PNDMScheduler, StableDiffusionImg2ImgPipeline

    pipeline = tiny_pipeline("sd")
    pipeline.scheduler = PNDMScheduler.from_config(pipeline.scheduler.config, skip_prk_steps=True)
    open_pipeline(pipeline, arguments(), "lora")
    assert "its PNDMScheduler is read for its noise levels" in capsys.readouterr().out
    pipeline.scheduler = CMStochasticIterativeScheduler()
    with pytest.raises(UserError, match="CMStochasticIterativeScheduler, is not supported"):
        adapter_of(pipeline)
    with pytest.raises(UserError, match="StableDiffusionImg2ImgPipeline is not a pipeline"):
        adapter_of(StableDiffusionImg2ImgPipeline(**tiny_pipeline("sd").components, requires_safety_checker=False))
    pipeline = tiny_pipeline("sd")
    pipeline.vae.register_to_config(latent_channels=8)
    with pytest.raises(UserError, match="takes latents of 4 channels, its VAE makes 8"):
        adapter_of(pipeline)
    pipeline = tiny_pipeline("sd")
    pipeline.unet.register_to_config(time_cond_proj_dim=8)
    with pytest.raises(UserError, match="is told the guidance scale"):
        adapter_of(pipeline)
