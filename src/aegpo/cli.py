"""The `aegpo` command. Only the standard library is imported up here, so that `aegpo --help` answers at once.

argparse reads the small commands and `train`'s own options. Settings (`--a.b VALUE`) become nested mappings and go
where a recipe goes, to `config.resolve`, so a wrong one gets the same answer in either place. tyro, whose complaints
fill a box, only prints the help page of all settings.
"""

import argparse
import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, get_origin, get_type_hints

from aegpo.words import config_of, did_you_mean, setting_of, split, value_of

if TYPE_CHECKING:
    from types import ModuleType

    from aegpo.config import Config

HELP = """\
usage: aegpo COMMAND ...

Align diffusion and flow models with human preference by online reinforcement learning.

  aegpo train [RECIPE] [--a.b VALUE ...] [--dry-run] [--resume latest|PATH] [--output-dir DIR] [--overwrite]
              [--processes N] [--cluster local|ray://HOST:PORT] [--reward-actors N] [--storage URL]
              [--push-to-hub USER/NAME]
  aegpo sample RUN --prompt "a red circle above a blue square" --out x.png [--seed 0]
  aegpo eval RUN [--prompts FILE] [--reward NAME] [--images N]
  aegpo eval RUN --rewards NAME,NAME,... [--prompts FILE] [--images N] [--out DIR]
  aegpo report RUN
  aegpo export RUN --comfyui FILE.safetensors
  aegpo push RUN USER/NAME [--private]
  aegpo analyze MODEL [--prompts FILE] [--reward NAME] [--images N] [--out DIR] [--a.b VALUE ...]
  aegpo reward-check NAME [--pairs FILE.jsonl]
  aegpo reward-server NAME [--host ADDRESS] [--port N] [--token-file FILE] [--batch N] [--wait-ms N] [--limit-mb N]
                      [--timeout SECONDS]
  aegpo world pretrain OUT [--steps N] [--seed N]

  aegpo --version
  aegpo COMMAND --help      (train --help lists every setting)
"""
CLUSTER_OPTIONS = ("--reward-actors", "--storage")
TRAIN_OPTIONS = (
    *("--help", "--dry-run", "--resume", "--overwrite", "--processes", "--push-to-hub", "--cluster"),
    *CLUSTER_OPTIONS,
)
REWARDS = (
    "one that is shipped (docs/rewards.md): world, pickscore=DIR, '{vlm: {url: URL, model: M}}'; or FILE.py:FUNCTION"
)
ANALYZE_OPTIONS = ("--help", "--prompts", "--reward", "--images", "--out")
ANALYZE_TAKES = {"model.path": "MODEL", "prompts.eval": "--prompts", "eval_images": "--images"}  # settings, as these
LONGEST = 2000  # letters of a complaint; what it quotes may have any number of them, and any letters


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; whatever its user got wrong is one line on stderr and exit code 2."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # it remarks on torchvision, which nothing here uses
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")  # and on text encoders, for which an adapter has no weights
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # and on each time that it tries the Hub again
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # and on kernels that it would be faster with on a CPU
    # Read when torch is loaded: its threads then wait without holding a core that others want.
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        _command(sys.argv[1:] if argv is None else list(argv))
    except KeyboardInterrupt as stop:
        return _say(str(stop) or "stopped", 130)
    except BrokenPipeError:  # whoever reads our output, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except FloatingPointError as error:
        return _say(str(error), 2)
    except OSError as error:
        return _say(f"{error.filename}: {error.strerror}" if error.filename else str(error), 2)
    except ValueError as error:
        return 2 if type(error).__name__ == "SaidElsewhere" else _say(str(error), 2)
    return 0


def _say(message: str, code: int) -> int:
    line = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in " ".join(message.split()))
    if len(line) > LONGEST:
        line = f"{line[: LONGEST // 2]} ... {line[-LONGEST // 4 :]}"
    print("aegpo:", line, file=sys.stderr)
    return code


