"""What a user can get wrong with the online trainers: one sentence, and no weight is read before it."""

import pytest
from tiny_online import even, make, questions
from tiny_text import build_causal

import textalign
from shared.errors import DataError, UserError


@pytest.fixture(scope="module")
def model_path(tiny):
    return str(tiny("lm"))


@pytest.fixture
def unread(monkeypatch):
    """No weight may be read."""

    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("textalign.policy_gradient.load_text_model", load)


def needs_colour(completions, colour):
    return [float(colour in completion) for completion in completions]


GIVEN = ("reward", "train_dataset")  # to the trainer; all others are options


@pytest.mark.parametrize("name", ["GRPO", "RLOO"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": None}, "There is no reward: give reward_funcs"),
        ({"reward": []}, "There is no reward"),
        ({"reward": "acuracy_reward"}, "accuracy_reward"),
        ({"reward": "no.such.function"}, "no.such.function"),
        ({"reward": needs_colour}, "Reward needs_colour takes 'colour', and the rows have no such column.*number"),
        ({"reward": [even, even], "reward_weights": [1.0]}, "1 reward_weights for 2 rewards"),
        ({"reward": even, "reward_weights": [1.0, 2.0]}, "2 reward_weights for 1 reward"),
        (
            {"reward": None, "reward_funcs": ["accuracy_reward"], "reward_weights": [1.0, 2.0]},
            r"reward_weights has 2 number\(s\) for 1 reward",
        ),
        ({"reward_timeout": 0.0}, "timeout"),
        ({"num_generations": 1}, "num_generations 1: must be at least 2"),
        ({"num_generations": 3}, "= 8 samples, which do not divide into groups of num_generations 3"),
        ({"generation_batch_size": 16, "steps_per_generation": 2}, "say the same: give one"),
        ({"generation_batch_size": 12}, "generation_batch_size 12: must be a multiple of 8"),
        ({"steps_per_generation": 0}, "steps_per_generation 0: must be at least 1"),
        ({"num_iterations": 0}, "num_iterations 0: must be at least 1"),
        ({"beta": -0.1}, "beta"),
        ({"epsilon": -0.1}, "epsilon must be"),
        ({"top_entropy_quantile": 0.0}, "top_entropy_quantile 0.0: must be above 0"),
        ({"top_entropy_quantile": 1.5}, "top_entropy_quantile 1.5"),
        ({"eval_strategy": "steps"}, "there are no held-out rows"),
        ({"train_dataset": None}, "train_dataset is missing"),
        ({"vllm_mode": "colocate"}, "vllm_mode is not an option of .*Config. Leave it out"),
    ],
)
def test_options_that_cannot_work(name, options, message, model_path, tmp_path, unread):
    options = {"num_generations": 4, **options}
    config = {"output_dir": str(tmp_path), "max_steps": 2, **{k: v for k, v in options.items() if k not in GIVEN}}
    rows = options.get("train_dataset", questions())
    with pytest.raises(UserError, match=message):
        getattr(textalign, f"{name}Trainer")(
            model_path,
            options.get("reward", even),
            getattr(textalign, f"{name}Config")(**config),
            train_dataset=rows,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"delta": 0.5}, "delta"),
        ({"loss_type": "cispo", "delta": 2.0}, "delta bounds the ratio of clipped losses"),
        ({"loss_type": "vespo", "importance_sampling_level": "sequence"}, "vespo"),
        ({"loss_type": "gpro"}, "loss_type"),
        ({"scale_rewards": "often"}, "scale_rewards"),
        ({"temperature": -1.0}, "temperature"),
        ({"eval_temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams not known"),
        ({"max_completion_length": 0}, "max_completion_length 0: must be at least 1"),
        ({"num_generations_eval": 0}, "num_generations_eval 0: must be at least 1"),
        ({"sample_every": -1}, "sample_every -1: must be at least 0"),
    ],
)
def test_options_of_grpo_that_cannot_work(options, message, model_path, tmp_path):
    with pytest.raises(UserError, match=message):
        make("GRPO", model_path, tmp_path, **options)


def test_defaults_that_two_groups_of_options_declare(tmp_path):
    for config in (textalign.GRPOConfig, textalign.RLOOConfig):
        args = config(output_dir=str(tmp_path))
        assert args.max_new_tokens is None, "as long as a completion"
        assert (args.learning_rate, args.metric_for_best_model, args.logging_steps) == (1e-6, "reward", 10)
    assert (args.beta, args.num_generations) == (0.05, 2)


