"""Makes ``import rankbook`` enough for ``from_pretrained``, without importing transformers or torch itself.

transformers looks quantizers up in a table of its module ``transformers.quantizers.auto``, which every model class
imports. If that module is there already, the quantizer is registered at once; otherwise a finder on ``sys.meta_path``
waits for it, registers right after it has run, and removes itself. An installed wheel does so at the start of Python
(``rankbook-transformers.pth``), so that programs that never heard of rankbook load its checkpoints.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


def install() -> None:
    """Register the quantizer now, or as soon as transformers loads its table of quantizers. Safe to call twice."""
    if _TARGET in sys.modules:
        _register(sys.modules[_TARGET])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register(_: ModuleType) -> None:
    from rankbook.calibration import hf

    hf.register()


class _Finder(MetaPathFinder):
    """Lets the other finders find the module and adds the registration to its execution."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,  # noqa: ARG002 (the interface asks for it)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        """Return the real spec of the awaited module, None for all others."""
        if fullname != _TARGET:
            return None
        sys.meta_path.remove(self)  # so that the search below reaches the others, and its work is done after this
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        run = spec.loader.exec_module

        def run_and_register(module: ModuleType) -> None:
            run(module)
            _register(module)

        # On the instance: the loader keeps its class and with it everything that inspect and pickle ask for.
        spec.loader.exec_module = run_and_register  # type: ignore[method-assign]
        return spec
