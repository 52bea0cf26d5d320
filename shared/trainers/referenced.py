"""Referenced: what a trainer with a reference model adds, whatever its modality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from shared.errors import UserError
from shared.trainers.reference import Cached, Reference, check_engine, make_reference
from shared.trainers.reference_beforehand import config_of, run_beforehand
from shared.trainers.reference_cache import precompute
from shared.trainers.reference_checks import check_reference_asked, check_run_beforehand
from shared.trainers.reference_options import WholeReferenceOptions
from shared.trainers.reference_sync import SyncReference, load_reference, save_reference


class Referenced:
    """Mixed into a trainer with WholeReferenceOptions; it makes, moves, saves and restores the reference.

    Attributes:
        loaded_from: the name that the trainer's model was loaded by; None for a model given as such.
        reference_given: what the reference is to be made from, a model or its name; None: the trainer's model.
    """

    loaded_from: str | None = None
    reference_given: str | nn.Module | None = None

    def take_reference(
        self, model: Any, ref_model: Any, args: WholeReferenceOptions, *, train_dataset: Any, peft_config: Any
    ) -> None:
        """Check what is asked for, and remember it; to be called before rows are read and the model is loaded.

        Args:
            model: the policy's model or its name.
            ref_model: the trainer's argument; `args.ref_model_name_or_path` where None.
            args: the trainer's options.
            train_dataset: the rows as the trainer is given them.
            peft_config: the trainer's argument.

        Raises:
            UserError: options out of range or that exclude each other; a reference model that is not there.
        """
        ref_model = args.ref_model_name_or_path if ref_model is None else ref_model
        if not (ref_model is None or isinstance(ref_model, (str, nn.Module))):
            raise UserError(f"ref_model is a {type(ref_model).__name__}: give its name or folder, or a loaded model.")
        has_adapter = peft_config is not None or hasattr(model, "peft_config")
        beforehand = _beforehand(args)
        check_reference_asked(model, ref_model, args, has_adapter=has_adapter, beforehand=beforehand)
        if beforehand:
            check_run_beforehand(train_dataset, args.precompute_ref_batch_size)
        if isinstance(ref_model, str):
            self.check_reference_is_there(ref_model, args)
        self.reference_given = ref_model

    @staticmethod
    def check_reference_is_there(name: str, args: WholeReferenceOptions) -> None:
        """Raise UserError unless there is a model of that name; none of its weights is loaded."""
        config_of(name, args)

    def load_reference(self, name: str, **options: Any) -> nn.Module:
        """A reference model by its name, frozen; `options` are more for `from_pretrained`."""
        raise NotImplementedError

    def reference_is_known(self, ref_model: str | nn.Module | None) -> bool:
        """Whether all weights of a reference that is loaded by name are in its files."""
        return True

    def with_reference(self, reference: Any, rows: Any, **options: Any) -> Any:
        """Rows with a reference's log-probabilities; see shared.trainers.reference_cache.precompute."""
        return precompute(reference, rows, self.data_collator, **options)

    def fit_reference(self, ref_model: str | nn.Module | None) -> None:
        """Called before the reference is made: see that it goes with the model, and make it fit."""

    def reference_of(self, ref_model: str | nn.Module | None) -> Reference:
        """The reference, as the options want it; run beforehand where they say so.

        Raises:
            UserError: it cannot be had under this engine, or does not go with the model.
        """
        args = self.args
        check_engine(self.accelerator, synced=args.sync_ref_model, **self._reference_options)
        all_known = self.reference_is_known(ref_model)
        self.fit_reference(ref_model)
        if _beforehand(args):
            made = lambda beforehand: self.made_reference(ref_model, beforehand=beforehand)  # noqa: E731
            run_beforehand(self, ref_model, made, name=self.loaded_from, all_known=all_known)
            return Cached()
        reference = self.made_reference(ref_model)
        if args.sync_ref_model:
            every, alpha = args.ref_model_sync_steps, args.ref_model_mixup_alpha
            self.add_callback(SyncReference(reference, every=every, alpha=alpha))
        return reference

    def made_reference(self, ref_model: str | nn.Module | None, *, beforehand: bool = False) -> Reference:
        """See shared.trainers.reference.make_reference."""
        return make_reference(
            self.model,
            ref_model,
            accelerator=self.accelerator,
            policy=self.policy,
            load=self.load_reference,
            name=self.loaded_from,
            share_prefix=getattr(self.args, "share_prefix", True),
            synced=self.args.sync_ref_model,
            beforehand=beforehand,
            **self._reference_options,
        )

    @property
    def _reference_options(self) -> dict[str, Any]:
        return {"num_shared_layers": self.args.ref_num_shared_layers, "load_in_8bit": self.args.ref_load_in_8bit}

    def save_extras(self, checkpoint: Path) -> None:
        super().save_extras(checkpoint)
        save_reference(self.model, self.reference, checkpoint, writes=self.args.should_save)

    def load_extras(self, checkpoint: Path) -> None:
        super().load_extras(checkpoint)
        load_reference(self.model, self.reference, checkpoint)


def _beforehand(args: WholeReferenceOptions) -> bool:
    """Whether the reference is run once, before training; of an online trainer's rows there are none to run it on."""
    return bool(getattr(args, "precompute_ref_log_probs", False))
