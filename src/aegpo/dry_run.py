"""What `--dry-run` prints: the resolved config, what a step of it costs, and the memory it takes on a GPU."""

import math
from typing import Any

from aegpo.config import (
    RIDERS,
    SPREAD_EVERY,
    SPREAD_PROMPTS,
    SPREAD_ROLLOUTS,
    Config,
    dump_yaml,
    explored_steps,
    largest_batch,
    needs_probe,
    needs_reference,
    needs_spread,
    needs_velocity,
    reward_terms,
)
from aegpo.models import memory
from aegpo.rewards import checked


def print_dry_run(config: Config) -> None:
    """Print the config, and under it its arithmetic and its memory as comments: all of it together is a recipe.

    Raises:
        ValueError: there is no such reward or setting of one, the pipeline cannot do what is asked, or the GPU here is
            too small for it.
    """
    for name, (_, settings) in reward_terms(config.reward).items():
        checked(name, **settings)
    outline = memory.sizes(config.model)
    print(dump_yaml(config))
    for what, how, number in arithmetic(config, outline is None or not outline.family.is_distilled):
        print(f"# {what:<23}{how:<78}{number:>14,}")
    if outline is None:
        print(f"# {'memory':<23}not estimated: the config files of {config.model.path} cannot be read here")
        return
    parts = memory.estimate(config, outline)
    for what, how, size in _memory(parts, outline):
        print(f"# {what:<23}{how:<78}{size / memory.GIB:>10.2f} GiB")
    _, taken = memory.total(parts)
    fits = [f"{size} GB" for size in memory.GPUS if taken <= size * memory.GIB * (1 - memory.FREE)]
    print(f"# {'memory: fits GPUs of':<23}{', '.join(fits) or 'no size that we know'}, {memory.FREE:.0%} left free")
    memory.refuse_too_small(parts, config)


def _memory(parts: dict[str, int], outline: Any) -> list[tuple[str, str, int]]:
    """What a run takes on a GPU, in bytes by part, and at most at once."""
    phase, taken = memory.total(parts)
    size = f"{memory.count(outline.network):,} of the network, and the VAE's, computed in {str(outline.dtype)[6:]}"
    about = {
        "weights": size,
        "trained": "an adapter or all weights, in float32",
        "optimizer": "their gradients, moments and averages",
        "reward": "its network, where it is one that we know",
        "activations": "a micro-batch of training, and one block on the way back",
        "latents": "explored steps, trunks and rollouts",
        "decoding": "latents into pixels, or the forward of a batch of rollouts",
        "text encoders": "on the GPU while prompts are encoded",
    }
    rows = [(f"memory: {part}", about[part], size) for part, size in parts.items()]
    return [*rows, ("memory: total", f"at most, during {phase}: {', '.join(memory.PHASES[phase])}", taken)]


def arithmetic(config: Config, doubles: bool = True) -> list[tuple[str, str, int]]:
    """What a step does and costs, in network evaluations x samples; evaluations of held-out prompts come on top.

    `doubles` says whether guidance costs a second evaluation.
    """
    prompts, rollouts, steps = config.prompts_per_step, config.rollouts_per_step, config.sampler.steps
    how, explored = config.exploration, explored_steps(config)
    learned = min(rollouts, prompts * config.advantage.best_of) if config.advantage.best_of else rollouts
    rows, updates, most = learned * explored, config.optimizer.updates, largest_batch(config)
    share, longer = divmod(rows, updates)  # rows of an update; so many updates get one row more
    batches = (updates - longer) * math.ceil(share / most) + longer * math.ceil((share + 1) / most)
    probed, matching = needs_probe(config), config.sampler.kind == "ode"
    twice, guided = (2, " x 2 for guidance") if doubles and config.sampler.guidance != 1 else (1, "")
    kept = config.optimizer.keep_graphs
    passes = {"backward": 2} if kept and not matching else {"forward": 1, "backward": 2}
    if needs_reference(config):
        alone = doubles and config.sampler.guidance == 1 and config.loss.reference_guidance not in (None, 1)
        passes["reference" + " under guidance" * alone] = 2 if alone else 1
    before = rollouts * explored if matching and needs_velocity(config) and not kept else 0  # of all, even if few learn
    evaluations, written = sum(passes.values()), " + ".join(f"{count} {what}" for what, count in passes.items())
    shared = config.sampler.shared_noise
    riders = prompts if matching else max(prompts, math.ceil((rollouts - (RIDERS - 1) * prompts) / RIDERS))  # at least
    branching = rollouts if shared else riders * probed  # rollouts that begin on their prompt's trunk, at least,
    saved = branching * (steps if matching else 0 if kept else 1)  # and what of them it has walked, at least
    trunk = prompts * (steps if probed else shared)  # with as many rollouts leaving it at once as can
    sampling, probe, training = twice * (rollouts * steps - saved), twice * trunk, twice * (rows * evaluations + before)
    step = sampling + probe + training
    few = min(SPREAD_PROMPTS, prompts)
    measured = math.ceil(config.steps / SPREAD_EVERY) if needs_spread(config) else 0
    spread = twice * measured * few * (SPREAD_ROLLOUTS * steps * (steps - 1) // 2 + (steps - 1) * (not probed))
    base = probe * probed
    from_trunk = f" - {branching} x {saved // branching} of a trunk" if saved else ""
    told_apart = config.allocation.rule != "median_split" or rollouts not in (
        prompts * config.allocation.low,
        prompts * config.allocation.high,
    )
    fewer = (branching > 0 and not matching) or how.branch == "tree" or config.sampler.compress < 1
    bound = ", at most" * fewer
    return [
        (
            "rollouts",
            f"of {prompts} prompts" + ", all alike: so many leave median_split no choice" * (not told_apart),
            rollouts,
        ),
        ("trained steps", f"of each rollout: {how.rule}, at most", explored),
        ("rows", f"{learned} rollouts x {explored} trained steps", rows),
        ("optimizer updates", "", updates),
        ("micro-batches", f"of at most {most} rows", batches),
        ("sampling evaluations", f"{rollouts} rollouts x {steps} steps{from_trunk}{guided}{bound}", sampling),
        ("trunk evaluations", f"{prompts} prompts x {trunk // prompts} steps{guided}" if trunk else "no trunk", probe),
        (
            "training evaluations",
            f"{rows} rows x ({written})" + f" + {before} before" * bool(before) + f"{guided}, at most",
            training,
        ),
        ("evaluations a step", "at most", step),
        ("base probe", "the same for the base, at a prompt's first visit" if probed else "no rule needs it", base),
        (
            "spread of reward",
            f"{measured} times, every {SPREAD_EVERY} steps" if measured else "no rule needs it",
            spread,
        ),
        ("evaluations in all", f"{config.steps} steps, base probes not counted, at most", config.steps * step + spread),
        ("base probes in all", f"{config.steps} steps, at most", config.steps * base),
    ]
