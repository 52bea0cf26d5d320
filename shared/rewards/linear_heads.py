"""Linear layers that turn an embedding into a score, as aesthetic predictors and ImageReward have them, from a file.

The layers follow each other with nothing between them: in training there was dropout, which scoring leaves out.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import Tensor, nn

from shared.errors import UserError
from shared.hub import require_available

NO_PICKLE = (
    "its weights are not there as safetensors, and pickles (.pt, .pth, .bin) are not read, since they can run code: "
    "load them where you trust them (torch.load, weights_only=True), and save them with safetensors.torch.save_file"
)
ENCODERS = ("vision_model.", "text_model.", "text_encoder.", "visual_projection.", "text_projection.", "embeddings.")


def linear_head(where: str, width: int, *, file: str = "model.safetensors", revision: str | None = None) -> nn.Module:
    """Read a chain of linear layers that ends in one number; frozen, float32.

    Args:
        where: a safetensors file; a folder or hub id with `file`; a folder with one such file; or
            `owner/name/file.safetensors`.
        width: of the embedding that the first layer takes.
        file: the file's name where there are several. Weights of encoders in it are passed over.
        revision: of the hub id.

    Raises:
        UserError: there is no such file, or it holds something else.
    """
    from safetensors import SafetensorError, safe_open

    path = _file(where, file, revision)
    try:
        with safe_open(path, "pt") as held:
            names = [name for name in held.keys() if not name.startswith(ENCODERS)]  # noqa: SIM118
            state = {name: held.get_tensor(name).float() for name in names if name.endswith(("weight", "bias"))}
    except (OSError, SafetensorError) as error:
        raise UserError(f"the head at {where} cannot be read as safetensors: {error}") from error
    layers = [name.removesuffix("weight") for name in state if name.endswith("weight") and state[name].dim() == 2]
    layers.sort(key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
    shapes = [tuple(state[f"{name}weight"].shape) for name in layers]
    fits = bool(shapes) and shapes[0][1] == width and shapes[-1][0] == 1
    if not fits or any(first[0] != then[1] for first, then in zip(shapes, shapes[1:], strict=False)):
        told = ", ".join(f"{taken} to {given}" for given, taken in shapes) or "none: name a file that has them"
        raise UserError(
            f"the head at {where} does not fit: expected linear layers from the encoder's {width} to 1, found {told}."
        )
    made = [_linear(state[f"{name}weight"], state.get(f"{name}bias")) for name in layers]
    return nn.Sequential(*made).requires_grad_(False).eval()


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight)
    if bias is not None:
        layer.bias = nn.Parameter(bias.to(torch.float32))
    return layer


def _file(where: str, file: str, revision: str | None) -> str:
    path = Path(where)
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"the head {where}: {NO_PICKLE}.")
        return where
    if path.is_dir():
        found = sorted(path.glob("*.safetensors"))
        chosen = path / file if path / file in found else found[0] if len(found) == 1 else None
        if chosen is None:
            held = NO_PICKLE if not found else f"there are {', '.join(each.name for each in found)}: name the file"
            raise UserError(f"the head in {where}: {held}.")
        return str(chosen)
    return _from_hub(where, file, revision)


def _from_hub(where: str, file: str, revision: str | None) -> str:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    owner, _, rest = where.partition("/")
    name, _, named = rest.partition("/")
    if named and (not named.endswith(".safetensors") or where.startswith((".", "/", "~"))):
        raise UserError(f"the head {where}: no such file; give one, a folder, or owner/name/file.safetensors.")
    require_available(f"{owner}/{name}" if name else owner, file=named or file, what="head", revision=revision)
    try:
        return hf_hub_download(f"{owner}/{name}", named or file, revision=revision)
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the head {where} cannot be loaded ({named or file} as safetensors): {reason}") from error
