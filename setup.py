"""The one thing pyproject.toml cannot say: the folder `kernels/` is imported as `qexp_kernels`."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["qexp", "qexp.*"]),
        "qexp_kernels",
        *(f"qexp_kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"qexp_kernels": "kernels"},
    package_data={
        "qexp_kernels": ["*.cpp", "*.cu", "*.h", "*/*.cpp", "*/*.cu", "*/*.h"],
        "qexp.report": ["assets/*"],
        "qexp.integer.package": ["*.c", "*.h"],
    },
)
