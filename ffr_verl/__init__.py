"""Fine-grained fragment retrieval (F2RVLM) training on verl: rewards, data, curriculum and recipes.

Importing the package loads nothing heavy: rewards and answers work in a process without torch.
"""

from __future__ import annotations

from ffr_verl.fragments import Fragment, format_fragment, parse_fragment

__version__ = "0.1.0"
__all__ = ["Fragment", "__version__", "format_fragment", "parse_fragment"]
