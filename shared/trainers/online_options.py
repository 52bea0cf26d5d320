"""Options of the trainers that act and are rewarded, as the command line shows them. Imports no torch.

RolloutOptions is for any action, a token or a denoising step; SamplingOptions is for those that write tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from shared.runtime.arguments import AlignOptions
from shared.runtime.options import option


@dataclass
class RolloutOptions(AlignOptions):
    """Rollouts and rewards."""

    learning_rate: float = option(1e-6, "Peak learning rate of AdamW.")
    num_generations: int = option(8, "G, samples of each prompt: a group, whose rewards are compared.")
    steps_per_generation: int | None = option(
        None, "Micro-batches that one round of sampling serves. Unset: gradient_accumulation_steps."
    )
    generation_batch_size: int | None = option(
        None, "Samples of one round over all processes, in place of steps_per_generation."
    )
    num_iterations: int = option(1, "μ, how many times a round's samples are trained on.")
    shuffle_dataset: bool = option(True, "Draw the prompts in random order.")

    reward_funcs: list[str] = option(
        [],
        "Rewards: a built-in name (accuracy_reward, think_format_reward, …), package.module.function, a reward model "
        "(folder, hub id), sentiment-analysis:MODEL, or judge:URL|MODEL. Several are added up.",
    )
    reward_weights: list[float] | None = option(
        None, "Weight of each reward; one with weight 0 is only measured. Unset: 1 each."
    )
    on_reward_error: Literal["raise", "zero", "skip"] = option(
        "raise", "Where a reward fails: stop and say where, count it as 0, or as not applicable."
    )
    reward_timeout: float | None = option(None, "Seconds after which an asynchronous or remote reward has failed.")
    async_reward_computation: bool = option(
        False, "Score samples while the next of the round are sampled, generation_rows (unset: a micro-batch) at once."
    )
    dynamic_sampling: bool = option(
        False, "Draw other prompts for groups whose rewards are all equal (DAPO), in max_resampling rounds at most."
    )
    max_resampling: int = option(4, "Further rounds of dynamic sampling.", needs="dynamic_sampling")

    num_generations_eval: int | None = option(
        None, "Samples of each held-out prompt in an evaluation. Unset: num_generations."
    )
    pass_reward: float = option(
        1.0, "A sample passes, for pass@k, when its reward reaches this (the weighted sum of all rewards)."
    )
    metric_for_best_model: str | None = option("reward", "Metric of the evaluation by which a checkpoint is best.")
    greater_is_better: bool | None = option(True, "Whether more of that metric is better.")

    log_completions: bool = option(False, "Print samples with their rewards, besides the report's tables.")
    num_completions_to_print: int | None = option(8, "How many samples are printed, and kept in each table.")
    sample_every: int = option(
        20, "Steps between two tables of samples, and two columns of pictures, in the run report; 0: none."
    )


@dataclass
class UpdateOptions(RolloutOptions):
    """Updates by a policy gradient."""

    beta: float = option(0.0, "Weight of the KL divergence to the reference model; 0 loads none.")
    epsilon: float = option(0.2, "ε, how far the ratio may fall below 1, and rise above it.")
    epsilon_high: float | None = option(None, "How far it may rise, where that differs.")


@dataclass
class GroupOptions(RolloutOptions):
    """How rewards of a group are compared."""

    scale_rewards: Literal["group", "batch", "none"] | bool = option(
        "group", "Divide advantages by the standard deviation of the group, of the batch, or not. true: group."
    )
    multi_objective_aggregation: Literal["sum_then_normalize", "normalize_then_sum"] = option(
        "sum_then_normalize", "Several rewards: add, then normalise; or normalise each, then add (GDPO)."
    )


@dataclass
class TokenUpdateOptions(UpdateOptions):
    """Updates by a policy gradient whose actions are tokens."""

    mask_truncated_completions: bool = option(False, "Learn nothing from samples that were cut at their longest.")
    top_entropy_quantile: float = option(
        1.0, "Learn from this share of the actions only: those of highest entropy (arXiv:2506.01939)."
    )
    entropy_coef: float = option(0.0, "Weight of an entropy bonus.")
    use_adaptive_entropy: bool = option(
        False, "Move entropy_coef so that the entropy stays above entropy_target (arXiv:2505.22312)."
    )
    entropy_coef_min: float = option(0.0, "Least entropy_coef.", needs="use_adaptive_entropy")
    entropy_coef_max: float = option(1.0, "Greatest entropy_coef.", needs="use_adaptive_entropy")
    entropy_coef_delta: float = option(0.005, "Move of entropy_coef at each step.", needs="use_adaptive_entropy")
    entropy_target: float = option(0.2, "Entropy to keep, in nats an action.", needs="use_adaptive_entropy")


@dataclass
class PolicyGradientOptions(TokenUpdateOptions, GroupOptions):
    """Group-relative policy gradient of tokens."""

    kl_estimator: Literal["k1", "k2", "k3"] = option("k3", "Estimator of that divergence, of one action each.")
    use_bias_correction_kl: bool = option(
        True, "Weigh the divergence by the importance ratio, so that it is unbiased off policy (arXiv:2512.02556)."
    )
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo"] = option(
        "dapo", "Objective; they differ in how the ratio is bounded and in what the sum is divided by."
    )
    importance_sampling_level: Literal["token", "sequence"] = option(
        "token", "Ratio of each action, or of each sample: the geometric mean over its actions (GSPO)."
    )
    epsilon_high: float | None = option(
        None, "How far the ratio may rise, where that differs; cispo: the ratio's bound."
    )
    delta: float | None = option(None, "Upper bound of the ratio where the advantage is negative (two-sided clip).")
    sapo_temperature_pos: float = option(1.0, "τ of sapo where the advantage is positive.")
    sapo_temperature_neg: float = option(1.05, "τ of sapo where it is not.")
    vespo_k_pos: float = option(2.0, "k of vespo where the advantage is positive.")
    vespo_lambda_pos: float = option(3.0, "λ of vespo where the advantage is positive.")
    vespo_k_neg: float = option(3.0, "k of vespo where it is not.")
    vespo_lambda_neg: float = option(2.0, "λ of vespo where it is not.")
    recipe: str | None = option(
        None, "Preset with a paper's numbers, below what is given: gspo dapo dr_grpo cispo sapo luspo vespo gdpo …"
    )


@dataclass
class SamplingOptions(AlignOptions):
    """Writing tokens."""

    max_prompt_length: int | None = option(None, "Prompts lose their beginning beyond so many tokens. Unset: no cut.")
    max_completion_length: int = option(512, "Longest completion, in tokens.")
    max_new_tokens: int | None = option(
        None, "Longest answer before and after training. Unset: max_completion_length."
    )
    temperature: float = option(1.0, "Divides the logits, in sampling and in training.")
    top_p: float = option(1.0, "Sample from the most likely tokens that hold this probability; 1: from all.")
    top_k: int = option(0, "Sample from so many most likely tokens; 0: from all.")
    min_p: float | None = option(None, "Sample from tokens with at least this share of the likeliest one's chance.")
    repetition_penalty: float = option(1.0, "Above 1: tokens that were written lose in chance.")
    stop_strings: list[str] = option([], "Texts that end a completion, besides the end-of-sequence token.")
    generation_kwargs: dict[str, Any] | None = option(
        None, "The same options under the names of transformers' generation, as JSON; they win."
    )
    generation_rows: int | None = option(
        None, "Samples that are written at once on each process. Unset: all of a round."
    )
    eval_temperature: float | None = option(None, "Temperature in evaluations; 0: greedy. Unset: temperature.")
    eval_top_p: float | None = option(None, "top_p in evaluations. Unset: top_p.")
    eval_top_k: int | None = option(None, "top_k in evaluations. Unset: top_k.")
    ds3_gather_for_generation: bool = option(
        True, "Under ZeRO-3: gather the whole model to write with; faster, where it fits."
    )
    use_vllm: bool = option(False, "Write with a vLLM server instead of in this process.")
    vllm_server_base_url: str = option("http://127.0.0.1:8000", "Address of the vLLM server.", needs="use_vllm")
    vllm_sync_dir: str | None = option(
        None, "Folder that trainer and server both see, through which new weights go.", needs="use_vllm"
    )
    vllm_server_timeout: float = option(240.0, "Seconds to wait for the server.", needs="use_vllm")
    vllm_importance_sampling_correction: bool = option(
        True, "Weigh samples by how likely they are here against on the server.", needs="use_vllm"
    )
    vllm_importance_sampling_mode: Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"] = (
        option("token_truncate", "Bound that weight, or drop what is above it.", needs="use_vllm")
    )
    vllm_importance_sampling_cap: float = option(3.0, "Bound of that weight.", needs="use_vllm")
    disable_dropout: bool = option(
        True, "Train without dropout, an adapter's neither, so that what samples is what is trained."
    )
    share_prefix: bool = option(
        True, "Run each prompt once for all of its samples, where the model can; the result is the same."
    )
