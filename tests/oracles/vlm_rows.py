"""The rows, templates and weights that record_trl_vlm.py and the test that reads its record have in common."""

import numpy as np
from PIL import Image

POLICY = {"seed": 3, "drift": 0.0}
REFERENCE = {"seed": 3, "drift": 0.3}
_TURN = (
    "{% for message in messages %}<OPEN>{{ message['role'] }}\n{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<IMAGE>{% else %}{{ part['text'] }}{% endif %}{% endfor %}<CLOSE>{% endfor %}"
    "{% if add_generation_prompt %}<OPEN>assistant\n{% endif %}"
)


def _template(**names):
    text = _TURN
    for name, value in names.items():
        text = text.replace(f"<{name}>", value)
    return text


TEMPLATES = {
    "llava": _template(OPEN="<s>", IMAGE="<image>", CLOSE="</s>"),
    "qwen2_vl": _template(
        OPEN="<|im_start|>", IMAGE="<|vision_start|><|image_pad|><|vision_end|>", CLOSE="<|im_end|>"
    ),
}


def rows():
    """Pairs of unlike length, each with an image of a size of its own, drawn by a formula."""
    told = [
        ("What colour is the circle?", "red", "the square is green"),
        ("Describe the image.", "two blue squares and a circle", "one"),
        ("How many shapes?", "three", "four"),
    ]
    return [
        {
            "images": [_image(at)],
            "prompt": [{"role": "user", "content": question}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
        for at, (question, chosen, rejected) in enumerate(told)
    ]


def _image(at):
    height, width = 32 + 8 * at, 40
    y, x, channel = np.meshgrid(np.arange(height), np.arange(width), np.arange(3), indexing="ij")
    return Image.fromarray(((7 * y + 13 * x * (at + 1) + 50 * channel) % 256).astype(np.uint8))