def test_numbers_that_do_not_divide_are_told_by_the_configuration(tmp_path):
    with pytest.raises(UserError, match="num_generations 3"):
        textalign.GRPOConfig(output_dir=str(tmp_path), num_generations=3)
    args = textalign.GRPOConfig(output_dir=str(tmp_path), generation_batch_size=32)
    assert args.steps_per_generation == 4


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"tools": []}, "takes no argument tools. Completions that call tools are not written here"),
        ({"tokenizer": None}, "It is called processing_class"),
        ({"rollout_func": even}, "Override the trainer's actor"),
        ({"no_such": 1}, "takes no argument no_such"),
    ],
)
def test_arguments_of_other_libraries(argument, message, model_path, tmp_path, unread):
    args = textalign.GRPOConfig(output_dir=str(tmp_path), max_steps=1)
    with pytest.raises(UserError, match=message):
        textalign.GRPOTrainer(model_path, even, args, train_dataset=questions(), **argument)


def test_a_configuration_of_another_trainer(model_path, tmp_path, unread):
    with pytest.raises(UserError, match="args is a RLOOConfig; give a GRPOConfig"):
        textalign.GRPOTrainer(model_path, even, textalign.RLOOConfig(output_dir=str(tmp_path)), questions())
    with pytest.raises(UserError, match="args is a SFTConfig; give a RLOOConfig"):
        textalign.RLOOTrainer(model_path, even, textalign.SFTConfig(output_dir=str(tmp_path)), questions())


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "empty"),
        ([{"question": "Why?"}], "prompt"),
        ([{"prompt": "Why?"}, {"prompt": ""}], "row 1.*empty"),
        ([{"prompt": []}, {"prompt": []}], "prompt"),
        ([{"prompt": [{"role": "user", "content": "Why?"}]}, {"prompt": [{"role": "user"}]}], "row 1"),
    ],
)
def test_rows_that_cannot_be_used(rows, message, model_path, tmp_path, unread):
    args = textalign.GRPOConfig(output_dir=str(tmp_path), max_steps=1)
    with pytest.raises(DataError, match=message):
        textalign.GRPOTrainer(model_path, even, args, train_dataset=rows)


def test_an_empty_prompt_can_be_left_out(model_path, tmp_path):
    rows = [*questions(3), {"prompt": "", "number": 3}]
    trainer = make("GRPO", model_path, tmp_path, rows=rows, on_bad_row="skip", max_steps=2)
    trainer.train()
    assert len(trainer.train_dataset) == 3 and "row 3" in " ".join(trainer.report.notes)


def test_a_stream_needs_max_steps(model_path, tmp_path, unread):
    from datasets import IterableDataset

    stream = IterableDataset.from_generator(lambda: iter(questions()))
    args = textalign.GRPOConfig(output_dir=str(tmp_path))
    with pytest.raises(UserError, match="max_steps is missing: a stream does not say"):
        textalign.GRPOTrainer(model_path, even, args, train_dataset=stream)


def test_completions_beyond_the_models_positions(tmp_path):
    path = str(build_causal("gpt2", tmp_path / "gpt2"))  # has 64
    with pytest.raises(UserError, match="max_completion_length 64: this model has 64 positions"):
        make("GRPO", path, tmp_path, max_completion_length=64)
    with pytest.raises(UserError, match="max_completion_length 40 and max_prompt_length 30: this model has 64"):
        make("GRPO", path, tmp_path, max_completion_length=40, max_prompt_length=30)
    with pytest.raises(UserError, match="max_new_tokens 64: this model has 64 positions"):
        make("GRPO", path, tmp_path, max_completion_length=8, max_new_tokens=64)
    make("GRPO", path, tmp_path, max_completion_length=8, max_steps=1).train()


def test_long_prompts_lose_their_beginning(tmp_path, model_path):
    rows = [{"prompt": "the circle " * 80 + f"is {at}", "number": at} for at in range(2)]
    path = str(build_causal("gpt2", tmp_path / "gpt2"))
    trainer = make("GRPO", path, tmp_path / "a", rows=rows)
    prompt = trainer.actor.encoder.prompts([trainer.train_dataset[0]])[0]
    assert len(prompt.ids) == 64 - 6
    trainer = make("GRPO", model_path, tmp_path / "b", rows=rows, max_prompt_length=5)
    prompt = trainer.actor.encoder.prompts([trainer.train_dataset[1]])[0]
    assert len(prompt.ids) == 5 and trainer.processing_class.decode(prompt.ids).endswith("is 1")


def test_a_model_that_is_none(tmp_path):
    args = textalign.GRPOConfig(output_dir=str(tmp_path), max_steps=1)
    with pytest.raises(UserError, match="model is a int"):
        textalign.GRPOTrainer(3, even, args, train_dataset=questions())


def test_a_train_that_is_called_twice_samples_anew(model_path, tmp_path):
    trainer = make("GRPO", model_path, tmp_path, steps_per_generation=8, max_steps=2)
    trainer.train()
    left = trainer.buffer
    assert not left.spent
    trainer.train()
    assert trainer.buffer is not left and trainer.buffer.born == 0
