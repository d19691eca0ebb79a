"""The step file: found, loaded, and recorded, so that a run's folder says which code trained it."""

import hashlib
import importlib.util
import shutil
import sys
import traceback
from pathlib import Path
from types import ModuleType

from data.base.console import say
from data.base.errors import UserError, one_line

DEFAULT = Path(__file__).parent.parent / "step.py"
ROOT = DEFAULT.parent.parent
FUNCTIONS = ("make_optimizers", "lr_multiplier", "forward_backward", "train_step", "evaluated_weights")


def load_step_file(path: str) -> ModuleType:
    """The module of a step file; recipes/ are found from any folder, and modules beside it can be imported. Raises
    UserError with its line if it cannot be loaded, or lacks one of the five functions."""
    given, own = Path(path).expanduser(), ROOT / path
    file = own if own == DEFAULT or (own.is_file() and not given.is_file()) else given
    if not file.is_file():
        raise UserError(f"there is no step file {path}; --step-file names a Python file such as loop/step.py")
    spec = importlib.util.spec_from_file_location("step_file", file)
    if spec is None:
        raise UserError(f"--step-file {path}: a step file ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["step_file"] = module  # dataclasses look a class's module up
    folder = str(file.resolve().parent)
    if file.resolve() != DEFAULT and folder not in sys.path:
        sys.path.append(folder)
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        name = Path(error.filename or path).name
        raise UserError(f"--step-file {path}: {name}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        where = line_of(error, module)
        raise UserError(f"--step-file {path}: {where}: {type(error).__name__}: {one_line(error)}") from error
    missing = [name for name in FUNCTIONS if not callable(getattr(module, name, None))]
    if missing:
        raise UserError(f"--step-file {path} has no function {', '.join(missing)}; loop/step.py shows all five")
    return module


def line_of(error: BaseException, module: ModuleType) -> str:
    """FILE, line N: of the step file, or of a module beside it, where an error was raised."""
    folder = Path(module.__file__).resolve().parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve().parent == folder]
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else Path(module.__file__).name


def imports_of(step_file: ModuleType) -> dict[str, Path]:
    """Name -> file of the modules that a step file has from its own folder or from recipes/."""
    own = Path(step_file.__file__).resolve()
    folders = {own.parent, ROOT / "recipes"} - {DEFAULT.parent}
    files = {name: Path(module.__file__).resolve() for name, module in list(sys.modules.items())
             if getattr(module, "__file__", None)}  # fmt: skip
    others = {own, ROOT / "train.py"}
    return {name: file for name, file in sorted(files.items()) if file.parent in folders and file not in others}


def record(folder: Path, step_file: ModuleType, optimizers: list[str], before: list[dict], start: int) -> list[dict]:
    """The step files of a run, each with the step from which it trained; this one, from step `start` on, is copied to
    folder/code/ with what it imports from beside it. before: those in run.json. Raises UserError if the same file makes
    other optimizers than before."""
    source, imports = Path(step_file.__file__), imports_of(step_file)
    now = {"sha256": sha256_of(source), "optimizers": optimizers}
    if imports:
        now["imports"] = {file.name: sha256_of(file) for file in imports.values()}
    entries = [entry for entry in before if entry["from_step"] < start]
    was = entries[-1] if entries else {}
    if was.items() >= now.items():
        return entries
    since = f"-from-step-{start}" if start else ""
    copy = folder / "code" / f"{source.stem}{since}.py"
    if was:
        changed = f"{was['optimizers']} -> {optimizers}"
        if was["sha256"] == now["sha256"] and was.get("imports") == now.get("imports"):
            raise UserError(f"{folder} was trained with other optimizers: {changed}; give --memory as it was")
        say(f"another step file from step {start} on: {was['file']} -> {source.name}, see {copy.parent}")
        if was["optimizers"] != optimizers:
            say(f"optimizers {changed}: their state begins anew, weights go on")
    copy.parent.mkdir(exist_ok=True)
    shutil.copyfile(source, copy)
    for file in imports.values():
        shutil.copyfile(file, copy.parent / f"{file.stem}{since}.py")
    return [*entries, {"file": copy.name, "from_step": start, **now}]


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
