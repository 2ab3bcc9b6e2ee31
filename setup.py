"""What pyproject.toml cannot say: experiments/ is installed as rlhf_jax/experiments."""

from setuptools import find_namespace_packages, setup

setup(
    packages=[*find_namespace_packages(include=["rlhf_jax*"]), "rlhf_jax.experiments"],
    package_dir={"rlhf_jax.experiments": "experiments"},
)
