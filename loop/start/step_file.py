"""The step file: found, loaded, and recorded, so that a run's folder says which code trained it."""

import ast
import difflib
import hashlib
import importlib.util
import json
import math
import shutil
import sys
import sysconfig
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import loop
from data.base.console import say, warn
from data.base.errors import UserError, one_line
from data.reading.preference import KINDS

DEFAULT = Path(__file__).parent.parent / "step.py"
ROOT = DEFAULT.parent.parent
FUNCTIONS = (
    "make_optimizers", "lr_multiplier", "micro_batch_loss", "forward_backward", "train_step", "evaluated_weights",
)  # fmt: skip
MAY_DEFINE = (*FUNCTIONS, "evaluators")
LIBRARIES = {Path(path).resolve() for path in sysconfig.get_paths().values()}  # of Python, and what is installed


def step_path(path: str) -> Path:
    """The file that --step-file names; recipes/ are found from any folder."""
    given, own = Path(path).expanduser(), ROOT / path
    return own if own == DEFAULT or (own.is_file() and not given.is_file()) else given


def load_step_file(path: str, settings: Iterable[str] = ()) -> ModuleType:
    """The method: the functions of a step file, and those of loop/step.py that it does not have. These call each
    other in the step file's version; what it imports from loop.step is the original.

    Modules beside the file can be imported. settings: NAME=VALUE, of constants of the file. Raises UserError, with its
    line if it cannot be loaded.
    """
    file = step_path(path)
    if not file.is_file():
        raise UserError(f"there is no step file {path}; --step-file names a Python file such as loop/step.py")
    if file.suffix != ".py":
        raise UserError(f"--step-file {path}: a step file ends in .py")
    if file.resolve() == DEFAULT:
        return with_defaults(run_file("step_file", file, path, settings), path)
    base = run_file("loop.step", DEFAULT, "loop/step.py", ())
    # Their originals: a step file that wraps one of them must not call itself.
    originals = ModuleType("loop.step")
    vars(originals).update(vars(base))
    sys.modules["loop.step"] = loop.step = originals
    folder = str(file.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)
    method = run_file("step_file", file, path, settings)
    changed = {name: getattr(method, name) for name in MAY_DEFINE if callable(getattr(method, name, None))}
    if not changed:
        raise UserError(f"--step-file {path} has none of the functions {', '.join(MAY_DEFINE)}; loop/step.py has six")
    for name in set(vars(method)) - set(MAY_DEFINE):
        near = difflib.get_close_matches(name, set(MAY_DEFINE) - set(changed), n=1, cutoff=0.9)
        if near and getattr(vars(method)[name], "__module__", "") == "step_file":
            warn(f"{path}: {name} is no function of a step; is {near[0]} meant?")
    vars(base).update(changed)
    for name in FUNCTIONS:
        setattr(method, name, getattr(base, name))
    return with_defaults(method, path)


def with_defaults(method: ModuleType, path: str) -> ModuleType:
    """The method with what it asks for: REFERENCE, "logits" or "losses", see loop/reference.py; PREFERENCE, "pairs" or
    "thumbs", if it compares replies, and ANSWERS_ALONE, see data/compared.py."""
    method.ANSWERS_ALONE = bool(getattr(method, "ANSWERS_ALONE", False))
    for name, known in (("REFERENCE", ("logits", "losses")), ("PREFERENCE", KINDS)):
        setattr(method, name, getattr(method, name, ""))
        if getattr(method, name) not in ("", *known):
            choices = " or ".join(f'"{one}"' for one in known)
            raise UserError(f'{path}: {name} is {choices} (or "", for none), not {getattr(method, name)!r}')
    return method


def run_file(name: str, file: Path, path: str, settings: Iterable[str]) -> ModuleType:
    module = importlib.util.module_from_spec(importlib.util.spec_from_file_location(name, file))
    if name == "step_file":
        sys.modules[name] = module  # dataclasses look a class's module up
    try:
        tree = ast.parse(file.read_bytes(), str(file))
        module.STEP_SET = set_constants(tree, settings, path)
        exec(compile(tree, str(file), "exec"), vars(module))
    except UserError:
        raise
    except SyntaxError as error:
        name = Path(error.filename or path).name
        raise UserError(f"--step-file {path}: {name}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        where = line_of(error, module)
        raise UserError(f"--step-file {path}: {where}: {type(error).__name__}: {one_line(error)}") from error
    return module


def set_constants(tree: ast.Module, settings: Iterable[str], path: str) -> dict:
    """Writes values over the constants of a file: NAME = a literal, in capitals, outside of functions. Returns name ->
    value. Raises UserError if there is no such name, or if the value is of another type."""
    known = {}
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) and len(node.targets) == 1 else None
        target = node.target if isinstance(node, ast.AnnAssign) and node.value else target
        if isinstance(target, ast.Name) and target.id.isupper() and is_literal(node.value):
            known[target.id] = node
    found = {}
    for text in settings:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name not in known:
            there = f"its constants are {', '.join(known)}" if known else "it has none that is a plain value"
            raise UserError(f"--step-set {text}: NAME=VALUE sets a constant of {path}; {there}")
        before = ast.literal_eval(known[name].value)
        found[name] = converted(value, before, text)
        known[name].value = ast.copy_location(ast.parse(repr(found[name]), mode="eval").body, known[name].value)
        ast.fix_missing_locations(known[name])
    return found


