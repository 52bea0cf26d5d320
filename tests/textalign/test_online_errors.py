"""What a user can get wrong with the online trainers: one sentence, and no weight is read before it."""

import dataclasses

import pytest
import yaml
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


GIVEN = ("reward", "train_dataset", "ref_model")  # to the trainer; all others are options


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
        (
            {"generation_batch_size": 16, "steps_per_generation": 3},
            "2 micro-batches.* for 3; .* say the same",
        ),
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
        ({"off_policy_mask_threshold": 0.1}, "off_policy_mask_threshold is not an option of .*Config. Leave it out"),
        ({"max_length": 64}, "max_length is not an option of .*Config. Give max_prompt_length"),
        ({"top_p": 2.0}, "top_p"),
        ({"eval_top_p": 3.0}, "top_p"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams not known"),
        ({"use_vllm": True, "vllm_server_base_url": "http://127.0.0.1:9"}, "127.0.0.1:9"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy sequential: .*shuffle_dataset false"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy group_by_length: "),
        ({"auto_find_batch_size": True}, "auto_find_batch_size True is not supported"),
        ({"beta": 0.0, "ref_model": "no/such"}, "ref_model: there is no reference where beta is 0"),
        ({"beta": 0.0, "ref_model_name_or_path": "no/such"}, "ref_model_name_or_path: there is no reference"),
        (
            {"beta": 0.0, "sync_ref_model": True, "ref_load_in_8bit": True},
            "ref_load_in_8bit, sync_ref_model: there",
        ),
        ({"beta": 0.0, "ref_num_shared_layers": 1}, "ref_num_shared_layers: there is no reference"),
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
            ref_model=options.get("ref_model"),
        )


@pytest.mark.parametrize(
    "bounds", [[0.0, 1.0, 2.0], [1.0], [], [1.0, -1.0], [1.0, 1.0], [float("nan"), 1.0], ["a", 1]]
)
def test_bounds_of_rewards_are_two_numbers_in_order(bounds, tmp_path):
    with pytest.raises(UserError, match="reward_clip_range .*: give two numbers, the least reward and the greatest"):
        textalign.RLOOConfig(output_dir=str(tmp_path), reward_clip_range=bounds)
    assert textalign.RLOOConfig(output_dir=str(tmp_path), reward_clip_range=[-1, 1]).reward_clip_range == [-1, 1]


def test_recipes_are_of_configurations_that_have_them(tmp_path):
    for config in (textalign.RLOOConfig, textalign.DPOConfig, textalign.SFTConfig):
        with pytest.raises(UserError, match=f"recipe is not an option of {config.__name__}. Recipes are of"):
            config(output_dir=str(tmp_path), recipe="gspo")


HELD_OUT = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": questions(2), "num_generations_eval": 3}


@pytest.mark.parametrize("metric", ["eval_loss", "loss", "rewards/evn/mean", "pass@4", "second_reward"])
def test_a_best_metric_that_no_evaluation_has(metric, model_path, tmp_path, unread):
    with pytest.raises(UserError, match=f"best_model {metric}: .* are: reward, rewards/even/mean, pass@1, pass@3"):
        make("GRPO", model_path, tmp_path, metric_for_best_model=metric, **HELD_OUT)


def test_best_metrics_that_there_are(model_path, tmp_path):
    several = {"first": questions(2), "second": questions(2)}
    metrics = ["eval_reward", "pass@3", "rewards/even/mean", "completions/clipped_ratio", "second_reward"]
    for at, metric in enumerate(metrics):
        held_out = {**HELD_OUT, "eval_dataset": several} if metric.startswith("second") else HELD_OUT
        make("GRPO", model_path, tmp_path / str(at), metric_for_best_model=metric, max_steps=1, **held_out).train()
    make("GRPO", model_path, tmp_path / "b", metric_for_best_model="eval_loss")  # nothing is evaluated

    class Measured(textalign.GRPOTrainer):
        def evaluate(self, *args, **kwargs):
            return {"eval_own": 1.0}

    options = {"metric_for_best_model": "own", "trainer": Measured, "max_steps": 1}
    make("GRPO", model_path, tmp_path / "c", **options, **HELD_OUT).train()


def test_the_longest_completion_is_what_a_sample_may_have(model_path, tmp_path):
    trainer = make("GRPO", model_path, tmp_path, loss_type="dr_grpo", generation_kwargs={"max_new_tokens": 4})
    assert trainer.objective.max_actions == 4


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


def test_the_options_of_a_run_can_be_used_again(model_path, tmp_path):
    """As a copy, and as the run.yaml that a run without a command line writes."""
    options = {"eos_token": "<|im_end|>", "hub_token": "hf_secret", "recipe": "gspo"}
    round_of = {"per_device_train_batch_size": 8, "num_generations": 4, "gradient_accumulation_steps": 2}
    for shape in ({"generation_batch_size": 32}, {"steps_per_generation": 4}, {}):
        args = textalign.GRPOConfig(output_dir=str(tmp_path), **round_of, **shape, **options)
        copied = dataclasses.replace(args, learning_rate=0.5)
        chosen = args.chosen()
        again = textalign.GRPOConfig(**chosen)
        for other in (copied, again):
            assert other.steps_per_generation == args.steps_per_generation
            assert (other.eos_token, other.pad_token, other.epsilon) == ("<|im_end|>", None, 3e-4)
        assert "hf_secret" not in str(chosen) and "<HUB_TOKEN>" not in str(chosen) and "pad_token" not in chosen
        assert ("steps_per_generation" in chosen) is ("generation_batch_size" not in shape)
    args = textalign.GRPOConfig(output_dir=str(tmp_path), trust_remote_code=False, max_steps=1, **round_of)
    textalign.GRPOTrainer(model_path, even, args, train_dataset=questions()).train()
    written = textalign.GRPOConfig(**yaml.safe_load((tmp_path / "run.yaml").read_text()))
    assert written.model_init_kwargs == {"trust_remote_code": False}


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