def _command(words: list[str]) -> None:
    commands = {
        "train": _train,
        "sample": _sample,
        "eval": _evaluate,
        "report": _report,
        "export": _export,
        "push": _push,
    }
    commands |= {"analyze": _analyze, "reward-check": _reward_check, "reward-server": _reward_server, "world": _world}
    name, rest = (words[0], words[1:]) if words else ("", [])
    if name in ("-h", "--help"):
        print(HELP, end="")
    elif name == "--version":
        from importlib.metadata import version

        print(f"aegpo {version('aegpo')}")
    elif name in commands:
        commands[name](rest)
    else:
        what = f"{name!r} is not a command" if name else "no command given"
        hint = did_you_mean(name, [*commands, "--help", "--version"])
        raise ValueError(f"{what}; the commands are {', '.join(commands)}{hint}")


# ---------------------------------------------------------------- the commands


def _train(words: list[str]) -> None:
    usage = "aegpo train [RECIPE] [--a.b VALUE ...] [--dry-run] [--resume latest|PATH] [--overwrite]"
    usage += " [--processes N] [--cluster WHERE] [--reward-actors N] [--storage URL] [--push-to-hub USER/NAME]"
    parser = _Parser("train", "Train a model as a recipe says, with single settings overridden.", usage=usage)
    parser.add_argument("RECIPE", nargs="?", help="a YAML file, or a packaged recipe (default: world, with its model)")
    parser.add_argument("--dry-run", action="store_true", help="only print the resolved config and what it will cost")
    parser.add_argument(
        "--resume", nargs="?", const="", type=_checkpoint, metavar="latest|PATH", help="go on from there"
    )
    parser.add_argument("--overwrite", action="store_true", help="start anew where the output folder holds a run")
    several = "train in so many processes, one a GPU where there are any (default: 1)"
    parser.add_argument("--processes", type=_whole(1), default=1, metavar="N", help=several)
    hub = "afterwards, push the run to this repository on the Hub, as `aegpo push` does"
    parser.add_argument("--push-to-hub", type=_text, metavar="USER/NAME", help=hub)
    cluster = "train on Ray: local is this machine alone, auto the cluster that it belongs to, or HOST:PORT, ray://..."
    parser.add_argument("--cluster", type=_cluster, metavar="local|ray://HOST:PORT", help=cluster)
    actors = "with --cluster, actors that judge for all workers (default: 0, each worker judges for itself)"
    parser.add_argument("--reward-actors", type=_whole(0), metavar="N", help=actors)
    place = "with --cluster, an fsspec URL for a copy of the run, where machines share no folder"
    parser.add_argument("--storage", type=_text, metavar="URL", help=place)
    if {"-h", "--help"} & set(words):
        return _print_train_help(parser)
    own, overrides = split(words, TRAIN_OPTIONS)
    asked = parser.read(own)
    if asked.resume and asked.overwrite:
        raise ValueError("--resume goes on with a run and --overwrite starts it anew; give one of them")
    if not asked.cluster:
        for option in CLUSTER_OPTIONS:
            if getattr(asked, setting_of(option)) is not None:
                raise ValueError(f"{option} goes with --cluster")
    if asked.resume == "latest" and asked.storage:
        from aegpo.config import Config

        _ray().fetch(asked.storage, Path(str(overrides.get("output_dir", Config.output_dir))))
    config = config_of(asked.RECIPE, asked.resume, overrides)
    if asked.dry_run:
        from aegpo.dry_run import print_dry_run

        return print_dry_run(config)
    if asked.push_to_hub:
        from aegpo.hub import check

        check(asked.push_to_hub)
    if asked.processes > config.rollouts_per_step:  # said before so many begin
        raise ValueError(
            f"--processes: {asked.processes} cannot share the {config.rollouts_per_step} rollouts of a step; start "
            "fewer, or raise rollouts_per_step"
        )
    if asked.processes > 1 and not asked.cluster:
        from aegpo.launch import launch
        from aegpo.stopping import begun

        last_words = functools.partial(_how_to_go_on, config, bool(asked.resume))
        with begun({"--processes": asked.processes}):
            code = launch(["train", *_without("--processes", words)], asked.processes, last_words)
        if code:
            sys.exit(code)
        return
    how = {"resume": asked.resume, "overwrite": asked.overwrite}
    try:
        if asked.cluster:
            how |= {"processes": asked.processes, "reward_actors": asked.reward_actors or 0, "storage": asked.storage}
            _ray().run(config, asked.cluster, **how)
        else:
            from aegpo.launch import end_with_launcher

            end_with_launcher()
            from aegpo.build import run

            run(config, **how)
    except KeyboardInterrupt as stop:
        raise KeyboardInterrupt(str(stop) or _how_to_go_on(config, bool(asked.resume))) from None
    except RuntimeError as error:
        from aegpo.distributed import SaidElsewhere, is_loss

        if asked.cluster or not is_loss(error):
            raise
        raise SaidElsewhere("another process was lost") from error
    if asked.push_to_hub and os.environ.get("RANK", "0") == "0":
        _push_if_finished(config, asked.push_to_hub)


