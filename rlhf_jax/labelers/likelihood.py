"""The likelihood of votes by people who differ, with its exact gradient and Hessian.

    η      = sharpness_l · q + Σ_f effect_lf · x_f + position_l · o
    P(a)   = (1 − lapses_l) · σ(η) + lapses_l / 2

q is by how much a is better than b, x_f the difference of a feature, o 1 where a was shown first
and −1 where b was. A pair whose q is unknown has the standard normal distribution in its place,
which is summed over on a grid, as in item response theory: "Marginal maximum likelihood estimation
of item parameters" (Bock & Aitkin, 1981), https://doi.org/10.1007/BF02293801. That people may
differ in sharpness and lapse is the model of "Pairwise Ranking Aggregation in a Crowdsourced
Setting" (Chen et al., 2013), https://doi.org/10.1145/2433396.2433420, with further biases.

The parameters have a weak normal prior, which is what is left of one that the votes don't tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse
from scipy.special import expit

REACH, NODES = 3.75, 31  # of the grid, in standard deviations of quality
# Standard deviations of the prior, in logits per standard deviation of what an effect is of.
SHARPNESS_PRIOR, EFFECT_PRIOR, POSITION_PRIOR = 10.0, 5.0, 3.0
LAPSE_PRIOR = (-3.0, 1.5)  # mean and standard deviation of logit(lapses)


@dataclass(frozen=True)
class Votes:
    """Votes as arrays: V votes by L labelers about P pairs of replies, a and b, with F features.

    Attributes:
      labelers: the names of the L labelers.
      labeler, pair: [V] int, whose and about what.
      wins: [V] float, 1 where a was preferred, 0 where b was, ½ for a tie.
      first: [V] float, 1 where a was shown first, −1 where b was, 0 where nobody knows.
      names: the F features' names.
      features: [P, F] float, of a less of b.
      replies: [P, 2] int, which replies a and b are.
      quality: [P] float, by how much a is better in truth; None where nobody knows.
    """

    labelers: tuple[str, ...]
    labeler: np.ndarray
    pair: np.ndarray
    wins: np.ndarray
    first: np.ndarray
    names: tuple[str, ...]
    features: np.ndarray
    replies: np.ndarray
    quality: np.ndarray | None = None

    @property
    def effects(self) -> tuple[str, ...]:
        """The names of a labeler's parameters, in their order."""
        return ("sharpness", *self.names, "position", "lapses")


@dataclass(frozen=True)
class Fitted:
    """The posterior mode of all parameters, and the inverse of minus the Hessian there.

    Attributes:
      theta: [L, K] by `Votes.effects`, in units of the votes' own; lapses as logits.
      covariance: [L · K, L · K] of these.
      prior: [K] standard deviations of the prior, in the same units.
      quality: [P] the mean of each pair's quality after its votes, or what was known.
      converged: whether the search for the mode ended where the gradient is nil.
    """

    theta: np.ndarray
    covariance: np.ndarray
    prior: np.ndarray
    quality: np.ndarray
    converged: bool


def fit(votes: Votes) -> Fitted:
    """Fits all labelers together; with known qualities each of them is fitted by itself."""
    problem = _Problem(votes)
    count, width = len(votes.labelers), len(votes.effects)
    start = np.zeros((count, width))
    start[:, 0], start[:, -1] = 1.0, LAPSE_PRIOR[0]
    theta = start.ravel()
    for most in (8, 12, 500):
        theta, converged = _search(problem, theta, most)
    information = problem.information(theta)
    units = np.tile(problem.units, count)
    return Fitted(
        theta=theta.reshape(count, width) * problem.units,
        covariance=np.linalg.inv(information) * units[:, None] * units,
        prior=problem.prior * problem.units,
        quality=problem.quality(theta),
        converged=converged,
    )


