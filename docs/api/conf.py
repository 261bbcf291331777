"""The API reference, made from the docstrings: sphinx-build -W docs/api build/api"""

import dataclasses
import importlib
import inspect
import typing
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import Config, GoogleDocstring

from fastbandit import __version__

project = "fastbandit"
author = "The fastbandit developers"
version = release = __version__
extensions = ["sphinx.ext.autodoc"]
html_theme = "furo"
html_title = f"fastbandit {__version__}"
html_copy_source = False
html_show_copyright = html_show_sphinx = False
maximum_signature_line_length = 80
add_module_names = False
autodoc_default_options = {
    "members": True,
    "undoc-members": True,
    # Up to these, whose own members are other people's.
    "inherited-members": "object, Module, BaseModel, BaseException, tuple",
    # main is a bound method of a command, whose signature autodoc cannot tell; presets is PRESETS.
    "exclude-members": "main, presets, model_config",
}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints_format = "short"

NAPOLEON = Config(napoleon_use_rtype=False, napoleon_use_ivar=True, napoleon_attr_annotations=False)

# Names that are imported when they are first asked for are not in dir(), where autodoc looks.
for page in Path(__file__).parent.glob("fastbandit*.rst"):
    module = importlib.import_module(page.stem)
    for name in module.__all__:
        setattr(module, name, thing := getattr(module, name))
        if dataclasses.is_dataclass(thing) or hasattr(thing, "model_fields"):
            # Of Annotated[int, ...] the type: what else it holds is for the command line.
            hints = typing.get_type_hints(thing)
            for kind in inspect.getmro(thing):
                if kind.__module__.startswith(f"{project}."):
                    own = inspect.get_annotations(kind)
                    kind.__annotations__ = {field: hints[field] for field in own}


def docstring(app: Any, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Google style, except of attributes, where napoleon takes what precedes a colon for a type."""
    if what not in ("attribute", "data", "property"):
        lines[:] = GoogleDocstring(lines, NAPOLEON, app, what, name, thing, options).lines()


def signature(app: Any, what: str, name: str, thing: Any, *rest: Any) -> tuple[str, None] | None:
    """None of what is made of its fields, which follow."""
    fields = what == "class" and (dataclasses.is_dataclass(thing) or hasattr(thing, "model_fields"))
    return ("", None) if fields else None


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", docstring)
    app.connect("autodoc-process-signature", signature)
