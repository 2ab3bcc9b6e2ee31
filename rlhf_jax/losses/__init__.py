"""Losses: pure functions over arrays that return (sum, weight); below the rest of the package."""
