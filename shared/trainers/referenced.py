"""Referenced: what a trainer with a reference model adds, whatever its modality."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from shared.trainers.reference import Reference, check_engine, make_reference
from shared.trainers.reference_sync import SyncReference, load_reference, save_reference


class Referenced:
    """Mixed into a trainer with ReferenceModelOptions; it makes, moves, saves and restores the reference.

    Attributes:
        loaded_from: the name that the trainer's model was loaded by; None for a model given as such.
    """

    loaded_from: str | None = None

    def load_reference(self, name: str, **options: Any) -> nn.Module:
        """A reference model by its name, frozen; `options` are more for `from_pretrained`."""
        raise NotImplementedError

    def fit_reference(self, ref_model: str | nn.Module | None) -> None:
        """Called before the reference is made: see that it goes with the model, and make it fit."""

    def reference_of(self, ref_model: str | nn.Module | None) -> Reference:
        """The reference, as the options want it.

        Raises:
            UserError: it cannot be had under this engine, or does not go with the model.
        """
        args = self.args
        check_engine(self.accelerator, synced=args.sync_ref_model, **self._reference_options)
        self.fit_reference(ref_model)
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
            share_prefix=self.args.share_prefix,
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
