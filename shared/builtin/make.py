"""Make the files of the built-in models and data sets again: `python -m shared.builtin.make`.

Writes `vlm_small/` (configuration, tokenizer, chat template, image processor; no weights) and, where scikit-learn is
installed, `data/digits.parquet`. Running it twice gives the same files. The vision-language models of other families
are made by make_vlms.py, the language models by make_lm.py.
"""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shared.builtin import MODELS, digits, shapes
from shared.builtin.rows import IMAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedTokenizerFast

VOCABULARY = 448
PATCH = 16  # pixels: one cell of a `builtin/shapes` picture
WIDTH = 96
PAD, END, IMAGE = "<pad>", "<end>", "<image>"
SPECIAL = (PAD, END, IMAGE, "<system>", "<user>", "<assistant>")

# One token a turn mark: with the some 15 tokens that usual templates spend on two turns a picture question is twice as
# long. The generation marks cover what the assistant has to produce: its text and the end of its turn.
CHAT_TEMPLATE = """\
{%- macro body(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'image' -%}
                {{- '<image>' -}}
            {%- elif part['type'] == 'text' -%}
                {{- part['text'] -}}
            {%- else -%}
                {{- raise_exception('this model takes text and images, not ' ~ part['type']) -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {%- if message['role'] not in ('system', 'user', 'assistant') -%}
        {{- raise_exception('unknown role ' ~ message['role']) -}}
    {%- endif -%}
    {{- '<' ~ message['role'] ~ '>' -}}
    {%- if message['role'] == 'assistant' -%}
        {%- generation -%}
            {{- body(message['content']) ~ '<end>' -}}
        {%- endgeneration -%}
    {%- else -%}
        {{- body(message['content']) ~ '<end>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<assistant>' -}}
{%- endif -%}
"""

# So that words outside the built-in questions are not spelt byte by byte.
ENGLISH = """\
The picture shows a small house with a green door and two windows. There is a tree on the left, and a dog is
sitting under it in the sun. Is there anything else in this image? No, I cannot see any people, but there are
some flowers on the right side of the road. What is the name of this animal? It is a cat that lies on the
table next to a bowl of fruit. Please answer the following question with one word. How do you know that?
Because the text on the sign says so. She said that they would have to wait for the train, which was about ten
minutes late, while he was reading the paper. I think it is better to use a short sentence when we can. Which
one is larger, the first or the second? They are not the same: the number of items in each row can be
different. Write a list of three things that you might want to take with you, and explain why. One of them
should be something to eat. The other parts were made from wood and metal before they had been put together.
After that, all of us went home and talked about what had happened during the day.
"""


def main() -> None:
    make_vlm(MODELS["builtin/vlm-small"])
    if importlib.util.find_spec("sklearn") is None:
        print("scikit-learn is not installed: data/digits.parquet stays as it is")
    else:
        make_digits(digits.PATH)


def make_vlm(directory: Path) -> None:
    """Write configuration and processor of a LLaVA-type model: SigLIP tower, two-layer projector, small Llama."""
    from transformers import (
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    tokenizer = make_tokenizer()
    image_id, pad_id, end_id = tokenizer.convert_tokens_to_ids([IMAGE, PAD, END])
    # Weights are larger than the usual 0.02: at this width the signal would fade, and learning start late.
    size = {
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_attention_heads": 4,
        "initializer_range": 0.06,
    }
    tower = SiglipVisionConfig(
        **size, num_hidden_layers=2, image_size=IMAGE_SIZE, patch_size=PATCH, vision_use_head=False
    )
    language = LlamaConfig(
        **size,
        num_hidden_layers=3,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=end_id,
        pad_token_id=pad_id,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=language,
        image_token_index=image_id,
        image_seq_length=(IMAGE_SIZE // PATCH) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        initializer_range=size["initializer_range"],
        architectures=["LlavaForConditionalGeneration"],
    )
    config.save_pretrained(directory)
    GenerationConfig(eos_token_id=end_id, pad_token_id=pad_id).save_pretrained(directory)
    LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE}),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(directory)


def make_tokenizer(
    special: Sequence[str] = SPECIAL,
    texts: Sequence[str] | None = None,
    *,
    pad: str = PAD,
    end: str = END,
    **named: str,
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: the built-in questions and answers in few tokens, any other text in more.

    Args:
        special: the control tokens, by their ids.
        texts: what is to be few tokens; None: what `built_in_texts` gives.
        pad, end: those of them that pad a row and end a turn.
        named: attribute of the tokenizer -> one of them, for example `bos_token` or `image_token`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY + len(special) - len(SPECIAL),
        special_tokens=list(special),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = built_in_texts() if texts is None else texts
    tokenizer.train_from_iterator([*list(texts) * 4, *ENGLISH.splitlines()], trainer)
    others = [token for token in special if token not in (pad, end, *named.values())]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token=end,
        additional_special_tokens=others,
        padding_side="right",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
        **named,
    )


def built_in_texts() -> list[str]:
    """Every question and answer of the built-in data sets, descriptions by their parts."""
    texts = ["Describe the image.", "How many shapes are there?", *digits.QUESTIONS, *map(str, range(10))]
    for form, colour in itertools.product(shapes.FORMS, shapes.COLOURS):
        texts += [f"What colour is the {form}?", f"What shape is {colour}?", f"Where is the {form}?"]
        texts += [f"How many {colour} shapes are there?", f"{form} {colour} {form} {colour}", colour, form]
    return texts + list(shapes.PLACES) * 2


def make_digits(path: Path, held_out: int = 360) -> None:
    """Write scikit-learn's copy of the UCI digits with a fixed split."""
    import pyarrow
    import pyarrow.parquet
    from sklearn.datasets import load_digits

    source = load_digits()
    pixels_N88 = source.images.astype(np.uint8)
    order = np.random.RandomState(0).permutation(len(pixels_N88))
    split = np.full(len(pixels_N88), "train", dtype=object)
    split[order[:held_out]] = "test"
    table = pyarrow.table(
        {
            "pixels": pyarrow.array([picture.tobytes() for picture in pixels_N88], pyarrow.binary()),
            "label": pyarrow.array(source.target, pyarrow.int8()),
            "split": pyarrow.array(split, pyarrow.string()),
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path, compression="zstd")


if __name__ == "__main__":
    main()
