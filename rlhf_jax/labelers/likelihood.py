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

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import optimize, sparse
from scipy.special import expit

REACH, NODES = 3.5, 21  # of the grid, in standard deviations of quality
PART = 4000  # votes that are computed together
PRECISION: type = np.float32  # of a vote at a node; sums over votes are in float64
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
      converged: whether the search ended at the mode: the gradient is nil there, and the log
        posterior falls in all directions.
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
    for most in (6, 8, *[50] * 10):
        theta, converged = _search(problem, theta, most)
        if not converged:
            continue
        information = problem.information(theta)
        curvatures, directions = np.linalg.eigh(information)
        converged = bool(curvatures[0] > 0)
        if converged:
            break
        # A saddle, as where everybody's sharpness is 0: the way down is to either side of it.
        down = directions[:, 0]
        theta = theta + (down if down[::width].sum() >= 0 else -down)
    else:
        information = problem.information(theta)
    units = np.tile(problem.units, count)
    return Fitted(
        theta=theta.reshape(count, width) * problem.units,
        covariance=np.linalg.inv(information) * units[:, None] * units,
        prior=problem.prior * problem.units,
        quality=problem.quality(theta) if votes.quality is None else votes.quality,
        converged=converged,
    )


def _search(problem: _Problem, theta: np.ndarray, most: int) -> tuple[np.ndarray, bool]:
    """(parameters, whether they are the mode) after at most so many iterations of L-BFGS.

    It walks in coordinates in which what the votes would tell, were q known, is the identity: so
    the gradient says by how many standard errors parameters are away from the mode. It ends at a
    few hundredths, or where single precision sees no more of a descent; a tenth is the mode.
    """
    count, width = problem.labelers, len(problem.prior)
    root = np.linalg.cholesky(np.linalg.inv(problem.complete_information(theta)))

    def to_theta(step: np.ndarray) -> np.ndarray:
        return theta + np.einsum("lij,lj->li", root, step.reshape(count, width)).ravel()

    def objective(step: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient = problem.loss_and_gradient(to_theta(step))
        return loss, np.einsum("lij,li->lj", root, gradient.reshape(count, width)).ravel()

    found = optimize.minimize(
        objective, np.zeros_like(theta), jac=True, method="L-BFGS-B",
        options={"maxiter": most, "maxcor": 20, "ftol": 1e-8, "gtol": 0.03},
    )  # fmt: skip
    return to_theta(found.x), bool(np.abs(found.jac).max() < 0.1)


class _Problem:
    """The likelihood in standard units: each feature, and a known quality, divided by its spread.

    Pairs are in parts that a processor's cache holds.
    """

    def __init__(self, votes: Votes) -> None:
        spread = _spread(votes.features)
        scale = 1.0 if votes.quality is None else float(_spread(votes.quality))
        self.threads = ThreadPoolExecutor(os.cpu_count())
        self.labelers, self.pairs = len(votes.labelers), len(votes.features)
        self.units = np.concatenate([[1 / scale], 1 / spread, [1, 1]])
        effects = [EFFECT_PRIOR] * len(spread)
        self.prior = np.array([SHARPNESS_PRIOR, *effects, POSITION_PRIOR, LAPSE_PRIOR[1]])
        self.center = np.array([0.0] * (len(self.prior) - 1) + [LAPSE_PRIOR[0]])
        # A tie is half a vote for each side.
        tied = np.flatnonzero((votes.wins > 0) & (votes.wins < 1))
        rows = np.concatenate([np.arange(len(votes.wins)), tied])
        sign = np.where(votes.wins > 0, 1.0, -1.0)[rows]
        sign[len(votes.wins) :] = -1
        weight = np.ones(len(rows))
        weight[tied] = weight[len(votes.wins) :] = 0.5
        order = np.argsort(votes.pair[rows], kind="stable")
        rows, sign, weight = rows[order], sign[order], weight[order]
        pair = votes.pair[rows]
        ends = np.flatnonzero(np.diff(pair, append=-1)) + 1  # of each pair's votes
        cuts = np.unique(np.searchsorted(ends, np.arange(PART, len(pair), PART)))
        fixed = np.concatenate([votes.features[pair] / spread, votes.first[rows, None]], axis=1)
        self.parts: list[_Part] = []
        for own in np.split(ends, cuts):
            if not len(own):
                continue
            begin = self.parts[-1].end if self.parts else 0
            at = slice(begin, int(own[-1]))
            known = None if votes.quality is None else votes.quality[pair[at], None] / scale
            self.parts.append(
                _Part(
                    labelers=self.labelers, end=at.stop, sign=sign[at], weight=weight[at],
                    labeler=votes.labeler[rows[at]], pair=pair[at], fixed=fixed[at], known=known,
                )
            )  # fmt: skip

    def loss_and_gradient(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """Minus the log posterior but for a constant, and its gradient [L · K]."""
        theta = theta.reshape(self.labelers, -1)
        away = (theta - self.center) / self.prior
        loss, gradient = 0.5 * float((away**2).sum()), away / self.prior
        for likelihood, along in self.threads.map(lambda part: part.likelihood(theta), self.parts):
            loss, gradient = loss - likelihood, gradient - along
        return loss, gradient.ravel()

    def information(self, theta: np.ndarray) -> np.ndarray:
        """Minus the Hessian of the log posterior, [L · K, L · K], by Louis' identity.

        "Finding the Observed Information Matrix when Using the EM Algorithm" (1982),
        https://www.jstor.org/stable/2345828: that of the votes given q, less what q adds, which
        is the covariance over q of a pair's score.
        """
        theta = theta.reshape(self.labelers, -1)
        width, each = theta.shape[1], np.arange(self.labelers)
        blocks = np.zeros((self.labelers, width, self.labelers, width))
        blocks[each, :, each, :] = np.diag(self.prior**-2)
        information = blocks.reshape(theta.size, -1)
        for block, covariance in self.threads.map(lambda part: part.information(theta), self.parts):
            blocks[each, :, each, :] += block
            information -= covariance
        return information

    def complete_information(self, theta: np.ndarray) -> np.ndarray:
        """[L, K, K] what votes would tell, were q known: the mean over q of each squared score."""
        theta = theta.reshape(self.labelers, -1)
        total = np.tile(np.diag(self.prior**-2), (self.labelers, 1, 1))
        return sum(self.threads.map(lambda part: part.squares(theta), self.parts), total)

    def quality(self, theta: np.ndarray) -> np.ndarray:
        """[P] the mean of each pair's quality after its votes."""
        quality = np.zeros(self.pairs)
        for part in self.parts:
            mass = part.derivatives(theta.reshape(self.labelers, -1)).mass
            quality[part.pair[part.starts]] = mass @ part.nodes[0]
        return quality


class _Derivatives(NamedTuple):
    """Of the log of each vote's probability, [v, nodes]; and the nodes' mass [p, nodes].

    `logit` and `lapse` are the first by η and by the logit of the lapses; `second` by η twice, by
    both, and by the lapse twice.
    """

    logit: np.ndarray
    lapse: np.ndarray
    mass: np.ndarray
    second: tuple[np.ndarray, np.ndarray, np.ndarray]


class _Part:
    """All v votes about p pairs, which stand together: their likelihood and its derivatives."""

    def __init__(
        self, *, labelers: int, end: int, sign: np.ndarray, weight: np.ndarray,
        labeler: np.ndarray, pair: np.ndarray, fixed: np.ndarray, known: np.ndarray | None,
    ) -> None:  # fmt: skip
        self.end, self.labeler, self.pair, self.known = end, labeler, pair, known
        self.sign: np.ndarray = sign.astype(PRECISION)
        self.weight: np.ndarray = weight.astype(PRECISION)
        self.fixed: np.ndarray = fixed.astype(PRECISION)
        self.starts = np.flatnonzero(np.diff(pair, prepend=-1))
        self.counts = np.diff(self.starts, append=len(pair))
        grid = np.linspace(-REACH, REACH, NODES)[None, :]
        mass = np.exp(-0.5 * grid[0] ** 2) if known is None else np.ones(1)
        self.nodes: np.ndarray = (grid if known is None else known).astype(PRECISION)
        self.log_mass: np.ndarray = np.log(mass / mass.sum()).astype(PRECISION)
        self.powers = self.nodes[..., None] ** np.arange(3, dtype=PRECISION)
        ones, at = np.ones(len(pair)), np.arange(len(pair))
        self.by_labeler = sparse.csr_matrix((ones, (labeler, at)), (labelers, len(at)))
        among = np.repeat(np.arange(len(self.starts)), self.counts)
        self.by_pair = sparse.csr_matrix((self.weight, (among, at)))

    def _votes(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(σ(±η), P of what was voted, each [v, nodes], lapses [v, 1])."""
        mine = theta[self.labeler].astype(PRECISION)
        signed = self.sign[:, None] * mine[:, :-1]
        right = -signed[:, :1] * self.nodes
        right -= (self.fixed * signed[:, 1:]).sum(1)[:, None]
        with np.errstate(over="ignore"):  # 1 / (1 + ∞) is right
            np.exp(right, out=right)
        right += 1
        np.reciprocal(right, out=right)
        lapses = expit(mine[:, -1:])
        chosen = right * (1 - lapses)
        chosen += lapses / 2
        return right, chosen, lapses

    def _posterior(self, chosen: np.ndarray) -> tuple[np.ndarray, float]:
        """(mass of each node after a pair's votes [p, nodes], log-likelihood)."""
        joint = self.by_pair @ np.log(chosen)
        joint += self.log_mass
        top = joint.max(1, keepdims=True)
        mass = np.exp(joint - top)
        total = mass.sum(1, keepdims=True)
        return mass / total, float((top + np.log(total)).sum(dtype=np.float64))

    def likelihood(self, theta: np.ndarray) -> tuple[float, np.ndarray]:
        """The log-likelihood of the votes, and its gradient [L, K]."""
        right, chosen, lapses = self._votes(theta)
        mass, likelihood = self._posterior(chosen)
        each = np.repeat(mass, self.counts, axis=0)
        each /= chosen
        of_lapse = self._moments(each)[:, 0] / 2
        each *= right
        of_lapse -= self._moments(each)[:, 0]
        right -= 1
        each *= right  # −σ(1 − σ) of each node
        moments = self._moments(each) * (-self.weight * self.sign * (1 - lapses[:, 0]))[:, None]
        columns = [
            moments[:, 1:2],
            moments[:, :1] * self.fixed,
            (self.weight * of_lapse * (lapses * (1 - lapses))[:, 0])[:, None],
        ]
        return likelihood, self.by_labeler @ np.concatenate(columns, axis=1)

    def _moments(self, values: np.ndarray) -> np.ndarray:
        """[v, 3] the sums over nodes of values [v, nodes], of them times q, and times q²."""
        return values @ self.powers[0] if self.known is None else values * self.powers[:, 0]

    def derivatives(self, theta: np.ndarray) -> _Derivatives:
        """The derivatives of each vote by what its probability is made of."""
        right, chosen, lapses = self._votes(theta)
        mass, _ = self._posterior(chosen)
        slope, moved = right * (1 - right), lapses * (1 - lapses)
        of_logit = self.sign[:, None] * (1 - lapses) * slope / chosen
        of_lapse = moved * (0.5 - right) / chosen
        second = (
            (1 - lapses) * slope * (1 - 2 * right) / chosen - of_logit**2,
            -self.sign[:, None] * moved * slope / chosen - of_logit * of_lapse,
            (1 - 2 * lapses) * of_lapse - of_lapse**2,
        )
        return _Derivatives(of_logit, of_lapse, mass, second)

    def squares(self, theta: np.ndarray) -> np.ndarray:
        """[L, K, K] the mean over q of each vote's squared score, summed over a labeler's votes."""
        found = self.derivatives(theta)
        squares = (found.logit**2, found.logit * found.lapse, found.lapse**2)
        return self.blocks(squares, found.mass)

    def information(self, theta: np.ndarray) -> tuple[np.ndarray, np.ndarray | float]:
        """Minus the mean second derivatives [L, K, K], and the `covariance`, 0 where q is known."""
        found = self.derivatives(theta)
        covariance = self.covariance(found) if self.known is None else 0.0
        return -self.blocks(found.second, found.mass), covariance

    def blocks(self, second: tuple[np.ndarray, ...], mass: np.ndarray) -> np.ndarray:
        """[L, K, K] the sum over a labeler's votes, and mean over q, of these second moments."""
        at = self.weight[:, None] * np.repeat(mass, self.counts, axis=0)
        logit, both, lapse = (at * moment for moment in second)
        width, fixed = self.fixed.shape[1] + 2, self.fixed
        blocks = np.zeros((len(at), width, width), PRECISION)
        zeroth, first, blocks[:, 0, 0] = self._moments(logit).T
        blocks[:, 0, 1:-1] = blocks[:, 1:-1, 0] = first[:, None] * fixed
        blocks[:, 1:-1, 1:-1] = zeroth[:, None, None] * fixed[:, :, None] * fixed[:, None, :]
        zeroth, first, _ = self._moments(both).T
        blocks[:, 0, -1] = blocks[:, -1, 0] = first
        blocks[:, 1:-1, -1] = blocks[:, -1, 1:-1] = zeroth[:, None] * fixed
        blocks[:, -1, -1] = lapse.sum(1)
        summed = self.by_labeler @ blocks.reshape(len(at), -1)
        return summed.reshape(-1, width, width)

    def covariance(self, found: _Derivatives) -> np.ndarray:
        """Σ over pairs of the covariance over q of the gradient by all parameters."""
        mass = np.repeat(found.mass, self.counts, axis=0).T[:, :, None]
        along = (self.weight[:, None] * found.logit).T[:, :, None]
        lapse = (self.weight[:, None] * found.lapse).T[:, :, None]
        of_quality = along * self.nodes.T[:, :, None]
        scores = np.concatenate([of_quality, along * self.fixed, lapse], axis=2)  # [nodes, v, K]
        spread = self._by_pair(np.sqrt(mass) * scores)
        mean = self._by_pair((mass * scores).sum(0, keepdims=True))
        return (spread.T @ spread - mean.T @ mean).toarray()

    def _by_pair(self, scores: np.ndarray) -> sparse.csr_matrix:
        """[n · p, L · K] of scores [n, v, K]: a row has those of all votes about a pair."""
        count, votes, width = scores.shape
        size = self.by_labeler.shape[0] * width
        columns = (self.labeler[:, None] * width + np.arange(width)).ravel()
        starts = (np.arange(count)[:, None] * votes + self.starts).ravel() * width
        return sparse.csr_matrix(
            (scores.ravel(), np.tile(columns, count), np.append(starts, scores.size)),
            shape=(len(starts), size),
        )


def _spread(values: np.ndarray) -> np.ndarray:
    """The root mean square along the first axis; 1 where all is 0."""
    spread = np.sqrt((np.asarray(values, np.float64) ** 2).mean(0))
    return np.where(spread > 0, spread, 1.0)
