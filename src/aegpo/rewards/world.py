"""The embedded world's verifier, which knows from the prompt what should be in the picture."""

from collections.abc import Sequence

import numpy as np

from aegpo import world
from aegpo.rewards import Metadata, Reward
from aegpo.types import Judgement


def load() -> Reward:
    """The reward: the share of what the prompt asks for that is there, in [0, 1]; it passes where all of it is."""

    def judge(images: np.ndarray, prompts: Sequence[str], metadata: Sequence[Metadata]) -> Judgement:
        return Judgement(*world.verify(images, prompts, metadata))

    return Reward("world", judge, (0.0, 1.0), read=world.requested)