def _push_if_finished(config: "Config", repo: str) -> None:
    from aegpo.checkpoint import last_step

    if last_step(Path(config.output_dir)) < config.steps:
        print(f"not pushed, as the run was stopped; once it has ended: aegpo push {config.output_dir} {repo}")
    else:
        _push_run(Path(config.output_dir), repo)


def _without(option: str, words: list[str]) -> list[str]:
    """The words without an option and its value."""
    left: list[str] = []
    for i, word in enumerate(words):
        if word.partition("=")[0] != option and (not i or words[i - 1] != option):
            left.append(word)
    return left


def _ray() -> "ModuleType":
    try:
        from aegpo import ray
    except ModuleNotFoundError as error:
        raise ValueError(f"--cluster needs {error.name}; pip install 'aegpo[ray]'") from None
    return ray


def _how_to_go_on(config: "Config", resumed: bool) -> str:
    """What to say to whoever stopped a run; a folder may still hold the run that this one was to overwrite."""
    from aegpo.config import dump_yaml

    folder = Path(config.output_dir)
    written = folder / "config.yaml"
    begun = resumed or (written.is_file() and written.read_text(encoding="utf-8") == dump_yaml(config))
    if begun and any(folder.glob("checkpoint-*")):
        from aegpo.stopping import how_to_resume

        return f"stopped; to go on: {how_to_resume(folder)}"
    return "stopped before its first checkpoint; start it again" + " with --overwrite" * written.is_file()


def _sample(words: list[str]) -> None:
    parser = _Parser("sample", "Draw one image with the weights of a run.")
    parser.add_argument("RUN", type=_run_folder, help="the folder of a run")
    parser.add_argument("--prompt", type=_text, required=True, help="what to draw")
    parser.add_argument("--out", type=_text, required=True, help="the image file to write")
    parser.add_argument("--seed", type=_whole(0), default=0, help="of the noise (default: 0)")
    asked = parser.read(words)
    from aegpo.use import sample

    sample(asked.RUN, asked.prompt, Path(asked.out), asked.seed)
    print(asked.out)


def _evaluate(words: list[str]) -> None:
    about = (
        "Judge the weights of a run, on held-out prompts; with --rewards by several rewards, beside the base policy."
    )
    parser = _Parser("eval", about)
    parser.add_argument("RUN", type=_run_folder, help="the folder of a run")
    own = "a .txt, a .jsonl or a data set (default: the run's own)"
    parser.add_argument("--prompts", type=_text, metavar="FILE", help=own)
    judge = f"{REWARDS} (default: the run's own)"
    parser.add_argument("--reward", type=_reward, metavar="NAME", help=judge)
    several = "one or several such: the base's pictures and the run's, each drawn once, are judged by all and kept"
    parser.add_argument("--rewards", type=_names, metavar="NAME,NAME,...", help=several)
    parser.add_argument("--images", type=_whole(1), metavar="N", help="images for each prompt (default: the run's own)")
    where = "with --rewards, where to write eval.json and images (default: RUN/eval)"
    parser.add_argument("--out", type=_text, metavar="DIR", help=where)
    asked = parser.read(words)
    if asked.reward and asked.rewards:
        raise ValueError("eval: --reward judges by one, --rewards by several and beside the base; give one of them")
    if asked.out and not asked.rewards:
        raise ValueError("eval: --out says where --rewards writes; without it nothing is written")
    from aegpo.use import evaluate, evaluate_by_all

    if asked.rewards:
        evaluate_by_all(asked.RUN, asked.rewards, asked.prompts, asked.images, Path(asked.out) if asked.out else None)
        return
    for name, value in evaluate(asked.RUN, asked.prompts, asked.reward, asked.images).items():
        print(f"{name:<32} {value:.4f}")


