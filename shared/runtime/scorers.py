"""Score heads for models that see: a sequence-classification class where transformers has none for a family.

The class is transformers' own recipe for one (GenericForSequenceClassification) over the family's base, and is entered
where `AutoModelForSequenceClassification` looks, so that loading, saving, adapters and engines treat it as any other.
Nothing here loads a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def register_scorer(config_class: type[PretrainedConfig]) -> None:
    """Make and enter the class that scores for models of this configuration; nothing to do where there is one.

    Only models that answer in words about images get one: of others transformers knows best whether they can score.

    Args:
        config_class: the class of a whole model's configuration, such as `transformers.LlavaConfig`.
    """
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, MODEL_MAPPING, AutoModelForSequenceClassification
    from transformers.conversion_mapping import (
        get_checkpoint_conversion_mapping,
        register_checkpoint_conversion_mapping,
    )
    from transformers.modeling_layers import GenericForSequenceClassification

    body = MODEL_MAPPING.get(config_class, None)
    answering = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING.get(config_class, None)
    if config_class in AutoModelForSequenceClassification._model_mapping or body is None or answering is None:
        return
    base = next(each for each in body.__mro__ if each.__name__.endswith("PreTrainedModel"))
    name = f"{body.__name__.removesuffix('Model')}ForSequenceClassification"
    own = {
        "__module__": __name__,
        "__doc__": f"A {body.__name__} with a score head in the place of its language-model head.",
        # of its own classes alone transformers translates the names that older checkpoints give their weights
        "is_custom_code": classmethod(lambda cls: False),
    }
    scorer = type(name, (GenericForSequenceClassification, base), own)
    names = get_checkpoint_conversion_mapping(answering.__name__)
    if names is not None:  # some families' translation is entered by the class that answers
        register_checkpoint_conversion_mapping(name, names, overwrite=True)
    AutoModelForSequenceClassification.register(config_class, scorer, exist_ok=True)
