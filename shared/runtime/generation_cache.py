"""A key/value cache for decoding: prompts' entries are copied to their groups once, tokens are written in place.

transformers' own dynamic layers copy all they hold for each new token. Here a layer has room for more tokens than it
holds; what attention gets is a view of it. Layers that keep a state in place of keys and values (linear attention) are
copied to the groups as they are, since their size does not grow.
"""

from __future__ import annotations

import copy

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

_ROOM = 64  # tokens that a layer makes room for at least
_LINEAR = getattr(cache_utils, "LinearAttentionLayer", None)
_DUMMY = getattr(cache_utils, "DummyLayer", None)


class UnknownCache(Exception):
    """The cache of a model is of a kind that is not known to be copied and cut by rows rightly."""


class GrowingLayer(DynamicLayer):
    """Keys and values `(B, heads, tokens, width)` of one layer, each prompt's for all of its group, with room to grow.

    Args:
        layer: what one pass over the prompts left; it is not changed.
        prompts: `(P,)` which of its rows to take.
        group: G; rows are B = P*G, prompt by prompt.
        tokens: how many more there can be.
    """

    def __init__(self, layer: DynamicLayer, prompts: Tensor, group: int, tokens: int):
        super().__init__()
        self.is_initialized = True
        self.dtype, self.device = layer.keys.dtype, layer.keys.device
        self.is_sliding = isinstance(layer, DynamicSlidingWindowLayer)
        self.sliding_window = layer.sliding_window if self.is_sliding else None
        self._seen, self._most = layer.get_seq_length(), layer.get_seq_length() + tokens
        self._start, self._end = 0, layer.keys.shape[-2]
        self._stores = [self._spread(held, prompts, group) for held in (layer.keys, layer.values)]
        self._show()

    def _spread(self, held: Tensor, prompts: Tensor, group: int) -> Tensor:
        store = held.new_empty(len(prompts), group, *self._shape(held))
        store[..., : held.shape[-2], :] = held[prompts, None]
        return store.flatten(0, 1)

    def _shape(self, held: Tensor) -> tuple[int, int, int]:
        """Of a row with room: in steps of half of what it holds, so that few copies make a long completion."""
        count = held.shape[-2]
        room = min(max(_ROOM, count // 2), self._most - self._seen)
        return held.shape[1], count + room, held.shape[-1]

    def _show(self) -> None:
        self.keys, self.values = (store[:, :, self._start : self._end] for store in self._stores)

    @property
    def room(self) -> int:
        """How many tokens can come before all has to be copied."""
        return self._stores[0].shape[-2] - self._end

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        count = key_states.shape[-2]
        if count > self.room:
            self._move(None)
        for store, new in zip(self._stores, (key_states, value_states), strict=True):
            store[:, :, self._end : self._end + count] = new
        self._end += count
        self._seen += count
        self._show()
        given = self.keys, self.values
        if self.is_sliding:
            self._start = max(self._start, self._end - self.sliding_window + 1)
            self._show()
        return given

    def _move(self, rows: Tensor | None) -> None:
        self._start, self._end = 0, self._end - self._start
        stores = []
        for held in (self.keys, self.values):
            count = len(held) if rows is None else len(rows)
            store = held.new_empty(count, *self._shape(held))
            live = store[:, :, : self._end]
            if rows is None:
                live.copy_(held)
            else:
                live.copy_(held.index_select(0, rows))
            stores.append(store)
        self._stores = stores
        self._show()

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(indices)

    def get_seq_length(self) -> int:
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        held = self._end - self._start
        return held + query_length, self._seen - held


def expanded(cache: object, prompts: Tensor, group: int, tokens: int, *, keep: bool = False) -> DynamicCache:
    """The cache of some prompts, for their completions.

    Args:
        cache: what the model gave for the prompts; it is used up.
        prompts: `(P,)` which of them.
        group: G; the result has P*G rows, prompt by prompt.
        tokens: how many more there can be.
        keep: leave the given cache as it is, for other prompts.

    Raises:
        UnknownCache: it is of another kind than these.
    """
    if type(cache) is not DynamicCache or not cache.layers:
        raise UnknownCache(f"its cache is a {type(cache).__name__}")
    result = DynamicCache()
    for at, layer in enumerate(cache.layers):
        if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized:
            made = GrowingLayer(layer, prompts, group, tokens)
        elif type(layer) is _LINEAR:
            made = copy.deepcopy(layer) if keep else layer
            made.reorder_cache(prompts.repeat_interleave(group))
        elif type(layer) is _DUMMY or (type(layer) is DynamicLayer and not layer.is_initialized):
            made = layer
        else:
            raise UnknownCache(f"a layer of its cache is a {type(layer).__name__}")
        result.layers.append(made)
        if not keep:
            cache.layers[at] = None
    return result


def select(cache: DynamicCache, rows: Tensor) -> None:
    """Keep only these rows of a cache that `expanded` made."""
    for layer in cache.layers:
        if isinstance(layer, GrowingLayer):
            layer.batch_select_indices(rows)
        elif type(layer) is _LINEAR:
            layer.reorder_cache(rows)


def is_full(cache: DynamicCache) -> bool:
    """Whether the next token makes the layers that hold all tokens be copied, so that rows can leave at no cost."""
    growing = [layer for layer in cache.layers if isinstance(layer, GrowingLayer)]
    whole = [layer for layer in growing if not layer.is_sliding] or growing
    return any(not layer.room for layer in whole)