def _report(words: list[str]) -> None:
    parser = _Parser("report", "Write the report of a run again, from what its folder holds.")
    parser.add_argument("RUN", type=_run_folder, help="the folder of a run")
    asked = parser.read(words)
    from aegpo.report import write_report

    print(write_report(asked.RUN))


def _export(words: list[str]) -> None:
    parser = _Parser("export", "Write the LoRA adapter of a run in the layout of another program.")
    parser.add_argument("RUN", type=_run_folder, help="the folder of a run")
    what = "the .safetensors file to write, for ComfyUI's models/loras"
    parser.add_argument("--comfyui", type=_safetensors, required=True, metavar="FILE", help=what)
    asked = parser.read(words)
    from aegpo.use import export

    export(asked.RUN, asked.comfyui)
    print(asked.comfyui)


def _push(words: list[str]) -> None:
    about = "Push a run to the Hub: weights, model card with its pictures, config.yaml, metrics.jsonl and env.json."
    parser = _Parser("push", about)
    parser.add_argument("RUN", type=_run_folder, help="the folder of a run")
    parser.add_argument("REPO", metavar="USER/NAME", help="the repository, which is made if there is none")
    parser.add_argument("--private", action="store_true", help="let nobody else see it")
    asked = parser.read(words)
    from aegpo.hub import check

    check(asked.REPO)
    _push_run(asked.RUN, asked.REPO, asked.private)


def _push_run(run: Path, repo: str, private: bool = False) -> None:
    from aegpo.hub import push

    print(f"pushed: {push(run, repo, private)}")


def _analyze(words: list[str]) -> None:
    about = "Check where attention entropy points, and where there is something to gain, on a run or before training. "
    about += "Settings such as --sampler.guidance 4.5 or --probe.rows 256 go over a run's own, or over the defaults."
    usage = "aegpo analyze MODEL [--prompts FILE] [--reward NAME] [--images N] [--out DIR] [--a.b VALUE ...]"
    parser = _Parser("analyze", about, usage=usage)
    parser.add_argument(
        "MODEL", type=_text, help="the folder of a run, a diffusers pipeline (folder, hub id), or world"
    )
    default = "default: the run's held-out prompts, or the world's; any other model needs it"
    parser.add_argument(
        "--prompts", type=_text, metavar="FILE", help=f"a .txt, a .jsonl, a data set, or world ({default})"
    )
    parser.add_argument("--reward", type=_reward, metavar="NAME", help=f"{REWARDS} (default: the run's own)")
    parser.add_argument("--images", type=_whole(1), metavar="N", default=4, help="images for each prompt (default: 4)")
    where = "where to write analysis.html and analysis.json (default: RUN/analysis, or runs/analysis)"
    parser.add_argument("--out", type=_text, metavar="DIR", help=where)
    for name in (setting_of(word) for word in words if word.startswith("--")):
        if name in ANALYZE_TAKES:
            raise ValueError(f"{name}: analyze takes it as {ANALYZE_TAKES[name]}")
    own, overrides = split(words, ANALYZE_OPTIONS)
    asked = parser.read(own)
    from aegpo.use import analyze

    out = Path(asked.out) if asked.out else None
    try:
        analyze(asked.MODEL, asked.prompts, asked.reward, asked.images, out, overrides)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; nothing was written") from None


