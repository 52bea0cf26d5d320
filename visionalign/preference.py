"""Direct preference optimisation on images, videos and text, with the losses of its family and mDPO's.

Each pair's images are processed once, and seen once by the policy and once by the reference, for both answers. Rows
become batches in pairs.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, ProcessorMixin, TrainerCallback

from shared.data.conversation import Conversation
from shared.data.rows import ROW, Rows
from shared.data.schema import Kind
from shared.errors import UserError
from shared.objectives.image_preference import with_corrupted, with_image_terms
from shared.objectives.preference import Pairs
from shared.policies.base import GroupedBatch, LogProbs
from shared.policies.token import TokenPolicy
from shared.rewards.base import text_of
from shared.runtime.report import SampleRow
from shared.trainers.answers import Answer
from shared.trainers.config import AlignConfig
from shared.trainers.datasets import check_evaluation, check_steps
from shared.trainers.judging import Judge
from shared.trainers.preference import PairedTrainer, check_arguments, dpo_objective
from visionalign.corruption import Corruption
from visionalign.pairs import VLMPairCollator, check_pairs, pair_collator, question_of, read_images
from visionalign.preference_options import VLMDPOOptions
from visionalign.preparing import left_out_notes, load_vlm, prepare_rows, prepare_vlm
from visionalign.referenced import VLMReference

NOT_TAKEN = {
    "max_length": "Give max_prompt_length and max_completion_length: a row that is cut may lose half an image.",
    "dataset_num_proc": "Leave it out: images are processed batch by batch, in dataloader_num_workers processes.",
}


@dataclass
class VLMDPOConfig(VLMDPOOptions, AlignConfig):
    """Options of VLMDPOTrainer: VLMDPOOptions and transformers.TrainingArguments."""

    run_name_stem: ClassVar[str] = "dpo_vlm"
    not_taken: ClassVar[dict[str, str]] = NOT_TAKEN


class VLMDPOTrainer(VLMReference, PairedTrainer):
    """Train a vision-language model on pairs of a chosen and a rejected answer, against a reference model.

    Rafailov et al. 2023, arXiv:2305.18290; `args.loss_type` names one of the losses that followed, or several: MPO
    (Wang et al. 2024, arXiv:2411.10442) is sigmoid, bco_pair and sft with weights 0.8, 0.2 and 1.
    `args.image_loss_weight` and `args.anchor_loss_weight` add mDPO's terms (Wang et al. 2024, arXiv:2406.11839).

    Args:
        model: hub id, folder or built-in name, or a loaded model (a PEFT model too).
        ref_model: the reference: a model or its name; `args.ref_model_name_or_path` where None. Without either it is
            the model as it is at the start.
        args: options; the defaults where None.
        data_collator: gives batches as VLMPairCollator does; one by `args` where None.
        train_dataset: rows with `images` (or `image`), `videos` (or `video`), `chosen` and `rejected`, strings or
            conversations, and a `prompt` where these do not hold it.
        eval_dataset: held-out rows of the same kind, or several sets by name.
        processing_class: the model's processor; loaded beside a model that is given by name.
        compute_metrics: not taken, since whole logits never exist.
        callbacks, optimizers: as transformers.Trainer.
        quantization_config: as `from_pretrained`, where the model is given by name.
        peft_config: puts this adapter on the model; a folder or hub id of an adapter goes on training that one.
        preprocess_logits_for_metrics: not taken.
        judge: `f(prompt, answer) -> number`, scores generated answers, or several such; `args.judge` where None.

    Raises:
        UserError: a text-only model, options that exclude each other or cannot be had.
        DataError: columns or rows that cannot be used, named; before any weight is loaded.

    Example:
        >>> args = VLMDPOConfig(beta=0.1, learning_rate=1e-6)  # doctest: +SKIP
        >>> VLMDPOTrainer("Qwen/Qwen2.5-VL-3B-Instruct", args=args, train_dataset=rows).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: str | PreTrainedModel | nn.Module,
        ref_model: str | PreTrainedModel | nn.Module | None = None,
        args: VLMDPOConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: ProcessorMixin | None = None,
        compute_metrics: Callable | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        *,
        preprocess_logits_for_metrics: Callable | None = None,
        judge: Judge | Sequence[Judge] | None = None,
    ):
        check_arguments(compute_metrics, preprocess_logits_for_metrics)
        args = VLMDPOConfig.of(args)
        objective, judges = self.asked_for(args, judge)
        self.take_reference(model, ref_model, args, train_dataset=train_dataset, peft_config=peft_config)
        check_evaluation(args, eval_dataset)
        run = prepare_vlm(model, args, processing_class)
        self.model_name, self.loaded_from = run.model_name, model if isinstance(model, str) else None
        _, train, held_out = prepare_rows(train_dataset, eval_dataset, {Kind.PREFERENCE}, args)
        check_steps(args, train)
        if data_collator is None:
            corrupt = Corruption(args.image_corruption, args.seed) if args.image_loss_weight else None
            data_collator = pair_collator(run, args, corrupt=corrupt)
        check_pairs(data_collator, train, args)
        if args.image_loss_weight and data_collator.corrupt is None:
            raise UserError("image_loss_weight: the data_collator corrupts no image. Give it corrupt=, or none.")
        init = {} if quantization_config is None else {"quantization_config": quantization_config}
        model = load_vlm(model, args, peft_config=peft_config, **init)
        super().__init__(
            model,
            args,
            policy=TokenPolicy(model, share_prefix=args.share_prefix),
            asking=PairQuestions(data_collator, held_out),
            judges=judges,
            data_collator=data_collator,
            train_dataset=train,
            eval_dataset=held_out,
            processing_class=run.processor,
            callbacks=callbacks,
            optimizers=optimizers,
            ref_model=self.reference_given,
            **objective,
        )
        self.row_notes = left_out_notes(train)

    def objective_options(self, args: VLMDPOConfig) -> dict[str, Any]:
        if args.image_loss_weight and args.ld_alpha is not None:
            raise UserError(
                "ld_alpha and image_loss_weight: which tokens lie beyond the other answer is not known where one "
                "answer is compared beside two images. Leave one out."
            )
        weights = {"image_weight": args.image_loss_weight, "anchor_weight": args.anchor_loss_weight}
        return {"objective": with_image_terms(dpo_objective(args), **weights, anchor=args.anchor)}

    def pairs(self, model: nn.Module, batch: GroupedBatch) -> tuple[Pairs, LogProbs]:
        pairs, out = super().pairs(model, batch)
        if not self.args.image_loss_weight:
            return pairs, out
        worse, kept = batch.corrupted, batch.columns["counted"]
        # The mask is 0 where log-probabilities are no figure of the answer's.
        logp = self.policy.log_probs(model, worse).logp.float().sum(1)
        ref_logp = self.reference.log_probs(model, worse).float().sum(1)
        return with_corrupted(pairs, logp[kept], ref_logp[kept], worse.columns["counted"][kept]), out

    def title(self) -> str:
        return f"Vision-language DPO: {self.model_name}"


@dataclass
class PairQuestions:
    """How the prompts of held-out pairs are asked; see shared.trainers.preference.Asking.

    Args:
        collator: of the pairs.
        questions: the rows, or several sets of them by name; None where there are none.
    """

    collator: VLMPairCollator
    questions: Rows | dict[str, Rows] | None

    def __post_init__(self) -> None:
        self.tokenizer, self.encode_prompts = self.collator.tokenizer, self.collator.encode_prompts

    def prompt(self, row: dict[str, Any]) -> str:
        """What the user says last."""
        said = [turn for turn in _prompt(row).messages if turn["role"] == "user"]
        return text_of(said[-1:])

    def sample(self, answer: Answer) -> SampleRow:
        """An answer as the run report shows it."""
        images, question = self.collator.prompts.shown(question_of(_prompt(answer.row)))
        columns = {name: answer.row[name] for name in ("kind",) if name in answer.row}
        return SampleRow(images, question, answer.recorded, after=answer.text, columns=columns)


def _prompt(row: dict[str, Any]) -> Conversation:
    chat, _ = read_images(row, row[ROW])
    chat.messages = chat.messages[: chat.prompt_messages]
    return chat
