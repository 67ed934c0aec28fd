"""setuptools' build backend, with what `.ci/sources` lists in the source distribution, too.

Of setuptools alone that would be a MANIFEST.in at the root.
"""

from setuptools.build_meta import *  # noqa: F403
from setuptools.command.egg_info import manifest_maker

manifest_maker.template = ".ci/sources"
