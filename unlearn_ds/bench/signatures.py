"""What our sources ask of other packages, held against the installed ones: every name exists and takes the arguments given.

A call such as `F.softmax(x, dim=-1)` is read from the source, its name looked up through the file's imports, and the arguments
bound to the signature that is installed. So a function that a supported version lacks, or that takes other arguments there,
shows on any machine, also where the line itself would need a GPU to run. Calls on objects (`engine.step()`) cannot be read so.
"""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

PACKAGES = ("torch", "transformers", "deepspeed", "triton", "numpy")


class Call(NamedTuple):
    """A call of another package's function."""

    where: str  # file:line
    name: str  # dotted, from the package on
    num_positional: int
    keywords: tuple[str, ...]
    complete: bool  # no *arguments or **options, whose names the source does not say


def calls_in(path: Path) -> Iterator[Call]:
    """Every call in a source file whose name leads into one of `PACKAGES`."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = dict(_imports(tree))
    for node in ast.walk(tree):
        name = _dotted(node.func, imported) if isinstance(node, ast.Call) else None
        if name and name.split(".")[0] in PACKAGES:
            keywords = tuple(keyword.arg for keyword in node.keywords if keyword.arg)
            starred = any(isinstance(argument, ast.Starred) for argument in node.args)
            complete = not starred and len(keywords) == len(node.keywords)
            yield Call(f"{path.name}:{node.lineno}", name, len(node.args), keywords, complete)


def _imports(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(name in the file, what it stands for); those in functions count for the whole file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield (alias.asname, alias.name) if alias.asname else (alias.name.split(".")[0],) * 2
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def _dotted(node: ast.AST, imported: dict[str, str]) -> str | None:
    if isinstance(node, ast.Name):
        return imported.get(node.id)
    if isinstance(node, ast.Attribute):
        owner = _dotted(node.value, imported)
        return owner and f"{owner}.{node.attr}"
    return None


def find(name: str) -> Any:
    """What a dotted name stands for. Raises `AttributeError` where the installed package does not have it."""
    found = importlib.import_module(name.split(".")[0])
    for end, part in enumerate(name.split(".")[1:], start=2):
        if not hasattr(found, part) and inspect.ismodule(found):
            try:
                found = importlib.import_module(".".join(name.split(".")[:end]))
                continue
            except ModuleNotFoundError:
                pass
        found = getattr(found, part)
    return found


def misfit(call: Call) -> str | None:
    """Why the installed package cannot take a call; None where it can, or does not say what it takes."""
    try:
        function = find(call.name)
    except AttributeError as error:
        return f"{call.where} {call.name}: {error}"
    # transformers' auto classes wrap a method that is bound already: following it would lose an argument.
    bound_twice = inspect.ismethod(function) and inspect.ismethod(getattr(function, "__wrapped__", None))
    try:
        signature = inspect.signature(function, follow_wrapped=not bound_twice)
    except (TypeError, ValueError):  # built in, without a signature
        return None
    bind = signature.bind if call.complete else signature.bind_partial
    try:
        bind(*[None] * call.num_positional, **dict.fromkeys(call.keywords))
    except TypeError as error:
        return f"{call.where} {call.name}{signature}: {error}"
    return None


def misfits() -> list[str]:
    """What of all our calls does not fit what is installed."""
    here = Path(__file__).resolve().parent.parent
    from unlearn_ds import kernels

    folders = [here, Path(kernels.__path__[0])]
    sources = sorted({path for folder in folders for path in folder.rglob("*.py")})
    return [found for path in sources for call in calls_in(path) if (found := misfit(call))]