def _reward_check(words: list[str]) -> None:
    about = "See whether a reward puts pairs of pictures in the right order; exit code 1 if it does not."
    parser = _Parser("reward-check", about)
    parser.add_argument("NAME", type=_reward, help=REWARDS)
    own = "lines of prompt, good and bad (image files), and any metadata (default: pairs that are drawn for the reward)"
    parser.add_argument("--pairs", type=_text, metavar="FILE.jsonl", help=own)
    asked = parser.read(words)
    from aegpo.config import reward_terms
    from aegpo.rewards import checked, load_one
    from aegpo.rewards.golden import drawn_pairs, judge_pairs, read_pairs

    for name, (_, settings) in reward_terms(asked.NAME).items():
        checked(name, **settings)
    pairs = read_pairs(Path(asked.pairs)) if asked.pairs else drawn_pairs(next(iter(reward_terms(asked.NAME))))
    reward = load_one(asked.NAME)
    scores = judge_pairs(reward, pairs)
    for pair, (good, bad) in zip(pairs, scores, strict=True):
        print(f"{'good' if good > bad else 'WRONG':<5}  {good:>10.4g}  {bad:>10.4g}  {pair.prompt}")
    wrong, count = sum(not good > bad for good, bad in scores), len(pairs)
    print(f"{reward.name}: {count - wrong} of {count} pairs in the right order")
    if wrong:
        say = f"reward-check: {reward.name} does not prefer the better picture in {wrong} of {count} pairs"
        sys.exit(_say(say, 1))


def _reward_server(words: list[str]) -> None:
    about = "Serve a reward over HTTP, for runs whose reward is remote=http://ADDRESS:PORT, on this machine or another."
    parser = _Parser("reward-server", about)
    parser.add_argument("NAME", type=_reward, help=REWARDS)
    parser.add_argument(
        "--host", type=_text, default="127.0.0.1", metavar="ADDRESS", help="to listen at (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--port", type=_whole(0), default=8123, metavar="N", help="to listen at; 0 is a free one (default: 8123)"
    )
    token = "that holds the token clients must know (default: the variable AEGPO_REWARD_TOKEN, if it is set)"
    parser.add_argument("--token-file", type=_text, metavar="FILE", help=token)
    batch = "images that are judged in one call, unless a single request has more (default: 64)"
    parser.add_argument("--batch", type=_whole(1), default=64, metavar="N", help=batch)
    wait = "milliseconds that a request waits for others to go with (default: 5)"
    parser.add_argument("--wait-ms", type=_whole(0), default=5, metavar="N", help=wait)
    limit = "MB that a request may have, as sent and once its pictures are decoded (default: 64)"
    parser.add_argument("--limit-mb", type=_whole(1), default=64, metavar="N", help=limit)
    time = "seconds that a request may take; its client then asks again (default: 60)"
    parser.add_argument("--timeout", type=_whole(1), default=60, metavar="SECONDS", help=time)
    asked = parser.read(words)
    try:
        from aegpo.rewards.server import serve
    except ModuleNotFoundError as error:
        raise ValueError(f"reward-server needs {error.name}; pip install 'aegpo[server]'") from None
    sizes = (asked.batch, asked.wait_ms, asked.limit_mb, asked.timeout)
    serve(asked.NAME, asked.host, asked.port, *sizes, asked.token_file)


def _world(words: list[str]) -> None:
    parser = _Parser("world", "Make the embedded model again, from nothing.", argument_default=argparse.SUPPRESS)
    parser.add_argument("pretrain", choices=["pretrain"])
    parser.add_argument("OUT", type=_text, help="the pipeline folder to write")
    parser.add_argument("--steps", type=_whole(1), metavar="N", help="updates of the transformer")
    parser.add_argument("--seed", type=_whole(0), metavar="N", help="of everything random")
    asked = vars(parser.read(words))
    from aegpo.world.pretrain import pretrain

    pretrain(Path(asked["OUT"]), **{name: asked[name] for name in ("steps", "seed") if name in asked})


# ---------------------------------------------------------------- what is printed


