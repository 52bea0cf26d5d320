"""Options of the vision-language trainers, as the command line shows them. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option
from visionalign.image_options import ImageOptions


@dataclass
class VideoOptions(AlignOptions):
    """Which frames of videos are seen. Unset: what the model's family usually sees."""

    video_num_frames: int | None = option(None, "Frames of each video, evenly spaced; of shorter ones all frames.")
    video_fps: float | None = option(None, "Frames for each second of a video, in place of video_num_frames.")
    video_min_frames: int | None = option(None, "No fewer frames of a video than these, with video_fps.")
    video_max_frames: int | None = option(None, "No more frames of a video than these.")
    video_max_pixels: int | None = option(
        None, "Scale frames with more pixels down to this many, keeping their shape."
    )
    video_total_pixels: int | None = option(
        None, "Scale the frames of a video down until all of them together have no more pixels than these."
    )
    video_decoder: Literal["auto", "pyav", "torchcodec", "decord"] = option(
        "auto", "What reads video files; auto: the first of these that is installed."
    )
    video_cache: bool | str = option(
        False, "Keep decoded frames on disk, in $TRIALIGN_CACHE or ~/.cache/trialign, or in the folder given here."
    )


@dataclass
class FeatureCacheOptions(AlignOptions):
    """Vision features computed once an image."""

    cache_vision_features: bool = option(
        False, "Run a frozen vision tower once an image, before training, and keep what it gives on disk."
    )
    vision_cache_dir: str | None = option(
        None,
        "Folder of these features. Unset: vision-features in $TRIALIGN_CACHE or ~/.cache/trialign.",
        needs="cache_vision_features",
    )


@dataclass
class PartOptions(AlignOptions):
    """How the model is loaded, and which of its parts are trained."""

    freeze_vision_tower: bool = option(False, "Leave the vision tower as it is.")
    freeze_projector: bool = option(False, "Leave the projector between vision and language as it is.")
    freeze_language_model: bool = option(False, "Leave the language model as it is.")
    model_init_kwargs: dict[str, Any] | None = option(
        None, "Further arguments of from_pretrained, as JSON, where the model is given by name."
    )


@dataclass
class VLMSFTOptions(ImageOptions, VideoOptions, FeatureCacheOptions, PartOptions):
    """Vision-language fine-tuning."""

    loss_type: Literal["nll", "dft"] = option(
        "nll", "Objective: negative log-likelihood, or dynamic fine-tuning (arXiv:2508.05629)."
    )
    assistant_only_loss: bool = option(
        True, "Learn the assistant's turns alone; image places and padding are never learnt."
    )
    completion_only_loss: bool | None = option(
        None, "For rows of prompt and completion: learn the completion alone. Unset: as assistant_only_loss."
    )
    max_length: int | None = option(
        None,
        "Cut rows after so many tokens, image tokens included. A cut through an image or a video is an error. none: "
        "no cut.",
    )
    pad_to_multiple_of: int | None = option(None, "Pad rows to a multiple of so many tokens.")
    vision_learning_rate: float | None = option(None, "Learning rate of the vision tower. Unset: learning_rate.")
    projector_learning_rate: float | None = option(None, "Learning rate of the projector. Unset: learning_rate.")
    language_learning_rate: float | None = option(None, "Learning rate of the language model. Unset: learning_rate.")
