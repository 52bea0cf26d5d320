"""A frozen vision tower whose work is done beforehand: its features are recorded, and later given in its place.

Features are what goes into the projector's modules, or what comes out of them where the projector is frozen too. A
model that is given them runs its own forward: its tower answers with a blank, and the projector's modules take the
features in place of what that blank led to. So where images stand among the tokens stays the family's own business.

What is known here of families: the few that work this way, and what their own code wants to see of pixels.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from shared.errors import UserError
from shared.policies.head_call import wrap_forward
from shared.policies.prefix import evaluating
from visionalign.families import Family, modules, parameters

FEATURES = "vision_features"  # and vision_features_1, … of a projector of several modules
# of what a processor gives: what only the tower sees
TOWER_ONLY = frozenset({"pixel_values", "pixel_attention_mask", "aspect_ratio_mask"})
_TILED = ("idefics3", "smolvlm")  # count an image's tiles by its pixels
_PATCHED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")  # one sequence of patches
_SLOTTED = ("mllama",)  # as many images for each row of a batch: what a blank one gives is seen too
CAN = ("llava", "llava_next", "llava_next_video", *_TILED, "gemma3", "paligemma", *_PATCHED, *_SLOTTED)


class FrozenTower:
    """The features of one model: `record` computes them, and `teach` makes the model take them.

    Args:
        model: a vision-language model, with its adapter where it has one.
        family: its row of families.py.

    Attributes:
        past_projector: whether the features are what comes out of the projector.

    Raises:
        UserError: a family that does not work this way, or a tower that trains.
    """

    def __init__(self, model: nn.Module, family: Family):
        if family.name not in CAN:
            raise UserError(
                f"cache_vision_features: not for models of the type {family.name!r}; it works for {', '.join(CAN)}."
            )
        trained = [name for name, p in parameters(model, "vision_tower").items() if p.requires_grad]
        if trained:
            raise UserError(
                f"cache_vision_features: the vision tower trains ({len(trained)} of its parameters, {trained[0]} for "
                "one). Freeze it (--freeze_vision_tower; of an adapter, target_modules that leave the tower out), or "
                "leave the cache out."
            )
        self.model = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.body: nn.Module = getattr(self.model, self.model.base_model_prefix)
        self.family = family
        self.towers = modules(model, "vision_tower")
        found = modules(model, "projector")
        self.projectors = [each for m in found for each in (m if isinstance(m, nn.ModuleList) else [m])]
        self.past_projector = not any(p.requires_grad for m in self.projectors for p in m.parameters())
        self.names = [f"{FEATURES}_{at}" if at else FEATURES for at in range(len(self.projectors))]
        self._shapes: list[torch.Size] = []  # of one row of each features
        self._blank: list[Tensor] = []
        self._given: list[Tensor] | None = None

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All that the features depend on, by name."""
        parts = [*self.towers, *(self.projectors if self.past_projector else [])]
        for at, module in enumerate(parts):
            for name, tensor in module.state_dict(keep_vars=True).items():
                if isinstance(tensor, Tensor):
                    yield f"{at}.{name}", tensor

    @torch.no_grad()
    def record(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        """The features of images, one tensor for each module of the projector, images behind each other.

        Args:
            inputs: what the processor gave for them; those of several images of one size are put together. The tower
                runs in evaluation mode.
        """
        seen: list[Tensor | None] = [None] * len(self.projectors)

        def keep(at: int, module: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            seen[at] = output if self.past_projector else given[0]

        hooks = [m.register_forward_hook(functools.partial(keep, at)) for at, m in enumerate(self.projectors)]
        try:
            with evaluating(self.body):
                self._see(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        return [each.flatten(0, 1) for each in seen] if self.family.name in _SLOTTED else seen

    def _see(self, inputs: dict[str, Tensor]) -> None:
        """Run tower and projector, and nothing else."""
        look = getattr(self.body, "get_image_features", None)
        taken = inspect.signature(look or self.towers[0].forward).parameters
        inputs = {name: value for name, value in inputs.items() if name in taken}
        if look is not None:
            look(**inputs)
        else:
            self.projectors[0](self.towers[0](**inputs).last_hidden_state)

    def teach(self, features: list[Tensor]) -> None:
        """Make the model take features, flattened to `(N, H)`, as `vision_features`; other calls go on as before.

        Args:
            features: of any image.
        """
        self._shapes = [each.shape[1:] for each in features]
        if self.family.name in _SLOTTED:
            self._blank = self.record(self._nothing())
        mark = f"takes_features_{id(self)}"  # another trainer may have taught the same model otherwise
        wrap_forward(self.body, self._taking, mark=mark)
        if len(self.towers) == 1:
            wrap_forward(self.towers[0], self._blank_tower, mark=mark)
        for tower in self.towers if len(self.towers) > 1 else []:
            for module in tower if isinstance(tower, nn.ModuleList) else [tower]:
                passing = isinstance(tower, nn.ModuleList)
                wrap_forward(module, self._same if passing else self._blank_patches, mark=mark)
        for at, projector in enumerate(self.projectors):
            wrap_forward(projector, functools.partial(self._projecting, at), mark=mark)

    def _taking(self, plain: Callable) -> Callable:
        @functools.wraps(plain)
        def forward(body: nn.Module, *args: Any, **kwargs: Any):
            flat = [kwargs.pop(name, None) for name in self.names]
            if flat[0] is None:
                return plain(body, *args, **kwargs)
            given = [each.view(-1, *shape) for each, shape in zip(flat, self._shapes, strict=True)]
            if self.family.name in _SLOTTED:
                given = self._in_slots(given, kwargs["aspect_ratio_ids"])
            self._given = given
            try:
                return plain(body, *args, **(kwargs | {"pixel_values": self._stand_in(given[0])}))
            finally:
                self._given = None

        return forward

    def _projecting(self, at: int, plain: Callable) -> Callable:
        @functools.wraps(plain)
        def forward(module: nn.Module, seen: Tensor, *args: Any, **kwargs: Any):
            if self._given is None:
                return plain(module, seen, *args, **kwargs)
            return self._given[at] if self.past_projector else plain(module, self._given[at], *args, **kwargs)

        return forward

    def _blank_tower(self, plain: Callable) -> Callable:
        @functools.wraps(plain)
        def forward(module: nn.Module, *args: Any, **kwargs: Any):
            if self._given is None:
                return plain(module, *args, **kwargs)
            blank = self._given[0].new_zeros(1).expand(1, *self._shapes[0][:-1], 1)
            return BaseModelOutputWithPooling(last_hidden_state=blank, hidden_states=_EveryLayer(blank))

        return forward

    def _blank_patches(self, plain: Callable) -> Callable:
        @functools.wraps(plain)
        def forward(module: nn.Module, each: Tensor):
            if self._given is None:
                return plain(module, each)
            places = each.shape if isinstance(module, nn.Embedding) else each.shape[:1]
            return self._given[0].new_zeros(*places, 1)

        return forward

    def _same(self, plain: Callable) -> Callable:
        @functools.wraps(plain)
        def forward(module: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any):
            return plain(module, hidden, *args, **kwargs) if self._given is None else hidden

        return forward

    def _stand_in(self, features: Tensor) -> Tensor:
        """Pixels as far as the family's code looks at them before its tower."""
        count, one = features.shape[0], features.new_ones(1)
        if self.family.name in _TILED:
            patch = self.model.config.vision_config.patch_size
            return one.expand(1, count, 1, patch, patch)
        if self.family.name in _PATCHED:
            merged = self.model.config.vision_config.spatial_merge_size**2 if self.past_projector else 1
            return one.expand(count * merged, 1)
        return one.expand(1, 1, 1, 1)

    def _in_slots(self, features: list[Tensor], kinds: Tensor) -> list[Tensor]:
        """Features at the places `(B, images)` of a batch; where there is no image (kind 0), those of a blank one."""
        filled = []
        for each, blank in zip(features, self._blank, strict=True):
            places = blank.expand(kinds.numel(), *each.shape[1:]).clone()
            places[kinds.flatten() > 0] = each
            filled.append(places.unflatten(0, kinds.shape))
        return filled

    def _nothing(self) -> dict[str, Tensor]:
        """What a processor gives for the place of an image where there is none."""
        config = self.model.config.vision_config
        weight = next(self.towers[0].parameters())
        kinds = torch.zeros(1, 1, dtype=torch.long, device=weight.device)
        tiles = torch.zeros(1, 1, config.max_num_tiles, dtype=torch.long, device=weight.device)
        tiles[..., 0] = 1
        size = (config.max_num_tiles, config.num_channels, config.image_size, config.image_size)
        return {
            "pixel_values": weight.new_zeros(1, 1, *size),
            "aspect_ratio_ids": kinds,
            "aspect_ratio_mask": tiles,
        }


class _EveryLayer:
    """The hidden states of a tower that did not run: alike for all layers."""

    def __init__(self, blank: Tensor):
        self.blank = blank

    def __getitem__(self, layer: int) -> Tensor:
        return self.blank
