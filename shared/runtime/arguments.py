"""The options that the scripts share, as flat dataclasses. Each is documented here, and `--help` is made from it.

Names follow TRL and transformers, so that a configuration that exists keeps its words. What a trainer adds is declared
beside the trainer, as a subclass of AlignOptions; transformers.TrainingArguments joins it where the trainer is built.
Nothing here imports torch or transformers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from shared.errors import UserError
from shared.runtime.options import option

LogLevel = Literal["detail", "debug", "info", "warning", "error", "critical", "passive"]


@dataclass
class ModelArguments:
    """Model and adapter.

    Raises:
        UserError: options that exclude each other.
    """

    model_name_or_path: str | None = option(None, "Model to train: a hub id, a local folder or a built-in name.")
    model_revision: str = option("main", "Branch, tag or commit of the model on the hub.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Number type that the weights are held in; auto: float32 for weights that are trained, the one that they were "
        "saved in under an adapter.",
    )
    attn_implementation: str | None = option(
        None, "Attention kernel: eager, sdpa, flash_attention_2, … Unset: transformers chooses."
    )
    trust_remote_code: bool = option(False, "Run the Python code that comes with the model. Only where you trust it.")

    load_in_4bit: bool = option(False, "Load the weights in 4 bits (bitsandbytes) for training an adapter: QLoRA.")
    load_in_8bit: bool = option(False, "Load the weights in 8 bits (bitsandbytes) for training an adapter.")
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = option("nf4", "4-bit code of the weights.", needs="load_in_4bit")
    use_bnb_nested_quant: bool = option(
        False, "Quantise the quantisation constants too; saves about 0.4 bit a weight.", needs="load_in_4bit"
    )
    bnb_4bit_compute_dtype: Literal["float32", "bfloat16", "float16"] | None = option(
        None, "Number type of the computation on 4-bit weights. Unset: dtype, or bfloat16.", needs="load_in_4bit"
    )

    use_peft: bool = option(False, "Train a LoRA adapter instead of the weights.")
    adapter_name_or_path: str | None = option(
        None, "Go on training this adapter (folder or hub id); it keeps its own LoRA settings."
    )
    lora_r: int = option(16, "Rank of the adapter.", needs="use_peft")
    lora_alpha: int = option(32, "Scale of the adapter: its output is multiplied by alpha / r.", needs="use_peft")
    lora_dropout: float = option(0.05, "Share of the adapter's inputs dropped in training.", needs="use_peft")
    lora_target_modules: list[str] | None = option(
        None,
        "Modules that get an adapter: names, one regular expression, or all-linear. Unset: PEFT's choice for the "
        "model, or all-linear where it has none.",
        needs="use_peft",
    )
    lora_exclude_modules: list[str] | None = option(
        None, "Modules that get none: names or one regular expression.", needs="use_peft"
    )
    lora_modules_to_save: list[str] | None = option(
        None, "Modules trained in full and saved with the adapter, for example lm_head.", needs="use_peft"
    )
    use_rslora: bool = option(False, "Scale by alpha / sqrt(r): steadier at high rank (rsLoRA).", needs="use_peft")
    use_dora: bool = option(False, "Adapt magnitude and direction apart (DoRA); slower.", needs="use_peft")
    lora_task_type: str = option("CAUSAL_LM", "PEFT's name of the task.", needs="use_peft")

    def __post_init__(self) -> None:
        if self.load_in_4bit and self.load_in_8bit:
            raise UserError("load_in_4bit and load_in_8bit exclude each other: give one of them.")
        quantised = "load_in_4bit" if self.load_in_4bit else "load_in_8bit" if self.load_in_8bit else None
        if quantised and not (self.use_peft or self.adapter_name_or_path):
            raise UserError(f"{quantised}: quantised weights cannot be trained themselves. Add use_peft (an adapter).")
        if self.lora_r < 1:
            raise UserError(f"lora_r {self.lora_r}: the rank must be at least 1.")
        if not 0 <= self.lora_dropout < 1:
            raise UserError(f"lora_dropout {self.lora_dropout}: must be at least 0 and below 1.")


@dataclass
class DataArguments:
    """Data.

    Raises:
        UserError: no data set, or numbers that cannot be meant.
    """

    dataset_name: list[str] = option(
        [], "Data to train on: hub ids, local files or folders, built-in names. Several are mixed."
    )
    dataset_config: str | None = option(None, "Configuration (subset) of a hub data set.")
    dataset_weights: list[float] | None = option(
        None, "Share of each data set in the mixture, one number each. Unset: by their sizes."
    )
    dataset_train_split: str = option("train", "Split to train on.")
    dataset_test_split: str = option("test", "Split to evaluate on, used where the data set has it.")
    dataset_columns: dict[str, str] | None = option(
        None,
        'Columns that are called otherwise, as JSON: {"in the data": "here"}. Unset: usual names such as question and '
        "answer are known.",
    )
    eval_fraction: float = option(0.0, "Share of the training rows held out where there is no test split.")
    streaming: bool = option(False, "Read rows while training instead of loading the data set first.")
    max_train_rows: int | None = option(None, "Use at most so many training rows.")
    max_eval_rows: int | None = option(None, "Use at most so many held-out rows.")

    def __post_init__(self) -> None:
        if isinstance(self.dataset_name, str):
            self.dataset_name = [self.dataset_name]
        if not self.dataset_name:
            raise UserError("dataset_name is missing: give a hub id, a local file or folder, or a built-in name.")
        weights = self.dataset_weights
        if weights is not None and (len(weights) != len(self.dataset_name) or min(weights) <= 0):
            raise UserError(
                f"dataset_weights {' '.join(map(str, weights))}: give one number above 0 for each of the "
                f"{len(self.dataset_name)} data set(s) in dataset_name."
            )
        if not 0 <= self.eval_fraction < 1:
            raise UserError(f"eval_fraction {self.eval_fraction}: must be at least 0 and below 1.")
        for name in ("max_train_rows", "max_eval_rows"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} {value}: must be at least 1.")

    def loading(self) -> dict[str, Any]:
        """What shared.data.loading.load_datasets takes besides the names and the seed."""
        return {
            "config": self.dataset_config,
            "weights": self.dataset_weights,
            "train_split": self.dataset_train_split,
            "test_split": self.dataset_test_split,
            "eval_fraction": self.eval_fraction,
            "streaming": self.streaming,
            "max_train_rows": self.max_train_rows,
            "max_eval_rows": self.max_eval_rows,
            "columns": self.dataset_columns,
        }


@dataclass
class AlignOptions:
    """What every trainer here adds to transformers.TrainingArguments, or sets to another default.

    A trainer's configuration is `class XConfig(XOptions, TrainingArguments)` with `class XOptions(AlignOptions)`, so
    every field has a default.
    """

    training_arguments: ClassVar[bool] = True  # the parser takes all fields of TrainingArguments besides these
    aliases: ClassVar[dict[str, str]] = {}  # names under which an option is known elsewhere, and taken -> its name

    output_dir: str | None = option(None, "Folder for the model, the checkpoints and the run report.")
    overwrite_output_dir: bool = option(False, "Start anew in a folder that holds another run.")
    resume_from_checkpoint: bool | str | None = option(
        None, "Go on from a checkpoint: its folder, or nothing behind the option for the last one in output_dir."
    )
    on_bad_row: Literal["error", "skip"] = option(
        "error", "What to do with a row that cannot be used: stop before training, or leave it out and list it."
    )
    check_rows: int | None = option(
        20_000,
        "How many rows have their images decoded and their videos opened before the model is loaded; none: all of "
        "them.",
    )
    eval_answers: int = option(
        16, "How many held-out rows are answered by generation before and after training; 0: none."
    )
    max_new_tokens: int = option(64, "Longest generated answer, in tokens.")
    bf16: bool | None = option(None, "Mixed precision in bfloat16. Unset: where the accelerator supports it.")
    logging_steps: float = option(10, "Log every so many steps; below 1: a share of all steps.")
    report_to: list[str] = option(["none"], "Trackers that also get the curves: tensorboard, trackio, wandb, …")
    save_total_limit: int | None = option(3, "Checkpoints kept; older ones are deleted. none: all.")
    dataloader_num_workers: int | None = option(
        None, "Processes that read and prepare batches ahead, for each training process. Unset: 4 with a GPU, else 0."
    )
    remove_unused_columns: bool = option(False, "Drop columns that the model's forward does not name.")
    log_level: LogLevel = option("passive", "transformers' log level on the main process; passive: as it is.")
    log_level_replica: LogLevel = option("warning", "transformers' log level on the other processes.")
