"""Front door to the loss kernels, and the name under which the top-level `kernels/` folder is imported.

`kernels/` has no `__init__.py`: with one it would hide Hugging Face's package of that name whenever the repository root
stands first on `sys.path`. This module is the package instead: its `__path__` is the installed copy, else the checkout's.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent
__path__ = [str(_HERE / "kernels" if (_HERE / "kernels").is_dir() else _HERE.parent / "kernels")]
