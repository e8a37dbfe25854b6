"""What a run does, in words that its start and the model card share."""

from __future__ import annotations

from kdtrain.config.schema import RunConfig


def divergence_in_words(config: RunConfig) -> str:
    """What compares rows with their teacher, such as `jsd (beta 0.5, temperature 1)`; of sources with a divergence of
    their own each way, and that of the student's own answers."""
    options = config.options
    base = options.divergence, options.beta
    ways = dict.fromkeys(_with(base, source.divergence, source.beta) for source in config.data.train) or {base: None}
    own = options.on_policy
    of_answers = dict.fromkeys(_with(way, own.divergence, own.beta) for way in ways) if options.lmbda > 0 else ways
    if list(of_answers) == list(ways) == [base]:
        return f"{base[0]} ({options.loss_numbers})"

    def named(some: dict[tuple[str, float], None]) -> str:
        with_numbers = [(name, options.divergence_params.numbers(name, beta)) for name, beta in some]
        return " and ".join(dict.fromkeys(f"{name} ({of_it})" if of_it else name for name, of_it in with_numbers))

    if options.lmbda == 1:
        said = named(of_answers)
    else:
        said = f"{named(ways)} by source" if len(ways) > 1 else named(ways)
        if list(of_answers) != list(ways):
            said += f", on the student's own answers {named(of_answers)}"
    of_base = options.divergence_params.numbers(*base)
    return f"{said}; {options.loss_numbers.removeprefix(of_base).removeprefix(', ')}"


def _with(way: tuple[str, float], divergence: str | None, beta: float | None) -> tuple[str, float]:
    return divergence or way[0], way[1] if beta is None else beta
