"""Packaging that pyproject.toml cannot express: `kernels/` is imported as `qexp_kernels`; `conf/` and `zoo/` move into `qexp/`."""

from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

CARRIED = bool(list((Path(__file__).parent / "kernels" / "compiled").glob("*.so")))


class Wheel(bdist_wheel):
    """With compiled libraries the wheel is for one platform, and still for every Python."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return ("py3", "none", platform)


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        return CARRIED


setup(
    distclass=Package,
    cmdclass={"bdist_wheel": Wheel},
    packages=[
        *find_packages(include=["qexp", "qexp.*"]),
        "qexp.conf",
        "qexp.zoo",
        "qexp_kernels",
        *(f"qexp_kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"qexp_kernels": "kernels", "qexp.conf": "conf", "qexp.zoo": "zoo"},
    package_data={
        "qexp_kernels": ["*/*.cpp", "*/*.cu", "*/*.cuh", "*/*.h", "compiled/*.so"],
        "qexp.conf": ["**/*.yaml"],
        "qexp.zoo": ["SHA256SUMS", "*/*", "*/files/*"],
        "qexp.command": ["templates/*"],
        "qexp.report": ["assets/*"],
        "qexp.integer.package": ["*.c", "*.h"],
    },
)