def _print_train_help(parser: "_Parser") -> None:
    """Print the page of train's own options, then tyro's page of all settings, from Config and its docstrings."""
    import tyro

    from aegpo.config import Config

    registry = tyro.constructors.ConstructorRegistry()

    @registry.primitive_rule
    def _list_in_one_word(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        write, is_list = (lambda value: [f"[{', '.join(map(str, value))}]"]), (lambda value: isinstance(value, tuple))
        spec = tyro.constructors.PrimitiveConstructorSpec(1, "'[A, B, ...]'", tuple, is_list, write)
        return spec if get_origin(info.type) is tuple else None

    @registry.primitive_rule
    def _name_or_weights(info: tyro.constructors.PrimitiveTypeInfo) -> Any:
        shown, is_name, write = (
            "NAME|'{NAME: WEIGHT, ...}'",
            (lambda value: isinstance(value, str)),
            (lambda value: [value]),
        )
        spec = tyro.constructors.PrimitiveConstructorSpec(1, shown, str, is_name, write)
        return spec if info.type == get_type_hints(Config)["reward"] else None

    parser.print_help()
    print()
    about = (
        "Settings, for RECIPE and the command line. Over these defaults go the algorithm's choices and the recipe's: "
    )
    about += "--dry-run shows what they come to."
    tyro.cli(
        Config,
        prog="aegpo train",
        description=about,
        args=["--help"],
        registry=registry,
        use_underscores=True,
        config=(tyro.conf.FlagConversionOff,),  # a switch takes a value here, as in a recipe
    )


# ---------------------------------------------------------------- arguments


class _Parser(argparse.ArgumentParser):
    """An argparse that complains by ValueError, and of a misspelt option before anything else."""

    def __init__(self, command: str, description: str, **options: Any) -> None:
        super().__init__(prog=f"aegpo {command}", description=description, allow_abbrev=False, **options)

    def read(self, words: list[str]) -> argparse.Namespace:
        options = [option for option in self._option_string_actions if option.startswith("--")]
        for option in (word.partition("=")[0] for word in words if word.startswith("--")):
            if option not in options:
                self.error(f"{option} is not an option{did_you_mean(option, options)}")
        return self.parse_args(words)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{self.prog.removeprefix('aegpo ')}: {message}")


def _text(word: str) -> str:
    if not word.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return word


def _safetensors(word: str) -> Path:
    if Path(word).suffix != ".safetensors":
        raise argparse.ArgumentTypeError(f"must be a file whose name ends in .safetensors, not {word!r}")
    return Path(word)


def _reward(word: str) -> str | dict[str, Any]:
    """A reward by its name, or by name and settings as a recipe has them."""
    return value_of(["reward"], _text(word))


def _names(word: str) -> list[str]:
    names = [name.strip() for name in re.split(r",(?!https?://)", word)]  # remote=URL,URL is one name
    if not all(names):
        raise argparse.ArgumentTypeError(f"must be names with commas between them, not {word!r}")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise argparse.ArgumentTypeError(f"{twice} stands twice; give each once")
    return names


def _whole(least: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not word.removeprefix("-").isdecimal() or int(word) < least:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {least}, not {word!r}")
        return int(word)

    return number


def _cluster(word: str) -> str:
    if word in ("local", "auto") or re.fullmatch(r"(ray://)?[^\s/:]+:[0-9]+", word):
        return word
    raise argparse.ArgumentTypeError(f"must be local, auto, HOST:PORT or ray://HOST:PORT, not {word!r}")


def _checkpoint(word: str) -> str:
    if word != "latest" and not (word and Path(word).is_dir()):
        missing = f"{word} is no folder; " if word else ""
        raise argparse.ArgumentTypeError(f"{missing}give 'latest' or a folder such as runs/latest/checkpoint-10")
    return word


def _run_folder(word: str) -> Path:
    if not (Path(word) / "config.yaml").is_file():
        hint = did_you_mean(word, [str(config.parent) for config in Path(word).parent.glob("*/config.yaml")])
        raise argparse.ArgumentTypeError(f"{word!r} is not the folder of a run: it holds no config.yaml{hint}")
    return Path(word)


if __name__ == "__main__":
    sys.exit(main())
