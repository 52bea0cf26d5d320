"""Losses of preference pairs, each a function of the pairs' log-probabilities that gives one value a pair.

With π the policy and ref the reference, log-probabilities summed over a completion's tokens, y_w chosen, y_l rejected:

    u = log π(y_w) - log ref(y_w)     v = log π(y_l) - log ref(y_l)     d = u - v
    n_w, n_l = tokens of y_w, y_l     ls = log σ                        ε = label smoothing

Without a reference its log-probabilities are 0. The loss of a batch is the mean over its pairs; `sft` alone, in
`PER_TOKEN`, is a mean over tokens. Nothing is reduced here, so that a trainer can divide by the counts of its whole
optimizer step. aot and aot_unpaired compare sorted values: they see the pairs that are given together, and no others.

Dimension letters: P pairs.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from shared.objectives.divergence import Divergence, capped_expm1


@dataclass
class Pairs:
    """Log-probabilities of P preference pairs, all `(P,)`.

    Args:
        chosen, rejected: sums over the completion's tokens, under the policy.
        chosen_tokens, rejected_tokens: how many tokens were counted.
        ref_chosen, ref_rejected: the same sums under the reference; None: no reference.
        chosen_nll: negative log-likelihood of the chosen completion, where `chosen` is no longer its plain sum.
        weights: what the loss of each pair is multiplied by (WPO).
    """

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    ref_chosen: Tensor | None = None
    ref_rejected: Tensor | None = None
    chosen_nll: Tensor | None = None
    weights: Tensor | None = None

    @property
    def u(self) -> Tensor:
        return self.chosen if self.ref_chosen is None else self.chosen - self.ref_chosen

    @property
    def v(self) -> Tensor:
        return self.rejected if self.ref_rejected is None else self.rejected - self.ref_rejected

    @property
    def nll(self) -> Tensor:
        return -self.chosen if self.chosen_nll is None else self.chosen_nll

    def select(self, keep_P: Tensor) -> Pairs:
        """The pairs where `keep_P`, bool, is True."""
        kept = {f.name: value[keep_P] for f in fields(self) if (value := getattr(self, f.name)) is not None}
        return replace(self, **kept)

    def scored(self, chosen: Tensor, rejected: Tensor) -> Pairs:
        """The same pairs with scores `(P,)` in the place of the log-ratios u and v."""
        return replace(self, chosen=chosen, rejected=rejected, ref_chosen=None, ref_rejected=None, chosen_nll=self.nll)

    def diverged(self, divergence: Divergence) -> Pairs:
        """The pairs with f-DPO's scores in the place of u and v."""
        return self.scored(divergence(self.u), divergence(self.v))

    def averaged(self) -> Pairs:
        """The pairs with u / n_w and v / n_l in the place of u and v, and one token each."""
        u, v = _per_token(self)
        ones = torch.ones_like(self.chosen_tokens)
        return replace(self.scored(u, v), chosen_tokens=ones, rejected_tokens=ones)


def _per_token(pairs: Pairs) -> tuple[Tensor, Tensor]:
    # a row that counts no token has a sum of 0
    return pairs.u / pairs.chosen_tokens.clamp_min(1), pairs.v / pairs.rejected_tokens.clamp_min(1)


