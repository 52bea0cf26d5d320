"""The progress bar: one line that carries the newest figures, instead of a line of numbers every few steps."""

from __future__ import annotations

from transformers import ProgressCallback

SHOWN = {
    "reward": "reward",
    "loss": "loss",
    "mean_token_accuracy": "token accuracy",
    "eval_loss": "eval loss",
    "learning_rate": "lr",
}


class ProgressBar(ProgressCallback):
    """transformers' bar, with the figures of SHOWN beside it."""

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self.figures: dict[str, str] = {}
        if self.training_bar is not None:
            self.training_bar.set_description("training")
            self.training_bar.update(state.global_step)
            self.current_step = state.global_step

    def close(self) -> None:
        """End the bar where training ends by an error."""
        if self.training_bar is not None:
            self.training_bar.close()

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        for name, label in SHOWN.items():
            if name in (logs or {}):
                self.figures[label] = f"{float(logs[name]):.3g}"
        self.training_bar.set_postfix(self.figures, refresh=False)
