"""Tasks and rivals by name: ours, and those of users, as ``my_study.py:MyTask`` or ``my_package.module:MyTask``."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

from .task import Rival, Task

TASKS = {
    "multilabel": "energynet.experiments.multilabel:MultiLabel",
    "multilabel-partial": "energynet.experiments.multilabel_partial:PartialLabels",
    "denoising": "energynet.experiments.denoising:Denoising",
    "flow": "energynet.experiments.flow:OpticalFlowTask",
    "constrained": "energynet.experiments.constrained:Constrained",
}
"""Our tasks; each knows its rivals."""


class NotFoundError(ValueError):
    """No task or rival has this name; the message says which there are."""


def find_task(name: str) -> type[Task]:
    """The task of this name, or the class at this place.

    Args:
        name: ``multilabel``, ``my_study.py:MyTask`` or ``my_package.module:MyTask``.

    Returns:
        The class.

    Raises:
        NotFoundError: when there is none.

    >>> find_task("multilabel").__name__
    'MultiLabel'
    """
    if name not in TASKS and ":" not in name:
        raise NotFoundError(f"there is no task {name!r}; ours are {', '.join(TASKS)}. Yours: FILE.py:CLASS or MODULE:CLASS.")
    found = _class_at(TASKS.get(name, name))
    if not issubclass(found, Task):
        raise NotFoundError(f"{name} is no energynet.experiments.task.Task; its bases are {found.__bases__}.")
    return found


def find_rival(name: str, task: type[Task]) -> Rival:
    """The rival of a task by name, or an instance of the class at this place.

    Args:
        name: one of the task's rivals, ``my_study.py:MyRival`` or ``my_package.module:MyRival``.
        task: the task.

    Returns:
        The rival.

    Raises:
        NotFoundError: when there is none.
    """
    for rival in task.rivals():
        if name in (rival.name, place_of(type(rival))):
            return rival
    if ":" not in name:
        names = ", ".join(rival.name for rival in task.rivals())
        raise NotFoundError(f"{task.name} has no method {name!r}; it has {names}. Yours: FILE.py:CLASS or MODULE:CLASS.")
    found = _class_at(name)
    if not issubclass(found, Rival):
        raise NotFoundError(f"{name} is no energynet.experiments.task.Rival; its bases are {found.__bases__}.")
    return found()


def place_of(cls: type[Any]) -> str:
    """Where a class is found again: its file or module, and its name.

    >>> place_of(find_task("multilabel"))
    'energynet.experiments.multilabel:MultiLabel'
    """
    return f"{getattr(sys.modules[cls.__module__], '__energynet_place__', cls.__module__)}:{cls.__qualname__}"


def _class_at(place: str) -> type[Any]:
    where, _, name = place.rpartition(":")
    module = _module_of_file(Path(where)) if where.endswith(".py") else _module(where)
    found = getattr(module, name, None)
    if not isinstance(found, type):
        classes = [key for key, value in vars(module).items() if isinstance(value, type) and value.__module__ == module.__name__]
        raise NotFoundError(f"{where} has no class {name!r}; it has {', '.join(classes) or 'none'}.")
    return found


def _module(name: str) -> ModuleType:
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does; the console script has its own folder there
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NotFoundError(f"no module {name!r} can be imported from here ({error}).") from error
    finally:
        sys.path.pop(0)


def _module_of_file(path: Path) -> ModuleType:
    """The module of a file, imported once; files beside it can be imported by it."""
    path = path.resolve()
    if not path.is_file():
        raise NotFoundError(f"there is no file {path}.")
    name = f"energynet_user_{path.stem}_{abs(hash(str(path)))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        module.__dict__["__energynet_place__"] = str(path)
        sys.path.insert(0, str(path.parent))
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.pop(0)
    return sys.modules[name]
