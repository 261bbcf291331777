"""fastbandit: anti-bandit search for architectures that stay accurate under attack.

Importing the package loads no third-party module. The kernels are in :mod:`fastbandit.ops`
(loads torch and nothing else); the commands are ``python -m fastbandit.search`` and
``python -m fastbandit.report``.
"""

from fastbandit._version import __version__

__all__ = ["__version__"]
