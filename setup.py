import os, sys
sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from setuptools import setup; from build_ext import BuildExt
setup(cffi_modules=["build_ext.py:ffibuilder"], cmdclass={"build_ext": BuildExt})
