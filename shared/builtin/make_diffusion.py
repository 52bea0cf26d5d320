"""Make the built-in text-to-image pipelines; `scripts/make_builtin_models.py` runs this.

`builtin/sd-small` is of the type of Stable Diffusion 1, `builtin/sd3-small` of that of Stable Diffusion 3, with the
same picture encoder. Everything is small: a picture is 32 x 32 pixels, its latents 4 x 8 x 8, a prompt 12 tokens.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from shared.builtin import measure_pictures, pipeline_path
from shared.builtin.pictures import COLOURS, FORMS, PHRASES, SIZE
from shared.builtin.train_diffusion import BATCH, Round, train_sd, train_sd3, train_vae

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTokenizer, T5EncoderModel

PROMPT = 12  # tokens
WORDS = 32  # width of a text encoder
START, END = "<|startoftext|>", "<|endoftext|>"
# So that prompts with other words are not spelt letter by letter.
OTHER_WORDS = """
small large big little bright dark light colourful beautiful on in with and at an no two three left right top bottom
centre middle background black white grey orange pink brown star ring object shape photo painting cat dog house tree
"""

VAE_STEPS = 900
VAE_SHIFT = 0.065  # mean of the latents
CARD = "README.md"


class Made(NamedTuple):
    """How a pipeline is made."""

    build: Callable[[AutoencoderKL], DiffusionPipeline]
    train: Callable[[Any, Round, int], None]
    rounds: tuple[Round, ...]
    origin: str


def make(name: str, directory: Path) -> None:
    """Train a pipeline of `MADE`; write it and, measured on what was written, its card.

    `builtin/sd3-small` takes the picture encoder that is in the folder of `builtin/sd-small`.
    """
    made = MADE[name]
    vae = make_vae() if made.build is new_sd else shipped_vae()
    torch.manual_seed(0)
    pipeline = made.build(vae)
    for seed, part in enumerate(made.rounds):
        made.train(pipeline, part, seed)
    save(pipeline, directory)
    text = card(name, made, measure_pictures.pipeline_figures(name))
    (directory / CARD).write_text(text, encoding="utf-8")
    print(text)


def make_vae() -> AutoencoderKL:
    """The picture encoder, trained."""
    torch.manual_seed(0)
    vae = new_vae()
    train_vae(vae, VAE_STEPS)
    return vae


def shipped_vae() -> AutoencoderKL:
    """The picture encoder of `builtin/sd-small`; its latents are also moved, to a mean of about 0."""
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(pipeline_path("builtin/sd-small") / "vae", shift_factor=VAE_SHIFT)


def save(pipeline: DiffusionPipeline, directory: Path) -> None:
    """Write the pipeline, its weights in float16."""
    pipeline.to(torch.float16).save_pretrained(directory)
    for config in (directory / "model_index.json", *directory.glob("*/config.json")):
        said = json.loads(config.read_text())
        said.pop("_name_or_path", None)
        # transformers loads numbers of the type that is said here, whatever they are held in, diffusers in float32.
        said |= {"dtype": "float32"} if "dtype" in said else {}
        config.write_text(json.dumps(said, indent=2) + "\n")
    for tokenizer in directory.glob("tokenizer*/tokenizer.json"):
        tokenizer.write_text(json.dumps(json.loads(tokenizer.read_text()), separators=(",", ":")))
    for weights in directory.rglob("*.safetensors"):
        weights.chmod(0o644)  # they are written for their owner alone


def card(name: str, made: Made, measured: dict[str, str]) -> str:
    """What the pipeline is and what it reaches, as Markdown."""
    wrong = [f"{each.wrong:.0%}" for each in made.rounds if each.spoilt_steps]
    spoilt = sum(each.spoilt_steps for each in made.rounds)
    origin = (
        f"{made.origin}, {spoilt + sum(each.steps for each in made.rounds)} steps of {BATCH} drawn pictures of 32 x "
        "32 pixels: a circle, square, triangle or cross in one of six colours, light or dark behind it. In "
        f"{spoilt} of these steps {' or '.join(wrong)} of the captions name a "
        "wrong colour, as captions from the web do; so it draws the form that it is asked for, but often in another "
        "colour: other trainers can mend that. Made by `python scripts/make_builtin_models.py`. Measured on the "
        "weights as they are shipped (held as float16, loaded as float32), by the rule in "
        "`shared.builtin.pictures_judge`, on the prompts of the test rows of `builtin/picture-prompts`:"
    )
    rows = "\n".join(f"| {what} | {value} |" for what, value in measured.items())
    return f"# {name}\n\n{textwrap.fill(origin, 115)}\n\n| measured | value |\n|---|---|\n{rows}\n"


def make_tokenizer() -> CLIPTokenizer:
    """A tokenizer of CLIP's kind: one token for each word of the prompts and of some more, letters for the rest."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    words = sorted(
        {*" ".join(PHRASES).replace("{", "").replace("}", "").split(), *COLOURS, *FORMS, *OTHER_WORDS.split()}
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=10_000, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    # As no two words are equally frequent, what is merged first does not hang on the order of a hash table.
    often = [word for at, word in enumerate(words) for _ in range(100 + at * at)]
    learner.train_from_iterator([*often, *alphabet], trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), *map("".join, merges), START, END]
    return CLIPTokenizer(
        vocab={token: at for at, token in enumerate(tokens)},
        merges=merges,
        model_max_length=PROMPT,
    )


