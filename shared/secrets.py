"""Which names stand for what must not be written down."""

from __future__ import annotations

import re

SECRET = re.compile(r"(^|_)(token|key|password|passwd|secret|authorization|credentials?)$", re.IGNORECASE)
# options of tokenizers that end like a secret and hold a word of the vocabulary
NOT_SECRET = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|image|video|audio)_token$", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether an option of this name holds a token, a key or a password."""
    return bool(SECRET.search(name)) and not NOT_SECRET.match(name)
