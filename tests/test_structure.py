"""Imports point downwards, so that each part can be read and used without what is above it."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "kdtrain"
# From top to bottom; a module may import its own layer and those below.
LAYERS = [
    {"__main__", "cli", "process", "progress"},
    {
        "notebook",
        "run",
        "build",
        "plan",
        "launch",
        "callbacks",
        "checkpoints",
        "failures",
        "log",
        "read_data",
        "teacher_answers",
    },
    {
        "trainer",
        "token_loss",
        "visual_term",
        "telemetry",
        "generation",
        "answers",
        "batch",
        "construction",
        "gkd_fields",
        "model_checks",
        "positions",
        "zero",
        "best",
        "rehearsal",
        "sampling",
        "token_ids",
        "unlogged",
        "watch",
    },
    {
        "teachers",
        "models",
        "tuning",
        "load_report",
        "lm_head",
        "experts",
        "probe",
        "model_kinds",
        "processing",
        "data",
        "vision",
        "feature_grids",
        "feature_images",
        "feature_projectors",
        "feature_taps",
        "feature_targets",
        "vocabulary",
    },
    {
        "config",
        "environment",
        "status",
        "folder",
        "signals",
        "ranks",
        "model_folder",
        "row_order",
        "adapters",
    },
    {"losses"},
    {"errors"},
]
WITHOUT_TORCH = LAYERS[-3] | LAYERS[-1]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(PACKAGE.rglob("*.py"))


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
        if isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for module in imports(ast.parse(path.read_text(encoding="utf-8"))):
        if module.startswith("kdtrain."):
            other = module.split(".")[1]
            assert LEVEL[own] <= LEVEL[other], f"{own} imports {other}, which is above it"


def test_leaves_do_not_import_torch():
    for name in WITHOUT_TORCH:
        for path in MODULES:
            if path.relative_to(PACKAGE).parts[0].removesuffix(".py") == name:
                tree = ast.parse(path.read_text(encoding="utf-8"))
                top = ast.Module([node for node in tree.body if not isinstance(node, ast.FunctionDef)], [])
                assert not {"torch", "trl", "transformers"} & {module.split(".")[0] for module in imports(top)}


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
    '"teacher_answers"': "folder.py",
    '"checkpoint-': "folder.py",
    '"trainer_state.json"': "checkpoints.py",
    "os._exit(": "process.py",
}


@pytest.mark.parametrize("text", IN_ONE_PLACE)
def test_what_a_reader_looks_for_by_name_is_in_one_file(text):
    assert [path.name for path in MODULES if text in path.read_text(encoding="utf-8")] == [IN_ONE_PLACE[text]]
