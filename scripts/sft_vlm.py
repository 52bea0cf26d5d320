"""Fine-tune a vision-language model on questions and answers about images.

With no arguments: the built-in small model on the built-in shapes and digits, about two minutes on two cores.

    accelerate launch scripts/sft_vlm.py
    accelerate launch scripts/sft_vlm.py --dataset_name path/to/folder
    accelerate launch scripts/sft_vlm.py --config run.yaml --learning_rate 1e-5
    accelerate launch --config_file shared/runtime/profiles/zero3.yaml scripts/sft_vlm.py \\
        --model_name_or_path HuggingFaceTB/SmolVLM-Instruct --dataset_name HuggingFaceH4/llava-instruct-mix-vsft \\
        --use_peft --lora_r 16 --lora_target_modules all-linear --load_in_4bit --dtype bfloat16 --output_dir out
"""

from shared.builtin import recipe
from shared.runtime.arguments import DataArguments, ModelArguments
from shared.runtime.command import defaults_of, run_command
from shared.runtime.parser import parse_arguments
from visionalign.options import VLMSFTOptions


def main() -> None:
    options = parse_arguments(
        [ModelArguments, DataArguments, VLMSFTOptions],
        description=__doc__,
        recipe=defaults_of("sft_vlm", recipe("sft_vlm")),
    )
    model, data = options.build(ModelArguments), options.build(DataArguments)

    from shared.data.loading import load_datasets
    from shared.runtime.adapters import lora_config
    from shared.runtime.models import model_init_kwargs
    from visionalign import VLMSFTConfig, VLMSFTTrainer

    args = options.build(VLMSFTOptions, VLMSFTConfig)
    args.check_output_dir()
    args.model_init_kwargs = {**model_init_kwargs(model), **(args.model_init_kwargs or {})}
    rows = load_datasets(data.dataset_name, seed=args.seed, **data.loading())
    trainer = VLMSFTTrainer(
        model.model_name_or_path,
        args,
        train_dataset=rows.train,
        eval_dataset=rows.test,
        peft_config=model.adapter_name_or_path or lora_config(model),
    )
    trainer.run_options = options.to_yaml()
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    run_command(main)