def text_config(tokenizer: CLIPTokenizer) -> CLIPTextConfig:
    from transformers import CLIPTextConfig

    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WORDS,
        intermediate_size=2 * WORDS,
        projection_dim=WORDS,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=PROMPT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",  # loaded as it says, whatever the weights are held in
    )


def new_vae() -> AutoencoderKL:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 24, 24),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def new_sd(vae: AutoencoderKL) -> StableDiffusionPipeline:
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    tokenizer = make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(32, 48),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WORDS,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    scheduler = DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text_config(tokenizer)),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def new_sd3(vae: AutoencoderKL) -> StableDiffusion3Pipeline:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextModelWithProjection, T5Tokenizer

    tokenizer = make_tokenizer()
    width, head = 80, 16
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=head,
        num_attention_heads=width // head,
        joint_attention_dim=2 * WORDS,
        caption_projection_dim=width,
        pooled_projection_dim=2 * WORDS,
        pos_embed_max_size=SIZE // 8,
        qk_norm="rms_norm",
    )
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=2.0),
        vae=vae,
        text_encoder=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer=tokenizer,
        text_encoder_2=CLIPTextModelWithProjection(text_config(tokenizer)),
        tokenizer_2=tokenizer,
        text_encoder_3=silent_t5(),
        tokenizer_3=T5Tokenizer([("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)], extra_ids=0, model_max_length=PROMPT),
    )


def silent_t5() -> T5EncoderModel:
    """A T5 that gives zeros, as diffusers puts in the place of none; but without one it loads no such folder."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=3, d_model=2 * WORDS, d_kv=4, d_ff=4, num_layers=1, num_heads=1, dtype="float32")
    encoder = T5EncoderModel(config).eval()
    encoder.encoder.final_layer_norm.weight.data.zero_()
    return encoder


MADE = {
    "builtin/sd-small": Made(
        build=new_sd,
        train=train_sd,
        rounds=(Round(4800, 900, wrong=0.3), Round(120)),
        origin="A text-to-image pipeline of the type of Stable Diffusion 1 (`StableDiffusionPipeline`, DDIM)",
    ),
    "builtin/sd3-small": Made(
        build=new_sd3,
        train=train_sd3,
        rounds=(Round(3500, 1000, wrong=0.45), Round(3600, 400, wrong=0.3)),
        origin=(
            "A text-to-image pipeline of the type of Stable Diffusion 3 (`StableDiffusion3Pipeline`, flow matching; "
            "its T5 encoder is silent, the two of CLIP read the prompt)"
        ),
    ),
}
