"""From prompts to updates of a policy: rollout, score, advantages, update."""
