"""The arena: every arm is a config that is valid, budgets are equal, and its page says what was measured."""

import dataclasses
import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest

from kdtrain.cli import app as cli
from kdtrain.config import ConfigLoader
from kdtrain.runs.verdict import verdict_of_pairs

FOLDER = Path(__file__).parent.parent / "examples" / "arena"


def script(name, folder):
    spec = importlib.util.spec_from_file_location(f"{folder.name}_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


arena = script("arena", FOLDER)


@pytest.fixture
def built(tmp_path, monkeypatch):
    """The arena in folders of its own: some rows, and the quickstart's models, untrained."""
    for name in ("quickstart", "arena"):
        (tmp_path / name).mkdir()
    for config in arena.QUICKSTART.glob("*.yaml"):
        (tmp_path / "quickstart" / config.name).write_bytes(config.read_bytes())
    arena.prepare.build(tmp_path / "quickstart" / "build", limit=10)
    monkeypatch.setattr(arena, "QUICKSTART", tmp_path / "quickstart")
    monkeypatch.setattr(arena, "BUILD", tmp_path / "arena" / "build")
    monkeypatch.setattr(arena, "RUNS", tmp_path / "arena" / "runs")
    monkeypatch.setattr(arena, "CACHE", tmp_path / "arena" / "build" / "hidden")
    monkeypatch.setattr(arena, "TEACHER", tmp_path / "quickstart" / "build" / "teacher_init")
    return tmp_path


def test_every_arm_is_a_config_of_its_own(built):
    losses = set()
    for name, arm in arena.ARMS.items():
        source = "distill" if arm.teaches else "ce"
        teacher = [f"rlhf.teacher_model={arena.TEACHER}"] if arm.teaches else []
        config = ConfigLoader.load_training_config(
            str(built / "quickstart" / f"{source}.yaml"), [*teacher, *arm.options]
        ).config
        if arm.teaches:
            assert config.rlhf.lmbda == arm.own, name
        losses.add((json.dumps([config.model_dump(mode="json")[part] for part in ("rlhf", "custom")]), arm.budget))
    assert len(losses) == len(arena.ARMS)


def test_equal_flops(built):
    costs, arms = arena.cost(), arena.ARMS
    assert costs.teacher > costs.student > costs.teacher_head > 0
    live = dataclasses.replace(arms[arena.BASELINE], live=True)
    budgets = {"live": arena.STEPS * costs.of_step(live), "cache": arena.STEPS * costs.of_step(arms[arena.BASELINE])}
    assert budgets["cache"] < budgets["live"]
    assert {arm.budget for arm in arms.values()} == {None, "live", "cache"}
    for arm in (arm for arm in arms.values() if arm.budget):
        assert costs.steps(arm) * costs.of_step(arm) == pytest.approx(budgets[arm.budget], rel=2e-3)
    same = {costs.of_step(arm) for arm in arms.values() if arm.teaches and not arm.live}
    assert len(same) == 1, "arms that read the cache take the same"
    assert costs.steps(arms["ce"]) == arena.STEPS < costs.steps(arms["ce_cache_flops"]) < costs.steps(arms["ce_flops"])


def test_the_flops_of_a_row_are_counted(built):
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = arena.QUICKSTART / "build" / "student_init"
    model = AutoModelForCausalLM.from_pretrained(folder)
    rows = arena.compare.read_rows(folder.parent / "train_400.jsonl")
    texts = [row["messages"] for row in rows]
    tokens = [len(AutoTokenizer.from_pretrained(folder).apply_chat_template(text)["input_ids"]) for text in texts]
    with FlopCounterMode(display=False) as counter:
        model(model.dummy_inputs["input_ids"][:1, :1].expand(1, round(sum(tokens) / len(tokens))))
    assert arena.cost().student <= counter.get_total_flops()  # which has the head at every token
    assert arena.cost().student > 0.5 * counter.get_total_flops()


def test_the_page_shows_what_was_measured():
    page, results = (FOLDER / "README.md").read_text(), json.loads((FOLDER / "results.json").read_text())
    assert [*results["arms"]] == [*arena.ARMS]
    assert arena.table(results) in page
    seeds = len(results["seeds"])
    assert f"{seeds} seeds" in page
    for name, row in results["arms"].items():
        assert [len(row[what]) for what in ("ce", "kl", "agreement")] == [seeds] * 3, name
        budget = {"live": results["live_flops"], "cache": results["arms"][arena.BASELINE]["flops"]}
        wanted = budget.get(arena.ARMS[name].budget)
        assert wanted is None or row["flops"] == pytest.approx(wanted, rel=2e-3), name
        assert wanted is not None or row["steps"] == arena.STEPS, name
        again = verdict_of_pairs(row["ce"], results["arms"][arena.BASELINE]["ce"])
        assert row["verdict"] == again.word
        assert row["difference"] == pytest.approx(again.difference, abs=1e-5)
    words = [row["verdict"] for name, row in results["arms"].items() if name != arena.BASELINE]
    assert f"{words.count('BEATS')} of the {len(words)} other arms beat" in page
    main_page = (FOLDER.parent.parent / "README.md").read_text().replace("\n", " ")
    assert (seeds, len(words)) == (5, 18), "the main page says these numbers as words"
    sentence = "over five seeds none of eighteen other arms beats it"
    assert (sentence in main_page) == ("BEATS" not in words)


@pytest.mark.slow
def test_two_steps_of_two_arms(built, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["arena.py", "--seeds", "2", "--only", "ce,tvd", "training.max_steps=2"])
    monkeypatch.setattr(arena.quickstart, "fit_teacher", lambda overrides: 0.0)
    commands = []

    def noted(*command):  # in this process
        commands.append([str(part) for part in command])
        if command[0] != arena.QUICKSTART / "prepare.py":
            with monkeypatch.context() as patched:
                patched.setattr(sys, "argv", ["kdtrain", *commands[-1][2:]])
                with pytest.raises(SystemExit) as done:
                    cli.main()
            assert done.value.code == 0

    monkeypatch.setattr(arena.quickstart, "run", noted)
    teacher = f"rlhf.teacher_model={arena.TEACHER}"
    for name in (arena.BASELINE, "tvd"):
        arm = arena.ARMS[name]
        monkeypatch.setitem(arena.ARMS, name, dataclasses.replace(arm, options=(*arm.options, teacher)))
    config = arena.QUICKSTART / "distill.yaml"
    config.write_text(config.read_text().replace("./runs/teacher", "./build/teacher_init"))
    arena.main()
    assert len([command for command in commands if "fit" in command]) == 6
    results = json.loads((arena.BUILD / "results.json").read_text())
    assert [*results["arms"]] == [arena.BASELINE, "ce", "tvd"]
    for arm in results["arms"].values():
        assert arm["steps"] == 2
        assert len(set(arm["ce"])) == 2, "seeds differ"
    assert results["arms"]["ce"]["ce"] != results["arms"]["tvd"]["ce"]
    assert results["arms"][arena.BASELINE]["difference"] == 0
    assert "INCONCLUSIVE" in capfd.readouterr().out

    commands.clear()
    arena.main()  # again: all is kept
    assert [command for command in commands if "fit" in command or "cache" in command] == []
    monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "training.max_steps=3"])
    arena.main()  # other options: trained again
    assert len([command for command in commands if "fit" in command]) == 6
    logger = logging.getLogger("kdtrain")
    logger.handlers, logger.propagate = [], True


@pytest.mark.parametrize(
    "argument", ["--fast", "steps", "training.output_dir=x", "rlhf.teacher.path=x", "--only=oops", "--seeds=0"]
)
def test_it_refuses_other_words(argument, capsys):
    with pytest.raises(SystemExit) as stopped:
        arena.parse([argument])
    assert stopped.value.code == 2
    assert "arena.py: error" in capsys.readouterr().err