def _logistic(logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """`-(1-ε) ls(x) - ε ls(-x)`: cross entropy where the label is wrong with probability ε."""
    loss = -F.logsigmoid(logits)
    if label_smoothing == 0:
        return loss
    return (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-logits)


def sigmoid(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """DPO, `-(1-ε) ls(βd) - ε ls(-βd)` (Rafailov et al. 2023, arXiv:2305.18290).

    ε > 0 is conservative DPO (Mitchell 2023, "A note on DPO with noisy preferences"). Without a reference it is CPO's
    loss (Xu et al. 2024, arXiv:2401.08417).

    Args:
        pairs: P pairs.
        beta: strength of the pull to the reference.
        label_smoothing: ε, the share of labels that are expected to be wrong.

    Returns:
        `(P,)`.
    """
    return _logistic(beta * (pairs.u - pairs.v), label_smoothing)


def hinge(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """`max(0, 1 - βd)`. `(P,)`.

    SLiC-HF: Zhao et al. 2023, arXiv:2305.10425; RSO: Liu et al. 2023, arXiv:2309.06657.
    """
    return F.relu(1 - beta * (pairs.u - pairs.v))


def ipo(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """`(u/n_w - v/n_l - 1/(2β))²`, β the paper's τ (Azar et al. 2023, arXiv:2310.12036). `(P,)`.

    Its authors normalise by length, which the paper does not say.
    """
    u, v = _per_token(pairs)
    return (u - v - 1 / (2 * beta)).square()


def sigmoid_norm(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """Length-normalised DPO, `-ls(β(u/n_w - v/n_l))` (Tülu 3: Lambert et al. 2024, arXiv:2411.15124). `(P,)`."""
    u, v = _per_token(pairs)
    return _logistic(beta * (u - v))


def exo_pair(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 1e-3) -> Tensor:
    """EXO, `σ(βd)(ls(βd) - log(1-ε)) + σ(-βd)(ls(-βd) - log ε)` (Ji et al. 2024, arXiv:2402.00856, eq. 16). `(P,)`.

    The reverse KL divergence from the policy's preference to the smoothed label, so ε > 0.
    """
    x = beta * (pairs.u - pairs.v)
    right = x.sigmoid() * (F.logsigmoid(x) - math.log1p(-label_smoothing))
    wrong = (-x).sigmoid() * (F.logsigmoid(-x) - math.log(label_smoothing))
    return right + wrong


def nca_pair(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """NCA, `-ls(βu) - ½ ls(-βu) - ½ ls(-βv)` (Chen et al. 2024, arXiv:2402.05369). `(P,)`."""
    x, y = beta * pairs.u, beta * pairs.v
    return -F.logsigmoid(x) - 0.5 * F.logsigmoid(-x) - 0.5 * F.logsigmoid(-y)


def bco_pair(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """BCO on pairs without its shift, `-ls(βu) - ls(-βv)` (Jung et al. 2024, arXiv:2404.04656). `(P,)`."""
    return -F.logsigmoid(beta * pairs.u) - F.logsigmoid(-beta * pairs.v)


def robust(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """Robust DPO, `[-(1-ε) ls(βd) + ε ls(-βd)] / (1 - 2ε)` (Chowdhury et al. 2024, arXiv:2403.00409). `(P,)`.

    DPO's loss in expectation when each label is flipped with probability ε < ½.
    """
    x = beta * (pairs.u - pairs.v)
    loss = -(1 - label_smoothing) * F.logsigmoid(x) + label_smoothing * F.logsigmoid(-x)
    return loss / (1 - 2 * label_smoothing)


def sppo_hard(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """SPPO where the chosen one always wins, `(u - 1/(2β))² + (v + 1/(2β))²`. `(P,)`.

    Wu et al. 2024, arXiv:2405.00675.
    """
    return (pairs.u - 0.5 / beta).square() + (pairs.v + 0.5 / beta).square()


def aot(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT, DPO's loss of `D = sort(log π(y_w) - log π(y_l)) - sort(log ref(y_w) - log ref(y_l))` in the place of d.

    First-order stochastic dominance of the policy's margins over the reference's (Melnyk et al. 2024,
    arXiv:2406.05882). Sorted over the P pairs given; value i belongs to the i-th smallest margin. `(P,)`.
    """
    margins = (pairs.chosen - pairs.rejected).sort().values
    if pairs.ref_chosen is not None:
        margins = margins - (pairs.ref_chosen - pairs.ref_rejected).sort().values
    return _logistic(beta * margins, label_smoothing)


def aot_unpaired(pairs: Pairs, *, beta: float = 0.1, label_smoothing: float = 0.0) -> Tensor:
    """AOT where chosen and rejected need not answer the same prompt: DPO's loss of `D = sort(u) - sort(v)`.

    Melnyk et al. 2024, arXiv:2406.05882. Sorted over the P pairs given; value i belongs to no one pair. `(P,)`.
    """
    return _logistic(beta * (pairs.u.sort().values - pairs.v.sort().values), label_smoothing)


def apo_zero(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """APO-zero, `1 - σ(βu) + σ(βv)`: for chosen answers better than the policy's own. `(P,)`.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 7.
    """
    return (-beta * pairs.u).sigmoid() + (beta * pairs.v).sigmoid()


def apo_down(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """APO-down, `σ(βu) + 1 - σ(βd)`: for chosen answers worse than the policy's own. `(P,)`.

    D'Oosterlinck et al. 2024, arXiv:2408.06266, eq. 8.
    """
    return (beta * pairs.u).sigmoid() + (beta * (pairs.v - pairs.u)).sigmoid()


def discopop(pairs: Pairs, *, beta: float = 0.1, discopop_tau: float = 0.05) -> Tensor:
    """DiscoPOP, `-ls(x)(1 - σ(x/τ)) + e^(-x) σ(x/τ)` with x = βd (Lu et al. 2024, arXiv:2406.08414, eq. 5). `(P,)`."""
    x = beta * (pairs.u - pairs.v)
    # e^(-x) alone overflows where σ(x/τ) is 0
    exponential = capped_expm1(F.logsigmoid(x / discopop_tau) - x) + 1
    return -F.logsigmoid(x) * (-x / discopop_tau).sigmoid() + exponential


def sft(pairs: Pairs) -> Tensor:
    """`-log π(y_w)`, summed over the tokens of the chosen completion: divide by the batch's chosen tokens. `(P,)`."""
    return pairs.nll


def simpo(pairs: Pairs, *, beta: float = 2.0, label_smoothing: float = 0.0, simpo_gamma: float = 0.5) -> Tensor:
    """SimPO, `-ls(β(m_w - m_l) - γ)` with m the mean log-probability of a token (Meng et al. 2024, arXiv:2405.14734).

    With label smoothing as in `sigmoid`. For pairs without a reference. `(P,)`.
    """
    u, v = _per_token(pairs)
    return _logistic(beta * (u - v) - simpo_gamma, label_smoothing)


def odds_ratio(pairs: Pairs, *, beta: float = 0.1) -> Tensor:
    """ORPO's second term, `-β ls(log odds(y_w) - log odds(y_l))`, β the paper's λ. `(P,)`.

    `odds = p / (1 - p)` with p the geometric mean of the tokens' probabilities. For pairs without a reference.
    Hong et al. 2024, arXiv:2403.07691.
    """
    return -beta * F.logsigmoid(log_odds_ratio(pairs))


def log_odds_ratio(pairs: Pairs) -> Tensor:
    """`log odds(y_w) - log odds(y_l)`, see `odds_ratio`. `(P,)`."""
    u, v = _per_token(pairs)
    return _log_odds(u) - _log_odds(v)


def _log_odds(mean_logp: Tensor) -> Tensor:
    # certainty has infinite odds: the nearest probability below 1 stands for it
    m = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    return m - torch.log(-torch.expm1(m))


PairLoss = Callable[[Pairs], Tensor]

PAIRED: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "sigmoid_norm": sigmoid_norm,
    "exo_pair": exo_pair,
    "nca_pair": nca_pair,
    "bco_pair": bco_pair,
    "robust": robust,
    "sppo_hard": sppo_hard,
    "aot": aot,
    "aot_unpaired": aot_unpaired,
    "apo_zero": apo_zero,
    "apo_down": apo_down,
    "discopop": discopop,
    "sft": sft,
}
REFERENCE_FREE: dict[str, Callable[..., Tensor]] = {
    "sigmoid": sigmoid,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
    "odds_ratio": odds_ratio,
    "sft": sft,
}
PER_TOKEN = frozenset({"sft"})


def known(name: str, names: Iterable[str], what: str = "preference loss") -> str:
    """`name`, if it is one of `names`.

    Raises:
        ValueError: it is not; the message has the names, and the one that may have been meant.
    """
    names = list(names)
    if name in names:
        return name
    near = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"Unknown {what} {name!r}: choose one of {', '.join(names)}.{hint}")


def takes(name: str, option: str) -> bool:
    """Whether the loss of that name looks at that option."""
    return option in inspect.signature((PAIRED | REFERENCE_FREE)[name]).parameters


def paired_loss(name: str, **options: float) -> PairLoss:
    """The loss of that name with its options bound; options that it does not take are left out.

    Args:
        name: a key of `PAIRED` or `REFERENCE_FREE`.
        options: beta, label_smoothing, discopop_tau, simpo_gamma.

    Raises:
        ValueError: no loss has that name, or an option is out of its range.
    """
    losses = PAIRED | REFERENCE_FREE
    known(name, losses)
    own = {option: value for option, value in options.items() if takes(name, option)}
    for option in ("beta", "discopop_tau"):
        if option in own and not (own[option] > 0 and math.isfinite(own[option])):
            raise ValueError(f"{option} must be a positive number, {own[option]!r} was given.")
    if "label_smoothing" in own:
        _check_smoothing(name, own["label_smoothing"])
    return partial(losses[name], **own)


def _check_smoothing(name: str, epsilon: float) -> None:
    if name == "exo_pair" and epsilon == 0:
        raise ValueError("The loss 'exo_pair' needs label_smoothing > 0: its paper takes 1e-3.")
    if not 0 <= epsilon < 0.5:
        raise ValueError(f"The loss {name!r} needs 0 <= label_smoothing < 0.5, {epsilon!r} was given.")