def is_literal(node: ast.expr) -> bool:
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


def converted(text: str, before, setting: str):
    """A value as a constant's own type. Raises UserError if it is another, or one that run.json cannot hold."""
    try:
        value = ast.literal_eval(text)
        value = float(value) if type(before) is float and type(value) is int else value
        json.dumps(value, allow_nan=False)
    except (ValueError, SyntaxError):
        value = text
    except TypeError:
        raise UserError(f"--step-set {setting}: numbers, texts, lists and the like can be set") from None
    if isinstance(before, str):
        return value if isinstance(value, str) else text
    if before is not None and type(value) is not type(before):
        kind = type(before).__name__
        raise UserError(f"--step-set {setting}: the file has {before!r}, so it takes a value of type {kind}")
    return value


def line_of(error: BaseException, module: ModuleType) -> str:
    """FILE, line N: of the step file, or of a module beside it, where an error was raised."""
    folder = Path(module.__file__).resolve().parent
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if Path(frame.filename).resolve().parent == folder]
    return f"{Path(own[-1].filename).name}, line {own[-1].lineno}" if own else name_of(module)


def name_of(method: ModuleType) -> str:
    return Path(method.__file__).name


def run_own(method: ModuleType, name: str, *args, call: Callable | None = None, passes: tuple = ()):
    """One of the functions of a step file, or `call`. What it raises becomes a message with its line, but for the
    errors in passes."""
    try:
        return (call or getattr(method, name))(*args)
    except Exception as error:
        if isinstance(error, (UserError, *passes)):
            raise
        raise UserError(f"{name} in {line_of(error, method)}: {type(error).__name__}: {one_line(error)}") from error


def finite(multiplier, method: ModuleType):
    """What lr_multiplier gave. Raises UserError if it is no finite number."""
    try:
        is_finite = math.isfinite(multiplier)
    except TypeError:
        is_finite = False
    if not is_finite:
        raise UserError(f"lr_multiplier in {name_of(method)} gave {multiplier!r}; it gives a finite number")
    return multiplier


def imports_of(method: ModuleType) -> dict[str, Path]:
    """Name in the record -> file: loop/step.py, and what the step file has from the project, but for loop/ and model/,
    or from the folder in which it lies."""
    own = Path(method.__file__).resolve()
    if own == DEFAULT:
        return {}
    named, found = names_in(ast.parse(own.read_bytes())), {"loop/step.py": DEFAULT}
    for name, module in sorted(sys.modules.items()):
        file = Path(getattr(module, "__file__", None) or "")
        if not file.is_absolute() or file.suffix != ".py" or (file := file.resolve()) == own or not file.is_file():
            continue
        if file.is_relative_to(ROOT):
            top = file.relative_to(ROOT).parts[0]
            is_beside = file.is_relative_to(own.parent) and own.parent.is_relative_to(ROOT) and own.parent != ROOT
            if top == "recipes" or is_beside or (name in named and top not in ("loop", "model")):
                found[file.relative_to(ROOT).as_posix()] = file
        elif file.is_relative_to(own.parent) and not any(map(file.is_relative_to, LIBRARIES)):
            found[file.relative_to(own.parent).as_posix()] = file
    return found


def names_in(tree: ast.Module) -> set[str]:
    """Modules that a file imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def record(folder: Path, method: ModuleType, optimizers: list[str], before: list[dict], start: int) -> list[dict]:
    """The step files of a run, each with the step from which it trained; this one, from step `start` on, is copied to
    folder/code/ with what it imports. before: those in run.json. Raises UserError if the same file makes other
    optimizers than before."""
    source, imports = Path(method.__file__), imports_of(method)
    now = {"sha256": sha256_of(source), "optimizers": optimizers}
    if imports:
        now["imports"] = {name: sha256_of(file) for name, file in imports.items()}
    if method.STEP_SET:
        now["set"] = json.loads(json.dumps(method.STEP_SET))  # as run.json holds it
    entries = [entry for entry in before if entry["from_step"] < start]
    was = entries[-1] if entries else {}
    if {**was, "set": was.get("set")}.items() >= {**now, "set": now.get("set")}.items():
        return entries
    since = f"-from-step-{start}" if start else ""
    copy = folder / "code" / f"{source.stem}{since}.py"
    if was:
        changed = f"{was['optimizers']} -> {optimizers}"
        if method.PREFERENCE and was.get("set") != now.get("set"):
            raise UserError(
                f"{folder} was trained with --step-set {was.get('set')}; the loss that chooses best/ depends on it"
            )
        if all(was.get(name) == now.get(name) for name in ("sha256", "imports", "set")):
            raise UserError(f"{folder} was trained with other optimizers: {changed}; give --memory as it was")
        say(f"another step file from step {start} on: {was['file']} -> {source.name}, see {copy.parent}")
        if was["optimizers"] != optimizers:
            say(f"optimizers {changed}: their state begins anew, weights go on")
    for name, file in {copy.name: source, **{f"{name[:-3]}{since}.py": file for name, file in imports.items()}}.items():
        (copy.parent / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy.parent / name)
    return [*entries, {"file": copy.name, "from_step": start, **now}]


def sha256_of(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()