def _search(problem: _Problem, theta: np.ndarray, most: int) -> tuple[np.ndarray, bool]:
    """(parameters, whether they are the mode) after at most so many iterations of L-BFGS.

    It walks in coordinates in which what the votes would tell, were q known, is the identity: so
    it ends where no parameter is further from the mode than a hundredth of its standard error.
    """
    count, width = problem.by_labeler.shape[0], len(problem.prior)
    root = np.linalg.cholesky(np.linalg.inv(problem.complete_information(theta)))

    def to_theta(step: np.ndarray) -> np.ndarray:
        return theta + np.einsum("lij,lj->li", root, step.reshape(count, width)).ravel()

    def objective(step: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = problem.loss_and_gradient(to_theta(step))
        return loss, np.einsum("lij,li->lj", root, gradient.reshape(count, width)).ravel()

    found = optimize.minimize(
        objective, np.zeros_like(theta), jac=True, method="L-BFGS-B",
        options={"maxiter": most, "maxcor": 20, "ftol": 0.0, "gtol": 0.01},
    )  # fmt: skip
    return to_theta(found.x), found.status == 0


class _Derivatives(NamedTuple):
    """Of the log of each vote's probability, [V, nodes]; and the nodes' mass [P, nodes].

    `logit` and `lapse` are the first by η and by the logit of the lapses; `second` has "logit",
    "both" and "lapse".
    """

    logit: np.ndarray
    lapse: np.ndarray
    mass: np.ndarray
    second: dict[str, np.ndarray]


class _Problem:
    """The likelihood in standard units: each feature, and a known quality, divided by its spread.

    A tie is half a vote for each side.
    """

    def __init__(self, votes: Votes) -> None:
        tied = np.flatnonzero((votes.wins > 0) & (votes.wins < 1))
        order = np.concatenate([np.arange(len(votes.wins)), tied])
        self.sign = np.where(votes.wins > 0, 1.0, -1.0)[order]
        self.sign[len(votes.wins) :] = -1
        self.weight = np.ones(len(order))
        self.weight[tied] = self.weight[len(votes.wins) :] = 0.5
        self.labeler, pair = votes.labeler[order], votes.pair[order]
        spread = _spread(votes.features)
        scale = 1.0 if votes.quality is None else float(_spread(votes.quality))
        fixed = [votes.features[pair] / spread, votes.first[order][:, None]]
        self.fixed = np.concatenate(fixed, axis=1)
        self.units = np.concatenate([[1 / scale], 1 / spread, [1, 1]])
        effects = [EFFECT_PRIOR] * len(spread)
        self.prior = np.array([SHARPNESS_PRIOR, *effects, POSITION_PRIOR, LAPSE_PRIOR[1]])
        self.center = np.array([0.0] * (len(self.prior) - 1) + [LAPSE_PRIOR[0]])
        self.grid = np.linspace(-REACH, REACH, NODES)
        log_mass = -0.5 * self.grid**2
        self.log_mass = log_mass - np.log(np.exp(log_mass).sum())
        self.nodes = self.grid[None, :]
        if votes.quality is not None:
            self.nodes, self.log_mass = votes.quality[pair][:, None] / scale, np.zeros(1)
        self.known = votes.quality
        ones, at = np.ones(len(order)), np.arange(len(order))
        pairs = len(votes.features)
        self.by_pair = sparse.csr_matrix((ones, (pair, at)), (pairs, len(order)))
        self.by_labeler = sparse.csr_matrix(
            (ones, (self.labeler, at)), (len(votes.labelers), len(order))
        )
        self.pair = pair

    def _votes(self, theta: np.ndarray) -> tuple[np.ndarray, ...]:
        """(σ(±η), P of what was voted, each [V, nodes], lapses [V, 1])."""
        theta = theta.reshape(self.by_labeler.shape[0], -1)
        mine = theta[self.labeler]
        logit = (self.fixed * mine[:, 1:-1]).sum(1)[:, None] + mine[:, :1] * self.nodes
        right = expit(self.sign[:, None] * logit)
        lapses = expit(mine[:, -1:])
        return right, (1 - lapses) * right + lapses / 2, lapses

    def _posterior(self, chosen: np.ndarray) -> tuple[np.ndarray, float]:
        """(mass of each node after a pair's votes [P, nodes], log-likelihood)."""
        joint = self.by_pair @ (self.weight[:, None] * np.log(chosen)) + self.log_mass
        top = joint.max(1, keepdims=True)
        mass = np.exp(joint - top)
        total = mass.sum(1, keepdims=True)
        return mass / total, float((top + np.log(total)).sum())

    def loss_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log posterior but for a constant, and its gradient [L · K]."""
        right, chosen, lapses = self._votes(theta)
        mass, likelihood = self._posterior(chosen)
        each = self.weight[:, None] * mass[self.pair] / chosen
        of_logit = each * (1 - lapses) * right * (1 - right) * self.sign[:, None]
        of_lapse = (each * (0.5 - right)).sum(1) * (lapses * (1 - lapses))[:, 0]
        along = of_logit.sum(1)
        columns = [
            (of_logit * self.nodes).sum(1)[:, None],
            along[:, None] * self.fixed,
            of_lapse[:, None],
        ]
        gradient = self.by_labeler @ np.concatenate(columns, axis=1)
        away = (theta.reshape(gradient.shape) - self.center) / self.prior
        loss = 0.5 * float((away**2).sum()) - likelihood
        return loss, (away / self.prior - gradient).ravel()

    def information(self, theta: np.ndarray) -> np.ndarray:
        """Minus the Hessian of the log posterior, [L · K, L · K], by Louis' identity.

        "Finding the Observed Information Matrix when Using the EM Algorithm" (1982),
        https://www.jstor.org/stable/2345828: that of the votes given q, less what q adds, which
        is the covariance over q of a pair's score.
        """
        found = self._derivatives(theta)
        count, width = self.by_labeler.shape[0], len(self.prior)
        information = np.zeros((count, width, count, width))
        each = np.arange(count)
        information[each, :, each, :] = -self._blocks(found.second, found.mass)
        information = information.reshape(count * width, -1)
        if len(self.log_mass) > 1:
            information -= self._covariance(found)
        return information + np.diag(np.tile(self.prior**-2, count))

    def complete_information(self, theta: np.ndarray) -> np.ndarray:
        """[L, K, K] the mean over q of the squared score of each vote, and the prior's."""
        found = self._derivatives(theta)
        squares = {
            "logit": found.logit**2,
            "both": found.logit * found.lapse,
            "lapse": found.lapse**2,
        }
        return self._blocks(squares, found.mass) + np.diag(self.prior**-2)

    def _derivatives(self, theta: np.ndarray) -> _Derivatives:
        right, chosen, lapses = self._votes(theta)
        mass, _ = self._posterior(chosen)
        slope, moved = right * (1 - right), lapses * (1 - lapses)
        of_logit = self.sign[:, None] * (1 - lapses) * slope / chosen
        of_lapse = moved * (0.5 - right) / chosen
        second = {
            "logit": (1 - lapses) * slope * (1 - 2 * right) / chosen - of_logit**2,
            "both": -self.sign[:, None] * moved * slope / chosen - of_logit * of_lapse,
            "lapse": (1 - 2 * lapses) * of_lapse - of_lapse**2,
        }
        return _Derivatives(of_logit, of_lapse, mass, second)

    def _blocks(self, second: dict[str, np.ndarray], mass: np.ndarray) -> np.ndarray:
        """[L, K, K] the sum over a labeler's votes, and mean over q, of these second moments."""
        at = self.weight[:, None] * mass[self.pair]
        width, fixed = len(self.prior), self.fixed
        blocks = np.zeros((len(at), width, width))
        logit, both = at * second["logit"], at * second["both"]
        blocks[:, 0, 0] = (logit * self.nodes**2).sum(1)
        blocks[:, 0, 1:-1] = (logit * self.nodes).sum(1)[:, None] * fixed
        blocks[:, 1:-1, 0] = blocks[:, 0, 1:-1]
        blocks[:, 1:-1, 1:-1] = logit.sum(1)[:, None, None] * fixed[:, :, None] * fixed[:, None, :]
        blocks[:, 0, -1] = blocks[:, -1, 0] = (both * self.nodes).sum(1)
        blocks[:, 1:-1, -1] = both.sum(1)[:, None] * fixed
        blocks[:, -1, 1:-1] = blocks[:, 1:-1, -1]
        blocks[:, -1, -1] = (at * second["lapse"]).sum(1)
        summed = self.by_labeler @ blocks.reshape(len(at), -1)
        return summed.reshape(-1, width, width)

    def _covariance(self, found: _Derivatives) -> np.ndarray:
        """Σ over pairs of the covariance over q of the gradient by all parameters."""
        width, pairs = len(self.prior), len(found.mass)
        size = self.by_labeler.shape[0] * width
        columns = (self.labeler[:, None] * width + np.arange(width)).ravel()
        rows = np.repeat(self.pair, width)
        total, mean = sparse.csr_matrix((size, size)), sparse.csr_matrix((pairs, size))
        for n, q in enumerate(self.nodes[0]):
            along = (self.weight * found.logit[:, n])[:, None]
            lapse = (self.weight * found.lapse[:, n])[:, None]
            score = np.concatenate([along * q, along * self.fixed, lapse], axis=1)
            scores = sparse.csr_matrix((score.ravel(), (rows, columns)), (pairs, size))
            weighted = sparse.diags(found.mass[:, n]) @ scores
            total = total + scores.T @ weighted
            mean = mean + weighted
        return (total - mean.T @ mean).toarray()

    def quality(self, theta: np.ndarray) -> np.ndarray:
        """[P] what is known of each pair's quality, or its mean after the votes."""
        if self.known is not None:
            return self.known
        mass, _ = self._posterior(self._votes(theta)[1])
        return mass @ self.grid


def _spread(values: np.ndarray) -> np.ndarray:
    """The root mean square along the first axis; 1 where all is 0."""
    spread = np.sqrt((np.asarray(values, np.float64) ** 2).mean(0))
    return np.where(spread > 0, spread, 1.0)
