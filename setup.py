import os, sys  # noqa: E401

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from setuptools import setup
from build_ext import BuildExt  # noqa: E401, E402, E702

setup(cffi_modules=["build_ext.py:ffibuilder"], cmdclass={"build_ext": BuildExt})
