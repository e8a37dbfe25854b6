"""Twelve rooms; imports point downwards, so that each can be read and used without what is above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kdtrain"
# From top to bottom; a room may import itself and those below.
ROOMS = [
    "cli",
    "runs",
    "trainer",
    "preflight",
    "generation",
    "feature_kd",
    "teachers",
    "models",
    "data",
    "config",
    "losses",
    "errors",
]
# Not rooms: the Python API and the entry above all of them; beneath, which process this is, its disk,
# its memory, and how tensors go between it and a device.
AROUND = {"__init__": -1, "__main__": -1} | dict.fromkeys(("ranks", "disk", "memory", "host"), len(ROOMS) - 1)
LEVEL = {room: level for level, room in enumerate(ROOMS)} | AROUND
# What runs before a run, or beside it; cli/progress.py is imported when a run begins.
WITHOUT_TORCH = (
    "__init__.py", "__main__.py", "errors.py", "ranks.py", "config/",
    "cli/__init__.py", "cli/app.py", "cli/shared.py", "cli/process.py", "cli/environment.py", "cli/commands/",
    "runs/__init__.py", "runs/launch.py", "runs/signals.py", "runs/folder.py", "runs/status.py", "runs/python_api.py",
    "runs/sweep_plan.py", "runs/sweep_ranking.py",
)  # fmt: skip
MODULES = sorted(PACKAGE.rglob("*.py"))


def room_of(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(tree):
    """Modules imported where the code runs; what stands under TYPE_CHECKING is for readers."""
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.unparse(block.test)
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "kdtrain":
            yield from (f"kdtrain.{alias.name}" for alias in node.names if not alias.name.startswith("_"))
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_the_rooms_are_these_twelve():
    found = {room_of(path) for path in MODULES} - AROUND.keys()
    assert found == set(ROOMS)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards_at_modules_that_exist(path):
    own = room_of(path)
    for module in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if module.startswith("kdtrain."):
            other = module.split(".")[1]
            assert LEVEL[own] <= LEVEL[other], f"{own} imports {other}, which is above it"
            file = PACKAGE.joinpath(*module.split(".")[1:])
            assert file.with_suffix(".py").exists() or (file / "__init__.py").exists(), f"{module} is not there"


def test_the_way_to_a_checked_config_does_not_import_torch():
    for path in MODULES:
        if str(path.relative_to(PACKAGE)).startswith(WITHOUT_TORCH):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
            assert not {"torch", "trl", "transformers"} & {module.split(".")[0] for module in imports(top)}, path


def test_no_setting_of_precision_is_touched():
    """Such a setting belongs to the whole process: it would change the model's numbers, and those of later calls."""
    names = ("fp32_precision", "set_float32_matmul_precision", "allow_tf32", "allow_bf16_reduced", "allow_fp16_reduced")
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        assert not [name for name in names if name in text], path


IN_ONE_PLACE = {
    "signal.signal(": "signals.py",
    '"RANK"': "ranks.py",
    '"WORLD_SIZE"': "ranks.py",
    "os.replace(": "folder.py",
    '"run_config.json"': "folder.py",
    '"status.json"': "folder.py",
    '"logging.jsonl"': "folder.py",
    '"evaluation.json"': "folder.py",
    '"completions.parquet"': "folder.py",
    '"teacher_answers"': "folder.py",
    '"checkpoint-': "folder.py",
    '"trainer_state.json"': "checkpoints.py",
    "os._exit(": "process.py",
}


@pytest.mark.parametrize("text", IN_ONE_PLACE)
def test_what_a_reader_looks_for_by_name_is_in_one_file(text):
    assert [path.name for path in MODULES if text in path.read_text(encoding="utf-8")] == [IN_ONE_PLACE[text]]
