"""Writes the world's two prompt files; run once: `python -m aegpo.world.prompts`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from aegpo.world import scenes

TRAIN, HELD_OUT = 100, 24  # prompts a task


def prompt_sets(seed: int = 0) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Training and held-out prompts, disjoint in wording; in three tasks also in what they ask.

    Those are colors, position and color attribution. The others have 20 requests or fewer, and all are in both sets.
    Two objects in turned order ("a ring above a cross", "a cross below a ring") count as two requests.
    """
    rng = np.random.default_rng(seed)
    train: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    for task in scenes.TASKS:
        rows: dict[str, scenes.Request] = {}
        for _ in range(20_000):
            request = scenes.random_request(rng, task)
            rows.setdefault(scenes.write(request, rng), request)
        requests = sorted(set(rows.values()), key=repr)
        kept = (
            {requests[i] for i in rng.permutation(len(requests))[: len(requests) // 5]} if len(requests) > 20 else set()
        )
        pool = {p: r for p, r in rows.items() if r in kept} if kept else dict(list(rows.items())[: len(rows) // 4])
        rest = {p: r for p, r in rows.items() if p not in pool and r not in kept}
        for target, source, count in ((held, pool, HELD_OUT), (train, rest, TRAIN)):
            prompts = list(source)
            for i in rng.permutation(len(prompts))[:count]:
                request = source[prompts[i]]
                target.append(
                    {"prompt": prompts[i], "task": task, "objects": request.objects, "relation": request.relation}
                )
    return train, held


def main() -> None:
    """Write `prompts/train.jsonl` and `prompts/eval.jsonl` beside this file."""
    folder = Path(__file__).parent / "prompts"
    folder.mkdir(exist_ok=True)
    for name, rows in zip(("train", "eval"), prompt_sets(), strict=True):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


if __name__ == "__main__":
    main()
