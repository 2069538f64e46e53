"""Packages of the wheel; everything else about it stands in pyproject.toml.

configs/ and the bundled models lie beside the code in the repository. In a wheel they are data of the package `infer`:
folders of such general names do not belong into site-packages itself. infer/program/paths.py finds both.
"""

from setuptools import find_namespace_packages, setup

FOLDERS = ("configs", *(f"scripts/tiny/{name}" for name in ("model", "klein", "klein_distilled")))
SHIPPED = {f"infer.shipped.{folder.replace('/', '.')}": folder for folder in FOLDERS}

setup(
    packages=[*find_namespace_packages(include=["hydra_plugins*", "infer*", "train*"]), *SHIPPED],
    package_dir=SHIPPED,
    package_data={"infer.report": ["assets/*"], "train.watch": ["assets/*"]} | {name: ["**/*"] for name in SHIPPED},
)
